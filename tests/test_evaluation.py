import io
import json
import math
from pathlib import Path

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from rich.console import Console
from small import small_tokenizer, small_training
from torch.utils.data import DataLoader

from gq_lightning import ImageTokenizer, UserError
from gq_lightning.data import BrokenImage, PictureSet
from gq_lightning.evaluation.evaluate import draw, evaluate, some_images, write_metrics
from gq_lightning.evaluation.report import metrics_table
from gq_lightning.metrics.codebook import collapse
from gq_lightning.quantizers import FiniteScalarQuantizer
from gq_lightning.tokenizer.module import Reconstruction


def batches() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.rand(count, 3, 32, 32, generator=generator) * 2 - 1 for count in (3, 2)]


def test_it_measures_what_a_receiver_of_the_tokens_sees(tokenizer: ImageTokenizer) -> None:
    values, protocol = evaluate(tokenizer, batches(), rfid=False, progress=False)
    images = torch.cat(batches())
    error = (tokenizer.decode(tokenizer.encode(images)) - images).double().square().mean((1, 2, 3)) / 4
    assert values["psnr"] == pytest.approx((-10 * error.log10()).mean().item(), abs=1e-3)
    assert values["images"] == 5
    assert values["tokens"] == 5 * 16 * 2
    assert values["bits_per_pixel"] == 0.25
    assert values["bits_mean"] > 0
    assert "rfid" not in values
    assert "psnr" in protocol


def test_evaluation_leaves_mode_and_multipliers_alone() -> None:
    tokenizer = small_tokenizer("vit").train()
    before = {name: value.clone() for name, value in tokenizer.state_dict().items()}
    evaluate(tokenizer, batches(), rfid=False, progress=False)
    assert tokenizer.training
    assert all(torch.equal(value, before[name]) for name, value in tokenizer.state_dict().items())


def test_nothing_to_evaluate() -> None:
    with pytest.raises(UserError, match="no image"):
        evaluate(small_tokenizer("vit"), [], rfid=False, progress=False)


def test_metrics_file(tmp_path: Path) -> None:
    write_metrics(tmp_path / "deep/metrics.json", {"psnr": 1.5}, {"psnr": "how"}, {"split": "val"}, steps=3)
    content = json.loads((tmp_path / "deep/metrics.json").read_text())
    assert content["psnr"] == 1.5
    assert content["steps"] == 3
    assert content["protocol"] == {"psnr": "how", "data": {"split": "val"}}
    assert content["machine"]["processors"] >= 1
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["metrics.json"]


def test_picture_has_a_row_for_each(tokenizer: ImageTokenizer) -> None:
    images = torch.full((2, 3, 32, 32), -1.0)
    grey = torch.zeros_like(images)
    pixels = np.asarray(draw(images, Reconstruction(torch.zeros(2, 4, 4, 2), -images, grey, None), scale=1))
    heights = [pixels[4 + 16 + row * 36, 96 + 16].tolist() for row in range(3)]
    assert heights == [[0, 0, 0], [128, 128, 128], [255, 255, 255]]
    two = draw(images, Reconstruction(torch.zeros(2, 4, 4, 2), -images, None, None), scale=1)
    assert two.size[1] == pixels.shape[0] - 36


class Numbers(PictureSet):
    def __len__(self) -> int:
        return 10

    def __getitem__(self, index: int) -> torch.Tensor:
        if index == 9:
            raise BrokenImage("nine is broken")
        return torch.full((3, 8, 8), float(index))

    def name(self, index: int) -> str:
        return str(index)

    def size(self, index: int) -> int:
        return 1


def test_some_images_are_spread_evenly() -> None:
    assert some_images(Numbers(), 4)[:, 0, 0, 0].tolist() == [0, 3, 6]
    assert len(some_images(Numbers(), 100)) == 9


def test_table_shows_what_was_measured() -> None:
    stream = io.StringIO()
    Console(file=stream, width=100).print(metrics_table({"psnr": 26.123, "gaussian_psnr": math.pi, "bits_mean": 16.0}, "title"))
    text = stream.getvalue()
    assert "26.12" in text
    assert "3.14" in text
    assert "16.00" in text
    assert "SSIM" not in text


def test_a_collapsed_codebook_warns() -> None:
    assert collapse({"codebook_usage": 1 / 65536, "codebook_usage_expected": 0.068}) is not None
    assert collapse({"codebook_usage": 0.0099, "codebook_usage_expected": 0.9}) is not None
    assert collapse({"codebook_usage": 0.0101, "codebook_usage_expected": 0.9}) is None
    assert collapse({"codebook_usage": 0.001, "codebook_usage_expected": 0.002}) is None, "few tokens cannot use many codewords"
    training = small_training("vit", FiniteScalarQuantizer(16))
    trainer = pl.Trainer(accelerator="cpu", devices=1, logger=False, enable_progress_bar=False, enable_model_summary=False)
    training.tokenizer.backbone.encoder.linear_out.weight.data.zero_()  # type: ignore[union-attr, operator]
    with pytest.warns(UserWarning, match="the codebook has collapsed: the tokens use 0.002%"):
        trainer.validate(training, DataLoader(torch.rand(64, 3, 32, 32), batch_size=32), verbose=False)  # type: ignore[arg-type]
