"""Two ranks (gloo) that share a global batch train what one process trains with it: every method, twenty steps in float32.

Ranks see the pictures and crops of the one process by themselves, see `data.order`. Random numbers of a training step are drawn apart on
purpose; here, and only here, all draw those of the global batch and take the rows of their own pictures.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from PIL import Image
from processes import on_ranks
from small import small_training
from torch import Tensor

from gq_lightning.callbacks import TDC, BrokenPictures, ExactResume
from gq_lightning.data import ImageFolder
from gq_lightning.data.order import derived_seed
from gq_lightning.distributed import is_distributed
from gq_lightning.losses.adversary import Adversary
from gq_lightning.losses.discriminator import PatchDiscriminator
from gq_lightning.quantizers import BinarySphericalQuantizer, GaussianQuantizer, LookupFreeQuantizer, Quantizer, VectorQuantizer, vq

STEPS, GLOBAL_BATCH, RANKS = 20, 4, 2
BROKEN = (11, 3, 7)  # in the order of their names
VQ: dict[str, Any] = {"bits_per_position": 10, "codebook_size": 32, "group_size": 4}
MULTIPLIERS = ("lambda_min", "lambda_mean", "lambda_max")


def gaussian() -> Quantizer:
    """Thresholds among the divergences of the first steps: one rank's smallest and largest alone would decide otherwise."""
    return GaussianQuantizer(4, latent_channels=4, codebook_size=4, tdc_alpha=1.88, tdc_beta=1.1)


# quantizer, whether there is a discriminator, batches that make a step; an epoch's last step has one batch
SETTINGS: dict[str, tuple[Callable[[], Quantizer], bool, int]] = {
    "gq": (gaussian, False, 1),
    "gq and adversary": (gaussian, True, 1),
    "gq and adversary, accumulated": (gaussian, True, 2),
    "vq": (lambda: VectorQuantizer(**VQ, dead_code_threshold=0.9), False, 1),
    "vq ema": (lambda: VectorQuantizer(**VQ, ema_decay=0.9, kmeans_init=True, dead_code_threshold=0.3), False, 1),
    "lfq": (lambda: LookupFreeQuantizer(16, temperature=1.0, entropy_weight=10.0, penalty_reduction="image_sum"), False, 1),
    "bsq": (lambda: BinarySphericalQuantizer(16, temperature=1.0, entropy_weight=2000.0), False, 1),
}


class SharedSeed(pl.Callback):
    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int) -> None:
        torch.manual_seed(derived_seed(trainer.datamodule.seed, trainer.current_epoch, batch_idx))  # type: ignore[attr-defined]


class History(pl.Callback):
    """The multipliers after each step, before DistributedDataParallel makes the buffers of all ranks those of the first."""

    def __init__(self) -> None:
        self.multipliers: list[Tensor] = []

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.multipliers.append(torch.stack([getattr(pl_module.tokenizer.quantizer.tdc, name) for name in MULTIPLIERS]))  # type: ignore[union-attr]


def noise(like: Tensor, rank: int, ranks: int) -> Tensor:
    return torch.randn(len(like) * ranks, *like.shape[1:])[rank::ranks]


