"""Measures how often the nearest codeword is farther than sigma from the posterior's mean, in one dimension, and compares with the bounds.

    python experiments/theory.py [--budget 26] [--seed 0] [--out experiments/results/theory]

A posterior N(mu, sigma^2) costs R nats, KL(N(mu, sigma^2) || N(0, 1)); the codebook has K = round(exp(R + t)) values drawn from N(0, 1),
and t is taken again from the rounded K.

search            every trial draws a codebook and finds the nearest codeword by gq_lightning.quantizers.search.best_codewords;
                  the posteriors of one rate and K share it
order statistics  every trial draws the least of K distances by the inverse of its distribution: for a K so large that the
                  2^budget codewords of a point make fewer than 64 trials

paper  the upper bound with c1 = 8.12 where |mu| sigma <= c1, the lower one with c2 = 1.50 where |mu| + sigma <= c2
sharp  the same two formulas with c1 = 0 and c2 = sigma sqrt(1 + mu^2), which hold for every posterior, see experiments/README.md

A point violates a bound if its whole confidence interval is beyond it; the exit status is then 1. The intervals are of 95 % for the paper's
bounds and of 99.99 % for the sharp ones, which are so tight that some of hundreds of points would violate them by chance at 95 %.
Writes theory.json, theory.png and theory.svg.
"""

import argparse
import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from scipy.optimize import brentq
from scipy.stats import binomtest, ncx2
from torch import Tensor

from arms import ROOT
from benchmarks.machine import machine, write
from bounds import deviation_lower_bound, deviation_probability, deviation_upper_bound
from gq_lightning.quantizers.gaussian import kl_bits
from gq_lightning.quantizers.search import best_codewords

C1, C2 = 8.12, 1.50
MEANS = (0.0, 0.7, 1.4, 3.0)
BITS = (15, 11)
# closer where the probability falls from 1 to 0
TS = (*range(-10, -3), *(i / 2 for i in range(-6, 9)), *range(5, 16))
TRIALS = 4000
FEWEST = 64
CONFIDENCE, SHARP_CONFIDENCE = 0.95, 0.9999


@dataclass(frozen=True)
class Posterior:
    """N(mean, sigma^2), which costs `nats`."""

    mean: float
    sigma: float
    nats: float


def posterior(mean: float, bits: float) -> Posterior:
    """The one with sigma < 1 that costs `bits`.

    Raises:
        ValueError: the mean alone costs more.
    """

    def excess(log_sigma: float) -> float:
        return kl_bits(torch.tensor(mean, dtype=torch.float64), torch.tensor(2 * log_sigma, dtype=torch.float64)).item() - bits

    if excess(0.0) >= 0:
        raise ValueError(f"a mean of {mean:g} costs {excess(0.0) + bits:g} bits, and no sigma < 1 makes it {bits:g}")
    nats = bits * math.log(2)
    return Posterior(mean, math.exp(brentq(excess, -nats - 1, 0.0, xtol=1e-14)), nats)


def searched(posteriors: list[Posterior], size: int, trials: int, generator: torch.Generator) -> Tensor:
    """(trials, posteriors): distances from the means to the nearest codewords of codebooks drawn anew."""
    mean = torch.tensor([[each.mean] for each in posteriors], dtype=torch.float64)
    variance = torch.tensor([[each.sigma**2] for each in posteriors], dtype=torch.float64)
    found = torch.empty(trials, len(posteriors), dtype=torch.float64)
    for row in found:
        codebook = torch.randn(size, 1, generator=generator)
        row.copy_((codebook[best_codewords(mean, variance, codebook, prior_weight=0.0)] - mean).abs()[:, 0])
    return found


def ordered(posteriors: list[Posterior], size: int, trials: int, generator: torch.Generator) -> Tensor:
    """The same by order statistics: a squared distance is noncentral chi-square, and the least of K exceeds d^2 with (1 - F)^K."""
    survival = torch.rand(trials, len(posteriors), generator=generator, dtype=torch.float64)
    share = -torch.expm1(survival.log() / size)
    return torch.from_numpy(ncx2.ppf(share, 1, torch.tensor([each.mean**2 for each in posteriors]))).sqrt()


