"""A few points of the experiment of the two bounds, with few trials; and that a wrong sigma is found out."""

import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch
from scipy.stats import kstest

import theory
from gq_lightning.quantizers.gaussian import kl_bits
from theory import Posterior, bounds, main, measure, ordered, posterior, searched, verdict
from theory_figure import figure

TRIALS = 800
GROUP = [posterior(mean, 8) for mean in (0.0, 0.7, 2.0)]


@pytest.fixture(autouse=True)
def few_trials(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(theory, "TRIALS", TRIALS)


def size(t: float, group: list[Posterior] = GROUP) -> int:
    return round(math.exp(group[0].nats + t))


@pytest.mark.parametrize(("mean", "bits"), [(0.0, 15), (0.7, 15), (-3.0, 11), (1.4, 2)])
def test_a_posterior_costs_its_bits(mean: float, bits: float) -> None:
    found = posterior(mean, bits)
    assert 0 < found.sigma < 1
    cost = kl_bits(torch.tensor(mean, dtype=torch.float64), torch.tensor(2 * math.log(found.sigma), dtype=torch.float64)).item()
    assert cost == pytest.approx(bits, rel=1e-12)
    assert found.nats == pytest.approx(bits * math.log(2))


def test_no_sigma_makes_a_far_mean_cheap() -> None:
    with pytest.raises(ValueError, match=r"a mean of 3 costs 6\.49\d* bits, and no sigma < 1 makes it 5"):
        posterior(3.0, 5)


@pytest.mark.parametrize(("t", "budget", "method"), [(-3, 20, "search"), (0.5, 20, "search"), (1, 12, "order statistics")])
def test_what_is_measured_is_exact_and_within_the_bounds(t: float, budget: int, method: str) -> None:
    points = measure(GROUP, size(t), budget, seed=0)
    assert [point["method"] for point in points] == [method] * 3
    for point in points:
        assert point["t"] == pytest.approx(t, abs=0.05)
        assert point["K"] == pytest.approx(math.exp(point["R"] + point["t"]))
        assert point["covered"] and point["interval"][0] <= point["measured"] <= point["interval"][1]
        assert point["paper"]["lower"] <= point["sharp"]["lower"] <= point["exact"] <= point["sharp"]["upper"] <= point["paper"]["upper"]
    assert [point["paper"]["applies"] for point in points] == [{"lower": lower, "upper": True} for lower in (True, True, False)]
    holds, sentence = verdict(points)
    assert holds
    assert sentence.startswith("Of 3 points none violate the paper's bounds, of which the lower applies to 2, and none the sharp ones; 0")


def test_order_statistics_are_those_of_the_search() -> None:
    generator = torch.Generator().manual_seed(0)
    found, drawn = (sample(GROUP, 50, 800, generator) for sample in (searched, ordered))
    for i in range(len(GROUP)):
        assert kstest(found[:, i].numpy(), drawn[:, i].numpy()).pvalue > 0.01
    # of 10^11 codewords the nearest is an exponential distance away, its mean 1 / (2 K phi(mu))
    far = ordered(GROUP, 10**11, 4000, generator).mean(dim=0)
    density = torch.exp(-torch.tensor([each.mean for each in GROUP]).double().square() / 2) / math.sqrt(2 * math.pi)
    torch.testing.assert_close(far * 2e11 * density, torch.ones(3).double(), rtol=0.05, atol=0)


@pytest.mark.parametrize(("factor", "within"), [(1.0, (True, True)), (2.0, (True, False)), (0.5, (True, False)), (5.0, (False, False))])
def test_a_wrong_sigma_fails(factor: float, within: tuple[bool, bool]) -> None:
    """Twice or half of sigma is found by the sharp bounds; the paper's, three times as far, find it only when it is five times as large."""
    wrong = [dataclasses.replace(each, sigma=factor * each.sigma) for each in GROUP[:2]]
    points = measure(wrong, size(-1.5), 19, seed=2)
    assert all((point["paper"]["within"], point["sharp"]["within"]) == within for point in points)
    assert verdict(points)[0] == all(within)


def test_a_side_that_does_not_apply_is_not_judged() -> None:
    point = theory.judged(Posterior(3.0, 1.0, 4.5), 4, "search", torch.tensor([2.0] * 912 + [0.5] * 88, dtype=torch.float64).repeat(100))
    assert point["measured"] == pytest.approx(point["exact"], abs=2e-3)
    assert point["interval"][1] < point["paper"]["lower"], "it is below the bound"
    assert point["paper"]["applies"] == {"lower": False, "upper": True}
    assert point["paper"]["within"]


def test_the_bounds_are_those_of_the_paper() -> None:
    found = bounds(-2.0, 8.12, 1.5)
    assert found["lower"] == pytest.approx(1 - math.exp(-2) * math.sqrt(2 / math.pi) * math.exp(1.5**2 / 2 - 0.5))
    assert found["upper"] == pytest.approx(math.exp(-math.exp(-2) * math.sqrt(2 / math.pi) * math.exp(-8.12 - 0.5)))


@pytest.mark.parametrize("factor", [1.0, 2.0])
def test_the_whole_run(factor: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def some(mean: float, bits: float) -> Posterior:
        found = posterior(mean, bits)
        return dataclasses.replace(found, sigma=factor * found.sigma)

    monkeypatch.setattr(theory, "posterior", some)
    monkeypatch.setattr(theory, "BITS", (5,))
    monkeypatch.setattr(theory, "MEANS", (0.0, 1.0))
    monkeypatch.setattr(theory, "TS", (-10, -1, 12))
    assert main(["--budget", "16", "--out", str(tmp_path / "theory")]) == (0 if factor == 1 else 1)
    content = json.loads((tmp_path / "theory/theory.json").read_text())
    assert content["holds"] == (factor == 1)
    assert content["command"] == "python experiments/theory.py --budget 16 --seed 0"
    assert {"processor", "torch"} < set(content["machine"])
    assert len(content["points"]) == 2 * 3
    assert [point["K"] for point in content["points"][::2]] == [1, 12, round(32 * math.exp(12))]
    assert all((tmp_path / f"theory/theory.{suffix}").stat().st_size > 1000 for suffix in ("png", "svg"))
    assert "violate the paper's bounds" in capsys.readouterr().out
    drawn = figure(content["points"], 8.12, 1.5)
    assert [axes.get_yscale() for axes in drawn.axes] == ["linear", "log"]
    assert len(drawn.legends[0].get_texts()) == 9