def gather_in_order(vectors: Tensor) -> Tensor:
    """The vectors of all ranks, in the order in which one process has their pictures."""
    if not is_distributed():
        return vectors
    images = [part.unflatten(0, (GLOBAL_BATCH // RANKS, -1)) for part in GATHER(vectors).chunk(RANKS)]
    return torch.stack(images, dim=1).flatten(0, 2)


GATHER = vq.rows_of_all_ranks


def train(name: str, pictures: Path, rank: int = 0, ranks: int = 1) -> dict[str, Any]:
    make, judged, accumulate = SETTINGS[name]
    torch.manual_seed(1)
    quantizer = make()
    adversary = Adversary(PatchDiscriminator(8, layers=2), start=4, warmup=3, learning_rate=2e-5)
    extra: dict[str, Any] = {"adversary": adversary} if judged else {}
    training = small_training("vit", quantizer, learning_rate=1e-3, accumulate=accumulate, **extra)
    torch.manual_seed(5)
    data = ImageFolder(
        str(pictures / "train"),
        str(pictures / "val"),
        scale=(0.3, 1),
        image_size=32,
        batch_size=GLOBAL_BATCH // ranks,
        evaluation_batch_size=2,
        workers=0,
    )
    history = History()
    quiet: dict[str, Any] = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=ranks,
        strategy="auto" if ranks == 1 else "ddp",
        max_steps=STEPS,
        val_check_interval=STEPS,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        callbacks=[ExactResume(), SharedSeed(), BrokenPictures(), *([TDC(), history] if isinstance(quantizer, GaussianQuantizer) else [])],
        default_root_dir=pictures / str(ranks),
        **quiet,
    )
    with patch("torch.randn_like", lambda like: noise(like, rank, ranks)), patch.object(vq, "rows_of_all_ranks", gather_in_order):
        before = dict(trainer.validate(training, data, verbose=False)[0])
        trainer.fit(training, data)
    after = {key: float(value) for key, value in trainer.callback_metrics.items() if key.startswith("val/")}
    return {"state": training.state_dict(), "before": before, "after": after, "multipliers": history.multipliers}


def train_all(folder: Path, rank: int, ranks: int) -> None:
    torch.save({name: train(name, folder, rank, ranks) for name in SETTINGS}, folder / (f"{rank}.pt" if ranks > 1 else "alone.pt"))


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Of the one process, and of each rank: by setting, the final state and the metrics before and after training."""
    folder = tmp_path_factory.mktemp("ranks")
    # an epoch leaves out two pictures; one rank evaluates three pictures in two batches, the other two in one
    for split, count in (("train", 22), ("val", 5)):
        (folder / split).mkdir()
        for index in range(count):
            pixels = np.random.default_rng(index + 100 * (split == "val")).integers(0, 255, (5, 6, 3), dtype=np.uint8)
            Image.fromarray(pixels).resize((48, 40), Image.Resampling.BICUBIC).save(folder / split / f"{index}.png")
    for index in BROKEN:
        (folder / "train" / f"{index}.png").write_bytes(b"no picture")
    for count in (1, RANKS):
        (folder / str(count)).mkdir()
    # the one process too is a process of its own: what other tests leave behind in this one is none of its matters
    for count in (1, RANKS):
        on_ranks(__file__, "train_all", folder, count)
    for count in (1, RANKS):
        report = (folder / str(count) / "broken_pictures.txt").read_text()
        assert report == "".join(f"training folder: {index}.png\n" for index in BROKEN)
    return [torch.load(folder / name, weights_only=True) for name in ("alone.pt", *(f"{rank}.pt" for rank in range(RANKS)))]


@pytest.mark.parametrize("name", SETTINGS)
def test_ranks_are_equal_to_the_bit(name: str, results: list[dict[str, Any]]) -> None:
    _, first, second = (result[name] for result in results)
    assert first["before"] == second["before"] and first["after"] == second["after"]
    for key, value in first["state"].items():
        assert torch.equal(value, second["state"][key]), key


@pytest.mark.parametrize("name", ["gq", "gq and adversary"])
def test_multipliers_are_those_of_one_process_at_every_step(name: str, results: list[dict[str, Any]]) -> None:
    alone, *ranks = (torch.stack(result[name]["multipliers"]) for result in results)
    assert alone.shape == (STEPS, 3)
    # each goes up and down
    steps = torch.cat([torch.ones(1, 3), alone]).diff(dim=0)
    assert (steps > 0).any(dim=0).all() and (steps < 0).any(dim=0).all()
    for rank in ranks:
        assert torch.equal(rank, alone)


@pytest.mark.parametrize("name", SETTINGS)
def test_ranks_train_what_one_process_trains(name: str, results: list[dict[str, Any]]) -> None:
    alone, rank = results[0][name]["state"], results[1][name]["state"]
    assert alone.keys() == rank.keys()
    for state in (alone, rank):
        for key in (key for key in state if key.endswith("attn.qkv.bias")):
            # softmax does not feel the bias of the keys: its gradient is rounding alone, of which Adam makes whole steps
            state[key] = torch.cat(state[key].chunk(3)[::2])
    # likewise the last bias of the discriminator: as long as the hinge is active everywhere, real and reconstructed logits pull equally
    last = "adversary.discriminator.network.8.bias"
    for key, value in alone.items():
        if key == last:
            assert (rank[key] - value).abs() <= 2e-5 * STEPS
            continue
        torch.testing.assert_close(rank[key], value, rtol=1e-6, atol=1e-5, msg=lambda text, key=key: f"{key}: {text}")


@pytest.mark.parametrize("name", SETTINGS)
def test_every_picture_is_measured_once(name: str, results: list[dict[str, Any]]) -> None:
    alone, rank = results[0][name], results[1][name]
    assert alone["before"]["val/images"] == 5
    for when in ("before", "after"):
        assert rank[when] == pytest.approx(alone[when], rel=1e-6, abs=1e-6)
