"""Adversarial loss of VQGAN, https://arxiv.org/abs/2012.09841 (Esser et al. 2021, section 3.1): hinge loss, adaptive weight.

    step:        0 ............ start ............ start + warmup ............
    discriminator:   idle       | learns          | learns
    generator:       reconstruction only          | reconstruction + weight * adaptive weight * (-logits)

The adaptive weight is the ratio of the gradient norms of the reconstruction loss and of the logits at the decoder's last layer. It
balances the two losses whatever their scales.

The discriminator's ActNorm is initialised by real images only, even if the generator uses it first.
"""

from typing import final

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from gq_lightning.distributed import is_distributed, mean_over_ranks
from gq_lightning.errors import UserError
from gq_lightning.losses.discriminator import PatchDiscriminator


@final
class Adversary(nn.Module):
    """A discriminator with its schedule and weights.

    The published code alternates generator and discriminator batches from the start, even before the adversarial loss is used. Here each
    batch trains the generator and, from `start` on, also the discriminator. The published start at step 20 001 is `start: 10000` here.

    Args:
        discriminator: the network.
        start: step at which the discriminator begins to learn. Before that it costs nothing.
        warmup: steps that the discriminator learns before it affects the generator.
        weight: weight of the adversarial term, on top of the adaptive weight.
        max_adaptive_weight: upper bound of the adaptive weight.
        learning_rate: of the discriminator; None takes the generator's.
        betas: of the discriminator's Adam.
    """

    def __init__(
        self,
        discriminator: PatchDiscriminator,
        start: int = 10_000,
        warmup: int = 0,
        weight: float = 0.75,
        max_adaptive_weight: float = 1e4,
        learning_rate: float | None = None,
        betas: tuple[float, float] = (0.9, 0.999),
    ) -> None:
        super().__init__()
        if start < 0 or warmup < 0:
            raise UserError(f"model.adversary: start {start} and warmup {warmup} are steps and cannot be negative")
        if weight <= 0 or max_adaptive_weight <= 0:
            raise UserError(f"model.adversary: weight {weight} and max_adaptive_weight {max_adaptive_weight} must be positive")
        self.discriminator = discriminator
        self.start, self.warmup = start, warmup
        self.weight, self.max_adaptive_weight = weight, max_adaptive_weight
        self.learning_rate, self.betas = learning_rate, betas
        # in a tuple, so that the parameters are registered only once, as `discriminator`
        self._learner: tuple[nn.Module] = (discriminator,)

    def learns(self, step: int) -> bool:
        """Whether the discriminator learns at this step."""
        return step >= self.start

    def judges(self, step: int) -> bool:
        """Whether the discriminator affects the generator at this step."""
        return step >= self.start + self.warmup

    def distribute(self, device: torch.device) -> None:
        """Averages the discriminator's gradients over ranks from now on; all ranks must call it when the process group exists.

        The discriminator has its own DistributedDataParallel because it has its own backward pass. In a common one, each pass would lack
        the gradients of the other.
        """
        if is_distributed():
            devices = [device.index] if device.type == "cuda" else None
            self._learner = (DistributedDataParallel(self.discriminator, device_ids=devices, gradient_as_bucket_view=True),)

    def generator_loss(
        self, images: Tensor, reconstructions: Tensor, reconstruction_loss: Tensor, last_layer: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The weighted adversarial term of the generator, a scalar, and its detached parts by name. Takes the originals and their
        reconstructions, (B, 3, H, W) with graph, the reconstruction loss of the same graph, and the weight of the decoder's last layer."""
        self.discriminator.initialize(images)
        # gradients pass through the discriminator to the images, but do not accumulate in it
        self.discriminator.requires_grad_(False)
        logits = self.discriminator(reconstructions).float()
        self.discriminator.requires_grad_(True)
        term = -logits.mean()
        adaptive = self._adaptive_weight(reconstruction_loss, term, last_layer)
        return self.weight * adaptive * term, {"generator": term.detach(), "adaptive_weight": adaptive}

    def _adaptive_weight(self, reconstruction_loss: Tensor, term: Tensor, last_layer: Tensor) -> Tensor:
        gradients = torch.stack(
            [torch.autograd.grad(loss, last_layer, retain_graph=True)[0].float() for loss in (reconstruction_loss, term)]
        )
        # norms of the global batch's gradients, so that the weight is the same on all ranks and in a single process
        reconstruction, adversarial = mean_over_ranks(gradients).flatten(1).norm(dim=1)
        return (reconstruction / (adversarial + 1e-4)).clamp(0.0, self.max_adaptive_weight).detach()

    def discriminator_loss(self, images: Tensor, reconstructions: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Hinge loss of the discriminator on real and reconstructed images (B, 3, H, W), a scalar, and its detached parts by name."""
        self.discriminator.initialize(images)
        logits = self._learner[0](torch.cat([images, reconstructions.detach()])).float()
        real, fake = logits.chunk(2)
        loss = (F.relu(1 - real).mean() + F.relu(1 + fake).mean()) / 2
        return loss, {"discriminator": loss.detach(), "logits_real": real.detach().mean(), "logits_fake": fake.detach().mean()}
