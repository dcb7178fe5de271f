import copy
from pathlib import Path

import pytest
import torch
from processes import on_ranks
from scipy.cluster.vq import kmeans2
from vector_quantize_pytorch import VectorQuantize

from gq_lightning import UserError
from gq_lightning.construction import build, describe
from gq_lightning.quantizers import vq
from gq_lightning.quantizers.base import Quantizer
from gq_lightning.quantizers.vq import VectorQuantizer

LEARNING: tuple[dict, ...] = ({}, {"ema_decay": 0.9}, {"ema_decay": 0.9, "kmeans_init": True, "dead_code_threshold": 0.5})


def features(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def small(tokens: int = 1, spread: bool = True, **arguments: object) -> VectorQuantizer:
    torch.manual_seed(0)
    start = "normal" if spread else "uniform"
    return VectorQuantizer(5 * tokens, codebook_size=32, group_size=4, codebook_start=start, **arguments)  # type: ignore[arg-type]


def nearest_by_definition(quantizer: VectorQuantizer, x: torch.Tensor) -> torch.Tensor:
    vectors = x.double().reshape(*x.shape[:-1], quantizer.tokens_per_position, quantizer.group_size)
    return (vectors[..., None, :] - quantizer.codebook.detach().double()).square().sum(-1).argmin(-1)


def rows_in(rows: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    return (rows[:, None] == others).all(-1).any(1)


@pytest.mark.parametrize("arguments", LEARNING, ids=str)
@pytest.mark.parametrize(("bits", "tokens"), [(16, 1), (32, 2), (64, 4)])
def test_geometry_follows_from_the_rate(bits: int, tokens: int, arguments: dict) -> None:
    quantizer = VectorQuantizer(bits, **arguments)
    assert (quantizer.tokens_per_position, quantizer.codebook_size, quantizer.bits_per_position) == (tokens, 65536, bits)
    assert quantizer.encoder_channels == quantizer.latent_channels == 16 * tokens
    x = features(2, 2, 3, 16 * tokens)
    found = quantizer.tokenize(x)
    assert found.shape == (2, 2, 3, tokens)
    assert found.dtype == torch.int64
    assert found.min() >= 0 and found.max() < 65536
    result = quantizer.eval()(x)
    torch.testing.assert_close(result.latents, quantizer.detokenize(found), atol=1e-5, rtol=0)
    assert result.posterior is None, "so no bits and no mean"


@pytest.mark.parametrize("bits", [16, 32, 64])
def test_every_codeword_is_its_own_token(bits: int) -> None:
    quantizer = VectorQuantizer(bits, codebook_size=65536)
    tokens = torch.arange(0, 65536, 97).unfold(0, bits // 16, bits // 16)
    assert torch.equal(quantizer.tokenize(quantizer.detokenize(tokens)), tokens)


@pytest.mark.parametrize("tokens", [1, 3])
@pytest.mark.parametrize("reduction", ["element_mean", "image_sum"])
def test_tokens_latents_and_penalty_by_definition(reduction: str, tokens: int) -> None:
    quantizer = small(tokens, commitment=0.3, codebook_weight=0.7, penalty_reduction=reduction)
    x = features(6, 5, 4 * tokens).requires_grad_()
    over = x.numel() if reduction == "element_mean" else 6
    result, found = quantizer(x), nearest_by_definition(quantizer, x)
    assert torch.equal(quantizer.tokenize(x), found)
    codewords = quantizer.codebook[found].flatten(-2)
    torch.testing.assert_close(result.latents, codewords)
    torch.testing.assert_close(result.penalty, (x - codewords).square().sum() / over)
    g = features(6, 5, 4 * tokens, seed=3)
    ((result.latents * g).sum() + result.penalty).backward()
    torch.testing.assert_close(x.grad, g + 0.3 * 2 * (x - codewords).detach() / over)
    pull = torch.zeros(32, 4).index_add_(0, found.flatten(), (codewords - x).detach().view(-1, 4))
    torch.testing.assert_close(quantizer.codebook.grad, 0.7 * 2 * pull / over)


@pytest.mark.parametrize("tokens", [1, 2])
def test_agrees_with_the_library_under_moving_averages(tokens: int) -> None:
    quantizer = small(tokens, ema_decay=0.9, commitment=0.25)
    library = VectorQuantize(
        4 * tokens, 32, heads=tokens, codebook_dim=4, decay=0.9, threshold_ema_dead_code=0, commitment_weight=0.25, rotation_trick=False
    )
    library._codebook.embed.copy_(quantizer.codebook)
    library._codebook.embed_avg.copy_(quantizer.codebook)
    for step in range(5):
        ours = features(6, 5, 4 * tokens, seed=step).requires_grad_()
        theirs = ours.detach().clone().requires_grad_()
        found = quantizer.tokenize(ours)
        result, (latents, indices, loss) = quantizer(ours), library(theirs)
        assert torch.equal(found, indices.view(6, 5, tokens))
        torch.testing.assert_close(result.latents, latents)
        torch.testing.assert_close(result.penalty, loss.squeeze())
        (result.latents.square().sum() + result.penalty).backward()
        (latents.square().sum() + loss.squeeze()).backward()
        torch.testing.assert_close(ours.grad, theirs.grad)
        torch.testing.assert_close(quantizer.codebook, library.codebook)
        torch.testing.assert_close(quantizer.usage, library._codebook.cluster_size[0])
    assert torch.equal(quantizer.tokenize(ours), library.eval()(theirs)[1].view(6, 5, tokens))


def test_agrees_with_the_library_by_gradient() -> None:
    # its learned codebook has one weight for both losses
    quantizer = small(commitment=1.0, codebook_weight=1.0)
    library = VectorQuantize(
        4, 32, learnable_codebook=True, ema_update=False, threshold_ema_dead_code=0, commitment_weight=1.0, rotation_trick=False
    )
    library._codebook.embed.data.copy_(quantizer.codebook.data)
    ours = features(6, 5, 4).requires_grad_()
    theirs = ours.detach().clone().requires_grad_()
    result, (latents, indices, loss) = quantizer(ours), library(theirs)
    ((result.latents**3).sum() + result.penalty).backward()
    ((latents**3).sum() + loss.squeeze()).backward()
    assert torch.equal(quantizer.tokenize(ours)[..., 0], indices)
    torch.testing.assert_close(result.penalty, 2 * loss.squeeze())
    torch.testing.assert_close(ours.grad, theirs.grad)
    torch.testing.assert_close(quantizer.codebook.grad, library._codebook.embed.grad[0])


@pytest.mark.parametrize("arguments", [*LEARNING[1:], {"kmeans_init": True}, {"dead_code_threshold": 0.5}], ids=str)
def test_only_training_moves_the_state(arguments: dict) -> None:
    quantizer, x = small(**arguments), features(9, 3, 4)
    before = copy.deepcopy(quantizer.state_dict())

    def moved() -> bool:
        return any(not torch.equal(value, before[name]) for name, value in quantizer.state_dict().items())

    quantizer.tokenize(x)
    quantizer.detokenize(quantizer.tokenize(x))
    with torch.no_grad():
        quantizer(x)
    quantizer.eval()(x)
    assert not moved()
    quantizer.train()(x)
    assert moved()


def test_clusters_are_lloyds() -> None:
    x = features(500, 3)
    torch.manual_seed(4)
    start = vq.sample(x, 20)
    assert rows_in(start, x).all() and len(start.unique(dim=0)) == 20
    expected, _ = kmeans2(x.double().numpy(), start.double().numpy(), iter=vq.KMEANS_ITERATIONS, minit="matrix")
    torch.manual_seed(4)
    centres, counts = vq.kmeans(x, 20)
    torch.testing.assert_close(centres.double(), torch.from_numpy(expected), atol=1e-5, rtol=0)
    assert counts.sum() == 500


def test_fewer_vectors_than_clusters_are_all_kept() -> None:
    x = features(5, 3)
    centres, counts = vq.kmeans(x, 12)
    assert rows_in(x, centres).all()
    assert len(centres.unique(dim=0)) == 12
    assert torch.cdist(centres, x).amin(1).max() < 0.2
    assert counts.sum() == 5


@pytest.mark.parametrize("ema_decay", [None, 0.9])
def test_kmeans_starts_once_from_the_first_batch(ema_decay: float | None) -> None:
    quantizer, x = small(ema_decay=ema_decay, kmeans_init=True), features(40, 5, 4)
    error = (quantizer(x).latents - x).square().mean()
    assert error < (small().eval()(x).latents - x).square().mean() * 0.7
    before = quantizer.codebook.detach().clone()
    found = nearest_by_definition(quantizer, x + 100).squeeze(-1)
    torch.testing.assert_close(quantizer(x + 100).latents, before[found], atol=1e-4, rtol=0)


@pytest.mark.parametrize("ema_decay", [None, 0.9])
def test_dead_codewords_become_features(ema_decay: float | None) -> None:
    quantizer = small(ema_decay=ema_decay, dead_code_threshold=0.5)
    quantizer.codebook.data[8:] += 1000
    if ema_decay is not None:
        quantizer.sums.copy_(quantizer.codebook)
    quantizer.usage[8:] = 0.5
    x = features(50, 4)
    assert quantizer.tokenize(x).max() < 8
    quantizer(x)
    replaced = quantizer.codebook.detach()[8:]
    assert rows_in(replaced, x).all() and len(replaced.unique(dim=0)) == 24
    assert (quantizer.usage[8:] == 1.0).all()
    before = quantizer.codebook.detach().clone()
    quantizer(x)
    if ema_decay is None:
        assert torch.equal(quantizer.codebook, before), "a new codeword is given some steps"
    quantizer.usage.zero_()
    quantizer(x[:3])  # more dead codewords than features: three at a time
    assert (rows_in(quantizer.codebook, x[:3]) & (quantizer.usage == 1.0)).sum() == 3


def test_gradients_survive_the_updates_of_the_same_step() -> None:
    quantizer, x = small(kmeans_init=True, dead_code_threshold=5.0), features(20, 4).requires_grad_()
    optimizer = torch.optim.Adam(quantizer.parameters(), 0.05)
    for _ in range(3):
        result = quantizer(x)
        (result.latents.sum() + result.penalty).backward()
        optimizer.step()
    assert x.grad is not None and x.grad.isfinite().all()


@pytest.mark.parametrize("arguments", LEARNING, ids=str)
def test_state_goes_on_where_it_was(arguments: dict) -> None:
    one, other = small(2, spread=False, **arguments), small(2, spread=False, **arguments)
    one(features(30, 8))
    other.load_state_dict(one.state_dict())
    for quantizer in (one, other):
        torch.manual_seed(5)
        quantizer(features(30, 8, seed=2) + 1)
    for name, value in one.state_dict().items():
        assert torch.equal(value, other.state_dict()[name]), name
    assert torch.equal(one.tokenize(features(7, 8)), other.tokenize(features(7, 8)))


def test_half_precision_leaves_codebook_and_distances_alone() -> None:
    quantizer, x = small(ema_decay=0.99, dead_code_threshold=0.1), features(64, 4).bfloat16()
    before = copy.deepcopy(quantizer.state_dict())
    quantizer.to(torch.bfloat16)
    assert all(torch.equal(value, before[name]) and value.dtype == before[name].dtype for name, value in quantizer.state_dict().items())
    learned = small()
    assert torch.equal(copy.deepcopy(learned).half().codebook, learned.codebook)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        tokens, result = quantizer.tokenize(x), quantizer(x)
    assert result.latents.dtype == result.penalty.dtype == torch.float32
    assert torch.equal(tokens, small().tokenize(x.float()))


def test_describes_and_rebuilds_itself() -> None:
    quantizer = small(2, ema_decay=0.9, kmeans_init=True, dead_code_threshold=0.5)
    description = describe(quantizer) | {"class_path": "gq_lightning.quantizers.vq.VectorQuantizer"}
    again = build(Quantizer, description, "here")  # type: ignore[type-abstract]
    again.load_state_dict(quantizer.state_dict())
    assert torch.equal(again.tokenize(features(9, 8)), quantizer.tokenize(features(9, 8)))


@pytest.mark.parametrize(
    ("arguments", "field"),
    [
        ({"bits_per_position": 24}, "bits_per_position"),
        ({"codebook_size": 1}, "codebook_size"),
        ({"group_size": 0}, "group_size"),
        ({"commitment": -1.0}, "commitment"),
        ({"codebook_weight": 0.0}, "codebook_weight"),
        ({"codebook_start": "zero"}, "codebook_start"),
        ({"ema_decay": 1.0}, "ema_decay"),
        ({"dead_code_threshold": 0.0}, "dead_code_threshold"),
    ],
)
def test_bad_arguments_name_the_field(arguments: dict, field: str) -> None:
    with pytest.raises(UserError, match=field):
        VectorQuantizer(**arguments)


@pytest.mark.parametrize("tokens", [torch.tensor([[32]]), torch.tensor([[-1]]), torch.tensor([[0, 0]]), torch.tensor([[0.0]])])
def test_bad_tokens(tokens: torch.Tensor) -> None:
    with pytest.raises(UserError, match="tokens"):
        small().detokenize(tokens)


def test_bad_features() -> None:
    with pytest.raises(UserError, match="4 channels"):
        small().tokenize(torch.zeros(3, 5))
    with pytest.raises(UserError, match="finite"):
        small()(torch.full((1, 4), float("nan")))


# Two real processes (gloo) against one that sees their batches together

CASES: dict[str, dict] = {
    "ema": {"ema_decay": 0.9},
    "dead": {"dead_code_threshold": 0.8},
    "kmeans": {"kmeans_init": True},
    "kmeans of few": {"kmeans_init": True, "codebook_size": 64, "bits_per_position": 6},
    "all": {"ema_decay": 0.9, "kmeans_init": True, "dead_code_threshold": 0.8},
}
IMAGES = 11
SHARES = (slice(0, 4), slice(4, IMAGES))  # ranks need not have equally many


def train(share: slice) -> dict[str, dict[str, torch.Tensor]]:
    """The state of each case after four steps on a share of the batch."""
    states = {}
    for name, arguments in CASES.items():
        torch.manual_seed(0)
        quantizer = VectorQuantizer(**{"bits_per_position": 5, "codebook_size": 32, "group_size": 4, **arguments})
        torch.manual_seed(share.start)  # what is drawn must be the first rank's, whatever the others would draw
        for step in range(4):
            quantizer((features(IMAGES, 5, 4, seed=step) * (1 + step))[share])
        states[name] = {key: value.detach().clone() for key, value in quantizer.state_dict().items()}
    return states


def work(folder: Path, rank: int, ranks: int) -> None:
    torch.save(train(SHARES[rank]), folder / f"rank{rank}.pt")


def test_two_ranks_are_one_process_with_the_whole_batch(tmp_path: Path) -> None:
    on_ranks(__file__, "work", tmp_path, 2)
    whole = train(slice(0, IMAGES))
    first, second = (torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in (0, 1))
    for case, state in whole.items():
        for name, value in state.items():
            assert torch.equal(first[case][name], second[case][name]), (case, name)
            torch.testing.assert_close(first[case][name], value, msg=f"{case} {name} differ from one process's")
