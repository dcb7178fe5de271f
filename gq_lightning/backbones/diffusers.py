"""The autoencoders of diffusers (https://huggingface.co/docs/diffusers) as backbones, with diffusers' own networks and names of arguments.

    image -> theirs -> [mean, log variance] -> (mean - shift) * scaling, log variance + 2 ln scaling   the features
    latents -> latents / scaling + shift -> theirs -> image

So features and latents are scaled as the model's own users have them, about N(0, 1). `importers.diffusers` gives them a model's weights.
Needs the extra `diffusers`, `pip install gq_lightning[diffusers]`.
"""

import math
from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from gq_lightning.backbones.base import Backbone, check_multiple
from gq_lightning.construction import Size, check_cost
from gq_lightning.errors import UserError


class _Encoder(nn.Module):
    """Images to features. Where these are means alone (`moments` is 1), a log-variance is left out."""

    def __init__(self, network: nn.Module, last: nn.Module | None, channels: int, moments: int, scaling: float, shift: float) -> None:
        super().__init__()
        self.network, self.last = network, last or nn.Identity()
        self.channels, self.moments, self.scaling, self.shift = channels, moments, scaling, shift

    def forward(self, images: Tensor) -> Tensor:
        mean, *rest = self.last(self.network(images)).split(self.channels, dim=1)
        mean = (mean - self.shift) * self.scaling
        return torch.cat([mean, rest[0] + 2 * math.log(self.scaling)], dim=1) if self.moments == 2 else mean


class _Decoder(nn.Module):
    def __init__(self, network: nn.Module, first: nn.Module | None, scaling: float, shift: float) -> None:
        super().__init__()
        self.first, self.network = first or nn.Identity(), network
        self.scaling, self.shift = scaling, shift

    def forward(self, latents: Tensor) -> Tensor:
        return self.network(self.first(latents / self.scaling + self.shift))


