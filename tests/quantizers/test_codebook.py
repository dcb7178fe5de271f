import hashlib
from itertools import pairwise

import numpy as np
import pytest
import scipy.stats
import torch
from torch.quasirandom import SobolEngine

from gq_lightning import UserError
from gq_lightning.quantizers.codebook import fingerprint, fingerprint_of_float64_points, gaussian_codebook, ordered


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


PUBLISHED = {
    (2**10, 1): "6559cd65304f6f4a9c5a3f78e4b374f768e544c2a5923637d140c056afc4be13",
    (2**10, 4): "660e7157d848563d7d4a63c943157169950f4cb7975369f49f1169eb93902d94",
    (2**14, 8): "03337fa234aa35e02fa5acb371f357f138123a5296b7d3122aad051820210d4b",
    (2**16, 16): "effbb50723ff7d93c536130bc3b48657d8e3bd8a7458dfe4882910c843eb95c8",
}


@pytest.mark.parametrize(("size", "dimensions"), PUBLISHED)
@pytest.mark.parametrize("default", [torch.float32, torch.float64])
def test_sobol_is_the_published_codebook(size: int, dimensions: int, default: torch.dtype) -> None:
    """By its values' hash, whatever torch's default type of floats is."""
    torch.set_default_dtype(default)
    try:
        codebook = gaussian_codebook("sobol", size, dimensions, 42)
    finally:
        torch.set_default_dtype(torch.float32)
    assert hashlib.sha256(codebook.numpy().astype("<f4").tobytes()).hexdigest() == PUBLISHED[size, dimensions]
    points = SobolEngine(dimensions, scramble=True, seed=42).draw(size, dtype=torch.float32).numpy().astype(np.float64)
    np.testing.assert_array_max_ulp(codebook.numpy(), scipy.stats.norm.ppf(points).astype(np.float32), 1)


def test_points_at_the_ends_stay_finite_and_move_no_others(monkeypatch: pytest.MonkeyPatch) -> None:
    points = torch.tensor([[0.0], [2.0**-30], [0.25], [1 - 2.0**-24], [1.0]])
    monkeypatch.setattr(SobolEngine, "draw", lambda *_, **__: points)
    codebook = gaussian_codebook("sobol", 5, 1, 0)[:, 0]
    assert codebook.isfinite().all()
    assert (codebook.diff() > 0).all()
    inner = scipy.stats.norm.ppf(points[1:-1, 0].double().numpy())
    np.testing.assert_allclose(codebook[1:-1].numpy(), inner, rtol=1e-7)


@pytest.mark.parametrize(
    ("generator", "expected"),
    [
        ("iid", "1862d2baf3d2e9997c2c2009c5974b124f806940597936b1638971d06657dca7"),
        ("sobol", "a5a9cf6774fc4f2d64eb5eeb77e9f74972df5b3a77549391f33deb6dbdd54f2a"),
    ],
)
def test_generators_are_frozen(generator: str, expected: str) -> None:
    """Tokens written today must mean the same in ten years: a failure here is a change of every tokenizer, not of a test."""
    assert fingerprint(gaussian_codebook(generator, 65536, 16, 42)).hex() == expected  # type: ignore[arg-type]


def test_earlier_sobol_codebooks_are_known_by_their_fingerprint() -> None:
    """The frozen fingerprint of versions that drew the points in float64."""
    expected = "f15fcee5314f37d85afb96292bea1ea5fec68492a3a222dd1b2a55d21947fc2d"
    assert fingerprint_of_float64_points(65536, 16, 42).hex() == expected


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


@pytest.mark.parametrize(("dimensions", "share"), [(1, 1e-3), (8, 0.37), (16, 0.69)])
def test_a_tree_orders_codewords_from_coarse_to_fine(dimensions: int, share: float) -> None:
    """The same codewords, in cells of equal size: the halving of normal axes leaves 1 - 2/pi of the variance of each axis halved once."""
    codebook = gaussian_codebook("iid", 4096 if dimensions < 16 else 65536, dimensions, seed=42)
    tree = ordered(codebook, "tree")
    assert torch.equal(torch.unique(tree, dim=0), torch.unique(codebook, dim=0)) and len(tree) == len(codebook)
    assert torch.equal(tree, ordered(codebook, "tree")) and torch.equal(codebook, ordered(codebook, "none"))
    variances = [float(tree.unflatten(0, (2**bits, -1)).var(dim=1, correction=0).mean()) for bits in range(9)]
    assert all(finer < coarser for coarser, finer in pairwise(variances))
    assert variances[8] < share * variances[0]
    # halves of one cell lie apart along one axis: no codeword of the one beyond those of the other
    first, second = tree.unflatten(0, (2, -1))
    assert ((first.amax(dim=0) <= second.amin(dim=0)).sum()) == 1


def test_the_tree_is_the_one_that_tokens_were_made_with() -> None:
    digest = hashlib.sha256(ordered(gaussian_codebook("iid", 65536, 8, seed=42), "tree").numpy().tobytes()).hexdigest()
    assert digest == "9d2009e93bba1de5675f3583a53774bc32d9a3bf2fa15dfae821551421743c33"


def test_a_tree_needs_a_power_of_two() -> None:
    with pytest.raises(UserError, match="power of two, not 1000: use order none"):
        ordered(gaussian_codebook("iid", 1000, 2, seed=0), "tree")
    with pytest.raises(UserError, match="order: 'sorted': give"):
        ordered(gaussian_codebook("iid", 16, 2, seed=0), "sorted")  # type: ignore[arg-type]
