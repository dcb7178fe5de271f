"""The golden trajectories: what a tiny training of every quantizer on both backbones gives, step by step, is in golden.json.

A change that is not to change numbers must not change these. One that is to, writes them anew, and its commit says why:

    PYTHONPATH=tests python tests/test_golden.py
"""

import json
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from small import small_training
from test_methods import images, quantizers
from torch.utils.data import DataLoader

from gq_lightning.callbacks import TDC
from gq_lightning.evaluation.evaluate import evaluate

GOLDEN = Path(__file__).parent / "golden.json"
STEPS = 8
METRICS = ("psnr", "ssim", "lpips", "gaussian_psnr", "bits_min", "bits_mean", "bits_max", "share_within_alpha", "codebook_perplexity")


class Losses(pl.Callback):
    def __init__(self) -> None:
        self.values: list[float] = []

    def on_train_batch_end(self, trainer: pl.Trainer, *_: object) -> None:
        self.values.append(float(trainer.callback_metrics["loss"]))


def trajectory(method: str, backbone: str) -> dict[str, Any]:
    training = small_training(backbone, quantizers()[method], learning_rate=2e-3)
    tokenizer = training.tokenizer
    losses = Losses()
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    settings = {"accelerator": "cpu", "devices": 1, "max_steps": STEPS, "log_every_n_steps": 1, "limit_val_batches": 0, **quiet}
    trainer = pl.Trainer(callbacks=[*([TDC()] if method in ("gq", "tokenbridge_tdc") else []), losses], **settings)  # type: ignore[arg-type]
    loader = DataLoader(images(), batch_size=8)  # type: ignore[arg-type]
    trainer.fit(training, loader, loader)
    tokenizer.eval()
    values, _ = evaluate(tokenizer, [images()], rfid=False, progress=False)
    multipliers = {name.rpartition(".")[2]: float(value) for name, value in tokenizer.state_dict().items() if "lambda" in name}
    return {
        "losses": losses.values,
        "multipliers": multipliers,
        "tokens": tokenizer.encode(images()[:2]).flatten().tolist(),
        "metrics": {name: values[name] for name in METRICS if name in values},
    }


@pytest.mark.parametrize("backbone", ["vit", "unet"])
@pytest.mark.parametrize("method", quantizers())
def test_golden(method: str, backbone: str) -> None:
    found, golden = trajectory(method, backbone), json.loads(GOLDEN.read_text())[f"{backbone}-{method}"]
    # processors round differently, and eight steps carry that on
    assert found["losses"] == pytest.approx(golden["losses"], rel=1e-3)
    assert found["multipliers"] == pytest.approx(golden["multipliers"], rel=1e-6)
    assert found["metrics"] == pytest.approx(golden["metrics"], rel=1e-2)
    equal = sum(ours == theirs for ours, theirs in zip(found["tokens"], golden["tokens"], strict=True))
    assert equal >= 0.9 * len(golden["tokens"])


if __name__ == "__main__":
    torch.set_num_threads(1)
    every = {f"{backbone}-{method}": trajectory(method, backbone) for method in quantizers() for backbone in ("vit", "unet")}
    GOLDEN.write_text(json.dumps(every, indent=1) + "\n")
