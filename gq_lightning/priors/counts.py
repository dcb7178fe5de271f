"""Baselines for a prior: independent tokens with their measured frequencies, and uniform tokens."""

import math

import numpy as np

from gq_lightning.tokens.token_set import TokenSet


def uniform_bits_per_pixel(tokens: TokenSet) -> float:
    """Bits per pixel of uniform tokens, which is the tokenizer's rate."""
    header = tokens.header
    return header.grid[2] * math.log2(header.codebook_size) / header.downsampling**2


def counted_bits_per_pixel(training: TokenSet, held_out: TokenSet) -> float:
    """Bits per pixel of held-out pictures under an order-0 model. A token's probability is its count among the training tokens at the same
    place within a position, plus one half (Krichevsky and Trofimov), so that no token is impossible."""
    counts, found = training.counts() + 0.5, held_out.counts()
    bits = -(found * np.log2(counts / counts.sum(axis=1, keepdims=True))).sum()
    height, width, _ = held_out.header.grid
    return float(bits) / (len(held_out) * height * width * held_out.header.downsampling**2)
