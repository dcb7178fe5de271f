"""Lookup-free quantization (LFQ), https://arxiv.org/abs/2310.05737 (MAGVIT-v2), section 3.1.

    features --tokenize----> the signs of each token's channels, as the bits of a number
             --forward-----> the signs, gradients straight through; commitment and entropy penalty
    tokens   --detokenize--> the signs, -1 and +1

`vector_quantize_pytorch.LFQ` is the well-known implementation, and tests compare tokens and loss terms with it on one process. It is not
used here because it drops the result of its all-reduce and divides the local distribution by the number of ranks (version 1.32), gives 0
the sign -1, has a penalty in training mode only, and holds positions x tokens x codebook_size probabilities at once.
"""

from torch import Tensor

from gq_lightning.errors import UserError
from gq_lightning.quantizers.base import PenaltyReduction, Quantized, checked, reduced
from gq_lightning.quantizers.signs import SignQuantizer, entropies, signs

# the batch's entropy enumerates all codes
LARGEST_CODEBOOK = 2**20


class LookupFreeQuantizer(SignQuantizer):
    """One sign bit per channel; tokens of log2(codebook_size) bits each. Nothing is learned.

    The penalty is

        commitment * mean (z - sign(z))^2 + entropy_weight * (mean H(p) - diversity_gamma * mean over tokens of H(mean of p)),

    where the first mean is over all channels of all positions of the batch and the second over all tokens of all positions. p is a
    token's soft assignment to its 2^b codes, the softmax over c in {-1, +1}^b of -|z - c|^2 / temperature, so that P(bit i is 1) =
    sigmoid(4 z_i / temperature). Its entropy is in nats, from 0 to b ln 2.

    The mean of p is over the positions of the global batch, separately for each token of a position; the entropies of these means are
    averaged. The published code pools the tokens into one mean, whose entropy has the same range, but pooled tokens can look diverse
    although each is constant.

    Args:
        bits_per_position: rate at each position of the grid, and number of features and latents. A whole number of tokens.
        codebook_size: codes of one token, a power of two, at most 2^20.
        entropy_weight: weight of the entropy terms; a position's entropy is minimised and the batch's maximised.
        commitment: weight of the distance from features to their signs. The published code has 0.025; the text of the Gaussian Quant paper
            (https://arxiv.org/abs/2512.06609) says 0.25.
        diversity_gamma: weight of the batch's entropy relative to a position's.
        temperature: of the soft assignment. At the published 0.01 only features within about 0.01 of 0 are uncertain, and only they
            receive a gradient from the entropies.
        penalty_reduction: `element_mean` (published), or `image_sum`: distances summed over positions and channels, entropies over
            positions and tokens of an image, averaged over images. That is positions * channels and positions * tokens times as large.
    """

    def __init__(
        self,
        bits_per_position: int = 16,
        codebook_size: int = 256,
        entropy_weight: float = 0.1,
        commitment: float = 0.025,
        diversity_gamma: float = 1.0,
        temperature: float = 0.01,
        penalty_reduction: PenaltyReduction = "element_mean",
    ) -> None:
        arguments = (bits_per_position, codebook_size, entropy_weight, commitment, diversity_gamma, temperature, penalty_reduction)
        super().__init__(*arguments)
        if codebook_size > LARGEST_CODEBOOK:
            raise UserError(f"codebook_size: {codebook_size} is more than 2^20: use a smaller one, and more tokens per position")

    def forward(self, features: Tensor) -> Quantized:
        values = checked(features, self.encoder_channels)
        codes = signs(values).detach()
        per_sample, batch = entropies((4 / self.temperature * values).unflatten(-1, (self.tokens_per_position, -1)))
        distance = self.commitment * (values - codes).square().mean()
        entropy = self.entropy_weight * (per_sample - self.diversity_gamma * batch) / self.tokens_per_position
        penalty = reduced(distance, self.encoder_channels, features, self.penalty_reduction)
        penalty = penalty + reduced(entropy, self.tokens_per_position, features, self.penalty_reduction)
        diagnostics = {"sample_entropy": per_sample.detach(), "batch_entropy": batch.detach()}
        return Quantized(values + (codes - values).detach(), penalty, diagnostics=diagnostics)
