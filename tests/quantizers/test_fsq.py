import json
import math

import numpy as np
import pytest
import torch
import yaml
from small import CONFIGS

from gq_lightning import UserError
from gq_lightning.construction import build, describe
from gq_lightning.quantizers.base import Quantizer
from gq_lightning.quantizers.fsq import FiniteScalarQuantizer
from gq_lightning.quantizers.signs import pack

LEVELS = ([16, 16, 16, 16], [4] * 8, [8, 8, 8, 5, 5, 5], [7, 5, 3], [2] * 16, [2, 3, 4], [15, 13, 11, 9], [1000, 7], [255, 256])


def quantizer_of(levels: list[int], tokens: int = 1) -> FiniteScalarQuantizer:
    return FiniteScalarQuantizer(round(tokens * math.log2(math.prod(levels))), levels)


def features(*shape: int, scale: float = 1.5) -> torch.Tensor:
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def published_bound(z: np.ndarray, levels: list[int]) -> np.ndarray:
    """The listing of the paper's appendix in numpy, before rounding, with artanh for tan: the shift is to put 0 on a level."""
    size = np.array(levels)
    half = (size - 1) * (1 - 1e-3) / 2
    offset = np.where(size % 2 == 1, 0.0, 0.5)
    return np.tanh(z + np.arctanh(offset / half)) * half - offset


@pytest.mark.parametrize(("bits", "tokens", "channels"), [(16, 1, 4), (32, 2, 8), (64, 4, 16)])
def test_geometry_follows_from_the_rate(bits: int, tokens: int, channels: int) -> None:
    quantizer = FiniteScalarQuantizer(bits)
    assert (quantizer.tokens_per_position, quantizer.codebook_size, quantizer.bits_per_position) == (tokens, 65536, bits)
    assert quantizer.encoder_channels == quantizer.latent_channels == channels
    x = features(2, 3, 5, channels)
    found, result = quantizer.tokenize(x), quantizer(x)
    assert found.shape == (2, 3, 5, tokens)
    assert found.dtype == torch.int64
    assert found.min() >= 0 and found.max() < 65536
    assert torch.equal(quantizer.detokenize(found), result.latents)
    assert result.penalty.item() == 0
    assert result.posterior is None, "so no bits and no mean"


@pytest.mark.parametrize(("asked", "real"), [(16, 15.9658), (32, 31.9316), (64, 63.8631)])
def test_the_real_rate_is_stated(asked: int, real: float) -> None:
    assert FiniteScalarQuantizer(asked, [8, 8, 8, 5, 5, 5]).bits_per_position == pytest.approx(real, abs=1e-4)


