import itertools
import math
from typing import Literal

import pytest
import torch
from vector_quantize_pytorch import LFQ

from gq_lightning import UserError
from gq_lightning.quantizers.lfq import LookupFreeQuantizer

RATES = (16, 32, 64)


def features(*shape: int, channels: int = 16, scale: float = 1.0, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, channels, generator=torch.Generator().manual_seed(seed)) * scale


@pytest.mark.parametrize(("bits", "tokens"), [(16, 2), (32, 4), (64, 8)])
def test_geometry_and_round_trip(bits: int, tokens: int) -> None:
    quantizer = LookupFreeQuantizer(bits)
    assert (quantizer.tokens_per_position, quantizer.codebook_size, quantizer.bits_per_position) == (tokens, 256, bits)
    assert quantizer.encoder_channels == quantizer.latent_channels == bits
    x = features(2, 3, 5, channels=bits)
    found = quantizer.tokenize(x)
    assert found.shape == (2, 3, 5, tokens)
    assert found.dtype == torch.int64
    assert found.min() >= 0
    assert found.max() < 256
    latents = quantizer.detokenize(found)
    assert torch.equal(latents, torch.where(x >= 0, 1.0, -1.0))
    assert torch.equal(quantizer.tokenize(latents), found)
    every = torch.arange(256)[:, None].expand(256, tokens)
    assert torch.equal(quantizer.tokenize(quantizer.detokenize(every)), every)


@pytest.mark.parametrize("bits", RATES)
def test_straight_through(bits: int) -> None:
    quantizer = LookupFreeQuantizer(bits)
    x = features(2, 4, 4, channels=bits).requires_grad_()
    for mode in (True, False):
        latents = quantizer.train(mode)(x).latents
        torch.testing.assert_close(latents, quantizer.detokenize(quantizer.tokenize(x)))
    weights = features(2, 4, 4, channels=bits, seed=1)
    (gradient,) = torch.autograd.grad((latents * weights).sum(), x)
    torch.testing.assert_close(gradient, weights)
    (gradient,) = torch.autograd.grad(quantizer(x).penalty, x)
    assert (gradient != 0).all()