def measure(posteriors: list[Posterior], size: int, budget: int, seed: int) -> list[dict[str, Any]]:
    """A point per posterior."""
    generator = torch.Generator().manual_seed(seed)
    trials, method = min(TRIALS, 2**budget // size), "search"
    if trials < FEWEST:
        trials, method = TRIALS, "order statistics"
    sample: Callable[..., Tensor] = searched if method == "search" else ordered
    distances = sample(posteriors, size, trials, generator)
    return [judged(each, size, method, row) for each, row in zip(posteriors, distances.T, strict=True)]


def judged(it: Posterior, size: int, method: str, distances: Tensor) -> dict[str, Any]:
    """The measured and the exact probability of one posterior, and whether it is within the bounds."""
    t, trials, deviations = math.log(size) - it.nats, len(distances), int((distances > it.sigma).sum())
    test = binomtest(deviations, trials)
    interval, wide = ([float(end) for end in test.proportion_ci(level)] for level in (CONFIDENCE, SHARP_CONFIDENCE))
    applies = {"lower": abs(it.mean) + it.sigma <= C2, "upper": abs(it.mean) * it.sigma <= C1}
    paper, sharp = bounds(t, C1, C2), bounds(t, 0.0, it.sigma * math.sqrt(1 + it.mean**2))
    exact, log_exact = (deviation_probability(it.mean, it.sigma, size, log=log).item() for log in (False, True))
    within = {side: not applies[side] or not beyond(interval, side, paper[side]) for side in paper}
    return {
        **{"mu": it.mean, "sigma": it.sigma, "R": it.nats, "K": size, "t": t, "method": method},
        **{"trials": trials, "deviations": deviations, "measured": deviations / trials, "interval": interval},
        **{"exact": exact, "log_exact": log_exact, "covered": interval[0] <= exact <= interval[1]},
        "paper": {**paper, "applies": applies, "within": all(within.values())},
        "sharp": {**sharp, "within": not any(beyond(wide, side, sharp[side]) for side in sharp)},
    }


def bounds(t: float, c1: float, c2: float) -> dict[str, float]:
    return {"lower": deviation_lower_bound(-t, c2).item(), "upper": deviation_upper_bound(t, c1).item()}


def beyond(interval: list[float], side: str, bound: float) -> bool:
    return interval[1] < bound if side == "lower" else interval[0] > bound


def verdict(points: list[dict[str, Any]]) -> tuple[bool, str]:
    """Whether every point is within the bounds, and a sentence about it."""
    paper, sharp = (sum(not point[name]["within"] for point in points) for name in ("paper", "sharp"))
    lower = sum(point["paper"]["applies"]["lower"] for point in points)
    missed = sum(not point["covered"] for point in points)
    sentence = (
        f"Of {len(points)} points {paper or 'none'} violate the paper's bounds, of which the lower applies to {lower}, "
        f"and {sharp or 'none'} the sharp ones; {missed} of the 95 % intervals miss the exact probability."
    )
    return not paper and not sharp, sentence


def table(points: list[dict[str, Any]]) -> Table:
    """A row per rate and K; the measured probability of each mean, the exact one of the first."""
    means = list(dict.fromkeys(point["mu"] for point in points))
    shown = Table("bits", "t", "K", "trials", *(f"mu {mean:g}" for mean in means), f"exact, {means[0]:g}", "lower", "upper", "within")
    rows: dict[tuple[float, int], list[dict[str, Any]]] = {}
    for point in points:
        rows.setdefault((point["R"], point["K"]), []).append(point)
    for (nats, size), row in rows.items():
        first = row[0]
        trials = f"{first['trials']}{'' if first['method'] == 'search' else ' *'}"
        cells = [f"{nats / math.log(2):g}", f"{first['t']:.2f}", f"{size:,}", trials, *(f"{point['measured']:.4f}" for point in row)]
        exact = f"{first['exact']:.4f}" if first["exact"] > 1e-4 else f"e^{first['log_exact']:.3g}"
        lower = f"{first['paper']['lower']:.4f}" if first["paper"]["lower"] > 0 else "-"
        within = all(point[name]["within"] for point in row for name in ("paper", "sharp"))
        shown.add_row(*cells, exact, lower, f"{first['paper']['upper']:.4f}", "yes" if within else "NO")
    shown.caption = "* by order statistics; bounds of the paper"
    return shown


def sizes(nats: float) -> list[int]:
    return sorted({max(1, round(math.exp(nats + t))) for t in TS})


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Measures how often Gaussian Quant misses by more than sigma, beside the paper's bounds.")
    parser.add_argument("--budget", type=int, default=26, help="log2 of the codewords drawn for a point")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=ROOT / "experiments/results/theory", help="folder of theory.json, .png and .svg")
    options = parser.parse_args(arguments)
    begin, points = time.perf_counter(), []
    cells = [(group, size) for bits in BITS for group in [[posterior(mean, bits) for mean in MEANS]] for size in sizes(group[0].nats)]
    for i, (group, size) in enumerate(track(cells, description="theory", console=Console(stderr=True))):
        points += measure(group, size, options.budget, 1000 * options.seed + i)
    holds, sentence = verdict(points)
    Console(width=140).print(table(points), sentence)
    options.out.mkdir(parents=True, exist_ok=True)
    command = f"python experiments/theory.py --budget {options.budget} --seed {options.seed}"
    facts = {"command": command, "machine": machine(), "seconds": round(time.perf_counter() - begin, 1), "c1": C1, "c2": C2}
    write({**facts, "verdict": sentence, "holds": holds, "points": points}, options.out / "theory.json")
    from looks import save
    from theory_figure import figure  # matplotlib is wanted by nothing else

    save(figure(points, C1, C2), [options.out / f"theory.{suffix}" for suffix in ("png", "svg")])
    return 0 if holds else 1


if __name__ == "__main__":
    sys.exit(main())
