"""Every method on both backbones, from training to the folder that a user loads."""

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from small import small_tokenizer, small_training
from torch.utils.data import DataLoader

from gq_lightning import ImageTokenizer
from gq_lightning.callbacks import TDC
from gq_lightning.callbacks.gaussian_quant import convert
from gq_lightning.quantizers import (
    BinarySphericalQuantizer,
    FiniteScalarQuantizer,
    GaussianQuantizer,
    LookupFreeQuantizer,
    Quantizer,
    TokenBridge,
    VectorQuantizer,
)

STEPS = 40


def quantizers() -> dict[str, Quantizer]:
    torch.manual_seed(0)
    return {
        "gq": GaussianQuantizer(16, latent_channels=4, codebook_size=256),
        "gq_exact": GaussianQuantizer(16, latent_channels=4, codebook_size=256, exact_divergence=True),
        "gaussian": GaussianQuantizer(16, latent_channels=4, codebook_size=256, penalty_weight=0.01),
        "tokenbridge": TokenBridge(16, latent_channels=4),
        "tokenbridge_tdc": TokenBridge(16, latent_channels=4),
        "vq": VectorQuantizer(16, codebook_size=256, group_size=4),
        "vq_ema": VectorQuantizer(16, codebook_size=256, group_size=4, ema_decay=0.9, kmeans_init=True, dead_code_threshold=0.01),
        "fsq": FiniteScalarQuantizer(16),
        "lfq": LookupFreeQuantizer(16),
        "bsq": BinarySphericalQuantizer(16),
    }


def images() -> torch.Tensor:
    """Eight smooth pictures: ramps of two colours in random directions."""
    generator = torch.Generator().manual_seed(0)
    colours = torch.rand(8, 2, 3, 1, 1, generator=generator) * 2 - 1
    angle = torch.rand(8, 1, 1, 1, generator=generator) * 6.28
    y, x = torch.meshgrid(torch.linspace(-1, 1, 32), torch.linspace(-1, 1, 32), indexing="ij")
    ramp = (x * angle.cos() + y * angle.sin() + 1.5) / 3
    return colours[:, 0] * ramp + colours[:, 1] * (1 - ramp)


class Losses(pl.Callback):
    def __init__(self) -> None:
        self.values: list[float] = []

    def on_train_batch_end(self, trainer: pl.Trainer, *_: object) -> None:
        self.values.append(float(trainer.callback_metrics["loss/reconstruction"]))


def pairs(*quick: tuple[str, str]) -> list[Any]:
    """Every method on both backbones, of which all but these take too long together for the quick tests."""
    every = [(method, backbone) for backbone in ("vit", "unet") for method in quantizers()]
    return [pytest.param(*pair, marks=() if pair in quick else pytest.mark.slow) for pair in every]


# what the others do in a few steps is in the golden trajectories
@pytest.mark.parametrize(("method", "backbone"), pairs(("gq", "unet"), ("vq", "unet"), *((method, "vit") for method in quantizers())))
def test_it_trains_and_its_tokens_survive(method: str, backbone: str, tmp_path: Path) -> None:
    training = small_training(backbone, quantizers()[method], learning_rate=2e-3)
    tokenizer = training.tokenizer
    losses = Losses()
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    tdc = [TDC()] if method in ("gq", "tokenbridge_tdc") else []
    trainer = pl.Trainer(
        accelerator="cpu", devices=1, max_steps=STEPS, log_every_n_steps=1, callbacks=[*tdc, losses], limit_val_batches=0, **quiet
    )
    loader = DataLoader(images(), batch_size=8)  # type: ignore[arg-type]
    trainer.fit(training, loader, loader)
    assert len(losses.values) == STEPS
    first, last = sum(losses.values[:5]) / 5, sum(losses.values[-5:]) / 5
    assert last < 0.5 * first, f"from {first:.0f} to {last:.0f}"
    moved = [float(value) != 1 for name, value in tokenizer.named_buffers() if "lambda_" in name]
    assert moved == [True] * 3 if tdc else not any(moved)

    convert(tokenizer)
    tokens = tokenizer.encode(images())
    result = tokenizer.reconstruct(images())
    assert torch.equal(result.tokens, tokens)
    assert torch.equal(result.images, tokenizer.decode(tokens)), "evaluation decodes tokens alone"
    assert (result.gaussian is not None) == method.startswith(("gq", "gaussian", "tokenbridge"))
    tokenizer.save_pretrained(tmp_path)
    again = ImageTokenizer.from_pretrained(tmp_path)
    assert again.fingerprint == tokenizer.fingerprint
    assert torch.equal(again.encode(images()), tokens)
    assert torch.equal(again.decode(tokens), tokenizer.decode(tokens))


@pytest.mark.parametrize(("method", "backbone"), pairs(("gq", "vit")))
def test_compiled_it_gives_the_same_tokens(method: str, backbone: str) -> None:
    """Traced by dynamo, executed without a compiler: what `torch.compile` may change are graphs, not tokens."""
    torch.compiler.reset()
    tokenizer = small_tokenizer(backbone, quantizers()[method]).eval()
    tokens = tokenizer.encode(images())
    compiled = torch.compile(tokenizer.encode, backend="aot_eager")(images())
    assert torch.equal(compiled, tokens)
    torch.testing.assert_close(torch.compile(tokenizer.decode, backend="aot_eager")(tokens), tokenizer.decode(tokens))


@pytest.mark.slow
@pytest.mark.parametrize("method", quantizers())
def test_compiled_by_inductor(method: str) -> None:
    torch.compiler.reset()
    tokenizer = small_tokenizer("vit", quantizers()[method]).eval()
    tokens = tokenizer.encode(images())
    compiled = torch.compile(tokenizer.encode)(images())
    # another order of additions may decide between two codewords that fit equally well
    assert (compiled != tokens).float().mean() <= 1e-3
    torch.testing.assert_close(torch.compile(tokenizer.decode)(tokens), tokenizer.decode(tokens), rtol=1e-4, atol=1e-4)
