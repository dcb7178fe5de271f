"""Small priors of every kind, for tests."""

from typing import Any

import torch

from gq_lightning.priors import Prior

# grid, codebook size, classes, largest vocabulary: one softmax, halves, several tokens in turn, a codebook that digits do not fill
SHAPES: dict[str, tuple[tuple[int, int, int], int, int, int]] = {
    "one softmax": ((2, 3, 1), 300, 0, 512),
    "halves": ((2, 2, 1), 65536, 3, 256),
    "tokens in turn": ((2, 2, 3), 16, 2, 16),
    "halves in turn, unfilled": ((2, 2, 2), 50, 2, 8),
}


def make(shape: str, **options: Any) -> Prior:
    """With logits far from uniform."""
    torch.manual_seed(0)
    grid, codebook_size, classes, largest = SHAPES[shape]
    names = [f"class {number}" for number in range(classes)]
    prior = Prior(
        grid, codebook_size, 8, "f" * 64, names, width=16, layers=2, heads=2, head_layers=1, largest_vocabulary=largest, **options
    )
    with torch.no_grad():
        for parameter in (prior.logits, prior.symbol.weight, prior.label.weight, prior.position.weight):
            parameter.normal_()
    return prior.eval().requires_grad_(False)


def some(prior: Prior, count: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(prior.codebook_size, (count, *prior.grid), generator=generator)
    return tokens, torch.randint(-1, len(prior.classes), (count,), generator=generator)
