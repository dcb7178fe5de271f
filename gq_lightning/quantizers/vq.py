"""The learned codebook of VQ-VAE, https://arxiv.org/abs/1711.00937, as in VQGAN, https://arxiv.org/abs/2012.09841.

    features --tokenize----> the nearest codeword of each token's group_size channels
             --forward-----> the same codewords, gradients straight through to the features; commitment and codebook loss
    tokens   --detokenize--> those codewords

`vector_quantize_pytorch.VectorQuantize` is the well-kept implementation, and tests compare tokens, moving averages and gradients with it.
It is not used here for three reasons. Each of its steps writes the N x K distances, their temporaries and an int64 one-hot: at K = 65 536,
a step of 1 024 vectors on one CPU core takes 5 to 8 s and 1.6 GB, against 0.3 s and less than 0.1 GB here. Its learned codebook has one
weight for both the commitment and the codebook loss. And it checks for other ranks only on construction.
"""

from typing import Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from gq_lightning.distributed import is_distributed, rows_of_all_ranks
from gq_lightning.errors import UserError
from gq_lightning.quantizers.base import (
    PenaltyReduction,
    Quantized,
    Quantizer,
    check_reduction,
    check_tokens,
    checked,
    reduced,
    tokens_of_rate,
)
from gq_lightning.quantizers.codebook import check_codebook
from gq_lightning.quantizers.search import best_codewords, k_best_codewords

USAGE_DECAY = 0.99
KMEANS_ITERATIONS = 10
SMOOTHING = 1e-5