@pytest.mark.parametrize("tokens", [1, 3])
@pytest.mark.parametrize("levels", LEVELS, ids=str)
def test_every_token_comes_back(levels: list[int], tokens: int) -> None:
    quantizer = quantizer_of(levels, tokens)
    every = torch.arange(quantizer.codebook_size)[:, None].expand(-1, tokens)
    points = quantizer.detokenize(every)
    assert points.abs().max() <= 1
    assert len(points.unique(dim=0)) == quantizer.codebook_size
    # where the bound sends there: the inverse of the grid's own map, by the tanh of its middle
    size = torch.tensor(levels * tokens, dtype=torch.float64)
    if 2 in levels:
        inverse = torch.atanh(points.double() * (1 - 1e-9))
    else:
        offset, half = (size % 2 == 0) / 2, (size - 1) * 1.001 / 2
        inverse = torch.atanh((points * (size // 2) + offset) / half) - torch.atanh(offset / half)
    assert torch.equal(quantizer.tokenize(inverse), every)


@pytest.mark.parametrize("levels", [levels for levels in LEVELS if 2 not in levels], ids=str)
def test_the_first_channel_is_the_most_significant_digit(levels: list[int]) -> None:
    quantizer, x = quantizer_of(levels, 2), features(50, 2 * len(levels))
    half = torch.tensor(levels) // 2
    digits = (quantizer(x).latents.unflatten(-1, (2, len(levels))) * half).round().long() + half
    wanted = torch.zeros(50, 2, dtype=torch.long)
    for channel, level in enumerate(levels):
        wanted = wanted * level + digits[..., channel]
    assert torch.equal(quantizer.tokenize(x), wanted)


def test_a_token_by_hand() -> None:
    quantizer = FiniteScalarQuantizer(8, [8, 8, 5])
    assert quantizer.detokenize(torch.tensor([[(7 * 8 + 0) * 5 + 3]])).tolist() == [[3 / 4, -1, 1 / 2]]


def test_two_levels_have_the_tokens_of_the_signs() -> None:
    x = features(50, 32)
    assert torch.equal(FiniteScalarQuantizer(32, [2] * 16).tokenize(x), pack(x, 2))


@pytest.mark.parametrize(("rate", "channels"), [(16, 8), (32, 16), (64, 32)])
def test_the_tuned_grid_has_two_bits_a_channel(rate: int, channels: int) -> None:
    described = yaml.safe_load((CONFIGS / "quantizer/fsq_tuned.yaml").read_text())["model"]["quantizer"]
    assert described["class_path"] == "gq_lightning.quantizers.FiniteScalarQuantizer"
    quantizer = FiniteScalarQuantizer(**described["init_args"] | {"bits_per_position": rate})
    assert (quantizer.latent_channels, quantizer.codebook_size, quantizer.bits_per_position) == (channels, 65536, rate)
    assert quantizer(features(50, channels)).latents.unique().tolist() == [-1, -0.5, 0, 0.5]


@pytest.mark.parametrize("levels", [levels for levels in LEVELS if 2 not in levels], ids=str)
def test_rounds_like_the_paper(levels: list[int]) -> None:
    quantizer, x = quantizer_of(levels), features(4000, len(levels))
    bounded = published_bound(x.double().numpy(), levels)
    half = np.array(levels) // 2
    found = quantizer(x).latents.double().numpy() * half
    # the two bounds differ by a thousandth of each side's reach: leave out what lies that near to a boundary
    clear = np.abs(bounded - np.floor(bounded) - 0.5) > 2e-3 * half
    assert clear.mean() > 0.3
    np.testing.assert_allclose(found[clear], np.round(bounded)[clear], atol=1e-4)


@pytest.mark.parametrize("levels", [[16, 16, 16, 16], [8, 8, 8, 5, 5, 5]], ids=str)
def test_gradients_pass_straight_through_the_rounding(levels: list[int]) -> None:
    quantizer, x = quantizer_of(levels, 2), features(50, 2 * len(levels)).requires_grad_()
    weights = features(50, 2 * len(levels), scale=1.0).flip(0)
    (quantizer(x).latents * weights).sum().backward()
    z, step = x.detach().double().numpy(), 1e-6
    slope = (published_bound(z + step, levels * 2) - published_bound(z - step, levels * 2)) / (2 * step) / (np.array(levels * 2) // 2)
    assert x.grad is not None
    np.testing.assert_allclose(x.grad.numpy(), weights.numpy() * slope, rtol=4e-3, atol=1e-6)


def test_two_levels_are_the_signs() -> None:
    quantizer, x = FiniteScalarQuantizer(16, [2] * 16), features(200, 16).requires_grad_()
    result = quantizer(x)
    assert torch.equal(result.latents, x.sign())
    result.latents.sum().backward()
    torch.testing.assert_close(x.grad, 1 - x.detach().tanh().square())


def test_ends_of_the_range_are_tokens() -> None:
    for levels in LEVELS:
        quantizer = quantizer_of(levels)
        for value, token in ((1e30, quantizer.codebook_size - 1), (-torch.inf, 0), (torch.inf, quantizer.codebook_size - 1)):
            assert quantizer.tokenize(torch.full((1, len(levels)), value)).item() == token, levels


def test_half_precision_features_are_taken_in_float32() -> None:
    quantizer, x = FiniteScalarQuantizer(16).to(torch.bfloat16), features(500, 4).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result, tokens = quantizer(x), quantizer.tokenize(x)
    assert result.latents.dtype == result.penalty.dtype == torch.float32
    assert torch.equal(tokens, quantizer.tokenize(x.float()))
    assert torch.equal(quantizer.detokenize(tokens), result.latents)


def test_describes_and_rebuilds_itself_without_state() -> None:
    quantizer = FiniteScalarQuantizer(32, (8, 8, 8, 5, 5, 5))
    description = json.loads(json.dumps(describe(quantizer)))
    description["class_path"] = "gq_lightning.quantizers.fsq.FiniteScalarQuantizer"
    again = build(Quantizer, description, "here")  # type: ignore[type-abstract]
    assert not quantizer.state_dict()
    assert torch.equal(again.tokenize(features(9, 12)), quantizer.tokenize(features(9, 12)))


@pytest.mark.parametrize(
    ("arguments", "field"),
    [
        ({"bits_per_position": 24}, "bits_per_position"),
        ({"bits_per_position": 3}, "bits_per_position"),
        ({"levels": []}, "levels"),
        ({"levels": [16, 1]}, "levels"),
        ({"levels": [16, 2.5]}, "levels"),
        ({"levels": [1001, 60]}, "levels"),
        ({"bits_per_position": 32, "levels": [16] * 8}, "2.20"),
    ],
)
def test_bad_arguments_name_the_field(arguments: dict, field: str) -> None:
    with pytest.raises(UserError, match=field):
        FiniteScalarQuantizer(**arguments)


@pytest.mark.parametrize("tokens", [torch.tensor([[65536]]), torch.tensor([[-1]]), torch.tensor([[0, 0]]), torch.tensor([[0.0]])])
def test_bad_tokens(tokens: torch.Tensor) -> None:
    with pytest.raises(UserError, match="tokens"):
        FiniteScalarQuantizer().detokenize(tokens)


def test_bad_features() -> None:
    with pytest.raises(UserError, match="4 channels"):
        FiniteScalarQuantizer().tokenize(torch.zeros(3, 5))
    with pytest.raises(UserError, match="finite"):
        FiniteScalarQuantizer().tokenize(torch.full((1, 4), float("nan")))
