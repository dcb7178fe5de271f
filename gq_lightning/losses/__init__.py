"""Training losses: reconstruction, and the adversary with its discriminator."""

from gq_lightning.losses.adversary import Adversary
from gq_lightning.losses.discriminator import PatchDiscriminator
from gq_lightning.losses.reconstruction import ReconstructionLoss

__all__ = ["Adversary", "PatchDiscriminator", "ReconstructionLoss"]
