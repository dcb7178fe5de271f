import itertools
import math
from typing import Literal

import pytest
import torch
import torch.nn.functional as F
from vector_quantize_pytorch import LFQ

from gq_lightning import UserError
from gq_lightning.quantizers.bsq import BinarySphericalQuantizer

RATES = (16, 32, 64)


def features(*shape: int, channels: int = 16, scale: float = 1.0, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, channels, generator=torch.Generator().manual_seed(seed)) * scale


@pytest.mark.parametrize(("bits", "size", "tokens"), [(16, 2**16, 1), (32, 2**16, 2), (64, 2**16, 4), (64, 2**32, 2), (64, 2, 64)])
def test_geometry_and_round_trip(bits: int, size: int, tokens: int) -> None:
    quantizer = BinarySphericalQuantizer(bits, codebook_size=size)
    assert (quantizer.tokens_per_position, quantizer.codebook_size, quantizer.bits_per_position) == (tokens, size, bits)
    assert quantizer.encoder_channels == quantizer.latent_channels == bits
    x = features(2, 3, 5, channels=bits)
    found = quantizer.tokenize(x)
    assert found.shape == (2, 3, 5, tokens)
    assert found.dtype == torch.int64
    assert found.min() >= 0
    assert found.max() < size
    latents = quantizer.detokenize(found)
    assert latents.dtype == torch.float32
    torch.testing.assert_close(latents, torch.where(x >= 0, 1.0, -1.0) / math.sqrt(bits))
    torch.testing.assert_close(latents.square().sum(-1), torch.ones(2, 3, 5))
    assert torch.equal(quantizer.tokenize(latents), found)
    drawn = torch.randint(size, (100, tokens), generator=torch.Generator().manual_seed(0))
    assert torch.equal(quantizer.tokenize(quantizer.detokenize(drawn)), drawn)


@pytest.mark.parametrize("bits", RATES)
def test_straight_through_to_the_sphere(bits: int) -> None:
    quantizer = BinarySphericalQuantizer(bits)
    x = features(2, 4, 4, channels=bits).requires_grad_()
    for mode in (True, False):
        latents = quantizer.train(mode)(x).latents
        torch.testing.assert_close(latents, quantizer.detokenize(quantizer.tokenize(x)))
    weights = features(2, 4, 4, channels=bits, seed=1)
    (gradient,) = torch.autograd.grad((latents * weights).sum(), x)
    (wanted,) = torch.autograd.grad((x / x.norm(dim=-1, keepdim=True) / math.sqrt(bits) * weights).sum(), x)
    torch.testing.assert_close(gradient, wanted)
    assert (gradient != 0).all()
    (gradient,) = torch.autograd.grad(quantizer(x).penalty, x)
    assert gradient.isfinite().all()
    assert (gradient != 0).any(dim=-1).all()


@pytest.mark.parametrize("bits", [2, 5])
@pytest.mark.parametrize("reduction", ["element_mean", "image_sum"])
def test_soft_assignment_by_enumeration_of_all_codewords(reduction: Literal["element_mean", "image_sum"], bits: int) -> None:
    """The factorised entropies are those of the softmax over 2^L codewords on the sphere, the batch's for one position."""
    weights = {"entropy_weight": 0.3, "commitment": 0.5, "diversity_gamma": 0.7}
    quantizer = BinarySphericalQuantizer(bits, codebook_size=2**bits, temperature=0.4, penalty_reduction=reduction, **weights)
    x = features(4, 3, 2, channels=bits)
    codes = torch.tensor(list(itertools.product([-1.0, 1.0], repeat=bits))) / math.sqrt(bits)
    squares = (F.normalize(x, dim=-1)[..., None, :] - codes).square().sum(-1)  # (4, 3, 2, 2^bits)
    p = (-squares / 0.4).softmax(dim=-1)
    per_sample = -(p * p.log()).sum(-1).mean()
    ones = (p[..., None] * (codes > 0)).sum(-2).mean(dim=(0, 1, 2))  # (bits,)
    batch = -(ones * ones.log() + (1 - ones) * (1 - ones).log()).sum()
    result = quantizer(x)
    torch.testing.assert_close(result.diagnostics["sample_entropy"], per_sample)
    torch.testing.assert_close(result.diagnostics["batch_entropy"], batch)
    wanted = 0.3 * (per_sample - 0.7 * batch) + 0.5 * squares.min(-1).values.mean()
    torch.testing.assert_close(result.penalty, wanted / bits if reduction == "element_mean" else 6 * wanted)  # 6 positions an image
    # the bits' entropies bound that of all codewords from above, and where there is one position they are equal to it
    mean = p.mean(dim=(0, 1, 2))
    assert result.diagnostics["batch_entropy"] >= -(mean * mean.log()).sum() - 1e-6
    one = quantizer(x[:1, :1, :1]).diagnostics
    torch.testing.assert_close(one["batch_entropy"], one["sample_entropy"])


