"""The UNet against formulas written out here, and against the published sizes."""

from collections import Counter
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gq_lightning.backbones import UNet
from gq_lightning.backbones.unet import Attention, Downsample, ResidualBlock, Upsample
from gq_lightning.errors import UserError

torch.set_num_threads(1)

# how often each parameter shape occurs in the published format at 32 channels, multipliers 1, 2, one block, 16 / 8 latent channels
ENCODER_SHAPES = {(16,): 1, (16, 64, 3, 3): 1, (32,): 10, (32, 3, 3, 3): 1, (32, 32, 3, 3): 3, (64,): 25}
ENCODER_SHAPES |= {(64, 32, 1, 1): 1, (64, 32, 3, 3): 1, (64, 64, 1, 1): 4, (64, 64, 3, 3): 5}
DECODER_SHAPES = {(3,): 1, (3, 32, 3, 3): 1, (32,): 13, (32, 32, 3, 3): 3, (32, 64, 1, 1): 1, (32, 64, 3, 3): 1, (64,): 40}
DECODER_SHAPES |= {(64, 8, 3, 3): 1, (64, 64, 1, 1): 8, (64, 64, 3, 3): 9}


def count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def shapes(module: nn.Module) -> dict[tuple[int, ...], int]:
    return Counter(tuple(parameter.shape) for parameter in module.parameters())


def randomize(module: nn.Module) -> None:
    """Norms start as the identity, which would hide a missing one."""
    torch.manual_seed(0)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.2)


def test_parameters_at_paper_size() -> None:
    with torch.device("meta"):
        unet = UNet(32, 16)
    assert (count(unet.encoder), count(unet.decoder)) == (35_325_856, 51_648_771)


def test_parameter_shapes_at_a_small_size() -> None:
    unet = UNet(16, 8, image_size=64, channels=32, multipliers=[1, 2], blocks=1)
    assert shapes(unet.encoder) == ENCODER_SHAPES
    assert shapes(unet.decoder) == DECODER_SHAPES