class VectorQuantizer(Quantizer):
    """A learned codebook of K x group_size values, shared by all tokens of a position.

    The penalty is commitment * mean (z - sg(c))^2 + codebook_weight * mean (sg(z) - c)^2, where the means are over all channels of all
    positions of the batch and sg stops gradients. The defaults are those of VQGAN's code, which gives the commitment the weight 1 and the
    codebook loss the 0.25 that the paper gives to the commitment ("legacy"). The reconstruction loss is a sum over pixels, so these means
    pull the features only gently. The codebook hardly depends on its weight, since Adam ignores the scale of the only loss it receives.

    Args:
        bits_per_position: rate at each position of the grid. A whole number of tokens of log2(codebook_size) bits.
        codebook_size: K, the number of codewords.
        group_size: channels of one token; features and latents have tokens_per_position times as many.
        commitment: weight of the loss that pulls features to their codewords.
        codebook_weight: weight of the loss that pulls codewords to their features; no effect with `ema_decay`.
        penalty_reduction: `element_mean` (published), or `image_sum`: both losses summed over the positions and channels of an image and
            averaged over images, as the reconstruction loss is over pixels. That is positions * channels times as large.
        codebook_start: `uniform` draws codewords between -1 / K and 1 / K (published). For large K they are so close to 0 and to each
            other that features choose few of them. `normal` draws them from N(0, 1), the scale of features. One measurement: on
            photographs (ViT, K = 4096, 300 steps, image_sum, commitment 0.25, codebook_weight 1) 20 batches used 6 codewords after the
            uniform start, at L1 0.29, and 401 after the normal start, at 0.15. No effect with `kmeans_init`.
        ema_decay: None learns the codebook by gradient (VQGAN). A number makes each codeword the moving average, with this decay per
            step, of the features that chose it (the VQ-VAE paper's appendix A.1, with Laplace smoothing as in vector-quantize-pytorch).
        kmeans_init: start from the clusters of the first training batch (10 iterations) instead of noise.
        dead_code_threshold: replace a codeword by a random feature of the batch when the moving average of its uses per step, over all
            ranks, falls below this number (equal use would give tokens of the global batch / K). None keeps all codewords.

    Moving averages, clusters and replacements use the global batch, are equal on all ranks, and happen only in `forward`, in training mode
    with gradients enabled.
    """

    codebook: Tensor
    usage: Tensor
    sums: Tensor
    initialised: Tensor

    training_arguments = frozenset(
        {"commitment", "codebook_weight", "penalty_reduction", "codebook_start", "ema_decay", "kmeans_init", "dead_code_threshold"}
    )

    def __init__(
        self,
        bits_per_position: int = 16,
        codebook_size: int = 65536,
        group_size: int = 16,
        commitment: float = 1.0,
        codebook_weight: float = 0.25,
        penalty_reduction: PenaltyReduction = "element_mean",
        codebook_start: Literal["uniform", "normal"] = "uniform",
        ema_decay: float | None = None,
        kmeans_init: bool = False,
        dead_code_threshold: float | None = None,
    ) -> None:
        super().__init__()
        check_codebook(codebook_size, group_size)
        if not commitment >= 0 or not codebook_weight > 0:
            raise UserError(f"commitment must be >= 0 and codebook_weight > 0, not {commitment} and {codebook_weight}")
        if ema_decay is not None and not 0 < ema_decay < 1:
            raise UserError(f"ema_decay: {ema_decay}: give a number between 0 and 1, or null to learn the codebook by gradient")
        if dead_code_threshold is not None and not dead_code_threshold > 0:
            raise UserError(f"dead_code_threshold: {dead_code_threshold}: give a positive number, or null to keep all codewords")
        if codebook_start not in ("uniform", "normal"):
            raise UserError(f"codebook_start: {codebook_start!r}: give 'uniform' or 'normal'")
        self.penalty_reduction = check_reduction(penalty_reduction)
        tokens, bits = tokens_of_rate(bits_per_position, codebook_size)
        self.encoder_channels = self.latent_channels = tokens * group_size
        self.codebook_size, self.tokens_per_position, self.bits_per_position = codebook_size, tokens, tokens * bits
        self.group_size, self.commitment, self.codebook_weight = group_size, float(commitment), float(codebook_weight)
        self.ema_decay, self.dead_code_threshold = ema_decay, dead_code_threshold
        codebook = torch.empty(codebook_size, group_size, dtype=torch.float32)
        if codebook_start == "uniform":
            codebook.uniform_(-1 / codebook_size, 1 / codebook_size)
        else:
            codebook.normal_()
        if ema_decay is None:
            self.codebook = nn.Parameter(codebook)
        else:
            self.register_buffer("codebook", codebook)
            self.register_buffer("sums", codebook.clone())
        if ema_decay is not None or dead_code_threshold is not None:
            self.register_buffer("usage", torch.ones(codebook_size, dtype=torch.float32))
        if kmeans_init:
            self.register_buffer("initialised", torch.zeros((), dtype=torch.bool))

    def forward(self, features: Tensor) -> Quantized:
        vectors = self.group(features)
        learning = self.training and torch.is_grad_enabled()
        if learning and "initialised" in self._buffers and not self.initialised:
            self._start_from_clusters(vectors.detach().flatten(0, -2))
        tokens = self._nearest(vectors)
        codewords = F.embedding(tokens, self.codebook)
        distance = self.commitment * (vectors - codewords.detach()).square().mean()
        if self.ema_decay is None:
            distance = distance + self.codebook_weight * (codewords - vectors.detach()).square().mean()
        latents = vectors + (codewords - vectors).detach()
        if learning and "usage" in self._buffers:
            self._follow(vectors.detach().flatten(0, -2), tokens.flatten())
        return Quantized(latents.flatten(-2), reduced(distance, self.encoder_channels, features, self.penalty_reduction))

    @torch.no_grad()
    def tokenize(self, features: Tensor) -> Tensor:
        return self._nearest(self.group(features))

    @torch.no_grad()
    def candidates(self, features: Tensor, count: int) -> Tensor:
        vectors = self.group(features)
        flat = vectors.flatten(0, -2)
        tokens = k_best_codewords(flat, torch.ones_like(flat), self.codebook.detach(), count, prior_weight=0.0)
        return tokens.view(*vectors.shape[:-1], count)

    def detokenize(self, tokens: Tensor) -> Tensor:
        tokens = check_tokens(tokens, self.codebook_size, self.tokens_per_position)
        return F.embedding(tokens, self.codebook.detach()).flatten(-2)

    def group(self, features: Tensor) -> Tensor:
        """(..., encoder_channels) to (..., tokens_per_position, group_size), in float32 whatever the encoder's precision."""
        return checked(features, self.encoder_channels).unflatten(-1, (self.tokens_per_position, self.group_size))

    def _nearest(self, vectors: Tensor) -> Tensor:
        return nearest(vectors.detach().flatten(0, -2), self.codebook.detach()).view(vectors.shape[:-1])

    @torch.no_grad()
    def _start_from_clusters(self, vectors: Tensor) -> None:
        codebook, counts = kmeans(vectors, self.codebook_size)
        self.codebook.copy_(codebook)
        if "usage" in self._buffers:
            self.usage.copy_(counts.clamp(min=1))
        if self.ema_decay is not None:
            self.sums.copy_(self.codebook * self.usage[:, None])
        self.initialised.fill_(True)

    @torch.no_grad()
    def _follow(self, vectors: Tensor, tokens: Tensor) -> None:
        """Updates the moving averages, and from them the codebook, with this step's vectors (N, group_size) and tokens (N,)."""
        counts, sums = cluster_totals(vectors, tokens, self.codebook_size)
        self.usage.lerp_(counts.float(), 1 - (self.ema_decay or USAGE_DECAY))
        if self.ema_decay is not None:
            self.sums.lerp_(sums.float(), 1 - self.ema_decay)
            total = self.usage.sum()
            smoothed = (self.usage + SMOOTHING) / (total + self.codebook_size * SMOOTHING) * total
            self.codebook.copy_(self.sums / smoothed[:, None])
        if self.dead_code_threshold is None:
            return
        dead = (self.usage < self.dead_code_threshold).nonzero().flatten()
        if len(dead):
            replacements = sample(vectors, len(dead))
            dead = dead[: len(replacements)]
            self.codebook[dead] = replacements
            # twice the threshold gives a new codeword some steps in which to be chosen
            self.usage[dead] = 2 * self.dead_code_threshold
            if self.ema_decay is not None:
                self.sums[dead] = 2 * self.dead_code_threshold * replacements

    def _apply(self, fn, recurse: bool = True):  # type: ignore[no-untyped-def]
        # rounding would change the codewords, and averages would not move in 8 bits, so all stays float32 under .to(dtype)
        kept = {name: value.data for name, value in self.state_dict(keep_vars=True).items()}
        super()._apply(fn, recurse)
        for name, value in self.state_dict(keep_vars=True).items():
            if value.dtype != kept[name].dtype:
                value.data = kept[name].to(value.device)
        return self

    def extra_repr(self) -> str:
        learned = "gradient" if self.ema_decay is None else f"ema_decay={self.ema_decay:g}"
        return f"codebook of {self.codebook_size} x {self.group_size} by {learned}, {self.tokens_per_position} tokens per position"


