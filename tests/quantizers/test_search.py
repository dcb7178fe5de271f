import pytest
import torch
from torch.distributions import Normal

from gq_lightning import UserError
from gq_lightning.quantizers import search
from gq_lightning.quantizers.search import best_codewords


def brute_force(mean: torch.Tensor, variance: torch.Tensor, codebook: torch.Tensor, prior_weight: float) -> torch.Tensor:
    """The score as the paper writes it, in float64, one posterior at a time."""
    tokens = []
    for mu, var in zip(mean.double(), variance.double(), strict=True):
        score = Normal(mu, var.sqrt()).log_prob(codebook.double()).sum(1)
        score -= prior_weight * Normal(torch.zeros_like(mu), torch.ones_like(mu)).log_prob(codebook.double()).sum(1)
        tokens.append(int(score.argmax()))
    return torch.tensor(tokens)


@pytest.mark.parametrize("prior_weight", [0.0, 0.5, 1.0])
@pytest.mark.parametrize(("tokens", "size", "m"), [(300, 1000, 16), (7, 5000, 4), (257, 300, 1), (1, 2, 3)])
def test_equals_brute_force(tokens: int, size: int, m: int, prior_weight: float) -> None:
    torch.manual_seed(tokens)
    mean, variance = torch.randn(tokens, m), torch.rand(tokens, m) * 1.2 + 0.05
    codebook = torch.randn(size, m)
    assert torch.equal(best_codewords(mean, variance, codebook, prior_weight), brute_force(mean, variance, codebook, prior_weight))


def test_one_dimension_without_prior_is_the_nearest_neighbour() -> None:
    torch.manual_seed(0)
    mean, codebook = torch.randn(200, 1), torch.randn(5000, 1)
    expected = (mean - codebook.T).abs().argmin(1)
    assert torch.equal(best_codewords(mean, torch.rand(200, 1) + 0.1, codebook, 0.0), expected)


def test_a_posterior_wider_than_the_prior_favours_the_longest_codeword() -> None:
    codebook = torch.tensor([[0.0], [0.5], [-4.0], [3.0]])
    mean, wide = torch.tensor([[0.1]]), torch.tensor([[9.0]])
    assert best_codewords(mean, wide, codebook, 1.0).item() == 2
    assert best_codewords(mean, wide, codebook, 0.0).item() == 0


def test_ties_go_to_the_lowest_index_across_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(search, "CODEWORDS_PER_BLOCK", 4)
    codebook = torch.randn(4, 2, generator=torch.Generator().manual_seed(0)).repeat(4, 1)
    tokens = best_codewords(codebook[:4], torch.full((4, 2), 1e-2), codebook, 1.0)
    assert tokens.tolist() == [0, 1, 2, 3]


def test_no_posterior_no_token() -> None:
    tokens = best_codewords(torch.empty(0, 4), torch.empty(0, 4), torch.randn(8, 4))
    assert tokens.shape == (0,)
    assert tokens.dtype == torch.int64


@pytest.mark.parametrize("mean, variance", [(float("nan"), 1.0), (float("inf"), 1.0), (0.0, 0.0), (0.0, -1.0), (0.0, float("nan"))])
def test_values_that_no_posterior_has(mean: float, variance: float) -> None:
    posterior = torch.zeros(3, 2), torch.ones(3, 2)
    posterior[0][1, 1], posterior[1][1, 1] = mean, variance
    with pytest.raises(UserError, match="finite"):
        best_codewords(*posterior, torch.randn(8, 2))


@pytest.mark.parametrize("shapes", [((3, 2), (3, 2), (8, 3)), ((3, 2), (2, 2), (8, 2)), ((2,), (2,), (8, 2))])
def test_shapes_that_do_not_match(shapes: tuple) -> None:
    with pytest.raises(UserError, match=r"\(N, m\)"):
        best_codewords(*(torch.ones(shape) for shape in shapes))