class _Autoencoder(Backbone):
    fixed_image_size = None
    training_arguments = frozenset({"gradient_checkpointing"})

    def _begin(self, encoder_channels: int, latent_channels: int, levels: int, scaling_factor: float) -> int:
        """Sets the attributes; returns how many moments the features have."""
        moments, rest = divmod(encoder_channels, latent_channels) if latent_channels > 0 else (0, 0)
        name = type(self).__name__
        if rest or moments not in (1, 2):
            raise UserError(
                f"{name}: encoder_channels {encoder_channels} are neither latent_channels, {latent_channels}, nor twice as many: "
                "use a quantizer whose features are means, or means and log-variances"
            )
        if not 0 < scaling_factor < math.inf:
            raise UserError(f"{name}: scaling_factor {scaling_factor} is not positive: give the model's own")
        self.encoder_channels, self.latent_channels, self.downsampling = encoder_channels, latent_channels, 2 ** (levels - 1)
        return moments

    @abstractmethod
    def _heads(self) -> tuple[nn.Conv2d, nn.Conv2d]:
        """The layer that gives features and the one that takes latents."""

    @torch.no_grad()
    def reorder(self, order: Sequence[int]) -> None:
        """Latent channel i becomes the one that was `order[i]`: the weights on both sides move, the network computes the same."""
        chosen = torch.tensor(order)
        last, first = self._heads()
        outputs = torch.cat([chosen + half * self.latent_channels for half in range(self.encoder_channels // self.latent_channels)])
        assert last.bias is not None
        last.weight.copy_(last.weight[outputs].clone())
        last.bias.copy_(last.bias[outputs].clone())
        first.weight.copy_(first.weight[:, chosen].clone())

    def encode(self, images: Tensor) -> Tensor:
        check_multiple((images.shape[-2], images.shape[-1]), self.downsampling)
        return self.encoder(images).contiguous()  # as in UNet

    def decode(self, latents: Tensor) -> Tensor:
        return self.decoder(latents)


class DiffusersKL(_Autoencoder):
    """`diffusers.AutoencoderKL`, the Gaussian VAE of Stable Diffusion, SDXL, SD 3 and FLUX. Convolutional; pictures of any size.

    Args:
        encoder_channels: channels of the features, from the quantizer.
        latent_channels: channels of the latents, from the quantizer.
        image_size: ignored, since nothing depends on it.
        block_out_channels: width of each level, from fine to coarse; downsampling is 2**(levels - 1).
        layers_per_block: residual blocks of each level of the encoder; the decoder has one more.
        norm_num_groups: groups of every group normalisation.
        mid_block_add_attention: attention at the coarsest level.
        use_quant_conv: a 1x1 convolution of the moments.
        use_post_quant_conv: a 1x1 convolution of the latents.
        scaling_factor: by which latents are multiplied.
        shift_factor: what is taken from them before.
        gradient_checkpointing: compute activations again in the backward pass: less memory, about a third more time.

    Raises:
        UserError: a size does not fit, the network is too large, see `check_cost`, or diffusers is not installed.
    """

    def __init__(
        self,
        encoder_channels: int,
        latent_channels: int,
        image_size: Size = 256,
        block_out_channels: Sequence[int] = (128, 256, 512, 512),
        layers_per_block: int = 2,
        norm_num_groups: int = 32,
        mid_block_add_attention: bool = True,
        use_quant_conv: bool = True,
        use_post_quant_conv: bool = True,
        scaling_factor: float = 0.18215,
        shift_factor: float = 0.0,
        gradient_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        widths = list(block_out_channels)
        if not widths or layers_per_block < 1 or norm_num_groups < 1 or any(width < 1 or width % norm_num_groups for width in widths):
            raise UserError(
                f"DiffusersKL: block_out_channels {widths}: give at least one level, multiples of norm_num_groups, and one layer"
            )
        moments = self._begin(encoder_channels, latent_channels, len(widths), scaling_factor)
        weights = 18 * sum((2 * layers_per_block + 1) * width**2 for width in widths) + 9 * widths[-1] * (
            8 * widths[-1] + 4 * latent_channels
        )
        check_cost("DiffusersKL", (2 * layers_per_block + 1) * len(widths), weights, latent_channels=latent_channels)
        model = _diffusers("AutoencoderKL")(
            down_block_types=("DownEncoderBlock2D",) * len(widths),
            up_block_types=("UpDecoderBlock2D",) * len(widths),
            block_out_channels=tuple(widths),
            layers_per_block=layers_per_block,
            latent_channels=latent_channels,
            norm_num_groups=norm_num_groups,
            use_quant_conv=use_quant_conv,
            use_post_quant_conv=use_post_quant_conv,
            mid_block_add_attention=mid_block_add_attention,
        )
        if gradient_checkpointing:
            model.enable_gradient_checkpointing()
        self.encoder: _Encoder = _Encoder(model.encoder, model.quant_conv, latent_channels, moments, scaling_factor, shift_factor)
        self.decoder: _Decoder = _Decoder(model.decoder, model.post_quant_conv, scaling_factor, shift_factor)

    def _heads(self) -> tuple[nn.Conv2d, nn.Conv2d]:
        pairs = ((self.encoder.last, self.encoder.network.conv_out), (self.decoder.first, self.decoder.network.conv_in))
        last, first = (network if isinstance(own, nn.Identity) else own for own, network in pairs)
        return cast(nn.Conv2d, last), cast(nn.Conv2d, first)

    @property
    def last_layer(self) -> nn.Parameter:
        return cast(nn.Parameter, cast(Any, self.decoder.network).conv_out.weight)


class DiffusersTiny(_Autoencoder):
    """`diffusers.AutoencoderTiny`, which sees latents like those of a large model at a fraction of the cost. Pictures of any size.

    Its encoder is deterministic. For a quantizer of Gaussian posteriors the last layer is made twice as wide, and its second half, the
    log-variances, begins at 0: `initial_log_variance` of the quantizer says where they are.

    Args:
        encoder_channels: channels of the features, from the quantizer.
        latent_channels: channels of the latents, from the quantizer.
        image_size: ignored, since nothing depends on it.
        block_out_channels: width of each level, from fine to coarse; they are all the same. Downsampling is 2**(levels - 1).
        blocks: residual blocks of each level of the encoder, from fine to coarse, and of the decoder, the other way round.
        scaling_factor: by which latents are multiplied.
        shift_factor: what is taken from them before.
        gradient_checkpointing: compute activations again in the backward pass: less memory, about a third more time.

    Raises:
        UserError: a size does not fit, the network is too large, see `check_cost`, or diffusers is not installed.
    """

    def __init__(
        self,
        encoder_channels: int,
        latent_channels: int,
        image_size: Size = 256,
        block_out_channels: Sequence[int] = (64, 64, 64, 64),
        blocks: Sequence[int] = (1, 3, 3, 3),
        scaling_factor: float = 1.0,
        shift_factor: float = 0.0,
        gradient_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        widths, counts = list(block_out_channels), list(blocks)
        if not widths or len(widths) != len(counts) or len(set(widths)) > 1 or min(*widths, *counts) < 1:
            raise UserError(
                f"DiffusersTiny: block_out_channels {widths} and blocks {counts}: give one width, as often as there are numbers of blocks"
            )
        moments = self._begin(encoder_channels, latent_channels, len(widths), scaling_factor)
        check_cost("DiffusersTiny", 2 * sum(counts), 54 * sum(counts) * widths[0] ** 2, latent_channels=latent_channels)
        model = _diffusers("AutoencoderTiny")(
            encoder_block_out_channels=tuple(widths),
            decoder_block_out_channels=tuple(widths),
            num_encoder_blocks=tuple(counts),
            num_decoder_blocks=tuple(reversed(counts)),
            latent_channels=latent_channels,
        )
        if gradient_checkpointing:
            model.enable_gradient_checkpointing()
        if moments == 2:
            means = model.encoder.layers[-1]
            model.encoder.layers[-1] = nn.Conv2d(means.in_channels, encoder_channels, 3, padding=1)
            set_means(model.encoder.layers[-1], means)
        self.encoder: _Encoder = _Encoder(model.encoder, None, latent_channels, moments, scaling_factor, shift_factor)
        self.decoder: _Decoder = _Decoder(model.decoder, None, scaling_factor, shift_factor)

    def _heads(self) -> tuple[nn.Conv2d, nn.Conv2d]:
        return cast(Any, self.encoder.network).layers[-1], cast(Any, self.decoder.network).layers[0]

    @property
    def last_layer(self) -> nn.Parameter:
        return cast(nn.Parameter, cast(Any, self.decoder.network).layers[-1].weight)


@torch.no_grad()
def set_means(layer: nn.Conv2d, means: nn.Conv2d) -> None:
    """Gives the first channels of a layer the weights of `means`, and the others, the log-variances, none."""
    for ours, theirs in ((layer.weight, means.weight), (layer.bias, means.bias)):
        assert ours is not None and theirs is not None
        ours.zero_()
        ours[: len(theirs)] = theirs


def _diffusers(name: str) -> Any:
    try:
        import diffusers  # of others: this file shares its name
    except ImportError as error:
        raise UserError(f"model.backbone: diffusers is not installed ({error}): pip install 'gq_lightning[diffusers]'") from error
    return getattr(diffusers, name)