@pytest.mark.parametrize(("height", "width"), [(8, 8), (16, 24), (40, 8)])
def test_any_multiple_of_the_downsampling(height: int, width: int) -> None:
    unet = UNet(8, 4, image_size=32, channels=32, multipliers=[1, 1, 1], blocks=1, attention_resolutions=[8])
    assert unet.fixed_image_size is None
    features = unet.encode(torch.randn(1, 3, height, width))
    assert features.shape == (1, 8, height // 4, width // 4)
    assert unet.decode(features[:, :4]).shape == (1, 3, height, width)


@pytest.mark.parametrize(("height", "width", "named"), [(10, 8, "height 10"), (8, 9, "width 9"), (2, 8, "height 2")])
def test_other_sizes_are_errors(height: int, width: int, named: str) -> None:
    unet = UNet(8, 4, image_size=32, channels=32, multipliers=[1, 1, 1], blocks=1)
    with pytest.raises(UserError, match=f"{named} is not a multiple of 4"):
        unet.encode(torch.zeros(1, 3, height, width))


@pytest.mark.parametrize(
    ("arguments", "named"),
    [({"channels": 48}, "channels 48"), ({"channels": 0}, "channels 0"), ({"multipliers": []}, "multipliers"), ({"blocks": 0}, "blocks 0")],
)
def test_wrong_arguments_are_errors(arguments: dict[str, Any], named: str) -> None:
    with pytest.raises(UserError, match=named):
        UNet(8, 4, **arguments)


@pytest.mark.parametrize(
    ("image_size", "resolutions", "levels"),
    [(256, [32], {3}), (128, [32], {2}), (64, [32, 16], {1, 2}), (64, [], set()), (256, [30], set())],
)
def test_attention_only_at_its_resolutions(image_size: int, resolutions: list[int], levels: set[int]) -> None:
    with torch.device("meta"):
        unet = UNet(8, 4, image_size=image_size, channels=32, blocks=2, attention_resolutions=resolutions)

    def attentions(module: nn.Module) -> int:
        return sum(isinstance(child, Attention) for child in module.modules())

    encoder, decoder = (list(half.levels) for half in (unet.encoder, unet.decoder))
    assert [attentions(level) for level in encoder] == [2 if index in levels else 0 for index in range(4)]
    assert [attentions(level) for level in reversed(decoder)] == [3 if index in levels else 0 for index in range(4)]
    assert attentions(unet.encoder.middle) == attentions(unet.decoder.middle) == 0


def mix(conv: nn.Conv2d, x: Tensor) -> Tensor:
    assert conv.bias is not None
    return torch.einsum("oc,bchw->bohw", conv.weight[..., 0, 0], x) + conv.bias[:, None, None]


def attend(layer: Attention, x: Tensor) -> Tensor:
    normed = F.group_norm(x, 32, layer.norm.weight, layer.norm.bias, 1e-6)
    query, key, value = (mix(part, normed) for part in (layer.query, layer.key, layer.value))
    weights = torch.einsum("bchw,bcij->bhwij", query, key) / x.shape[1] ** 0.5
    weights = weights.flatten(3).softmax(3).reshape(weights.shape)
    mixed = torch.einsum("bhwij,bcij->bchw", weights, value)
    return x + mix(layer.output, mixed)


def residual(block: ResidualBlock, x: Tensor) -> Tensor:
    hidden = x
    for norm, conv in ((block.norm1, block.conv1), (block.norm2, block.conv2)):
        normed = F.group_norm(hidden, 32, norm.weight, norm.bias, 1e-6)
        hidden = F.conv2d(normed * normed.sigmoid(), conv.weight, conv.bias, padding=1)
    return hidden + (block.shortcut(x) if x.shape != hidden.shape else x)


def test_attention_is_its_formula() -> None:
    layer = Attention(64, 32)
    randomize(layer)
    x = torch.randn(2, 64, 3, 5)
    torch.testing.assert_close(layer(x), attend(layer, x), atol=1e-4, rtol=1e-4)


def test_downsampling_pads_right_and_bottom() -> None:
    layer = Downsample(1)
    x = torch.arange(1.0, 17).reshape(1, 1, 4, 4)
    with torch.no_grad():
        layer.conv.bias.zero_()  # type: ignore[union-attr]
        for row in range(3):
            for column in range(3):
                layer.conv.weight.zero_()
                layer.conv.weight[0, 0, row, column] = 1
                expected = torch.zeros(2, 2)
                for i in range(2):
                    for j in range(2):
                        inside = 2 * i + row < 4 and 2 * j + column < 4
                        expected[i, j] = x[0, 0, 2 * i + row, 2 * j + column] if inside else 0
                assert torch.equal(layer(x)[0, 0], expected)


def test_upsampling_repeats_then_convolves() -> None:
    layer = Upsample(2)
    x = torch.randn(1, 2, 3, 4)
    repeated = x.repeat_interleave(2, 2).repeat_interleave(2, 3)
    torch.testing.assert_close(layer(x), F.conv2d(repeated, layer.conv.weight, layer.conv.bias, padding=1))


def test_whole_network_is_its_formula() -> None:
    unet = UNet(8, 4, image_size=16, channels=32, multipliers=[1, 2], blocks=2, attention_resolutions=[8])
    randomize(unet)
    encoder, decoder = unet.encoder, unet.decoder

    def finish(half: nn.Module, x: Tensor) -> Tensor:
        return half.conv_out(F.silu(F.group_norm(x, 32, half.norm_out.weight, half.norm_out.bias, 1e-6)))  # type: ignore

    def run(level: nn.Module, x: Tensor, attention: bool, blocks: int) -> Tensor:
        assert len(level.blocks) == blocks  # type: ignore[arg-type]
        for block in level.blocks:  # type: ignore[union-attr]
            x = residual(block, x)
            x = attend(block.attention, x) if attention else x
        return x

    images, latents = torch.randn(2, 3, 16, 8), torch.randn(2, 4, 8, 4)
    x = run(encoder.levels[0], encoder.conv_in(images), False, 2)
    x = encoder.levels[0].resample(x)  # type: ignore[operator]
    x = run(encoder.middle, run(encoder.levels[1], x, True, 2), False, 2)
    torch.testing.assert_close(unet.encode(images), finish(encoder, x), atol=1e-3, rtol=1e-3)

    x = run(decoder.middle, decoder.conv_in(latents), False, 2)
    x = decoder.levels[0].resample(run(decoder.levels[0], x, True, 3))  # type: ignore[operator]
    torch.testing.assert_close(unet.decode(latents), finish(decoder, run(decoder.levels[1], x, False, 3)), atol=1e-3, rtol=1e-3)


def test_it_begins_with_the_variance_kept_and_residual_branches_at_zero() -> None:
    torch.manual_seed(0)
    block = UNet(4, 4, channels=64, multipliers=[1, 2], norm_groups=8).encoder.levels[1].blocks[0]
    x = torch.randn(2, 64, 16, 16)
    torch.testing.assert_close(block(x), block.shortcut(x))
    assert block(x).var().item() == pytest.approx(1, rel=0.15)
    assert block.conv1(x)[..., 1:-1, 1:-1].var().item() == pytest.approx(1, rel=0.15)


@pytest.mark.parametrize("pixel_unshuffle", [1, 2, 4])
def test_a_patch_is_one_position(pixel_unshuffle: int) -> None:
    unet = UNet(8, 4, image_size=32, channels=32, multipliers=[1, 2], blocks=1, attention_resolutions=[], pixel_unshuffle=pixel_unshuffle)
    assert unet.downsampling == 2 * pixel_unshuffle
    images = torch.randn(2, 3, 16, 24)
    squares = images.unfold(2, pixel_unshuffle, pixel_unshuffle).unfold(3, pixel_unshuffle, pixel_unshuffle)  # (B, 3, h, w, row, column)
    flat = squares.permute(0, 1, 4, 5, 2, 3).flatten(1, 3)
    x = unet.encoder.conv_in(flat)
    for level in unet.encoder.levels:
        x = level(x)
    expected = unet.encoder.conv_out(F.silu(unet.encoder.norm_out(unet.encoder.middle(x))))
    assert torch.equal(unet.encode(images), expected)
    latents = torch.randn(2, 4, 3, 5)
    assert unet.decode(latents).shape == (2, 3, 6 * pixel_unshuffle, 10 * pixel_unshuffle)


def test_the_patches_of_the_last_layer_are_those_of_the_first() -> None:
    unet = UNet(8, 4, channels=32, multipliers=[1], blocks=1, attention_resolutions=[], pixel_unshuffle=2)
    unet.decoder.conv_out.weight.data.zero_()
    unet.decoder.conv_out.bias.data = torch.arange(12.0)  # type: ignore[union-attr]
    image = unet.decode(torch.randn(1, 4, 1, 2))[..., :2]
    assert image.tolist() == [[[[0, 1], [2, 3]], [[4, 5], [6, 7]], [[8, 9], [10, 11]]]]


def test_a_position_normalised_by_itself_does_not_know_its_picture() -> None:
    @torch.no_grad()
    def middle(groups: int) -> float:
        torch.manual_seed(0)
        unet = UNet(8, 4, channels=32, multipliers=[1, 1], blocks=1, attention_resolutions=[], norm_groups=groups)
        randomize(unet)
        picture = torch.randn(1, 3, 64, 64)
        other = picture.clone()
        other[..., 48:] = 1.0  # beyond the field of view of the left half
        first, second = (unet.encode(images)[..., :4] for images in (picture, other))
        return float((first - second).abs().max() / first.abs().max())

    assert middle(0) == 0
    assert middle(4) > 1e-3


def test_a_position_norm_is_layer_norm_over_channels() -> None:
    unet = UNet(8, 4, channels=32, multipliers=[1], blocks=1, attention_resolutions=[], norm_groups=0)
    norm = unet.encoder.norm_out
    randomize(norm)
    x = torch.randn(2, 32, 3, 5)
    variance, mean = torch.var_mean(x, dim=1, keepdim=True, correction=0)
    expected = (x - mean) / (variance + 1e-6).sqrt() * norm.weight.view(-1, 1, 1) + norm.bias.view(-1, 1, 1)  # type: ignore[union-attr,operator]
    torch.testing.assert_close(norm(x), expected)


@pytest.mark.parametrize(("named", "arguments"), [("pixel_unshuffle 0", {"pixel_unshuffle": 0}), ("norm_groups -1", {"norm_groups": -1})])
def test_impossible_patches_and_groups_are_refused(named: str, arguments: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=named):
        UNet(8, 4, channels=32, multipliers=[1], **arguments)
