"""How fast is the search for codewords? Times it beside the published form and beside a bare matrix product of the same operations.

    python experiments/benchmarks/search.py [--out FOLDER] [--seconds 0.1] [--device cuda]

search    gq_lightning.quantizers.search.best_codewords, the codebook prepared before, as in use
blocked   the same in plain torch, for machines without a compiler (m > 1)
plain     log-probabilities of all codewords by Normal.log_prob, 8 posteriors at a time, on a GPU as many as fit: the published form
product   (N, 2m) x (2m, K) in float32, in blocks of 256 x 4096 that stay in the cache, on a GPU as large as fit, nothing done with the
          result: the roofline

The forms take turns within every repeat; medians. A CPU works with one thread. A cell whose N would take longer than --seconds is timed
with fewer posteriors and scaled (on a GPU `plain` alone): `timed` has their number; one that takes much less is timed several times in a
turn. Memory is what a fresh process grows by at most, on a GPU what is allocated there. Writes search.json and search.png, on a GPU
search_gpu.json and search_gpu.png.
"""

import argparse
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib
import torch
from machine import machine, write_ratios
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor
from torch.distributions import Normal

from gq_lightning.quantizers.search import best_codewords, blocked, compiled

matplotlib.use("Agg")
from matplotlib import pyplot as plt

BITS = (10, 12, 14, 16, 18)
DIMENSIONS = (1, 4, 8, 16)
TOKENS = (1, 7, 256, 4096, 65536)
REPEATS = {"cpu": 3, "cuda": 7}
# values that `plain` holds at once on a GPU, and sides of the blocks of `product`
VALUES = 2**28
BLOCKS = {"cpu": (256, 4096), "cuda": (4096, 2**18)}
COLOURS = {"search": "#0072B2", "blocked": "#009E73", "plain": "#D55E00", "product": "#000000"}
WANTED = {"a token of 4096, us": 10.0, "a token alone, us": 100.0}  # on one core, K 65536, m 16
MARKERS = {"search": "o", "blocked": "s", "plain": "^", "product": "x"}


def problem(tokens: int, size: int, m: int, device: str = "cpu") -> tuple[Tensor, Tensor, Tensor]:
    """Posteriors that cost as many bits as the codebook has, as training under TDC leaves them, and a codebook."""
    generator = torch.Generator().manual_seed(0)
    bits = size.bit_length() - 1
    std = (2 ** (-bits / m) * torch.exp(0.3 * torch.randn(tokens, m, generator=generator))).clamp_max(0.99)
    mean = torch.randn(tokens, m, generator=generator) * (1 - std.square()).sqrt()
    return mean.to(device), std.square().to(device), torch.randn(size, m, generator=generator).to(device)


