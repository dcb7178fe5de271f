"""Binary spherical quantization (BSQ), https://arxiv.org/abs/2406.07548 (BSQ-ViT), section 4.

    features --tokenize----> their signs, as the bits of one or more numbers
             --forward-----> signs / sqrt(L), gradients straight through the signs to features on the unit sphere; entropy penalty
    tokens   --detokenize--> signs / sqrt(L), a point on the unit sphere of all L bits of a position

A position of L bits has 2^L codes, which are never enumerated.
"""

import math

import torch.nn.functional as F
from torch import Tensor

from gq_lightning.quantizers.base import PenaltyReduction, Quantized, checked, reduced
from gq_lightning.quantizers.signs import SignQuantizer, entropies, signs

# shorter vectors are not normalised to the sphere: near 0 the gradient of the normalisation is unbounded
SHORTEST = 1e-3


class BinarySphericalQuantizer(SignQuantizer):
    """L = bits_per_position channels u = z / |z| on the unit sphere, quantised to sign(z) / sqrt(L). Nothing is learned.

    The soft assignment of u to the codes c in {-1 / sqrt(L), +1 / sqrt(L)}^L is a softmax of -|u - c|^2 / temperature. All codes have
    length 1, so this is a softmax of 2 u . c / temperature (the paper's tau u . c, tau = 2 / temperature), a product over the bits:

        p(c | u) = prod over bits i of sigmoid(4 u_i c_i / temperature),    P(bit i is 1) = sigmoid(4 u_i / (sqrt(L) temperature)).

    Its entropy is the sum of the bits' entropies. The entropy of its mean over the global batch is bounded from above by the sum of the
    entropies of each bit's mean, which is used here (groups of one bit, as in the published models). The penalty averages over bits
    instead of summing:

        entropy_weight * (mean H(p_i) - diversity_gamma * mean over bits of H(mean of p_i)) + commitment * mean (u - sign(z) / sqrt(L))^2,

    where the first and the last mean are over all bits of all positions of the batch. Entropies are in nats, from 0 to ln 2. The defaults
    are those of the published code of the Gaussian Quant paper, https://arxiv.org/abs/2512.06609. That code pools the bits; here they are
    never pooled. If some bits are stuck at 1 and as many at 0, each has entropy 0, but pooled they look ideal.

    Latents are (u + sg(sign(z) - u)) / sqrt(L): gradients pass straight through the signs and then through the scale, as published. They
    are sqrt(L) times smaller than gradients that pass straight from sign(z) / sqrt(L) to u.

    Args:
        bits_per_position: L, the rate at each position of the grid and the number of features and latents. A whole number of tokens.
        codebook_size: codes of one token, a power of two up to 2^62. It only determines how bits are packed into tokens.
        entropy_weight: weight of the entropy terms; a position's entropy is minimised and the batch's maximised.
        commitment: weight of the distance on the sphere, which is bounded; the published models use none.
        diversity_gamma: weight of the batch's entropy relative to a position's.
        temperature: of the soft assignment. At the published 0.01 only channels within about 0.01 * sqrt(L) / 4 of 0 are uncertain, and
            only they receive a gradient from the entropies. At 1, the default of BSQ-ViT's code, a position's entropy is nearly constant
            on the sphere and the batch's dominates: it drives each bit to be 1 half of the time.
        penalty_reduction: `element_mean` (published), or `image_sum`: summed over positions and bits of an image, averaged over images,
            which is positions * L times as large.
    """

    def __init__(
        self,
        bits_per_position: int = 16,
        codebook_size: int = 65536,
        entropy_weight: float = 0.1,
        commitment: float = 0.0,
        diversity_gamma: float = 1.0,
        temperature: float = 0.01,
        penalty_reduction: PenaltyReduction = "element_mean",
    ) -> None:
        arguments = (bits_per_position, codebook_size, entropy_weight, commitment, diversity_gamma, temperature, penalty_reduction)
        super().__init__(*arguments)
        self.scale = 1 / math.sqrt(self.bits_per_position)

    def forward(self, features: Tensor) -> Quantized:
        values = checked(features, self.encoder_channels)
        directions = F.normalize(values, dim=-1, eps=SHORTEST)
        # signs of the features, since a tiny negative feature may become zero on the sphere
        codes = signs(values).detach()
        per_sample, batch = entropies((4 * self.scale / self.temperature * directions)[..., None])
        entropy = self.entropy_weight * (per_sample - self.diversity_gamma * batch) / self.encoder_channels
        distance = self.commitment * (directions - self.scale * codes).square().mean()
        penalty = reduced(entropy + distance, self.encoder_channels, features, self.penalty_reduction)
        diagnostics = {"sample_entropy": per_sample.detach(), "batch_entropy": batch.detach()}
        # scaled after the straight-through step, so that the gradient is scaled too
        return Quantized(self.scale * (directions + (codes - directions).detach()), penalty, diagnostics=diagnostics)
