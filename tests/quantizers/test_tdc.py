import copy
import time

import pytest
import torch

from gq_lightning import UserError
from gq_lightning.quantizers.tdc import TargetDivergence


def multipliers(tdc: TargetDivergence) -> list[float]:
    return [tdc.lambda_min.item(), tdc.lambda_mean.item(), tdc.lambda_max.item()]


# (min, mean, max) of the bits of four steps, for a target of 16 +- 0.5
STATISTICS = [(10.0, 17.0, 20.0), (15.6, 15.0, 16.5), (15.5, 16.0, 16.6), (16.0, 16.1, 16.2)]


def test_paper_trajectory_by_hand() -> None:
    tdc = TargetDivergence(16, alpha=0.5, beta=2.0)
    # a multiplier doubles where min > 15.5, mean > 16, max > 16.5 (strictly) and halves otherwise
    expected = [[0.5, 2, 2], [1, 1, 1], [0.5, 0.5, 2], [1, 1, 1]]
    for statistics, wanted in zip(STATISTICS, expected, strict=True):
        tdc.update(*map(torch.tensor, statistics))
        assert multipliers(tdc) == wanted


def test_reference_trajectory_by_hand() -> None:
    tdc = TargetDivergence(16, alpha=0.5, beta=2.0, variant="reference")
    # the same tests, with lambda_min in [1e-3, 1] and lambda_max in [1, 1e3]
    expected = [[0.5, 2, 2], [1, 1, 1], [0.5, 0.5, 2], [1, 1, 1]]
    for statistics, wanted in zip(STATISTICS, expected, strict=True):
        tdc.update(*statistics)
        assert multipliers(tdc) == wanted
    tdc.update(16.0, 17.0, 16.0)
    assert multipliers(tdc) == [1, 2, 1], "lambda_min stops at 1 from below, lambda_max from above"


@pytest.mark.parametrize(
    ("variant", "low", "high"), [("paper", [1e-3] * 3, [1e3] * 3), ("reference", [1e-3, 0, 1], [1, float("inf"), 1e3])]
)
def test_limits(variant: str, low: list[float], high: list[float]) -> None:
    for statistic, limits in ((0.0, low), (100.0, high)):
        tdc = TargetDivergence(16, beta=2.0, variant=variant)  # type: ignore[arg-type]
        for _ in range(160):
            tdc.update(statistic, statistic, statistic)
        assert multipliers(tdc) == pytest.approx(limits)


def test_penalty_weighs_three_bands() -> None:
    bits = torch.tensor([15.49, 15.5, 16.5, 16.51], requires_grad=True)
    tdc = TargetDivergence(16)
    for name, value in (("lambda_min", 2.0), ("lambda_mean", 3.0), ("lambda_max", 5.0)):
        getattr(tdc, name).fill_(value)
    tdc.penalty(bits).sum().backward()
    assert bits.grad is not None
    assert bits.grad.tolist() == [2, 3, 3, 5]
    reference = TargetDivergence(16, variant="reference")
    reference.load_state_dict(tdc.state_dict())
    torch.testing.assert_close(reference.penalty(bits), bits * torch.tensor([6.0, 3, 3, 15]))


def test_multipliers_of_one_are_a_plain_gaussian_vae() -> None:
    bits = torch.rand(3, 5) * 30
    for variant in ("paper", "reference"):
        assert torch.equal(TargetDivergence(16, variant=variant).penalty(bits), bits)  # type: ignore[arg-type]


def test_saved_state_continues_the_trajectory() -> None:
    torch.manual_seed(0)
    steps = [(torch.rand(3) * 4 + 14).sort().values for _ in range(60)]
    straight, first = TargetDivergence(16), TargetDivergence(16)
    for step in steps:
        straight.update(*step)
    for step in steps[:31]:
        first.update(*step)
    second = TargetDivergence(16)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    for step in steps[31:]:
        second.update(*step)
    assert multipliers(straight) == multipliers(second) != [1, 1, 1]


def test_stays_float32_under_conversion() -> None:
    tdc = TargetDivergence(16)
    tdc.update(17.0, 17.0, 17.0)
    before = multipliers(tdc)
    assert tdc.to(torch.bfloat16).lambda_mean.dtype == torch.float32
    tdc.update(17.0, 17.0, 17.0)
    assert multipliers(tdc) == pytest.approx([1.01**2] * 3) != before


@pytest.mark.parametrize("arguments", [{"target_bits": 0}, {"alpha": -1}, {"beta": 1.0}, {"variant": "papper"}])
def test_bad_arguments(arguments: dict) -> None:
    with pytest.raises(UserError):
        TargetDivergence(**{"target_bits": 16, **arguments})


def test_updates_are_cheap() -> None:
    tdc, statistics = TargetDivergence(16), torch.tensor([15.0, 16.0, 17.0])
    begin = time.perf_counter()
    for _ in range(1000):
        tdc.update(*statistics)
    # 1 % of 1 000 steps of the demo, which takes more than 100 ms a step on two cores
    assert time.perf_counter() - begin < 1.0
