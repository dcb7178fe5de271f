"""The vision transformer against formulas written out here, and against the published sizes."""

from collections import Counter
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gq_lightning.backbones import VisionTransformer
from gq_lightning.backbones.vit import Transformer, to_map, to_sequence
from gq_lightning.errors import UserError

torch.set_num_threads(1)

# how often each parameter shape occurs in the published format at image size 64, width 64, 2 layers, 16 / 8 latent channels
ENCODER_SHAPES = {(16,): 1, (16, 64): 1, (64,): 16, (64, 64): 3, (64, 192): 1, (64, 256): 2, (192,): 2, (192, 64): 2}
ENCODER_SHAPES |= {(256,): 2, (256, 64): 2}
DECODER_SHAPES = {(64,): 17, (64, 8): 1, (64, 64): 3, (64, 256): 2, (192,): 3, (192, 64): 2, (192, 3072): 1, (256,): 2, (256, 64): 2}
DECODER_SHAPES |= {(3072,): 1, (3072, 64): 1}


def make(**arguments: Any) -> VisionTransformer:
    torch.manual_seed(0)
    small: dict[str, Any] = {"image_size": 16, "patch_size": 4, "width": 32, "layers": 2, "heads": 4, "head_width": 64}
    return VisionTransformer(8, 4, **(small | arguments))


def count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def shapes(module: nn.Module) -> dict[tuple[int, ...], int]:
    return Counter(tuple(parameter.shape) for parameter in module.parameters())


def test_parameters_at_paper_size() -> None:
    with torch.device("meta"):
        vit = VisionTransformer(32, 16)
    assert (count(vit.encoder), count(vit.decoder)) == (86_016_032, 88_809_408)
    assert vit.fixed_image_size == 256


def test_parameter_shapes_at_a_small_size() -> None:
    vit = VisionTransformer(16, 8, image_size=64, width=64, layers=2, heads=4)
    assert shapes(vit.encoder) == ENCODER_SHAPES
    assert shapes(vit.decoder) == DECODER_SHAPES


def test_patches_are_flattened_channel_row_column() -> None:
    images = torch.arange(2.0 * 3 * 8 * 8).reshape(2, 3, 8, 8)
    patches = to_sequence(F.pixel_unshuffle(images, 4))
    assert patches.shape == (2, 4, 48)
    for index, (top, left) in enumerate([(0, 0), (0, 4), (4, 0), (4, 4)]):
        assert torch.equal(patches[:, index], images[:, :, top : top + 4, left : left + 4].flatten(1))
    assert torch.equal(F.pixel_shuffle(to_map(patches, images.shape[2] // 4), 4), images)


@pytest.mark.parametrize("height", [1, 3, 9])
def test_maps_and_sequences_invert_each_other(height: int) -> None:
    patches = torch.randn(2, 9, 12)
    assert torch.equal(to_sequence(to_map(patches, height)), patches)


def transform(transformer: Transformer, x: Tensor, heads: int) -> Tensor:
    """The text of the format, on torch's own attention module."""

    def normalize(norm: nn.LayerNorm, x: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], norm.weight, norm.bias, 1e-5)

    x = normalize(transformer.norm_in, x + transformer.position_embedding)
    for block in transformer.blocks:
        attention = nn.MultiheadAttention(x.shape[-1], heads, batch_first=True)
        state = {"in_proj_weight": block.attn.qkv.weight, "in_proj_bias": block.attn.qkv.bias}  # type: ignore[union-attr]
        state |= {"out_proj.weight": block.attn.proj.weight, "out_proj.bias": block.attn.proj.bias}  # type: ignore[union-attr]
        attention.load_state_dict(state)  # type: ignore[arg-type]
        normed = normalize(block.norm1, x)  # type: ignore[arg-type]
        x = x + attention(normed, normed, normed, need_weights=False)[0]
        hidden = block.mlp.fc1(normalize(block.norm2, x))  # type: ignore[union-attr, operator, arg-type]
        hidden = hidden * 0.5 * (1 + torch.erf(hidden / 2**0.5))
        x = x + block.mlp.fc2(hidden)  # type: ignore[union-attr, operator]
    return normalize(transformer.norm_out, x)


def test_whole_network_is_its_formula() -> None:
    vit = make()
    for parameter in vit.parameters():  # norms start as the identity and biases at zero, which would hide a missing one
        nn.init.normal_(parameter, std=0.3)
    encoder, decoder = vit.encoder, vit.decoder
    with torch.no_grad():  # small enough for the eps of the blocks' norms to count
        for half in (encoder, decoder):
            half.transformer.norm_in.weight.mul_(0.01)
            half.transformer.norm_in.bias.mul_(0.01)
    images, latents = torch.randn(2, 3, 16, 16), torch.randn(2, 4, 4, 4)

    x = images.unfold(2, 4, 4).unfold(3, 4, 4).permute(0, 2, 3, 1, 4, 5).reshape(2, 16, 48)
    x = transform(encoder.transformer, x @ encoder.linear_in.weight.T, 4) @ encoder.linear_out.weight.T + encoder.linear_out.bias
    torch.testing.assert_close(vit.encode(images), x.reshape(2, 4, 4, 8).permute(0, 3, 1, 2), atol=1e-4, rtol=1e-4)

    x = latents.permute(0, 2, 3, 1).reshape(2, 16, 4) @ decoder.linear_in.weight.T + decoder.linear_in.bias
    x = torch.tanh(transform(decoder.transformer, x, 4) @ decoder.head.weight.T + decoder.head.bias)
    x = (x @ decoder.linear_out.weight.T + decoder.linear_out.bias).reshape(2, 4, 4, 3, 4, 4)
    torch.testing.assert_close(vit.decode(latents), x.permute(0, 3, 1, 4, 2, 5).reshape(2, 3, 16, 16), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("height", "width"), [(32, 32), (16, 20), (8, 32)])
def test_images_of_another_size_are_errors(height: int, width: int) -> None:
    with pytest.raises(UserError, match=f"image is {height}x{width}, not 16x16"):
        make().encode(torch.zeros(1, 3, height, width))


def test_latents_of_another_size_are_errors() -> None:
    with pytest.raises(UserError, match="latents is 2x8, not 4x4"):
        make().decode(torch.zeros(1, 4, 2, 8))  # as many positions as 4 x 4


@pytest.mark.parametrize(("arguments", "named"), [({"heads": 5}, "heads 5"), ({"heads": 0}, "heads 0"), ({"image_size": 18}, "18 is not")])
def test_wrong_arguments_are_errors(arguments: dict[str, Any], named: str) -> None:
    with pytest.raises(UserError, match=named):
        make(**arguments)
