import copy

import pytest
import torch
from torch import nn

from gq_lightning import weights
from gq_lightning.errors import UserError
from gq_lightning.weights.lpips import LPIPS, SMALLEST_SIDE


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def images(count=2, size=64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, 3, size // 8 + 1, size // 8 + 1, generator=generator) * 2 - 1
    return nn.functional.interpolate(coarse, size=(size, size), mode="bicubic").clamp(-1, 1)


def noisy(targets, strength, seed=1):
    return (targets + strength * torch.randn(targets.shape, generator=torch.Generator().manual_seed(seed))).clamp(-1, 1)


@pytest.mark.parametrize("network", ["alex", "vgg"])
def test_zero_for_equal_images_and_growing_with_noise(network):
    distance, targets = LPIPS(network), images()
    assert distance(targets, targets).tolist() == [0, 0]
    values = torch.stack([distance(noisy(targets, strength), targets) for strength in (0.02, 0.1, 0.4)])
    assert values.shape == (3, 2)
    assert (values.diff(dim=0) > 0).all()


def test_blur_is_worse_than_a_shift_in_brightness():
    """What PSNR gets wrong: at the same squared error LPIPS minds lost detail more than brightness."""
    targets = noisy(images(size=96), 0.3)
    blurred = nn.functional.avg_pool2d(targets, 5, stride=1, padding=2, count_include_pad=False)
    shift = (blurred - targets).square().mean().sqrt()
    distance = LPIPS("alex")
    assert (distance(blurred, targets) > 2 * distance(targets + shift, targets)).all()


def test_formula_from_the_activations_by_hand():
    """LPIPS in a few lines over AlexNet's layers, as the paper states it, with the heads of package lpips."""
    from pathlib import Path

    import lpips

    state = weights.load("alexnet")
    heads = torch.load(Path(lpips.__file__).parent / "weights/v0.1/alex.pth", map_location="cpu", weights_only=True)
    shift, scale = (torch.tensor(v).view(1, 3, 1, 1) for v in ([-0.030, -0.088, -0.188], [0.458, 0.448, 0.450]))

    def activations(x):
        x = (x - shift) / scale
        for index, stride, padding in ((0, 4, 2), (3, 1, 2), (6, 1, 1), (8, 1, 1), (10, 1, 1)):
            if index in (3, 6):
                x = nn.functional.max_pool2d(x, 3, 2)
            x = nn.functional.conv2d(x, state[f"features.{index}.weight"], state[f"features.{index}.bias"], stride, padding).relu()
            yield x / (x.square().sum(dim=1, keepdim=True).sqrt() + 1e-10)

    targets = images(3, 80)
    candidates = noisy(targets, 0.2)
    expected = torch.zeros(3)
    for layer, (a, b) in enumerate(zip(activations(candidates), activations(targets), strict=True)):
        expected += ((a - b).square() * heads[f"lin{layer}.model.1.weight"]).sum(dim=1).mean(dim=(1, 2))
    torch.testing.assert_close(LPIPS("alex")(candidates, targets), expected, rtol=1e-4, atol=1e-6)


class Parent(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(2, 2)
        self.distance = LPIPS("alex")


def test_a_parent_saves_and_loads_strictly_without_it():
    parent = Parent()
    state = parent.state_dict()
    assert sorted(state) == ["layer.bias", "layer.weight"]
    other = Parent()
    other.load_state_dict(state, strict=True)
    assert torch.equal(other.layer.weight, parent.layer.weight)
    with pytest.raises(RuntimeError, match=r"layer\.bias"):
        other.load_state_dict({"layer.weight": state["layer.weight"]}, strict=True)
    assert sum(1 for _ in parent.distance.parameters()) == 0


def test_train_copy_and_casts_change_nothing():
    parent, targets = Parent(), images()
    candidates = noisy(targets, 0.1)
    expected = parent.distance(candidates, targets)
    copied = copy.deepcopy(parent).train().requires_grad_(True).to(torch.bfloat16)
    assert all(torch.equal(copied.distance(candidates, targets), expected) for _ in range(3))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = parent.distance(candidates, targets)
    assert result.dtype == torch.float32
    assert torch.equal(result, expected)


def test_gradients_reach_the_images_alone():
    targets = images()
    candidates = noisy(targets, 0.1).requires_grad_()
    LPIPS("vgg")(candidates, targets).sum().backward()
    assert candidates.grad is not None
    assert candidates.grad.abs().sum() > 0
    assert targets.grad is None


def test_first_use_under_inference_mode_does_not_spoil_training():
    from gq_lightning.weights import lpips as perceptual

    perceptual._network.cache_clear()
    targets = images()
    with torch.inference_mode():
        LPIPS("alex")(targets, targets)
    candidates = noisy(targets, 0.1).requires_grad_()
    LPIPS("alex")(candidates, targets).sum().backward()
    assert candidates.grad.isfinite().all()


def test_building_leaves_the_random_state_alone():
    from gq_lightning.weights import lpips as perceptual

    perceptual._network.cache_clear()
    before = torch.get_rng_state()
    LPIPS("alex")
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("network", ["alex", "vgg"])
def test_smallest_images(network):
    side = SMALLEST_SIDE[network]
    assert LPIPS(network)(images(1, side), -images(1, side)).isfinite().all()
    small = torch.zeros(1, 3, 64, side - 1)
    with pytest.raises(UserError, match=f"images of {side - 1} pixels"):
        LPIPS(network)(small, small)
    with pytest.raises(RuntimeError):  # the limit is the network's, not ours
        from gq_lightning.weights.lpips import _network

        _network(network, torch.device("cpu"))(small, small)


def test_unknown_network():
    with pytest.raises(UserError, match="squeeze"):
        LPIPS("squeeze")