def plain(mean: Tensor, variance: Tensor, codebook: Tensor) -> Tensor:
    prior = Normal(mean.new_zeros(()), mean.new_ones(()))
    tokens = []
    rows = 8 if mean.device.type == "cpu" else max(8, VALUES // codebook.numel())
    for mu, std in zip(mean.split(rows), variance.sqrt().split(rows), strict=True):
        ratio = Normal(mu.unsqueeze(1), std.unsqueeze(1)).log_prob(codebook) - prior.log_prob(codebook)
        tokens.append(ratio.sum(-1).argmax(1))
    return torch.cat(tokens)


def product(query: Tensor, keys: Tensor) -> None:
    height, width = BLOCKS[query.device.type]
    for rows in query.split(height):
        for columns in keys.split(width):
            rows @ columns.T


def forms(mean: Tensor, variance: Tensor, codebook: Tensor) -> dict[str, Callable[[int], Any]]:
    """By name, what the first n posteriors are searched with."""
    query, keys = torch.cat([mean, variance], 1), torch.cat([codebook, codebook.square()], 1)
    double, precision = mean.double(), variance.double().reciprocal()
    found: dict[str, Callable[[int], Any]] = {
        "search": lambda n: best_codewords(mean[:n], variance[:n], codebook),
        "plain": lambda n: plain(mean[:n], variance[:n], codebook),
        "product": lambda n: product(query[:n], keys),
    }
    if mean.shape[1] > 1:
        found["blocked"] = lambda n: blocked.best(double[:n], precision[:n], codebook, 1.0, 1)[:, 0]
    return found


def finish() -> None:
    """Waits for the GPU, where it is used."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def seconds_of(call: Callable[[int], Any], n: int) -> float:
    finish()
    begin = time.perf_counter()
    call(n)
    finish()
    return time.perf_counter() - begin


def cell(tokens: int, size: int, m: int, patience: float, device: str = "cpu") -> list[dict[str, Any]]:
    """Seconds of each form, for one K, m and N."""
    with torch.inference_mode(False), torch.no_grad():
        calls = forms(*problem(tokens, size, m, device))
        counts, times = {}, {}
        for name, call in calls.items():
            n = min(tokens, 256 if name != "plain" else 8)
            # a GPU's time does not grow with the posteriors until they fill it
            n = tokens if device == "cuda" and name != "plain" else n
            seconds_of(call, n)  # compile, prepare, fault memory in
            each = seconds_of(call, n) / n
            counts[name] = min(tokens, max(n, int(patience / each)))
            times[name] = min(50, max(1, int(patience / 5 / (each * counts[name]))))
        taken: dict[str, list[float]] = {name: [] for name in calls}
        for _ in range(REPEATS[device]):
            for name, call in calls.items():
                one = statistics.median(seconds_of(call, counts[name]) for _ in range(times[name]))
                taken[name].append(one * tokens / counts[name])
    return [
        {"K": size, "m": m, "N": tokens, "form": name, "seconds": statistics.median(taken[name]), "timed": counts[name]} for name in calls
    ]


MEMORY = """
import sys
sys.path.insert(0, {folder!r})
from machine import peak
from search import forms, problem
mean, variance, codebook = problem({tokens}, 65536, {m}, {device!r})
call = forms(mean, variance, codebook)[{form!r}]
call(8)
peak()
before = peak()
call({tokens})
print(peak() - before)
"""


def memory(form: str, m: int, tokens: int, device: str) -> float:
    """MiB by which a process grows at most in one call, on a CPU where Linux tells, or on a GPU."""
    code = MEMORY.format(folder=str(Path(__file__).parent), form=form, m=m, tokens=tokens, device=device)
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    return float(done.stdout)


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Time over N, time over K, and the share of the roofline, all with m = 16 but the last."""
    figure, (over_n, over_k, roofline) = plt.subplots(1, 3, figsize=(13, 4.2), layout="constrained")

    def line(axes: Any, x: str, form: str, **fixed: int) -> None:
        points = [
            (row[x], row["seconds"]) for row in rows if row["form"] == form and all(row[key] == value for key, value in fixed.items())
        ]
        if points:
            axes.loglog(*zip(*sorted(points), strict=True), color=COLOURS[form], marker=MARKERS[form], markersize=5, label=form)

    for form in COLOURS:
        line(over_n, "N", form, K=65536, m=16)
        line(over_k, "K", form, N=4096, m=16)
    over_n.set(xlabel="posteriors N", ylabel="seconds", title="K = 65 536, m = 16")
    over_k.set(xlabel="codewords K", ylabel="seconds", title="N = 4 096, m = 16")
    over_n.legend(frameon=False)
    for m, marker in zip(DIMENSIONS, "oDsv", strict=True):
        taken = {(row["K"], row["form"]): row["seconds"] for row in rows if row["m"] == m and row["N"] == 4096}
        values = [taken[2**bits, "product"] / taken[2**bits, "search"] for bits in BITS]
        roofline.loglog([2**bits for bits in BITS], values, marker=marker, markersize=5, label=f"m = {m}")
    roofline.axhline(1, color="black", linewidth=0.8, linestyle=":")
    roofline.set(xlabel="codewords K", ylabel="time of the bare product / time of the search", title="N = 4 096 (above 1: faster)")
    roofline.legend(frameon=False)
    for axes in (over_n, over_k, roofline):
        axes.grid(True, which="major", linewidth=0.4, alpha=0.6)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description="Times the search for codewords beside the published form and a bare matrix product.")
    parser.add_argument("--out", type=Path, default=Path("experiments/results/benchmarks"), help="folder for search.json and search.png")
    parser.add_argument("--seconds", type=float, default=0.1, help="longest single measurement")
    found = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=REPEATS, default=found, help="a GPU if there is one")
    options = parser.parse_args()
    device, name = options.device, "search" if options.device == "cpu" else "search_gpu"
    options.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    begin = time.perf_counter()
    cells = [(tokens, 2**bits, m) for m in DIMENSIONS for bits in BITS for tokens in TOKENS]
    watched = track(cells, description="search", disable=not sys.stderr.isatty())
    rows = [row for each in watched for row in cell(*each, options.seconds, device)]
    # those that are spoken of, in full
    for tokens, m in ((4096, 16), (256, 16), (65536, 1)):
        others = [row for row in rows if (row["N"], row["K"], row["m"]) != (tokens, 65536, m)]
        rows = others + cell(tokens, 65536, m, 50 * options.seconds, device)
    peaks = [
        {"form": form, "K": 65536, "m": m, "N": 65536, "MiB": round(memory(form, m, 65536, device), 1)}
        for form, m in (("search", 16), ("search", 1), ("blocked", 16))
    ]
    compiler = {"compiled": compiled.library("table") is not None}
    content = {"machine": machine() | compiler, "total_seconds": round(time.perf_counter() - begin, 1), "memory": peaks, "times": rows}
    seconds = {(row["form"], row["N"]): row["seconds"] for row in rows if (row["K"], row["m"]) == (65536, 16)}
    ratios = {f"{tokens} posteriors, K 65536, m 16": seconds["search", tokens] / seconds["product", tokens] for tokens in TOKENS}
    ratios |= {"a token of 4096, us": seconds["search", 4096] / 4096 * 1e6, "a token alone, us": seconds["search", 1] * 1e6}
    write_ratios(content, options.out / f"{name}.json", ratios, WANTED if device == "cpu" else {})
    draw(rows, options.out / f"{name}.png")
    table = Table(title="K = 65 536: seconds", caption=f"{content['total_seconds']:.0f} s in all; peak memory: {peaks}")
    for column in ("m", "N", "search", "blocked", "product", "plain", "plain / search", "search / product"):
        table.add_column(column, justify="right")
    for m in DIMENSIONS:
        for tokens in TOKENS:
            taken = {row["form"]: row["seconds"] for row in rows if (row["K"], row["m"], row["N"]) == (65536, m, tokens)}
            shown = [f"{taken[form]:.3g}" if form in taken else "" for form in ("search", "blocked", "product", "plain")]
            ratios = [f"{taken['plain'] / taken['search']:.0f}", f"{taken['search'] / taken['product']:.2f}"]
            table.add_row(str(m), str(tokens), *shown, *ratios)
    Console().print(table)


if __name__ == "__main__":
    main()
