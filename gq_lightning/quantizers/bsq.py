"""Binary spherical quantization (BSQ), https://arxiv.org/abs/2406.07548 (BSQ-ViT), section 4.

    features --tokenize----> their signs, as the bits of one or more numbers
             --forward-----> signs / sqrt(L), gradients straight through to features on the unit sphere; entropy penalty
    tokens   --detokenize--> signs / sqrt(L), a point on the unit sphere of all L bits of a position

With L bits a position has 2^L codes. Nothing here enumerates them.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from gq_lightning.errors import UserError
from gq_lightning.quantizers.base import Quantized, Quantizer, check_tokens
from gq_lightning.quantizers.signs import checked, entropies, pack, positions_of_image, signs, tokens_of, unpack

# shorter vectors stay inside the sphere: at 0 the direction is undefined and the gradient of normalising unbounded
SHORTEST = 1e-3


class BinarySphericalQuantizer(Quantizer):
    """L = bits_per_position channels u = z / |z| on the unit sphere, quantised to sign(z) / sqrt(L). Nothing is learned.

    The soft assignment of u to the codes c in {-1 / sqrt(L), +1 / sqrt(L)}^L is a softmax of -|u - c|^2 / temperature. All codes have
    length 1, so this is a softmax of 2 u . c / temperature (the paper's tau u . c, tau = 2 / temperature), a product over the bits:

        p(c | u) = prod over bits i of sigmoid(4 u_i c_i / temperature),    P(bit i is 1) = sigmoid(4 u_i / (sqrt(L) temperature)).

    Its entropy is the sum of the bits' entropies. The entropy of its mean over the global batch is approximated, from above, by the sum of
    the entropies of each bit's mean (groups of one bit, as in the published models). Bits are never pooled: where some are stuck at 1 and
    as many at 0, every one of them has the entropy 0.

    The penalty, entropies in nats, is summed over the positions of an image and averaged over the images, because the reconstruction loss
    is a sum over pixels, too. Per position it is

        entropy_weight * (sum over bits of H(p_i) - diversity_gamma * sum over bits of H(mean of p_i))
            + commitment * |u - sign(z) / sqrt(L)|^2.

    The entropies of the means are one number for the batch and count once for each position of an image, so that both entropies balance as
    in the paper. Published weights multiply the entropies of one position: against a loss of mean reconstruction + w * entropies, the same
    balance is w * 3 * downsampling^2 here, 192 times w at 8x downsampling.

    Args:
        bits_per_position: L, rate at each position of the grid, and number of features and latents. A whole number of tokens.
        codebook_size: codes of one token, a power of two up to 2^62. It only says how the bits are packed.
        entropy_weight: weight of the entropies, of which a position's is made small and the batch's large.
        commitment: weight of the distance on the sphere, which is bounded; the published models use none.
        diversity_gamma: weight of the batch's entropy within the entropies.
        temperature: of the soft assignment; 1 in the published models. On the sphere it leaves a position's entropy nearly constant, so
            that the batch's decides: each bit is to be 1 half of the time.
    """

    def __init__(
        self,
        bits_per_position: int = 16,
        codebook_size: int = 65536,
        entropy_weight: float = 0.1,
        commitment: float = 0.0,
        diversity_gamma: float = 1.0,
        temperature: float = 1.0,
    ) -> None:
        super().__init__()
        self.tokens_per_position = tokens_of(bits_per_position, codebook_size)
        if not min(entropy_weight, commitment, diversity_gamma) >= 0 or not temperature > 0:
            given = f"{entropy_weight}, {commitment}, {diversity_gamma} and {temperature}"
            raise UserError(f"entropy_weight, commitment and diversity_gamma must be >= 0 and temperature > 0, not {given}")
        self.encoder_channels = self.latent_channels = int(bits_per_position)
        self.codebook_size, self.bits_per_position = codebook_size, int(bits_per_position)
        self.entropy_weight, self.commitment = float(entropy_weight), float(commitment)
        self.diversity_gamma, self.temperature = float(diversity_gamma), float(temperature)
        self.scale = 1 / math.sqrt(self.bits_per_position)

    def forward(self, features: Tensor) -> Quantized:
        values = checked(features, self.encoder_channels)
        directions = F.normalize(values, dim=-1, eps=SHORTEST)
        # signs of the features: a tiny negative one may become a zero on the sphere
        codes = self.scale * signs(values).detach()
        per_sample, batch = entropies((4 * self.scale / self.temperature * directions)[..., None])
        distance = (directions - codes).square().sum(dim=-1).mean()
        per_position = self.entropy_weight * (per_sample - self.diversity_gamma * batch) + self.commitment * distance
        diagnostics = {"sample_entropy": per_sample.detach(), "batch_entropy": batch.detach()}
        return Quantized(directions + (codes - directions).detach(), positions_of_image(features) * per_position, diagnostics)

    @torch.no_grad()
    def tokenize(self, features: Tensor) -> Tensor:
        return pack(checked(features, self.encoder_channels), self.tokens_per_position)

    def detokenize(self, tokens: Tensor) -> Tensor:
        check_tokens(tokens, self.codebook_size, self.tokens_per_position)
        return self.scale * unpack(tokens, self.latent_channels // self.tokens_per_position)

    def extra_repr(self) -> str:
        return (
            f"{self.bits_per_position} signs, {self.tokens_per_position} tokens per position, entropy_weight={self.entropy_weight:g},"
            f" commitment={self.commitment:g}, diversity_gamma={self.diversity_gamma:g}, temperature={self.temperature:g}"
        )
