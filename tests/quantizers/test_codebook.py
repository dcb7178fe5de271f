import hashlib

import numpy as np
import pytest
import scipy.stats
import torch

from gq_lightning import UserError
from gq_lightning.quantizers.codebook import fingerprint, gaussian_codebook


@pytest.mark.parametrize("generator", ["iid", "sobol"])
def test_values_are_standard_normal(generator: str) -> None:
    codebook = gaussian_codebook(generator, 16384, 4, seed=42)  # type: ignore[arg-type]
    assert codebook.shape == (16384, 4)
    assert codebook.dtype == torch.float32
    assert torch.isfinite(codebook).all()
    assert scipy.stats.kstest(codebook.flatten().numpy(), "norm").statistic < 0.01
    assert torch.corrcoef(codebook.T).fill_diagonal_(0).abs().max() < 0.03


@pytest.mark.parametrize("generator", ["iid", "sobol"])
def test_seed_decides(generator: str) -> None:
    one, same, other = (gaussian_codebook(generator, 256, 16, seed) for seed in (1, 1, 2))  # type: ignore[arg-type]
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


def test_drawing_leaves_the_global_generators_alone() -> None:
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    for generator in ("iid", "sobol"):
        gaussian_codebook(generator, 64, 2, seed=3)  # type: ignore[arg-type]
    assert torch.equal(torch.rand(3), expected)


def test_sobol_is_more_even_than_iid() -> None:
    # 256 points of one dimension fall into 256 equally probable bins: all different for Sobol
    sobol = torch.special.ndtr(gaussian_codebook("sobol", 256, 1, seed=42).double())
    assert (sobol.flatten() * 256).floor().unique().numel() == 256
    iid = torch.special.ndtr(gaussian_codebook("iid", 256, 1, seed=42).double())
    assert (iid.flatten() * 256).floor().unique().numel() < 200


@pytest.mark.parametrize("size", [2, 3, 4, 16, 65536])
def test_quantiles_are_the_medians_of_equally_probable_bins(size: int) -> None:
    codebook = gaussian_codebook("quantile", size, 1, seed=42)
    assert codebook.shape == (size, 1)
    assert codebook.dtype == torch.float32
    assert torch.equal(codebook, gaussian_codebook("quantile", size, 1, seed=7)), "nothing is random"
    edges = scipy.stats.norm.ppf(np.linspace(0, 1, size + 1))
    values = codebook[:, 0].double().numpy()
    assert (np.searchsorted(edges, values) == np.arange(1, size + 1)).all(), "one value in each bin, in ascending order"
    # half of a bin's probability lies below its value
    np.testing.assert_allclose((scipy.stats.norm.cdf(values) - scipy.stats.norm.cdf(edges[:-1])) * size, 0.5, atol=size * 1e-7)


@pytest.mark.parametrize(
    ("generator", "expected"),
    [
        ("iid", "1862d2baf3d2e9997c2c2009c5974b124f806940597936b1638971d06657dca7"),
        ("sobol", "f15fcee5314f37d85afb96292bea1ea5fec68492a3a222dd1b2a55d21947fc2d"),
    ],
)
def test_generators_are_frozen(generator: str, expected: str) -> None:
    """Tokens written today must mean the same in ten years: a failure here is a change of every tokenizer, not of a test."""
    assert fingerprint(gaussian_codebook(generator, 65536, 16, 42)).hex() == expected  # type: ignore[arg-type]


def test_fingerprint_is_the_hash_of_the_values() -> None:
    codebook = torch.tensor([[1.0, -2.0], [0.5, 0.0]])
    expected = hashlib.sha256(b"(2, 2)" + np.array([1.0, -2.0, 0.5, 0.0], dtype="<f4").tobytes()).digest()
    assert fingerprint(codebook) == expected != fingerprint(codebook.view(1, 4))


def test_quantiles_are_frozen_too() -> None:
    # every codebook that TokenBridge can have at the paper's rates
    digest = hashlib.sha256()
    for bits in (1, 2, 4, 8, 16):
        digest.update(fingerprint(gaussian_codebook("quantile", 2**bits, 1, 0)))
    assert digest.hexdigest() == "4d7ec8698fc701be5e8a649e842ea9d710a376ce5d28154758437a17419b750e"


@pytest.mark.parametrize(
    "arguments", [("normal", 16, 2, 0), ("iid", 1, 2, 0), ("iid", 16, 0, 0), ("sobol", 16, 100_000, 0), ("quantile", 16, 2, 0)]
)
def test_bad_recipes(arguments: tuple) -> None:
    with pytest.raises(UserError):
        gaussian_codebook(*arguments)
