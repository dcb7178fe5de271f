import pytest
import torch

from gq_lightning import UserError
from gq_lightning.losses.reconstruction import ReconstructionLoss
from gq_lightning.weights.lpips import LPIPS


def images(seed: int) -> torch.Tensor:
    return torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(seed)) * 2 - 1


@pytest.mark.parametrize(("pixel", "power"), [("l1", 1), ("l2", 2)])
def test_sum_per_image_and_mean_over_the_batch(pixel: str, power: int) -> None:
    x, y = images(0), images(1)
    loss, parts = ReconstructionLoss(pixel, lpips_weight=0, learned_variance=False)(x, y)  # type: ignore[arg-type]
    expected = (x - y).abs().pow(power)
    torch.testing.assert_close(loss, expected.sum() / 2)
    torch.testing.assert_close(parts[pixel], expected.mean())


def test_the_formula_of_the_recipe() -> None:
    """(L1 + LPIPS broadcast over pixels) / exp(s) + s, summed per image."""
    x, y = images(0), images(1)
    loss = ReconstructionLoss("l1", lpips_weight=0.7, lpips_network="alex")
    assert loss.log_scale is not None
    loss.log_scale.data.fill_(-0.3)
    per_pixel = (x - y).abs() + 0.7 * LPIPS("alex")(x, y)[:, None, None, None]
    expected = (per_pixel / torch.tensor(-0.3).exp() - 0.3).flatten(1).sum(1).mean()
    torch.testing.assert_close(loss(x, y)[0], expected)


def test_learned_variance_settles_at_the_mean_distance() -> None:
    x, y = images(0), images(1)
    loss = ReconstructionLoss("l2", lpips_weight=0)
    assert loss.log_scale is not None
    loss.log_scale.data.fill_(float((x - y).square().mean().log()))
    loss(x, y)[0].backward()
    assert loss.log_scale.grad is not None
    assert abs(loss.log_scale.grad.item()) < 1e-2


def test_float32_under_autocast_and_no_network_in_the_checkpoint() -> None:
    loss = ReconstructionLoss("l1", lpips_network="alex")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value, _ = loss(images(0), images(1))
    torch.testing.assert_close(value, loss(images(0), images(1))[0])
    assert list(loss.state_dict()) == ["log_scale"]


def test_a_share_of_the_batch_has_the_same_expectation() -> None:
    """Over all halves of a batch the loss averages to that of the whole: each image is as often among those measured."""
    x, y = (torch.cat([images(seed), images(seed + 1)]) for seed in (0, 2))
    loss = ReconstructionLoss("l2", lpips_network="alex", lpips_share=0.5)
    whole = ReconstructionLoss("l2", lpips_network="alex")(x, y)[0]
    rolled = [loss(x.roll(shift, 0), y.roll(shift, 0))[0] for shift in range(4)]
    torch.testing.assert_close(torch.stack(rolled).mean(), whole)
    assert torch.stack(rolled).std() > 0


def test_bad_weight() -> None:
    with pytest.raises(UserError, match=r"loss.lpips_share"):
        ReconstructionLoss(lpips_share=0)

    with pytest.raises(UserError, match=r"loss.lpips_weight"):
        ReconstructionLoss(lpips_weight=-1)
