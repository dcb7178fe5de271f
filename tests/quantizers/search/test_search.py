"""Exactness: every way of searching against a float64 brute force, on easy and on hard posteriors; and what is refused."""

import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.distributions import Normal

from gq_lightning import UserError
from gq_lightning.quantizers.search import best_codewords, bisection, blocked, k_best_codewords, table
from gq_lightning.quantizers.search.blocked import scores

CPU = torch.device("cpu")


def brute_force(mean: Tensor, variance: Tensor, codebook: Tensor, prior_weight: float) -> Tensor:
    """The score as the paper writes it, in float64: log-probabilities, a few posteriors at a time; the first of the largest."""
    codewords = codebook.double()
    prior = prior_weight * Normal(0.0, 1.0).log_prob(codewords).sum(-1)
    tokens = []
    step = max(1, 2**22 // codewords.numel())
    for mu, var in zip(mean.double().split(step), variance.double().split(step), strict=True):
        score = Normal(mu.unsqueeze(1), var.sqrt().unsqueeze(1)).log_prob(codewords).sum(-1) - prior
        tokens.append(score.argmax(1))
    return torch.cat(tokens)


def posteriors(tokens: int, m: int, generator: torch.Generator, hard: bool) -> tuple[Tensor, Tensor]:
    """Means and variances: of trained tokens, or with standard deviations from 1e-6 to 3, each dimension its own."""
    if hard:
        std = 10 ** torch.empty(tokens, m).uniform_(-6, 0.477, generator=generator)
        return torch.randn(tokens, m, generator=generator) * 1.5, std.square()
    std = (2 ** (-16 / max(m, 4)) * torch.exp(0.3 * torch.randn(tokens, m, generator=generator))).clamp_max(0.99)
    return torch.randn(tokens, m, generator=generator) * (1 - std.square()).sqrt(), std.square()


Search = Callable[[Tensor, Tensor, Tensor, float], Tensor]


def ways(m: int) -> dict[str, Search]:
    """Beside the one that `best_codewords` takes: for m = 1 the compiled one."""
    if m == 1:
        return {"bisection": bisection.search}
    both = {"blocked": blocked, "table": table}
    return {name: lambda *arguments, way=way: way.best(*arguments, 1)[:, 0] for name, way in both.items()}


def disagreements(count: int, size: int, m: int, prior_weight: float, hard: bool, dtype: torch.dtype, seed: int) -> dict[str, int]:
    generator = torch.Generator().manual_seed(seed)
    codebook = torch.randn(size, m, generator=generator)
    mean, variance = (part.to(dtype) for part in posteriors(count, m, generator, hard))
    expected = brute_force(mean, variance, codebook, prior_weight)
    arguments = mean.double().contiguous(), variance.double().reciprocal().contiguous(), codebook, prior_weight
    found = {name: search(*arguments) for name, search in ways(m).items()}
    found["best_codewords"] = best_codewords(mean, variance, codebook, prior_weight)
    return {name: int((tokens != expected).sum()) for name, tokens in found.items()}


@pytest.fixture(autouse=True)
def compiler() -> None:
    """What is compiled is compiled here, not at the first large search."""
    if not (table.usable(CPU, compile=True) and bisection.library("bisection")):
        pytest.skip("no compiler, or no AVX2: test_compiled.py says what happens then")


@pytest.mark.parametrize("hard", [False, True], ids=["trained", "hard"])
@pytest.mark.parametrize("prior_weight", [0.0, 0.5, 1.0])
@pytest.mark.parametrize(
    ("tokens", "size", "m"),
    [(100, 1000, 16), (40, 5000, 4), (60, 4097, 8), (500, 31, 2), (257, 300, 1), (40, 65536, 1), (1, 2, 3), (64, 1, 5), (33, 70, 24)],
)
def test_equals_brute_force(tokens: int, size: int, m: int, prior_weight: float, hard: bool) -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        assert set(disagreements(tokens, size, m, prior_weight, hard, dtype, seed=tokens).values()) == {0}


@pytest.mark.parametrize("hard", [False, True], ids=["trained", "hard"])
@pytest.mark.parametrize("prior_weight", [0.0, 1.0])
@pytest.mark.parametrize(
    ("tokens", "size", "m", "k"),
    [
        (60, 1000, 16, 16),
        (40, 5000, 4, 16),
        (30, 4097, 8, 128),
        (300, 31, 2, 31),
        (50, 300, 1, 5),
        (20, 65536, 8, 16),
        (33, 70, 24, 69),
        (9, 1, 3, 1),
    ],
)
def test_the_k_best_equal_brute_force(tokens: int, size: int, m: int, k: int, prior_weight: float, hard: bool) -> None:
    """Score by score in float64, as two ways of adding one up may order what lies within its rounding."""
    generator = torch.Generator().manual_seed(tokens)
    codebook = torch.randn(size, m, generator=generator)
    mean, variance = posteriors(tokens, m, generator, hard)
    arguments = mean.double().contiguous(), variance.double().reciprocal().contiguous(), codebook, prior_weight
    every = torch.stack([scores(one, precise, codebook.double(), prior_weight) for one, precise in zip(*arguments[:2], strict=True)])
    expected = every.sort(dim=1, descending=True, stable=True).values[:, :k]
    found = {
        "blocked": blocked.best(*arguments, k),
        "table": table.best(*arguments, k),
        "any": k_best_codewords(mean, variance, codebook, k, prior_weight),
    }
    for name, indices in found.items():
        assert all(len(row.unique()) == k for row in indices), name
        torch.testing.assert_close(every.gather(1, indices), expected, rtol=1e-12, atol=0, msg=name)
        assert torch.equal(indices[:, 0], best_codewords(mean, variance, codebook, prior_weight)), name
    assert torch.equal(found["blocked"], found["table"]) and torch.equal(found["any"], found["table"])


def test_ties_among_the_k_best_go_by_index() -> None:
    distinct = torch.randn(20, 3, generator=torch.Generator().manual_seed(0))
    order = torch.randint(20, (3000,), generator=torch.Generator().manual_seed(1))
    mean, precision = distinct.double(), torch.full((20, 3), 1e4, dtype=torch.float64)
    expected = torch.stack([(order == index).nonzero()[:40, 0] for index in range(20)])
    for way in (blocked, table):
        assert torch.equal(way.best(mean, precision, distinct[order], 0.0, 40), expected), way.__name__


@pytest.mark.parametrize("k", [0, 9, -1])
def test_no_more_than_the_codebook_has(k: int) -> None:
    with pytest.raises(UserError, match="k: .* of 8 codewords"):
        k_best_codewords(torch.zeros(2, 3), torch.ones(2, 3), torch.randn(8, 3), k)
    assert k_best_codewords(torch.empty(0, 3), torch.empty(0, 3), torch.randn(8, 3), 4).shape == (0, 4)
    with pytest.raises(UserError, match="finite"):
        k_best_codewords(torch.full((2, 3), torch.nan), torch.ones(2, 3), torch.randn(8, 3), 4)


@pytest.mark.slow
@pytest.mark.parametrize("m", [1, 4, 8, 16])
@pytest.mark.parametrize(("bits", "tokens"), [(10, 60_000), (12, 10_000), (14, 3_000), (16, 800), (18, 200)])
def test_a_million_searches(bits: int, tokens: int, m: int) -> None:
    """1 036 000 posteriors over the four widths, with codebooks that are no powers of two, each searched in three ways."""
    for seed, (hard, dtype) in enumerate((hard, dtype) for hard in (False, True) for dtype in (torch.float32, torch.bfloat16)):
        share = tokens * 7 // 8 if dtype == torch.float32 else tokens // 8
        for prior_weight in (1.0,) if seed else (1.0, 0.0):
            size = 2**bits - (seed % 2) * 17
            assert set(disagreements(share, size, m, prior_weight, hard, dtype, seed=seed + bits).values()) == {0}


def test_a_kernel_for_cuda_under_tritons_interpreter() -> None:
    pytest.importorskip("triton")
    code = """
import gc
import weakref
import torch
from gq_lightning.quantizers.search import blocked, fused
torch.manual_seed(0)
for tokens, size, m in ((18, 700, 16), (3, 129, 3), (1, 5, 2), (4, 260, 24), (5, 200, 40)):
    codebook = torch.randn(size, m)
    codebook[size // 2] = codebook[1]  # a tie
    mean, precision = torch.randn(tokens, m).double(), 1 / (10 ** torch.empty(tokens, m).uniform_(-6, 0.5)).double().square()
    mean[0], precision[0] = codebook[1], 1e4
    for prior_weight in (0.0, 1.0):
        found = fused.search(mean, precision, codebook, prior_weight)
        assert torch.equal(found, blocked.best(mean, precision, codebook, prior_weight, 1)[:, 0]), (tokens, size, m, prior_weight)
        assert found[0] == 1 and len(found) == tokens
held = weakref.ref(codebook)
del codebook
gc.collect()
assert held() is None, "the cache keeps a codebook alive"
print("equal")
"""
    import os

    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.stdout.strip() == "equal", done.stderr


@pytest.mark.parametrize("way", ["blocked", "table"])
def test_blocks_and_threads_do_not_matter(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(3)
    codebook = torch.randn(3000, 6, generator=generator)
    mean, variance = posteriors(500, 6, generator, hard=True)
    arguments = mean.double(), variance.double().reciprocal(), codebook, 1.0
    expected = ways(6)[way](*arguments)
    for name, value in (("TOKENS_PER_BLOCK", 7), ("CODEWORDS_PER_BLOCK", 64), ("PAIRS_PER_BLOCK", 5)):
        monkeypatch.setattr(blocked, name, value)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        assert torch.equal(ways(6)[way](arguments[0], arguments[1], codebook.clone(), 1.0), expected)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("m", [1, 2, 16])
def test_ties_go_to_the_lowest_index(m: int) -> None:
    distinct = torch.randn(70, m, generator=torch.Generator().manual_seed(0))
    order = torch.randint(70, (9000,), generator=torch.Generator().manual_seed(1))
    order[:70] = torch.randperm(70, generator=torch.Generator().manual_seed(2))
    codebook = distinct[order]
    first = torch.tensor([(order == index).nonzero()[0].item() for index in range(70)])
    for variance in (1e-2, 1e-8):
        posterior = distinct.double(), torch.full((70, m), 1 / variance, dtype=torch.float64)
        for name, search in ways(m).items():
            assert torch.equal(search(*posterior, codebook, 0.0), first), name


def test_one_dimension_without_prior_is_the_nearest_neighbour() -> None:
    torch.manual_seed(0)
    mean, codebook = torch.randn(200, 1), torch.randn(5000, 1)
    expected = (mean - codebook.T).abs().argmin(1)
    assert torch.equal(best_codewords(mean, torch.rand(200, 1) + 0.1, codebook, 0.0), expected)


@pytest.mark.parametrize("m", [1, 3])
def test_a_posterior_wider_than_the_prior_favours_the_longest_codeword(m: int) -> None:
    codebook = torch.tensor([[0.0], [0.5], [-4.0], [3.0]]).expand(4, m)
    mean = torch.full((1, m), 0.1)
    for search in (best_codewords, lambda *a: ways(m)["table" if m > 1 else "bisection"](a[0].double(), 1 / a[1].double(), *a[2:])):
        assert search(mean, torch.full((1, m), 9.0), codebook, 1.0).item() == 2
        assert search(mean, torch.full((1, m), 9.0), codebook, 0.0).item() == 0
    # prior_weight * variance = 1: a line that rises to the mean's side
    assert best_codewords(mean, torch.ones(1, m), codebook, 1.0).item() == 3
    assert best_codewords(-mean, torch.ones(1, m), codebook, 1.0).item() == 2


@pytest.mark.parametrize("m", [1, 4])
def test_strides_and_types_do_not_matter(m: int) -> None:
    torch.manual_seed(1)
    mean, variance, codebook = torch.randn(m, 2, 50), torch.rand(m, 2, 50) + 0.01, torch.randn(m, 999)
    strided = best_codewords(mean[:, 0].T, variance[:, 0].T, codebook.T, 1.0)
    assert torch.equal(strided, best_codewords(mean[:, 0].T.contiguous(), variance[:, 0].T.contiguous(), codebook.T.contiguous(), 1.0))
    assert torch.equal(strided, best_codewords(mean[:, 0].T.double(), variance[:, 0].T.double(), codebook.T.double(), 1.0))


def test_no_posterior_no_token() -> None:
    for m in (1, 4):
        tokens = best_codewords(torch.empty(0, m), torch.empty(0, m), torch.randn(8, m))
        assert tokens.shape == (0,)
        assert tokens.dtype == torch.int64


def test_a_changed_codebook_is_prepared_again() -> None:
    """As a learned one changes, in place, between two steps."""
    torch.manual_seed(0)
    mean, variance, codebook = torch.randn(64, 4), torch.full((64, 4), 0.1), torch.randn(2000, 4)
    for m in (4, 1):
        best_codewords(mean[:, :m], variance[:, :m], codebook[:, :m])
        book = torch.nn.Parameter(codebook[:, :m].clone())
        for _ in range(2):
            expected = brute_force(mean[:, :m], variance[:, :m], book.detach(), 1.0)
            assert torch.equal(best_codewords(mean[:, :m], variance[:, :m], book), expected)
            with torch.no_grad():
                book.copy_(book.flip(0))
    with torch.inference_mode():
        book = codebook.clone()
        assert torch.equal(best_codewords(mean, variance, book), brute_force(mean, variance, book, 1.0))


@pytest.mark.parametrize("m", [1, 2])
@pytest.mark.parametrize(
    "mean, variance", [(float("nan"), 1.0), (float("inf"), 1.0), (0.0, 0.0), (0.0, -1.0), (0.0, float("nan")), (0.0, float("inf"))]
)
def test_values_that_no_posterior_has(mean: float, variance: float, m: int) -> None:
    posterior = torch.zeros(3, m), torch.ones(3, m)
    posterior[0][1, -1], posterior[1][1, -1] = mean, variance
    with pytest.raises(UserError, match="finite"):
        best_codewords(*posterior, torch.randn(8, m))


@pytest.mark.parametrize("shapes", [((3, 2), (3, 2), (8, 3)), ((3, 2), (2, 2), (8, 2)), ((2,), (2,), (8, 2))])
def test_shapes_that_do_not_match(shapes: tuple) -> None:
    with pytest.raises(UserError, match=r"\(N, m\)"):
        best_codewords(*(torch.ones(shape) for shape in shapes))


def test_what_else_is_refused() -> None:
    good, codebook = torch.ones(3, 2), torch.randn(8, 2)
    with pytest.raises(UserError, match="floating point"):
        best_codewords(good.long(), good, codebook)
    with pytest.raises(UserError, match="one device"):
        best_codewords(good, good, codebook.to("meta"))
    with pytest.raises(UserError, match="empty"):
        best_codewords(good, good, codebook[:0])
    with pytest.raises(UserError, match="prior_weight"):
        best_codewords(good, good, codebook, float("nan"))
    codebook[3, 1] = float("nan")
    with pytest.raises(UserError, match="codewords are not finite"):
        best_codewords(good, good, codebook)
