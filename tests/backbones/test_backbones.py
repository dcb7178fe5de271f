"""What every backbone promises, whichever it is."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gq_lightning.backbones import Backbone, UNet, VisionTransformer
from gq_lightning.construction import build, describe
from gq_lightning.errors import UserError

torch.set_num_threads(1)

Make = Callable[..., Backbone]


def make_unet(**arguments: Any) -> UNet:
    small: dict[str, Any] = {"image_size": 16, "channels": 32, "multipliers": [1, 2], "blocks": 1, "attention_resolutions": [8]}
    return UNet(8, 4, **(small | arguments))


def make_vit(**arguments: Any) -> VisionTransformer:
    small: dict[str, Any] = {"image_size": 16, "patch_size": 4, "width": 32, "layers": 2, "heads": 4, "head_width": 64}
    return VisionTransformer(8, 4, **(small | arguments))


@pytest.fixture(params=[make_unet, make_vit], ids=["unet", "vit"])
def make(request: pytest.FixtureRequest) -> Make:
    torch.manual_seed(0)
    return request.param


@pytest.fixture
def images() -> Tensor:
    return torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(1)) * 2 - 1


def reconstruct(backbone: Backbone, images: Tensor) -> Tensor:
    return backbone.decode(backbone.encode(images)[:, : backbone.latent_channels])


def test_shapes_follow_the_stated_channels_and_downsampling(make: Make, images: Tensor) -> None:
    backbone = make()
    side = 16 // backbone.downsampling
    assert backbone.encode(images).shape == (2, backbone.encoder_channels, side, side)
    assert backbone.decode(torch.randn(2, backbone.latent_channels, side, side)).shape == images.shape


@pytest.mark.parametrize("cls", [UNet, VisionTransformer])
def test_paper_size_on_the_meta_device(cls: type[Backbone]) -> None:
    with torch.device("meta"):
        backbone = cls(32, 16)  # type: ignore[call-arg]
        features = backbone.encode(torch.empty(1, 3, 256, 256))
        decoded = backbone.decode(torch.empty(1, 16, 32, 32))
    assert backbone.downsampling == 8
    assert features.shape == (1, 32, 32, 32) and decoded.shape == (1, 3, 256, 256)


def test_description_rebuilds_the_backbone(make: Make, images: Tensor) -> None:
    backbone = make()
    description = describe(backbone)
    assert description["class_path"] == f"gq_lightning.backbones.{type(backbone).__name__}"
    rebuilt = build(Backbone, description, "test")  # type: ignore[type-abstract]
    rebuilt.load_state_dict(backbone.state_dict())
    assert describe(rebuilt) == description
    assert torch.equal(reconstruct(rebuilt, images), reconstruct(backbone, images))


def test_gradient_reaches_every_parameter(make: Make, images: Tensor) -> None:
    backbone = make()
    for parameter in backbone.parameters():
        if not parameter.abs().sum():  # a residual branch begins with a weight of 0, which stops gradients for the first step
            torch.nn.init.normal_(parameter, std=0.02)
    (reconstruct(backbone, images) - images).square().sum().backward()
    backbone.encode(images).square().sum().backward()  # `reconstruct` uses half of the features
    for name, parameter in backbone.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        # a norm or a softmax may cancel a bias exactly, never a weight
        assert parameter.ndim == 1 or parameter.grad.abs().amax() > 0, name


def test_a_frozen_encoder_leaves_the_decoder_trainable(make: Make, images: Tensor) -> None:
    backbone = make()
    backbone.encoder.requires_grad_(False)
    reconstruct(backbone, images).sum().backward()
    assert all(parameter.grad is None for parameter in backbone.encoder.parameters())
    assert all(parameter.grad is not None for parameter in backbone.decoder.parameters())
    owned = [*backbone.encoder.parameters(), *backbone.decoder.parameters()]
    assert len(owned) == len(list(backbone.parameters()))  # nothing lives outside the two


def test_checkpointing_computes_twice_and_gives_identical_gradients(make: Make, images: Tensor) -> None:
    plain, checkpointed = make(), make(gradient_checkpointing=True)
    checkpointed.load_state_dict(plain.state_dict())
    norms = [(name, module) for name, module in checkpointed.named_modules() if isinstance(module, (nn.GroupNorm, nn.LayerNorm))]
    calls: list[str] = []
    for name, module in norms:
        module.register_forward_hook(lambda *_, name=name: calls.append(name))
    with torch.no_grad():
        reconstruct(checkpointed, images)
    assert len(calls) == len(norms)  # nothing to compute again
    calls.clear()
    for backbone in (plain, checkpointed):
        reconstruct(backbone, images).square().sum().backward()
    assert all(calls.count(name) == (2 if ".blocks." in name else 1) for name, _ in norms)
    for mine, other in zip(plain.parameters(), checkpointed.parameters(), strict=True):
        assert mine.grad is not None and other.grad is not None and torch.equal(mine.grad, other.grad)


def test_last_layer_is_the_last(make: Make) -> None:
    backbone = make()
    side = 16 // backbone.downsampling
    assert isinstance(backbone.last_layer, nn.Parameter)
    one, other = torch.randn(2, 1, backbone.latent_channels, side, side)
    assert not torch.equal(backbone.decode(one), backbone.decode(other))
    with torch.no_grad():
        backbone.last_layer.mul_(1000)
        assert backbone.decode(one).abs().amax() > 1  # clamping is the tokenizer's
        backbone.last_layer.zero_()
    assert torch.equal(backbone.decode(one), backbone.decode(other))  # only its bias is left


def test_an_image_is_independent_of_its_batch(make: Make, images: Tensor) -> None:
    backbone = make()
    alone = reconstruct(backbone, images[:1])
    torch.testing.assert_close(reconstruct(backbone, images)[:1], alone)
    torch.testing.assert_close(reconstruct(backbone, torch.stack([images[0], -images[1]]))[:1], alone)


def test_train_and_eval_mode_agree(make: Make, images: Tensor) -> None:
    backbone = make()
    assert torch.equal(reconstruct(backbone.train(), images), reconstruct(backbone.eval(), images))


def test_bfloat16_autocast_stays_close(make: Make, images: Tensor) -> None:
    backbone = make(gradient_checkpointing=True)
    expected = reconstruct(backbone, images)
    with torch.autocast("cpu", torch.bfloat16):
        result = reconstruct(backbone, images)
    assert result.dtype == torch.bfloat16
    torch.testing.assert_close(result.float(), expected, atol=0.1, rtol=0.1)
    result.float().sum().backward()


@pytest.mark.filterwarnings("ignore")  # the compiler's own
def test_compiles_as_one_graph(make: Make, images: Tensor) -> None:
    backbone = make()
    compiled = torch.compile(lambda x: reconstruct(backbone, x), backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(images), reconstruct(backbone, images))


def test_a_few_steps_lower_the_error(make: Make, images: Tensor) -> None:
    backbone = make()
    optimizer = torch.optim.Adam(backbone.parameters(), lr=1e-3)
    errors = []
    for _ in range(30):
        error = (reconstruct(backbone, images) - images).abs().mean()
        optimizer.zero_grad()
        error.backward()
        optimizer.step()
        errors.append(float(error.detach()))
    assert max(errors) <= 1.2 * errors[0] and errors[-1] < 0.8 * errors[0]


def test_sizes_that_do_not_fit_are_errors(make: Make) -> None:
    backbone = make()
    with pytest.raises(UserError, match="17"):
        backbone.encode(torch.zeros(1, 3, 16, 17))
    with pytest.raises(UserError, match="image height 15 is not a multiple"):
        make(image_size=15)
