"""What every quantizer owes its users, whatever the method: the contract of quantizers/base.py."""

import math
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.distributions import Normal, kl_divergence

from gq_lightning import UserError
from gq_lightning.construction import build, describe
from gq_lightning.quantizers import (
    BinarySphericalQuantizer,
    FiniteScalarQuantizer,
    GaussianQuantizer,
    LookupFreeQuantizer,
    Quantizer,
    TokenBridge,
    VectorQuantizer,
)
from gq_lightning.quantizers.base import INTEGERS, PosteriorQuantizer

# constructor, arguments, tokens of one position at 16, 32 and 64 bits, codebook size at the same rates
METHODS: dict[str, tuple[type[Quantizer], dict[str, Any], tuple[int, int, int], tuple[int, int, int]]] = {
    "gq": (GaussianQuantizer, {}, (1, 2, 4), (65536,) * 3),
    "gq-strided": (GaussianQuantizer, {"layout": "strided", "codebook": "sobol"}, (1, 2, 4), (65536,) * 3),
    "gq-k256": (GaussianQuantizer, {"codebook_size": 256}, (2, 4, 8), (256,) * 3),
    "gq-exact": (GaussianQuantizer, {"exact_divergence": True}, (1, 2, 4), (65536,) * 3),
    "tokenbridge": (TokenBridge, {}, (16, 16, 16), (2, 4, 16)),
    "vq": (VectorQuantizer, {}, (1, 2, 4), (65536,) * 3),
    "vq-ema": (VectorQuantizer, {"codebook_size": 256, "ema_decay": 0.9, "dead_code_threshold": 0.01}, (2, 4, 8), (256,) * 3),
    "fsq": (FiniteScalarQuantizer, {}, (1, 2, 4), (65536,) * 3),
    "fsq-tuned": (FiniteScalarQuantizer, {"levels": [4] * 8}, (1, 2, 4), (65536,) * 3),
    "fsq-paper": (FiniteScalarQuantizer, {"levels": [8, 8, 8, 5, 5, 5]}, (1, 2, 4), (64000,) * 3),
    "lfq": (LookupFreeQuantizer, {}, (2, 4, 8), (256,) * 3),
    "bsq": (BinarySphericalQuantizer, {}, (1, 2, 4), (65536,) * 3),
    "bsq-k16": (BinarySphericalQuantizer, {"codebook_size": 16}, (4, 8, 16), (16,) * 3),
}
RATES = (16, 32, 64)
STRAIGHT_THROUGH = ("vq", "fsq", "fsq-tuned", "fsq-paper", "lfq", "bsq", "bsq-k16")
every = pytest.mark.parametrize("method", METHODS)
at_every_rate = pytest.mark.parametrize("rate", RATES)


def make(method: str, rate: int) -> Quantizer:
    torch.manual_seed(0)
    kind, arguments, _, _ = METHODS[method]
    return kind(rate, **arguments)


def features(quantizer: Quantizer, *shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, quantizer.encoder_channels, generator=torch.Generator().manual_seed(seed))


@every
@at_every_rate
def test_geometry(method: str, rate: int) -> None:
    quantizer = make(method, rate)
    _, _, tokens, sizes = METHODS[method]
    index = RATES.index(rate)
    assert (quantizer.tokens_per_position, quantizer.codebook_size) == (tokens[index], sizes[index])
    assert quantizer.bits_per_position == pytest.approx(quantizer.tokens_per_position * math.log2(quantizer.codebook_size))
    assert quantizer.bits_per_position == pytest.approx(rate, abs=0.2)


@every
@at_every_rate
@settings(max_examples=5, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    shape=st.lists(st.integers(1, 3), min_size=1, max_size=3),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    scale=st.sampled_from([1e-3, 1.0, 30.0]),
    seed=st.integers(0, 2**31),
)
def test_tokens_are_honest(method: str, rate: int, shape: list[int], dtype: torch.dtype, scale: float, seed: int) -> None:
    """Integers in range, the same each time; their latents alone are what is decoded, and are fixed points where codes are features."""
    quantizer = CACHE.setdefault((method, rate), make(method, rate).eval())
    x = (features(quantizer, *shape, seed=seed) * scale).to(dtype)
    tokens = quantizer.tokenize(x)
    assert tokens.dtype == torch.int64
    assert tokens.shape == (*shape, quantizer.tokens_per_position)
    assert tokens.min() >= 0
    assert tokens.max() < quantizer.codebook_size
    assert torch.equal(tokens, quantizer.tokenize(x))
    latents = quantizer.detokenize(tokens)
    assert latents.shape == (*shape, quantizer.latent_channels)
    assert latents.dtype == torch.float32
    assert latents.isfinite().all()
    if method.startswith("vq"):
        assert torch.equal(quantizer.tokenize(latents), tokens)
    flat = quantizer.tokenize(x.reshape(-1, x.shape[-1]))
    assert torch.equal(flat.view_as(tokens), tokens), "positions do not see each other"


CACHE: dict[tuple[str, int], Quantizer] = {}


@every
@at_every_rate
def test_any_tokens_have_latents_of_their_own(method: str, rate: int) -> None:
    quantizer = make(method, rate)
    tokens = torch.randint(quantizer.codebook_size, (200, quantizer.tokens_per_position), generator=torch.Generator().manual_seed(0))
    latents = quantizer.detokenize(tokens)
    assert len(latents.unique(dim=0)) == len(tokens.unique(dim=0))
    for wrong in (tokens + quantizer.codebook_size, tokens - quantizer.codebook_size, tokens.float(), tokens[:, :0]):
        with pytest.raises(UserError, match="tokens"):
            quantizer.detokenize(wrong)


