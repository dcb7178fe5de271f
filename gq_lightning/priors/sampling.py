"""Draws tokens from a prior, symbol by symbol. With a cache of keys and values, each step costs one position.

A picture's random numbers depend only on the seed and its number. So it is the same in any batch and on any rank, except that rounding in
batched arithmetic may decide between symbols that are equally likely to the last bit.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gq_lightning.data.order import derived_seed
from gq_lightning.errors import UserError
from gq_lightning.priors.module import Prior

LARGEST_GUIDANCE = 10**6  # float32 logits stay finite


@dataclass(frozen=True)
class Sampling:
    """How a symbol is drawn from its probabilities.

    Attributes:
        cfg: classifier-free guidance, https://arxiv.org/abs/2207.12598: the logits are those without a class plus `cfg` times the
            difference that the class makes. 1 is no guidance and half the work.
        top_k: use only the k likeliest symbols; None uses all.
        top_p: use only the likeliest symbols that together have at least this probability.
        temperature: divides the logits.
    """

    cfg: float = 1.0
    top_k: int | None = None
    top_p: float = 1.0
    temperature: float = 1.0

    def __post_init__(self) -> None:
        for name, fits, wanted in (
            ("cfg", 0 <= self.cfg <= LARGEST_GUIDANCE, f"a number from 0 to {LARGEST_GUIDANCE}; 1 is no guidance"),
            ("top_k", self.top_k is None or self.top_k >= 1, "a number of symbols, at least 1"),
            ("top_p", 0 < self.top_p <= 1, "a probability above 0 and up to 1"),
            ("temperature", 0 < self.temperature < float("inf"), "a number above 0; 1 changes nothing"),
        ):
            if not fits:
                raise UserError(f"--{name} {getattr(self, name)}: give {wanted}")


PLAIN = Sampling()


def noise(prior: Prior, seed: int, numbers: Sequence[int]) -> Tensor:
    """Uniform random numbers for each symbol of the pictures: (len(numbers), h * w, n * digits) float64 in [0, 1), on the CPU."""
    shape = (prior.positions, prior.symbols)
    return torch.stack(
        [torch.rand(shape, generator=torch.Generator().manual_seed(derived_seed(seed, number)), dtype=torch.float64) for number in numbers]
    )


@torch.no_grad()
def sample(
    prior: Prior, labels: Tensor, uniform: Tensor, sampling: Sampling = PLAIN, given: Tensor | None = None, cached: bool = True
) -> Iterator[Tensor]:
    """Draws pictures' symbols, position by position: yields (B, n * digits) int64, h * w times.

    Args:
        labels: (B,), -1 for no class.
        uniform: (B, h * w, n * digits) in [0, 1), see `noise`.
        given: (B, k, n * digits), symbols of the first k positions, which are kept.
        cached: cache keys and values; without, each symbol costs a whole forward pass, with the same result.
    """
    guided = sampling.cfg != 1 and bool(prior.classes)
    if guided:
        labels = torch.cat([labels, torch.full_like(labels, -1)])
    body, _ = prior.caches()
    symbols = uniform.new_empty(len(uniform), 0, prior.symbols, dtype=torch.int64).to(labels.device)
    uniform = uniform.to(labels.device)
    kept = 0 if given is None else given.shape[1]
    for position in range(prior.positions):
        before = symbols if not cached else symbols[:, max(position - 1, 0) :]
        before = torch.cat([before, before]) if guided else before
        context = prior.context(before, labels, body if cached else None)[:, -1]
        if given is not None and position < kept:
            drawn = given[:, position].to(labels.device)
        else:
            drawn = _position(prior, context, uniform[:, position], sampling, guided, cached)
        symbols = torch.cat([symbols, drawn.unsqueeze(1)], dim=1)
        yield drawn


def _position(prior: Prior, context: Tensor, uniform: Tensor, sampling: Sampling, guided: bool, cached: bool) -> Tensor:
    """Draws the symbols (B, n * digits) of one position."""
    drawn, head, digits = uniform.new_empty(len(uniform), 0, dtype=torch.int64), prior.caches()[1], prior.spelling.digits
    for place in range(prior.symbols):
        before = drawn if not cached else drawn[:, max(place - 1, 0) :]
        before = torch.cat([before, before]) if guided else before
        logits = prior.follow(context, before, head if cached else None)[:, -1]
        if guided:
            with_class, without = logits.chunk(2)
            logits = without + sampling.cfg * (with_class - without)
        if (impossible := prior.spelling.impossible(drawn[:, place - place % digits :])) is not None:
            logits = logits.masked_fill(impossible, -torch.inf)
        drawn = torch.cat([drawn, draw(logits, uniform[:, place], sampling).unsqueeze(1)], dim=1)
    return drawn


def draw(logits: Tensor, uniform: Tensor, sampling: Sampling) -> Tensor:
    """Draws symbols (B,) from logits (B, base) and numbers (B,) in [0, 1), by the inverse of the cumulative probabilities."""
    logits = logits.double()
    logits = (logits - logits.amax(-1, keepdim=True)) / sampling.temperature  # finite at any temperature, where it matters
    if sampling.top_k is not None and sampling.top_k < logits.shape[-1]:
        logits = logits.masked_fill(logits < logits.topk(sampling.top_k).values[:, -1:], -torch.inf)
    probabilities = logits.softmax(-1)
    if sampling.top_p < 1:
        ordered, places = probabilities.sort(dim=-1, descending=True, stable=True)
        ordered = ordered.masked_fill(ordered.cumsum(-1) - ordered >= sampling.top_p, 0)
        probabilities = torch.zeros_like(probabilities).scatter(-1, places, ordered)
    cumulative = probabilities.cumsum(-1)
    return (cumulative <= (uniform.double() * cumulative[:, -1]).unsqueeze(-1)).sum(-1).clamp(max=logits.shape[-1] - 1)
