import copy
import itertools
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from processes import on_ranks

from gq_lightning import UserError
from gq_lightning.losses.discriminator import ActNorm, PatchDiscriminator


def images(count: int = 2, size: int = 32) -> torch.Tensor:
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(1)) * 2 - 1


def test_the_papers_size() -> None:
    with torch.device("meta"):
        network = PatchDiscriminator().eval()
        assert network(torch.empty(2, 3, 256, 256)).shape == (2, 1, 2, 2)
    kernels = [parameter.shape for name, parameter in network.named_parameters() if name.endswith("weight")]
    widths = [3, 160, 320, 640, 1280, 1280, 1280, 1280, 1]
    assert kernels == [(after, before, 4, 4) for before, after in itertools.pairwise(widths)]


def test_against_the_formula() -> None:
    torch.manual_seed(0)
    network = PatchDiscriminator(4, 2, "none")
    x, kernels = images(), list(network.parameters())
    for index, stride in enumerate((2, 2, 1, 1)):
        x = F.conv2d(x, kernels[2 * index], kernels[2 * index + 1], stride, padding=1)
        x = torch.where(x > 0, x, 0.2 * x) if index < 3 else x
    torch.testing.assert_close(network(images()), x)


@pytest.mark.parametrize("normalization", ["actnorm", "spectral", "none"])
def test_gradients_reach_images_and_parameters(normalization: str) -> None:
    network = PatchDiscriminator(8, 2, normalization)  # type: ignore[arg-type]
    x = images().requires_grad_()
    network(x).sum().backward()
    assert x.grad is not None
    assert x.grad.abs().sum() > 0
    assert all(parameter.grad is not None for parameter in network.parameters())


def test_spectral_norm_bounds_every_kernel() -> None:
    torch.manual_seed(0)
    network = PatchDiscriminator(8, 2, "spectral")
    for _ in range(50):
        network(images())
    for layer in network.network:
        if isinstance(layer, torch.nn.Conv2d):
            assert torch.linalg.matrix_norm(layer.weight.flatten(1), 2).item() == pytest.approx(1, rel=1e-2)


def test_actnorm_is_set_once_and_by_no_other_images() -> None:
    network, x = PatchDiscriminator(8, 2), images()
    before = network(x)
    assert torch.equal(network.eval()(x), before), "a pass sets nothing, in training or evaluation"
    assert not torch.equal(network(x), network.initialize(x) or network(x))
    state = copy.deepcopy(network.state_dict())
    restored = PatchDiscriminator(8, 2)
    restored.load_state_dict(state)
    for one in (network, restored):
        one.initialize(images() * 5 - 1)
        assert all(torch.equal(value, state[name]) for name, value in one.state_dict().items())


@pytest.mark.parametrize("shape", [(8, 5, 6, 6), (1, 5, 1, 2)])
def test_actnorm_gives_mean_0_and_unbiased_deviation_1(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 3 + 7
    norm = ActNorm(5)
    assert torch.equal(norm(x), x)
    norm.initialize(x)
    channels = norm(x).transpose(0, 1).flatten(1)
    torch.testing.assert_close(channels.mean(dim=1), torch.zeros(5), atol=1e-5, rtol=0)
    torch.testing.assert_close(channels.std(dim=1), torch.ones(5), atol=1e-5, rtol=0)


def test_spectral_kernels_wait_for_the_first_pass() -> None:
    """There is no ActNorm to set, and a power iteration more would make a resumed training another one."""
    network = PatchDiscriminator(8, 2, "spectral")
    state = copy.deepcopy(network.state_dict())
    network.initialize(images())
    assert all(torch.equal(value, state[name]) for name, value in network.state_dict().items())


def initialize(folder: Path, rank: int, ranks: int) -> None:
    norm = ActNorm(5)
    norm.initialize(torch.load(folder / "x.pt", weights_only=True).chunk(ranks)[rank])
    torch.save(norm.state_dict(), folder / f"norm{rank}.pt")


def test_two_ranks_share_the_deviation_of_the_whole_batch(tmp_path: Path) -> None:
    x = torch.randn(2, 5, 1, 2, generator=torch.Generator().manual_seed(1)) * 2 + torch.tensor([0.0, 3.0]).view(2, 1, 1, 1)
    torch.save(x, tmp_path / "x.pt")
    on_ranks(__file__, "initialize", tmp_path, 2)
    channels = x.transpose(0, 1).flatten(1)
    for rank in range(2):
        state = torch.load(tmp_path / f"norm{rank}.pt", weights_only=True)
        torch.testing.assert_close(state["location"].flatten(), -channels.mean(dim=1))
        torch.testing.assert_close(state["scale"].flatten(), 1 / (channels.std(dim=1) + 1e-6))
        assert state["initialized"]


def test_bad_arguments() -> None:
    with pytest.raises(UserError, match="normalization: 'batch'"):
        PatchDiscriminator(normalization="batch")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="positive"):
        PatchDiscriminator(layers=0)
    with pytest.raises(UserError, match=r"discriminator\.layers: 4 layers halve images of 32x32 to nothing: use at most 3"):
        PatchDiscriminator(8, 4)(images())
    with pytest.raises(UserError, match=r"discriminator\.layers: 4 layers"):
        PatchDiscriminator(8, 4).initialize(images())
    assert PatchDiscriminator(8, 3)(images()).shape == (2, 1, 2, 2), "and 3 work"