@every
@at_every_rate
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_flow_to_the_encoder(method: str, rate: int, dtype: torch.dtype) -> None:
    quantizer = make(method, rate)
    x = features(quantizer, 2, 3, 3).to(dtype).requires_grad_()
    quantized = quantizer(x)
    assert quantized.latents.shape == (2, 3, 3, quantizer.latent_channels)
    assert quantized.latents.dtype == quantized.penalty.dtype == torch.float32
    assert quantized.penalty.shape == ()
    weight = torch.randn_like(quantized.latents)  # any loss of the latents
    (gradient,) = torch.autograd.grad((weight * quantized.latents).sum() + quantized.penalty, x)
    assert gradient.isfinite().all()
    assert (gradient != 0).float().mean() > 0.9
    assert (
        (quantized.posterior is not None)
        == isinstance(quantizer, PosteriorQuantizer)
        == isinstance(quantizer, GaussianQuantizer | TokenBridge)
    )


@pytest.mark.parametrize("method", [method for method, (kind, *_) in METHODS.items() if issubclass(kind, PosteriorQuantizer)])
@at_every_rate
def test_posteriors_cost_what_they_say(method: str, rate: int) -> None:
    """Against torch's own divergence; `forward` gives the same ones, detached."""
    quantizer = make(method, rate)
    assert isinstance(quantizer, PosteriorQuantizer)
    x = features(quantizer, 2, 3).requires_grad_()
    posterior = quantizer.posterior(x)
    normal = Normal(posterior.mean.double(), (posterior.log_variance.double() / 2).exp())
    bits = kl_divergence(normal, Normal(torch.zeros((), dtype=torch.float64), 1.0)) / math.log(2)
    torch.testing.assert_close(posterior.bits.sum(-1).double(), bits.sum(-1), rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(posterior.dimension_bits.double(), bits.mean((0, 1)), rtol=1e-5, atol=1e-4)
    assert posterior.bits.shape == (2, 3, quantizer.tokens_per_position)
    given = quantizer(x).posterior
    assert given is not None and posterior.bits.requires_grad and not given.bits.requires_grad
    assert torch.equal(given.bits, posterior.bits)


@pytest.mark.parametrize("method", STRAIGHT_THROUGH)
@at_every_rate
def test_straight_through_training_decodes_what_evaluation_decodes(method: str, rate: int) -> None:
    quantizer = make(method, rate)
    x = features(quantizer, 2, 4)
    torch.testing.assert_close(quantizer(x).latents, quantizer.detokenize(quantizer.tokenize(x)), rtol=1e-5, atol=1e-5)


@every
def test_penalty_is_a_mean_over_images(method: str) -> None:
    if method == "vq-ema":
        pytest.skip("its codebook moves with each batch")
    quantizer = make(method, 32)
    image = features(quantizer, 1, 4, 4)
    torch.manual_seed(0)
    one = quantizer(image).penalty
    torch.manual_seed(0)
    same = quantizer(image.expand(3, -1, -1, -1)).penalty
    torch.testing.assert_close(one, same, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("method", ["vq", "lfq", "bsq"])
def test_penalty_is_a_mean_over_elements_or_a_sum_over_positions(method: str) -> None:
    kind = METHODS[method][0]
    for reduction, ratio in (("element_mean", 1), ("image_sum", 2)):
        torch.manual_seed(0)
        quantizer = kind(32, penalty_reduction=reduction)
        image = features(quantizer, 2, 4, 4)
        one, twice = quantizer(image).penalty, quantizer(torch.cat([image, image], dim=1)).penalty
        torch.testing.assert_close(twice, ratio * one)


@every
def test_description_and_state_make_it_again(method: str) -> None:
    quantizer = make(method, 32)
    if quantizer.training:
        quantizer(features(quantizer, 2, 4))  # moving averages move
    again = build(Quantizer, describe(quantizer), "a test")  # type: ignore[type-abstract]
    again.load_state_dict(quantizer.state_dict())
    x = features(quantizer, 2, 5)
    assert torch.equal(again.tokenize(x), quantizer.tokenize(x))
    tokens = quantizer.tokenize(x)
    assert torch.equal(again.detokenize(tokens), quantizer.detokenize(tokens))


@every
def test_wrong_features_and_rates(method: str) -> None:
    quantizer = make(method, 16)
    with pytest.raises(UserError, match="last axis must have"):
        quantizer.tokenize(torch.zeros(2, quantizer.encoder_channels + 1))
    with pytest.raises(UserError, match="last axis must have"):
        quantizer(torch.zeros(2, quantizer.encoder_channels + 1))
    with pytest.raises(UserError, match="bits_per_position"):
        make(method, 3)


@every
def test_tokens_of_every_integer_type(method: str) -> None:
    quantizer = make(method, 16)
    tokens = quantizer.tokenize(features(quantizer, 2, 3)) % 2**7
    latents = quantizer.detokenize(tokens)
    for dtype in INTEGERS:
        assert torch.equal(quantizer.detokenize(tokens.to(dtype)), latents), dtype
    beyond = torch.full_like(tokens, -1).view(torch.uint64)
    for wrong in (tokens.double(), tokens > 0, tokens.to(torch.complex64), beyond, -1 - tokens.to(torch.int8)):
        with pytest.raises(UserError, match="give integers|out of range"):
            quantizer.detokenize(wrong)
