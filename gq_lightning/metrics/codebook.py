"""Codebook usage (arXiv 2512.06609, section 5), and a check for collapse."""

import math
from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from gq_lightning.metrics.base import Metric, Number
from gq_lightning.quantizers.base import Quantizer, check_tokens

# larger codebooks have no histogram, which would take too much memory
LARGEST_HISTOGRAM = 2**22


class CodebookUsage(Metric):
    """Usage and perplexity from one histogram of all tokens. Raises UserError if a token is not in [0, codebook_size)."""

    numbers = (
        Number("codebook_usage", "codebook usage", ".2%", "higher"),
        Number("codebook_usage_expected", "usage of as many uniform tokens", ".2%", constant=True),
        Number("codebook_perplexity", "codebook perplexity", ".0f", "higher"),
    )
    protocol: ClassVar = {"codebook_note": f"usage is not measured for more than {LARGEST_HISTOGRAM} codewords"}
    histogram: Tensor

    def __init__(self, quantizer: Quantizer) -> None:
        super().__init__(quantizer)
        self.codebook_size = quantizer.codebook_size
        codewords = self.codebook_size if self.codebook_size <= LARGEST_HISTOGRAM else 0
        self.add_state("histogram", torch.zeros(codewords, dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, tokens: Tensor) -> None:
        check_tokens(tokens, self.codebook_size, tokens.shape[-1])
        if len(self.histogram):
            self.histogram = self.histogram + torch.bincount(tokens.flatten(), minlength=self.codebook_size)

    def compute(self) -> dict[str, float]:
        if not (tokens := int(self.histogram.sum())):
            return {}
        shares = self.histogram[self.histogram > 0].double() / tokens
        return {
            "codebook_usage": len(shares) / self.codebook_size,
            "codebook_usage_expected": expected_usage(self.codebook_size, tokens),
            "codebook_perplexity": math.exp(-(shares * shares.log()).sum().item()),
        }


def expected_usage(codebook_size: int, tokens: int) -> float:
    """Expected share of the codewords that uniform tokens hit, 1 - (1 - 1/K)^T: few tokens cannot reach 1, however good the code is."""
    if tokens == 0 or codebook_size == 1:
        return float(tokens > 0)
    return -math.expm1(tokens * math.log1p(-1 / codebook_size))


def collapse(values: Mapping[str, float]) -> str | None:
    """A warning if the codebook has collapsed, else None: usage under 1 %, unless there were too few tokens to expect more."""
    if "codebook_usage" not in values:
        return None
    used, expected = values["codebook_usage"], values["codebook_usage_expected"]
    if used >= min(0.01, expected / 4):
        return None
    return f"the codebook has collapsed: the tokens use {used:.3%} of its codewords; as many uniform tokens would use {expected:.2%}"