@pytest.mark.parametrize("reduction", ["element_mean", "image_sum"])
def test_penalty_by_brute_force(reduction: Literal["element_mean", "image_sum"]) -> None:
    weights = {"entropy_weight": 0.3, "commitment": 0.5, "diversity_gamma": 0.7}
    quantizer = LookupFreeQuantizer(6, codebook_size=8, temperature=1.5, penalty_reduction=reduction, **weights)
    x = features(4, 3, 2, channels=6)
    codes = torch.tensor(list(itertools.product([-1.0, 1.0], repeat=3)))
    wanted = torch.zeros(())
    for token in (0, 1):
        z = x[..., 3 * token : 3 * token + 3].reshape(-1, 3)
        p = (-torch.cdist(z, codes).square() / 1.5).softmax(dim=1)
        mean = p.mean(dim=0)
        entropies = -(p * p.log()).sum(1).mean() + 0.7 * (mean * mean.log()).sum()
        commitment = torch.cdist(z, codes).square().min(dim=1).values.mean()
        if reduction == "element_mean":
            wanted = wanted + (0.3 * entropies + 0.5 * commitment / 3) / 2  # 3 channels a token, 2 tokens
        else:
            wanted = wanted + 6 * (0.3 * entropies + 0.5 * commitment)  # 6 positions an image
    torch.testing.assert_close(quantizer(x).penalty, wanted, atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(quantizer(x.flatten(1, 2)).penalty, wanted, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("temperature", [0.01, 1.0])
def test_agrees_with_the_published_library_on_one_process(temperature: float) -> None:
    """Its entropies are averaged over the tokens and its commitment over the channels; what we report are sums over the tokens."""
    ours = LookupFreeQuantizer(16, entropy_weight=1.0, commitment=0.0, temperature=temperature)
    theirs = LFQ(codebook_size=256, num_codebooks=2, commitment_loss_weight=1.0, channel_first=False)
    # a tenth of the channels in the range where the soft assignment is soft
    x = features(3, 50, scale=5 * temperature)
    result, terms = theirs(x, inv_temperature=1 / temperature, return_loss_breakdown=True)
    assert torch.equal(ours.tokenize(x), result.indices.long())
    found = ours(x)
    torch.testing.assert_close(found.latents, result.quantized)
    assert set(found.diagnostics) == {"sample_entropy", "batch_entropy"}
    # it clamps probabilities at 1e-5 in its logarithms
    torch.testing.assert_close(found.diagnostics["sample_entropy"], 2 * terms.per_sample_entropy, atol=1e-2, rtol=1e-2)
    torch.testing.assert_close(found.diagnostics["batch_entropy"], 2 * terms.batch_entropy, atol=1e-2, rtol=1e-2)
    torch.testing.assert_close(found.penalty, terms.per_sample_entropy - terms.batch_entropy, atol=1e-2, rtol=1e-2)
    committed = LookupFreeQuantizer(16, entropy_weight=0.0, commitment=1.0)(x).penalty
    torch.testing.assert_close(committed, terms.commitment)


def test_entropy_is_not_pooled_over_codebooks() -> None:
    """Tokens that are constant, each another one, are no diversity."""
    quantizer = LookupFreeQuantizer(64)
    stuck = quantizer.detokenize(torch.arange(0, 256, 32).expand(10, 8))
    assert quantizer(stuck).diagnostics["batch_entropy"].item() == pytest.approx(0, abs=1e-6)
    generator = torch.Generator().manual_seed(0)
    alike = quantizer.detokenize(torch.stack([torch.randperm(256, generator=generator) for _ in range(8)], dim=1))
    assert quantizer(alike).diagnostics["batch_entropy"].item() == pytest.approx(64 * math.log(2), rel=1e-5)
    assert quantizer(alike).penalty < quantizer(stuck).penalty


def test_descending_the_penalty_spreads_the_codes() -> None:
    quantizer = LookupFreeQuantizer(16, codebook_size=16, commitment=0.0, temperature=1.0)
    x = (features(64, 4, scale=0.2) + 0.4).requires_grad_()
    before = len(quantizer.tokenize(x)[..., 0].unique())
    optimizer = torch.optim.Adam([x], lr=0.05)
    for _ in range(60):
        optimizer.zero_grad()
        quantizer(x).penalty.backward()
        optimizer.step()
    assert before < 8
    assert len(quantizer.tokenize(x)[..., 0].unique()) == 16
    terms = quantizer(x).diagnostics
    # the optimum is that every position is certain and every code is used alike
    assert terms["sample_entropy"] < 0.05 * 16 * math.log(2)
    assert terms["batch_entropy"] > 0.95 * 16 * math.log(2)


def test_one_vector_is_an_image_of_one_position() -> None:
    quantizer = LookupFreeQuantizer(16)
    x = features()
    assert quantizer.tokenize(x).shape == (2,)
    torch.testing.assert_close(quantizer(x).penalty, quantizer(x[None, None]).penalty)


@pytest.mark.parametrize(
    ("arguments", "field"),
    [
        ({"bits_per_position": 20}, "bits_per_position"),
        ({"codebook_size": 250}, "codebook_size"),
        ({"bits_per_position": 24, "codebook_size": 2**24}, "codebook_size"),
        ({"entropy_weight": -0.1}, "entropy_weight"),
        ({"commitment": -0.1}, "commitment"),
        ({"diversity_gamma": -1.0}, "diversity_gamma"),
        ({"temperature": 0.0}, "temperature"),
    ],
)
def test_bad_arguments_name_the_field(arguments: dict, field: str) -> None:
    with pytest.raises(UserError, match=field):
        LookupFreeQuantizer(**arguments)


def test_bad_input() -> None:
    quantizer = LookupFreeQuantizer(16)
    for verb in (quantizer, quantizer.tokenize):
        with pytest.raises(UserError, match="16 channels"):
            verb(torch.zeros(3, 5))
    with pytest.raises(UserError, match="finite"):
        quantizer.tokenize(torch.full((1, 16), float("nan")))
