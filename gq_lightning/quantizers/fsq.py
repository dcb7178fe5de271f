"""Finite Scalar Quantization (FSQ), https://arxiv.org/abs/2309.15505: each channel is bounded and rounded to a few levels.

    features --forward, tokenize--> bound(features) rounded, gradients straight through the rounding
    tokens   --detokenize---------> the same point of the grid

A token's digits are its channels' levels, counted from 0, most significant first. For channels of 8, 8 and 5 levels, the levels 7, 0 and
3 are the token (7 * 8 + 0) * 5 + 3.

The grid is `vector_quantize_pytorch.FSQ`'s. Its bound differs from the paper's listing in two ways: it centres an even number of levels by
artanh instead of tan, and its levels reach a thousandth further instead of less far.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from gq_lightning.errors import UserError
from gq_lightning.quantizers.base import Quantized, Quantizer, check_tokens, checked, has_values, tokens_of_rate
from gq_lightning.quantizers.search import k_best_codewords

# the library sums a token's digits in float32
LARGEST_CODEBOOK = 2**20
# with more levels, the extra thousandth of the bound would be a level of its own
MOST_LEVELS = 1000


class FiniteScalarQuantizer(Quantizer):
    """Tokens are points of a fixed grid with values in [-1, 1]. Nothing is learned, and the penalty is 0.

    Args:
        bits_per_position: rate at each position of the grid, a whole number of tokens to within half a bit each. The attribute of this
            name is the rate of the actual grid: for levels 8, 8, 8, 5, 5, 5 and 16 bits it is 15.97.
        levels: levels of each channel of a token; their product is the codebook size, at most 2^20. 16, 16, 16, 16 is four channels of
            4 bits; 4, 4, 4, 4, 4, 4, 4, 4 is eight channels of 2 bits. An even number of levels is shifted half a step below the
            symmetric grid, so that 0 is a level (the paper). Two levels would have no centre, so a list that contains a 2 uses the
            symmetric grid of https://arxiv.org/abs/2411.19842 in all its channels.
    """

    def __init__(self, bits_per_position: int = 16, levels: Sequence[int] = (16, 16, 16, 16)) -> None:
        from vector_quantize_pytorch import FSQ  # imported late: it takes as long as torch

        super().__init__()
        levels = list(levels)
        if len(levels) > 20:
            raise UserError(f"levels: {len(levels)} channels make more than 2^20 codewords: use fewer, and more tokens per position")
        if not levels or any(not isinstance(level, int) or not 2 <= level <= MOST_LEVELS for level in levels):
            raise UserError(f"levels: {levels} must be whole numbers from 2 to {MOST_LEVELS}, at least one")
        self.codebook_size = math.prod(levels)
        if self.codebook_size > LARGEST_CODEBOOK:
            raise UserError(
                f"levels: {levels} make {self.codebook_size} codewords, more than 2^20: use fewer, and more tokens per position"
            )
        tokens, bits = tokens_of_rate(bits_per_position, self.codebook_size)
        self.levels, self.tokens_per_position, self.bits_per_position = levels, tokens, tokens * bits
        self.encoder_channels = self.latent_channels = tokens * len(levels)
        # the library's first channel is the least significant digit, so it gets our channels in reverse order;
        # return_indices=False keeps it from materialising the whole grid
        self.grid = FSQ(levels[::-1], preserve_symmetry=2 in levels, return_indices=False)
        self._points: Tensor | None = None  # the grid, (codebook_size, channels of a token), built when `candidates` needs it

    def forward(self, features: Tensor) -> Quantized:
        latents = self._round(features).flip(-1).flatten(-2)
        return Quantized(latents, latents.new_zeros(()))

    @torch.no_grad()
    def tokenize(self, features: Tensor) -> Tensor:
        points = self._round(features)
        if has_values(points) and points.isnan().any():
            raise UserError("the encoder's features are not finite: the training diverged, or the weights are damaged")
        return self.grid.codes_to_indices(points).long()

    @torch.no_grad()
    def candidates(self, features: Tensor, count: int) -> Tensor:
        """The points of the grid nearest to the features, with distances measured in levels."""
        levels = torch.tensor(self.levels, device=features.device)
        x = self._split(features)
        if self.grid.preserve_symmetry:
            places = (levels - 1) * (torch.tanh(x) + 1) / 2
        else:  # the library's bound before its rounding
            half = (levels - 1) * 1.001 / 2
            offset = torch.where(levels % 2 == 0, 0.5, 0.0)
            places = torch.tanh(x + torch.atanh(offset / half)) * half - offset + levels // 2
        if self._points is None or self._points.device != x.device:
            self._points = torch.cartesian_prod(*(torch.arange(level, device=x.device).float() for level in self.levels)).view(
                -1, len(levels)
            )
        tokens = k_best_codewords(places.flatten(0, -2), torch.ones_like(places).flatten(0, -2), self._points, count, prior_weight=0.0)
        return tokens.view(*places.shape[:-1], count)

    def detokenize(self, tokens: Tensor) -> Tensor:
        tokens = check_tokens(tokens, self.codebook_size, self.tokens_per_position)
        # flattened, because the library would take more axes for an image and move the last one
        return self.grid.indices_to_codes(tokens.flatten()).flip(-1).view(*tokens.shape[:-1], self.latent_channels)

    def _round(self, features: Tensor) -> Tensor:
        """(..., encoder_channels) to points of the grid (..., tokens_per_position, len(levels)), last channel first, float32."""
        return self.grid.quantize(self._split(features).flip(-1))

    def _split(self, features: Tensor) -> Tensor:
        """(..., encoder_channels) to (..., tokens_per_position, len(levels)), float32."""
        return checked(features, self.encoder_channels).unflatten(-1, (self.tokens_per_position, len(self.levels)))

    def extra_repr(self) -> str:
        return f"levels={self.levels}, {self.tokens_per_position} tokens per position, {self.bits_per_position:.2f} bits per position"