def test_agrees_with_the_published_library_on_one_process() -> None:
    ours = BinarySphericalQuantizer(8, codebook_size=256, temperature=0.1)
    theirs = LFQ(codebook_size=256, spherical=True, channel_first=False)
    x = features(3, 50, channels=8)
    result, terms = theirs(x, inv_temperature=10.0, return_loss_breakdown=True)
    found = ours(x)
    assert torch.equal(ours.tokenize(x)[..., 0], result.indices.long())
    torch.testing.assert_close(found.latents, result.quantized)
    # it clamps probabilities at 1e-5 in its logarithms
    torch.testing.assert_close(found.diagnostics["sample_entropy"], terms.per_sample_entropy, atol=1e-2, rtol=1e-2)


def test_entropy_is_not_pooled_over_bits() -> None:
    """Half of the bits stuck at 1 and half at 0 are no diversity, though pooled they look ideal."""
    quantizer = BinarySphericalQuantizer(16, temperature=0.01)
    stuck = torch.tensor([1.0, -1.0]).repeat(8).expand(10, 4, 16)
    used = torch.cat([stuck[:5], -stuck[:5]])
    assert quantizer(stuck).diagnostics["batch_entropy"].item() == pytest.approx(0, abs=1e-4)
    assert quantizer(used).diagnostics["batch_entropy"].item() == pytest.approx(16 * math.log(2))
    assert quantizer(used).penalty < quantizer(stuck).penalty


@pytest.mark.parametrize("bits", RATES)
def test_descending_the_penalty_uses_the_bits(bits: int) -> None:
    quantizer = BinarySphericalQuantizer(bits, temperature=1.0)  # every bit feels it
    x = (features(32, 4, channels=bits, scale=0.2) + 0.3).requires_grad_()
    optimizer = torch.optim.Adam([x], lr=0.05)
    for _ in range(60):
        optimizer.zero_grad()
        quantizer(x).penalty.backward()
        optimizer.step()
    use = (x > 0).float().mean(dim=(0, 1))
    assert use.min() > 0.2
    assert use.max() < 0.8


def test_a_zero_vector_has_a_sign_and_a_bounded_gradient() -> None:
    quantizer = BinarySphericalQuantizer(16, commitment=0.25)
    x = torch.zeros(1, 2, 16)
    x[0, 1] = features()
    x = x.requires_grad_()
    result = quantizer(x)
    torch.testing.assert_close(result.latents[0, 0], torch.full((16,), 0.25))
    assert quantizer.tokenize(x)[0, 0].item() == 2**16 - 1
    (gradient,) = torch.autograd.grad(result.latents.sum() + result.penalty, x)
    assert result.penalty.isfinite()
    assert gradient.isfinite().all()
    assert gradient.abs().max() < 1e4


def test_values_that_vanish_on_the_sphere_keep_their_sign() -> None:
    quantizer = BinarySphericalQuantizer(16)
    x = features(2, 3, scale=1e20)
    x[..., 0] = -1e-40
    torch.testing.assert_close(quantizer(x).latents, quantizer.detokenize(quantizer.tokenize(x)))


def test_length_does_not_matter() -> None:
    quantizer = BinarySphericalQuantizer(32, commitment=0.25)
    x = features(2, 3, channels=32)
    torch.testing.assert_close(quantizer(x * 7).penalty, quantizer(x).penalty)
    assert torch.equal(quantizer.tokenize(x * 7), quantizer.tokenize(x))


@pytest.mark.parametrize(
    ("arguments", "field"),
    [
        ({"bits_per_position": 20}, "bits_per_position"),
        ({"codebook_size": 60_000}, "codebook_size"),
        ({"bits_per_position": 64, "codebook_size": 2**64}, "codebook_size"),
        ({"entropy_weight": -0.1}, "entropy_weight"),
        ({"commitment": -0.1}, "commitment"),
        ({"diversity_gamma": -1.0}, "diversity_gamma"),
        ({"temperature": 0.0}, "temperature"),
    ],
)
def test_bad_arguments_name_the_field(arguments: dict, field: str) -> None:
    with pytest.raises(UserError, match=field):
        BinarySphericalQuantizer(**arguments)


def test_bad_input() -> None:
    quantizer = BinarySphericalQuantizer(16)
    for verb in (quantizer, quantizer.tokenize):
        with pytest.raises(UserError, match="16 channels"):
            verb(torch.zeros(3, 5))
    with pytest.raises(UserError, match="finite"):
        quantizer.tokenize(torch.full((1, 16), float("nan")))
