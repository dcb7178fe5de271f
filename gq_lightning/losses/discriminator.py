"""PatchGAN discriminator, https://arxiv.org/abs/1611.07004 (Isola et al. 2017, section 3.2.2), as VQGAN uses it.

    images (B, 3, H, W) -> [4x4 convolution of stride 2, norm, leaky ReLU] per layer -> two of stride 1 -> logits (B, 1, h, w)

Each logit judges one patch of the image: real above 0, reconstructed below.
"""

from typing import Literal, final

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from gq_lightning.distributed import mean_over_ranks, ranks
from gq_lightning.errors import UserError

Normalization = Literal["actnorm", "spectral", "none"]


class ActNorm(nn.Module):
    """Learned scale and shift per channel, initialised to give mean 0 and standard deviation 1
    (https://arxiv.org/abs/1807.03039, section 3.1). (B, C, H, W) to the same shape. It has no running statistics.
    """

    initialized: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.location = nn.Parameter(torch.zeros(1, channels, 1, 1))
        self.scale = nn.Parameter(torch.ones(1, channels, 1, 1))
        self.register_buffer("initialized", torch.tensor(False))

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * (x + self.location)

    @torch.no_grad()
    def initialize(self, x: Tensor) -> None:
        """Sets scale and shift from the global batch, of which x is this rank's equal share; all ranks get the same values."""
        x = x.float()
        mean = mean_over_ranks(x.mean(dim=(0, 2, 3)))
        # from the deviations, because a difference of moments loses its digits when the variance is small
        variance = mean_over_ranks((x - mean.view(-1, 1, 1)).square().mean(dim=(0, 2, 3)))
        values = x[:, 0].numel() * ranks()
        deviation = (variance * values / max(values - 1, 1)).sqrt()  # unbiased
        self.location.copy_(-mean.view_as(self.location))
        self.scale.copy_((deviation + 1e-6).reciprocal().view_as(self.scale))
        self.initialized.fill_(True)


@final
class PatchDiscriminator(nn.Module):
    """The defaults are the paper's (https://arxiv.org/abs/2512.06609, recipe): width 160, 6 layers, ActNorm.

    Args:
        width: channels of the first layer; each layer doubles them, up to 8 times.
        layers: number of times the image is halved. With 6 layers a logit covers more than a 256x256 image, with 3 a patch of 70x70.
        normalization: `actnorm`; `spectral` normalisation of the kernels; or `none`.

    Raises:
        UserError: width or layers are not positive, or the normalisation is unknown.
    """

    def __init__(self, width: int = 160, layers: int = 6, normalization: Normalization = "actnorm") -> None:
        super().__init__()
        if width < 1 or layers < 1:
            raise UserError(f"discriminator: width {width} and layers {layers} must be positive")
        if normalization not in ("actnorm", "spectral", "none"):
            raise UserError(f"discriminator.normalization: {normalization!r}: give actnorm, spectral or none")
        self.layers = layers
        widths = [width * min(2**index, 8) for index in range(layers + 1)]

        def convolution(before: int, after: int, stride: int) -> nn.Module:
            layer = nn.Conv2d(before, after, 4, stride, padding=1)
            nn.init.normal_(layer.weight, 0.0, 0.02)
            nn.init.zeros_(layer.bias)  # type: ignore[arg-type]
            return spectral_norm(layer) if normalization == "spectral" else layer

        modules = [convolution(3, widths[0], 2), nn.LeakyReLU(0.2)]
        for index in range(1, layers + 1):
            modules.append(convolution(widths[index - 1], widths[index], 2 if index < layers else 1))
            modules += [ActNorm(widths[index])] if normalization == "actnorm" else []
            modules.append(nn.LeakyReLU(0.2))
        self.network = nn.Sequential(*modules, convolution(widths[-1], 1, 1))
        self._known = False  # host copy of ActNorm's buffers, since reading them at each step would wait for the device

    @torch.no_grad()
    def initialize(self, images: Tensor) -> None:
        """Initialises ActNorm from the first batch of real images (B, 3, H, W) in [-1, 1], unless it is initialised or loaded."""
        if self._known:
            return
        if not all(bool(layer.initialized) for layer in self.network if isinstance(layer, ActNorm)):
            self._check_size(images)
            for layer in self.network:
                if isinstance(layer, ActNorm):
                    layer.initialize(images)
                images = layer(images)
        self._known = True

    def forward(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [-1, 1] to logits (B, 1, h, w). Raises UserError if the images are too small for so many layers."""
        self._check_size(images)
        return self.network(images)

    def _check_size(self, images: Tensor) -> None:
        # each halving rounds down, and the last two convolutions take one pixel each
        if min(images.shape[-2:]) >> self.layers < 3:
            height, width = images.shape[-2:]
            fitting = max((min(height, width) // 3).bit_length() - 1, 0)
            raise UserError(
                f"discriminator.layers: {self.layers} layers halve images of {height}x{width} to nothing: use at most {fitting}"
            )
