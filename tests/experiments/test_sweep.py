"""Sweeps: axes that some arms have and others have not, and the rules that a sweep gives."""

import json
from typing import Any

import pytest
import yaml

from arms import ROOT, Arm, SpecError, arms, choose, read
from tables import choices, rules

FIG1 = read(ROOT / "experiments/fig1.yaml")
SWEEP: dict[str, Any] = {
    "configs": ["a.yaml"],
    "axes": {"quantizer": ["vq", "gq"], "rate": [0.1, 0.2, 0.4], "form": ["element_mean", "image_sum"], "start": [True, False]},
    "only": {"form": {"quantizer": ["vq", "lfq"]}, "start": {"quantizer": "vq"}},
    "arguments": {"quantizer": "--config {}.yaml", "form": "--reduction {}", "start": "--kmeans {}"},
    "rules": [{"set": {"model.learning_rate": "{rate}"}}],
}
SEARCH = {"of": {"rate": "model.learning_rate", "form": "reduction", "start": "kmeans"}, "by": ["quantizer"], "metric": "psnr"}


def scored(planned: list[Arm], best: dict[str, Any]) -> list[dict[str, Any]]:
    """Results that are the better the more values an arm shares with the best."""
    return [{"arm": arm.values, "metrics": {"psnr": 20.0 + len(arm.values.items() & best.items())}} for arm in planned]


def test_an_axis_that_does_not_apply_multiplies_nothing() -> None:
    found = {arm.name: arm for arm in arms(SWEEP, "runs")}
    assert len(found) == 3 * 2 * 2 + 3
    assert found["gq-0.1"].values == {"quantizer": "gq", "rate": 0.1, "form": None, "start": None}
    assert "--reduction" not in found["gq-0.1"].line
    assert "--reduction image_sum --kmeans true" in found["vq-0.2-image_sum-True"].line
    with pytest.raises(SpecError, match="only: method is no axis"):
        arms(SWEEP | {"only": {"form": {"method": "vq"}}}, "runs")
    twins = {"axes": {"q": ["x"], "a": ["same"], "b": ["same"], "c": [1, 2]}, "only": {"a": {"c": 1}, "b": {"c": 2}, "c": {"q": "y"}}}
    with pytest.raises(SpecError, match="only: two arms are called x-same"):
        arms(SWEEP | twins | {"arguments": {}, "rules": []}, "runs")


def test_several_axes_are_chosen_together() -> None:
    planned = arms(SWEEP, "runs")
    results = scored(planned, {"rate": 0.2, "form": "image_sum", "start": True})
    vq, gq = choices(SEARCH, results)
    assert (vq.when, vq.best) == ({"quantizer": "vq"}, {"rate": 0.2, "form": "image_sum", "start": True})
    assert (gq.when, gq.best) == ({"quantizer": "gq"}, {"rate": 0.2})
    assert len(vq.tried) == 12
    first, second = rules(SEARCH, results, planned).strip().split("\n")
    assert first.startswith(
        "- {when: {quantizer: vq}, set: {model.learning_rate: 0.2, reduction: image_sum, kmeans: true}}  # 0.1 element_mean true: 21.00, "
    )
    assert second == "- {when: {quantizer: gq}, set: {model.learning_rate: 0.2}}  # 0.1: 20.00, 0.2: 21.00, 0.4: 20.00"
    pasted = yaml.safe_load(first + "\n" + second)
    settings = {arm.name: arm.settings for arm in arms(SWEEP | {"rules": [*SWEEP["rules"], *pasted]}, "runs")}
    assert settings["vq-0.1-image_sum-True"] == {"model.learning_rate": 0.2, "reduction": "image_sum", "kmeans": True}
    assert settings["gq-0.1"] == {"model.learning_rate": 0.2}


def test_a_choice_at_the_edge_or_among_few_is_told() -> None:
    planned = arms(SWEEP, "runs")
    results = scored(planned, {"rate": 0.4, "form": "element_mean"})
    assert [choice.edges() for choice in choices(SEARCH, results)] == [["rate"], ["rate"]]
    text = rules(SEARCH, results[:-2], planned)
    assert text.count("; at the edge: extend the sweep of rate") == 1
    assert text.endswith("# 0.1: 20.00; 2 of 3 arms are missing\n")
    diverged = [*results[:-1], {**results[-1], "metrics": {"psnr": float("nan")}}]
    assert choices(SEARCH, diverged)[1].best == {"rate": 0.1}


def test_seeds_of_a_sweep_are_averaged() -> None:
    scores = {(0.1, 0): 20.0, (0.1, 1): 24.0, (0.2, 0): 23.0, (0.2, 1): 23.0}
    measured = [{"arm": {"q": "vq", "rate": rate, "seed": seed}, "metrics": {"psnr": v}} for (rate, seed), v in scores.items()]
    (choice,) = choices({"of": {"rate": "model.learning_rate"}, "by": ["q"], "metric": "psnr"}, measured)
    assert choice.best == {"rate": 0.2}
    assert choice.tried == [({"rate": 0.1}, 22.0), ({"rate": 0.2}, 23.0)]


def test_small_rates_can_be_pasted() -> None:
    measured = [{"arm": {"q": "vq", "rate": rate}, "metrics": {"psnr": 1.0}} for rate in (0.00005, 0.0001)]
    (pasted,) = yaml.safe_load(rules({"of": {"rate": "learning_rate"}, "by": ["q"], "metric": "psnr"}, measured, []))
    assert pasted["set"] == {"learning_rate": 0.00005}


@pytest.mark.parametrize("profile", FIG1["profiles"])
def test_committed_rules_are_the_best_of_the_sweep(profile: str) -> None:
    results = sorted((ROOT / f"experiments/results/fig1/{profile}/sweep").glob("*.json"))
    if not results:
        pytest.skip("no sweep has been committed")
    search = choose(FIG1, profile, sweep=True)["best"]
    planned = [(arm.values, arm.settings) for arm in arms(choose(FIG1, profile), "runs")]
    for choice in choices(search, [json.loads(path.read_text()) for path in results]):
        wanted = {search["of"][axis]: value for axis, value in choice.best.items()}
        mine = [settings for values, settings in planned if choice.when.items() <= values.items()]
        assert mine, choice.when
        assert all(settings.get(key) == value for settings in mine for key, value in wanted.items()), choice.when
