"""A training resumed in mid-epoch with other batches or ranks shows each picture once; a rank with nothing to evaluate stops none."""

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from PIL import Image
from processes import on_ranks
from small import small_training
from torch import Tensor

from gq_lightning.callbacks import ExactResume
from gq_lightning.data import ImageFolder
from gq_lightning.errors import UserError

COUNT = 48
QUIET: dict[str, Any] = {
    "logger": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "enable_checkpointing": False,
    "log_every_n_steps": 1,
}


class Counting(pl.LightningModule):
    """Which pictures it was shown, by epoch: a picture is of the grey level of its number."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.shown: dict[int, list[int]] = defaultdict(list)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        self.shown[self.current_epoch] += ((batch[:, 0, 0, 0] + 1) * 127.5).round().int().tolist()
        return self.weight * batch.mean()

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        pass

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)


def train(
    root: Path, batch_size: int, steps: int, rank: int = 0, ranks: int = 1, resume: bool = True, **settings: Any
) -> dict[int, list[int]]:
    torch.manual_seed(7)
    data = ImageFolder(str(root / "train"), str(root / "val"), crop="center", image_size=8, batch_size=batch_size, workers=0)
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=ranks,
        strategy="auto" if ranks == 1 else "ddp",
        max_steps=steps,
        limit_val_batches=0,
        callbacks=[ExactResume()],
        default_root_dir=root,
        **QUIET,
        **settings,
    )
    model = Counting()
    trainer.fit(model, data, ckpt_path=root / "last.ckpt" if resume else None)
    trainer.save_checkpoint(root / "last.ckpt")
    (root / f"{rank}.json").write_text(json.dumps(model.shown))
    return dict(model.shown)


def go_on(root: Path, rank: int, ranks: int, batch_size: int, steps: int) -> None:
    train(root, batch_size, steps, rank, ranks)


def evaluate(root: Path, rank: int, ranks: int) -> None:
    data = ImageFolder(str(root / "train"), str(root / "val"), image_size=32, batch_size=2, workers=0, skip_broken=True)
    trainer = pl.Trainer(accelerator="cpu", devices=ranks, strategy="ddp", default_root_dir=root, **QUIET)
    try:
        said: Any = trainer.validate(small_training("vit"), data, verbose=False)[0]["val/images"]
    except UserError as error:
        said = str(error)
    (root / f"{rank}.json").write_text(json.dumps(said))


def in_two_ranks(root: Path, function: str, *arguments: object) -> list[Any]:
    on_ranks(__file__, function, root, 2, *arguments)
    return [json.loads((root / f"{rank}.json").read_text()) for rank in range(2)]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for split, count in (("train", COUNT), ("val", 4)):
        (tmp_path / split).mkdir()
        for index in range(count):
            pixels = np.full((8 + (split == "val"), 8, 3), index, dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / split / f"{index}.png")
    return tmp_path


def test_one_rank_then_two_then_one_of_other_batches(root: Path) -> None:
    first = train(root, 8, 2, resume=False)
    second = [shown["0"] for shown in in_two_ranks(root, "go_on", 4, 4)]
    third = train(root, 3, 4 + 5 + 16)
    assert [len(first[0]), *map(len, second), len(third[0]), len(third[1])] == [16, 8, 8, 15, 48]
    # one is left over at the end, as a part of a batch always is
    assert len({*first[0], *second[0], *second[1], *third[0]}) == 47
    assert set(third[1]) == set(range(COUNT)) and set(third) == {0, 1}


@pytest.mark.parametrize(
    ("batch", "of_this", "of_the_next"), [(8, 32, 48), (3, 30, 48), (20, 20, 40), (30, 30, 30), (40, 0, 40), (48, 0, 48)]
)
def test_other_batches(root: Path, batch: int, of_this: int, of_the_next: int) -> None:
    """Behind 16 pictures, also where what is left does not make a batch, and where no such batch is through."""
    steps = 2 + of_this // batch + of_the_next // batch
    first, rest = train(root, 8, 2, resume=False), train(root, batch, steps)
    assert (len(rest.get(0, [])), len(rest[1]), set(rest)) == (of_this, of_the_next, {0, 1} if of_this else {1})
    assert len({*first[0], *rest.get(0, [])}) == 16 + of_this
    assert len({*rest[1]}) == of_the_next


@pytest.mark.parametrize("batch", [5, 7, 48])
def test_other_batches_after_an_epoch(root: Path, batch: int) -> None:
    train(root, 20, 2, resume=False)
    shown = train(root, batch, 2 + 48 // batch)
    assert set(shown) == {1} and len({*shown[1]}) == len(shown[1]) == 48 // batch * batch


@pytest.mark.slow
@pytest.mark.parametrize("broken", [(1, 3), (0, 1, 2, 3)])
def test_a_rank_with_nothing_to_evaluate(root: Path, broken: tuple[int, ...]) -> None:
    for index in broken:
        (root / "val" / f"{index}.png").write_bytes(b"broken")
    told = in_two_ranks(root, "evaluate")
    if len(broken) == 2:
        assert told == [2, 2]
    else:
        assert told[0] == told[1] and told[0].startswith("none of the evaluation set's pictures can be read")
