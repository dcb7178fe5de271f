"""Posteriors whose divergence is the target by construction, against torch.distributions, a bisection and finite differences."""

import math

import pytest
import torch
from scipy.optimize import brentq
from small import small_tokenizer
from torch import Tensor
from torch.distributions import Normal, kl_divergence

from gq_lightning.quantizers import GaussianQuantizer
from gq_lightning.quantizers.exact import MEAN, SPREAD, exact_posterior


def drawn(mean_scale: float, spread: float, size: int, count: int = 500, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    mean, relative = (torch.randn(count, size, generator=generator, dtype=dtype) for _ in range(2))
    return mean_scale * mean, spread * relative


def bits(mean: Tensor, log_variance: Tensor) -> Tensor:
    posterior = Normal(mean.double(), (log_variance.double() / 2).exp())
    return kl_divergence(posterior, Normal(torch.zeros((), dtype=torch.float64), 1.0)).sum(dim=-1) / math.log(2)


@pytest.mark.parametrize("size", [1, 2, 4, 8, 16])
@pytest.mark.parametrize("target", [1.0, 10.0, 15.97, 18.0])
@pytest.mark.parametrize("mean_scale", [0.0, 0.1, 1.0, 100.0])
@pytest.mark.parametrize("spread", [0.0, 1.0, 100.0])
def test_every_divergence_is_the_target(size: int, target: float, mean_scale: float, spread: float) -> None:
    mean, log_variance = exact_posterior(*drawn(mean_scale, spread, size), target * math.log(2))
    assert mean.isfinite().all() and log_variance.isfinite().all()
    assert (bits(mean, log_variance) - target).abs().max() < 1e-3


def test_the_shift_is_the_smaller_root() -> None:
    """Where means and spread leave room they stay as they are, and one number is added to the log-variances: the one bisection finds."""
    target = 16 * math.log(2)
    given_mean, given = drawn(0.5, 0.5, 8, count=20, dtype=torch.float64)
    mean, log_variance = exact_posterior(given_mean, given, target)
    assert torch.equal(mean, given_mean)
    for m, r, found in zip(given_mean, given - given.mean(dim=-1, keepdim=True), log_variance, strict=True):

        def excess(shift: float, m: Tensor = m, r: Tensor = r) -> float:
            return float((m.square() + (r + shift).exp() - 1 - r - shift).sum() / 2) - target

        least = math.log(8 / float(r.exp().sum()))  # where the divergence is smallest; beyond it lies the branch of wide posteriors
        torch.testing.assert_close(found, r + brentq(excess, -60, least, xtol=1e-13), rtol=0, atol=1e-9)


def test_what_all_log_variances_share_has_no_effect() -> None:
    mean, relative = drawn(1.0, 1.0, 4, dtype=torch.float64)
    shifted = exact_posterior(mean, relative + 5, 11.0)
    for one, other in zip(exact_posterior(mean, relative, 11.0), shifted, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-9)


@pytest.mark.parametrize(("mean_scale", "spread"), [(0.5, 0.5), (5.0, 0.5), (0.5, 4.0), (5.0, 4.0)])
def test_gradients(mean_scale: float, spread: float) -> None:
    """Also of means and spreads that had to be scaled."""
    given = tuple(part.requires_grad_() for part in drawn(mean_scale, spread, 4, count=5, dtype=torch.float64))
    assert torch.autograd.gradcheck(lambda mean, relative: exact_posterior(mean, relative, 11.0), given)


def test_means_and_spreads_that_leave_no_room_are_scaled() -> None:
    target = 16 * math.log(2)
    mean, log_variance = exact_posterior(*drawn(100.0, 100.0, 16), target)
    relative = log_variance - log_variance.mean(dim=-1, keepdim=True)
    spread = 8 * (relative.exp().mean(dim=-1)).log()
    assert (spread <= SPREAD * target * 1.001).all()
    energy = mean.square().sum(dim=-1) / 2
    torch.testing.assert_close(energy, MEAN * (target - spread), rtol=1e-3, atol=1e-3)
    directions = torch.nn.functional.cosine_similarity(mean, drawn(100.0, 100.0, 16)[0], dim=-1)
    torch.testing.assert_close(directions, torch.ones_like(directions))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", ["contiguous", "strided"])
def test_the_quantizer(layout: str, dtype: torch.dtype) -> None:
    quantizer = GaussianQuantizer(32, latent_channels=16, exact_divergence=True, layout=layout)  # type: ignore[arg-type]
    features = (3 * torch.randn(4, 5, 5, 32, generator=torch.Generator().manual_seed(0))).to(dtype)
    result = quantizer(features)
    assert result.penalty == 0
    assert (result.posterior.bits - 16).abs().max() < 1e-3
    posterior = quantizer.posterior(features)
    mean, log_variance = posterior.mean, posterior.log_variance
    assert mean.dtype == log_variance.dtype == torch.float32
    assert (bits(quantizer.group(mean), quantizer.group(log_variance)) - 16).abs().max() < 1e-3
    tokens = quantizer.tokenize(features)
    assert quantizer.detokenize(tokens).shape == mean.shape


def test_gradients_reach_the_encoder_under_autocast() -> None:
    tokenizer = small_tokenizer("vit", GaussianQuantizer(16, latent_channels=8, exact_divergence=True))
    images = torch.rand(2, 3, 32, 32) * 2 - 1
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = tokenizer.quantizer(tokenizer.backbone.encode(images).movedim(1, -1))
        loss = tokenizer.backbone.decode(result.latents.movedim(-1, 1)).square().mean()
    loss.backward()
    assert (result.posterior.bits - 16).abs().max() < 1e-3
    gradients = [parameter.grad for parameter in tokenizer.backbone.encoder.parameters()]
    assert all(gradient is not None and gradient.isfinite().all() for gradient in gradients)
    assert any(gradient.abs().max() > 0 for gradient in gradients)  # type: ignore[union-attr]
