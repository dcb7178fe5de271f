"""The baselines as published, each with its default arguments: penalties and gradients against a few lines of plain torch."""

import inspect
import itertools
import math

import pytest
import torch
import torch.nn.functional as F
import yaml
from small import CONFIGS

from gq_lightning import UserError, quantizers
from gq_lightning.quantizers import BinarySphericalQuantizer, LookupFreeQuantizer, Quantizer, VectorQuantizer

# 5 x 3 positions an image
SHAPE = (6, 5, 3)
POSITIONS = 15


def features(channels: int, scale: float = 1.0, seed: int = 0) -> torch.Tensor:
    return (torch.randn(*SHAPE, channels, generator=torch.Generator().manual_seed(seed)) * scale).requires_grad_()


def entropy(p: torch.Tensor) -> torch.Tensor:
    return -(p * p.clamp(min=1e-30).log()).sum(-1)


def two_vectors_a_position(**arguments: object) -> VectorQuantizer:
    quantizer = VectorQuantizer(10, codebook_size=32, group_size=4, **arguments)  # type: ignore[arg-type]
    quantizer.codebook.data.normal_(generator=torch.Generator().manual_seed(1))
    return quantizer


def vq_losses(x: torch.Tensor, codebook: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The means of the commitment and of the codebook's loss."""
    vectors = x.reshape(-1, 4)
    codewords = codebook[torch.cdist(vectors, codebook).argmin(dim=1)]
    return F.mse_loss(vectors, codewords.detach()), F.mse_loss(codewords, vectors.detach())


def test_vq() -> None:
    """VQGAN's legacy order: 1 for the commitment, 0.25 for the codebook."""
    quantizer, x, codebook = two_vectors_a_position(), features(8), two_vectors_a_position().codebook
    commitment, learning = vq_losses(x, codebook)
    wanted = torch.autograd.grad(commitment + 0.25 * learning, (x, codebook))
    found = quantizer(x)
    torch.testing.assert_close(found.penalty, commitment + 0.25 * learning)
    for gradient, expected in zip(torch.autograd.grad(found.penalty, (x, quantizer.codebook), retain_graph=True), wanted, strict=True):
        torch.testing.assert_close(gradient, expected)
    weights = features(8, seed=2)
    torch.testing.assert_close(torch.autograd.grad(found.latents, x, weights)[0], weights)


@pytest.mark.parametrize("ema_decay", [None, 0.99])
def test_vq_starts_near_zero(ema_decay: float | None) -> None:
    torch.manual_seed(0)
    codebook = VectorQuantizer(12, codebook_size=4096, ema_decay=ema_decay).codebook.detach() * 4096
    assert codebook.abs().max() <= 1
    assert codebook.std().item() == pytest.approx(1 / math.sqrt(3), rel=0.01)
    normal = VectorQuantizer(12, codebook_size=4096, ema_decay=ema_decay, codebook_start="normal")
    assert normal.codebook.std().item() == pytest.approx(1, rel=0.02)


def lfq_losses(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Commitment and entropies of tokens of 8 bits at temperature 0.01, by the softmax over all 256 codes."""
    codes = torch.tensor(list(itertools.product([-1.0, 1.0], repeat=8)), dtype=x.dtype)
    tokens = x.reshape(-1, 2, 8)
    p = (-(tokens[..., None, :] - codes).square().sum(-1) / 0.01).softmax(-1)
    commitment = F.mse_loss(tokens, torch.where(tokens >= 0, 1.0, -1.0).to(x.dtype))
    return commitment, entropy(p).mean() - entropy(p.mean(dim=0)).mean()


def test_lfq() -> None:
    quantizer, x = LookupFreeQuantizer(16), features(16, scale=0.01)
    exact = x.detach().double().requires_grad_()
    commitment, entropies = lfq_losses(exact)
    assert entropies < -0.1
    wanted = 0.025 * commitment + 0.1 * entropies
    found = quantizer(x)
    torch.testing.assert_close(found.penalty.double(), wanted, rtol=1e-4, atol=1e-6)
    gradient, expected = torch.autograd.grad(found.penalty, x, retain_graph=True)[0], torch.autograd.grad(wanted, exact)[0]
    torch.testing.assert_close(gradient.double(), expected, rtol=1e-3, atol=1e-6)
    weights = features(16, seed=2)
    torch.testing.assert_close(torch.autograd.grad(found.latents, x, weights)[0], weights)


def bsq_entropies(x: torch.Tensor) -> torch.Tensor:
    """Of each bit's two probabilities at temperature 0.01, averaged over positions and bits."""
    bits = x.shape[-1]
    p = torch.sigmoid(4 * F.normalize(x, dim=-1) / math.sqrt(bits) / 0.01)
    p = torch.stack([p, 1 - p], dim=-1).reshape(-1, bits, 2)
    return entropy(p).mean() - entropy(p.mean(dim=0)).mean()


@pytest.mark.parametrize("bits", [16, 64])
def test_bsq(bits: int) -> None:
    quantizer, x = BinarySphericalQuantizer(bits), features(bits)
    exact = x.detach().double().requires_grad_()
    wanted = 0.1 * bsq_entropies(exact)
    assert wanted < -0.01
    found = quantizer(x)
    torch.testing.assert_close(found.penalty.double(), wanted, rtol=1e-4, atol=1e-6)
    gradient, expected = torch.autograd.grad(found.penalty, x, retain_graph=True)[0], torch.autograd.grad(wanted, exact)[0]
    torch.testing.assert_close(gradient.double(), expected, rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize("bits", [16, 64])
def test_bsqs_gradient_passes_before_the_scale(bits: int) -> None:
    x, weights = features(bits), features(bits, seed=2)
    found = BinarySphericalQuantizer(bits)(x).latents
    torch.testing.assert_close(found, x.sign() / math.sqrt(bits))
    gradient = torch.autograd.grad(found, x, weights)[0]
    # what a gradient that passes after the scale would be
    behind = torch.autograd.grad(F.normalize(x, dim=-1), x, weights)[0]
    torch.testing.assert_close(gradient * math.sqrt(bits), behind)


def test_bits_that_are_stuck_are_no_diversity() -> None:
    """Pooled, as the published code has them, their penalty would be 0.1 * -ln 2."""
    stuck = torch.tensor([1.0, -1.0]).repeat(8).expand(*SHAPE, 16)
    assert BinarySphericalQuantizer(16)(stuck).penalty.item() == pytest.approx(0, abs=1e-4)
    used = stuck * torch.tensor([1.0, -1.0]).repeat(3)[:, None, None, None]
    assert BinarySphericalQuantizer(16)(used).penalty.item() == pytest.approx(-0.1 * math.log(2), abs=1e-4)


def test_sums_over_an_image() -> None:
    """The other reduction is the mean times the elements of an image."""
    x, codebook = features(8), two_vectors_a_position().codebook
    commitment, learning = vq_losses(x, codebook)
    penalty = two_vectors_a_position(penalty_reduction="image_sum", commitment=0.3, codebook_weight=0.7)(x).penalty
    torch.testing.assert_close(penalty, POSITIONS * 8 * (0.3 * commitment + 0.7 * learning))
    near = features(16, scale=0.01)
    commitment, entropies = lfq_losses(near)
    penalty = LookupFreeQuantizer(16, penalty_reduction="image_sum")(near).penalty
    torch.testing.assert_close(penalty, POSITIONS * (16 * 0.025 * commitment + 2 * 0.1 * entropies), rtol=1e-4, atol=1e-4)
    bits = features(32)
    penalty = BinarySphericalQuantizer(32, penalty_reduction="image_sum")(bits).penalty
    torch.testing.assert_close(penalty, POSITIONS * 32 * 0.1 * bsq_entropies(bits), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", [VectorQuantizer, LookupFreeQuantizer, BinarySphericalQuantizer])
def test_unknown_reductions(kind: type[Quantizer]) -> None:
    with pytest.raises(UserError, match="penalty_reduction: 'mean': give 'element_mean' or 'image_sum'"):
        kind(penalty_reduction="mean")


@pytest.mark.parametrize("name", ["vq", "lfq", "bsq", "fsq"])
def test_the_configs_spell_the_defaults_out(name: str) -> None:
    described = yaml.safe_load((CONFIGS / f"quantizer/{name}.yaml").read_text())["model"]["quantizer"]
    kind = getattr(quantizers, described["class_path"].rsplit(".", 1)[1])
    defaults = {key: parameter.default for key, parameter in inspect.signature(kind).parameters.items()}
    defaults = {key: list(value) if isinstance(value, tuple) else value for key, value in defaults.items()}
    assert described["init_args"] == defaults