def nearest(vectors: Tensor, codebook: Tensor) -> Tensor:
    """Index (N,) of the codeword (K, d) nearest to each vector (N, d); ties go to the lowest index."""
    return best_codewords(vectors, torch.ones_like(vectors), codebook, prior_weight=0.0)


def cluster_totals(vectors: Tensor, tokens: Tensor, codebook_size: int) -> tuple[Tensor, Tensor]:
    """Uses (K,) of each token and the sum (K, d) of its vectors over the global batch, in float64, so that the order does not matter."""
    counted = torch.cat([vectors, torch.ones_like(vectors[:, :1])], dim=1).double()
    totals = counted.new_zeros(codebook_size, counted.shape[1]).index_add_(0, tokens, counted)
    if is_distributed():
        dist.all_reduce(totals)
    return totals[:, -1], totals[:, :-1]


def sample(vectors: Tensor, count: int) -> Tensor:
    """Up to `count` distinct vectors (N, d) of the global batch, drawn by rank 0 for all ranks."""
    vectors = rows_of_all_ranks(vectors)
    drawn = vectors[torch.randperm(len(vectors))[:count].to(vectors.device)]
    if is_distributed():
        dist.broadcast(drawn, src=0)
    return drawn


def kmeans(vectors: Tensor, clusters: int) -> tuple[Tensor, Tensor]:
    """Centres (K, d) and sizes (K,) of clusters of the global batch, by Lloyd's algorithm from random vectors of the batch.

    In a batch of fewer than K vectors, each has its own cluster; the remaining centres are placed next to them, at a hundredth of the
    batch's spread.
    """
    centres = sample(vectors, clusters)
    if (missing := clusters - len(centres)) > 0:
        beside = centres[torch.arange(missing, device=centres.device) % len(centres)]
        noise = torch.randn(beside.shape).to(beside)
        if is_distributed():
            dist.broadcast(noise, src=0)
        centres = torch.cat([centres, beside + 0.01 * centres.std(dim=0, correction=0) * noise])
    counts = centres.new_zeros(clusters)
    for _ in range(KMEANS_ITERATIONS):
        counts, sums = cluster_totals(vectors, nearest(vectors, centres), clusters)
        centres = torch.where(counts[:, None] > 0, (sums / counts.clamp(min=1)[:, None]).float(), centres)
    return centres, counts
