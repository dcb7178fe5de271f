"""Tokens as short sequences of symbols from a small vocabulary: 65536 codewords are 256 cells of 256.

tokens (..., n) --split--> symbols (..., n * digits), each in [0, base), the leading digit of a token first --join--> tokens

The digits are meaningful if the codebook is ordered. Levels and signs are; codewords are with `order: tree`.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from gq_lightning.errors import UserError


@dataclass(frozen=True)
class Symbols:
    """The split of a codebook's tokens into symbols: `digits` for each token, from a vocabulary of `base`, a power of two if there are
    several digits."""

    codebook_size: int
    digits: int
    base: int

    @classmethod
    def of(cls, codebook_size: int, largest_vocabulary: int) -> "Symbols":
        """The fewest digits whose vocabulary is at most `largest_vocabulary`. Raises UserError."""
        if largest_vocabulary < 2:
            raise UserError(f"model.prior.largest_vocabulary {largest_vocabulary}: give at least 2")
        if codebook_size <= largest_vocabulary:
            return cls(codebook_size, 1, codebook_size)
        bits, most = (codebook_size - 1).bit_length(), largest_vocabulary.bit_length() - 1
        digits = math.ceil(bits / most)
        return cls(codebook_size, digits, 2 ** math.ceil(bits / digits))

    def split(self, tokens: Tensor) -> Tensor:
        """(..., n) to (..., n * digits)."""
        powers = torch.tensor([self.base**digit for digit in reversed(range(self.digits))], device=tokens.device)
        return (tokens.unsqueeze(-1) // powers % self.base).flatten(-2)

    def join(self, symbols: Tensor) -> Tensor:
        """(..., n * digits) to (..., n)."""
        powers = torch.tensor([self.base**digit for digit in reversed(range(self.digits))], device=symbols.device)
        return (symbols.unflatten(-1, (-1, self.digits)) * powers).sum(-1)

    def impossible(self, before: Tensor) -> Tensor | None:
        """Mask (..., base) of the symbols with which no token continues whose leading digits are `before` (..., k); None if all can
        follow."""
        if self.base**self.digits == self.codebook_size:
            return None
        rest = self.digits - 1 - before.shape[-1]
        prefix = before.new_zeros(before.shape[:-1])
        for digit in before.unbind(-1):
            prefix = prefix * self.base + digit
        smallest = (prefix.unsqueeze(-1) * self.base + torch.arange(self.base, device=before.device)) * self.base**rest
        return smallest >= self.codebook_size
