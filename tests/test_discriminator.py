import itertools

import pytest
import torch
import torch.nn.functional as F

from gq_lightning import UserError
from gq_lightning.discriminator import ActNorm, PatchDiscriminator


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


def test_actnorm_is_set_by_the_first_training_batch_alone() -> None:
    x = torch.randn(8, 5, 6, 6, generator=torch.Generator().manual_seed(0)) * 3 + 7
    norm = ActNorm(5)
    assert torch.equal(norm.eval()(x), x), "not by evaluation"
    first = norm.train()(x)
    torch.testing.assert_close(first.mean(dim=(0, 2, 3)), torch.zeros(5), atol=1e-5, rtol=0)
    torch.testing.assert_close(first.var(dim=(0, 2, 3), correction=0), torch.ones(5), atol=1e-4, rtol=0)
    torch.testing.assert_close(norm(x + 1), first + norm.scale)
    restored = ActNorm(5)
    restored.load_state_dict(norm.state_dict())
    torch.testing.assert_close(restored(x + 1), norm(x + 1))


def test_bad_arguments() -> None:
    with pytest.raises(UserError, match="normalization: 'batch'"):
        PatchDiscriminator(normalization="batch")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="positive"):
        PatchDiscriminator(layers=0)
    with pytest.raises(UserError, match=r"discriminator\.layers: 4 layers halve images of 32x32 to nothing: use at most 3"):
        PatchDiscriminator(8, 4)(images())
    assert PatchDiscriminator(8, 3)(images()).shape == (2, 1, 2, 2), "and 3 work"
