"""Who wins: counted by hand on results that are made up here."""

from typing import Any

from arms import Arm, arms
from points import points, published_points
from verdict import contests, markdown

PLOT: dict[str, Any] = {
    **{"x": "bpp", "y": ["psnr", "lpips"], "series": "method", "style": "backbone", "rate": "rate", "lead": "psnr"},
    **{"method": ["gq", "wide"], "as_published": "gq", "baselines": ["vq", "fsq", "bsq"]},
    "labels": {"bpp": "bits per pixel"},
}
# seeds of PSNR at two rates; LPIPS is 1 - PSNR / 100, save where it is said
SCORES = {("gq", 16): [20.0, 20.4], ("wide", 16): [20.9, 21.1], ("vq", 16): [20.6, 20.8], ("fsq", 16): [20.1, 20.3]}
SCORES |= {("gq", 32): [25.0, 25.2], ("wide", 32): [24.0, 24.2], ("vq", 32): [22.0, 25.1], ("fsq", 32): [24.5, 24.9]}
PUBLISHED = {
    "bpp": [0.25, 0.5],
    "series": [{"backbone": "vit", "method": m, "psnr": [a, b]} for m, a, b in (("gq", 27, 30), ("vq", 26, 31))],
}


def planned(methods: tuple[str, ...] = ("gq", "wide", "vq", "fsq")) -> list[Arm]:
    axes = {"backbone": ["vit"], "method": list(methods), "rate": [16, 32], "seed": [0, 1]}
    return arms({"configs": [], "axes": axes, "arguments": {}}, "runs")


def measured(*without: tuple[str, int, int]) -> list[dict[str, Any]]:
    found = []
    for arm in planned():
        method, rate, seed = (arm.values[axis] for axis in ("method", "rate", "seed"))
        if (method, rate, seed) not in without:
            psnr = SCORES[method, rate][seed]
            found.append({"arm": arm.values, "metrics": {"psnr": psnr, "lpips": 1 - psnr / 100, "bpp": rate / 64}})
    return found


def test_leads_by_hand() -> None:
    best, alone, published = contests(PLOT, planned(), points(PLOT, measured()), published_points(PLOT, PUBLISHED)).values()
    first = best.lead(("vit", 0.25), "psnr")
    assert first is not None
    assert (first.method.series, first.baseline.series, round(first.value, 6)) == ("wide", "vq", 0.3)
    assert first.beyond_seeds, "20.9 is above 20.8"
    second = best.lead(("vit", 0.5), "psnr")
    assert second is not None
    assert (second.method.series, second.baseline.series, round(second.value, 6)) == ("gq", "fsq", 0.4)
    assert second.beyond_seeds is False, "a seed of VQ, which is not the best baseline, reaches 25.1"
    behind = alone.lead(("vit", 0.25), "psnr")
    assert behind is not None
    assert (behind.method.series, round(behind.value, 6)) == ("gq", -0.5)
    lower = best.lead(("vit", 0.25), "lpips")
    assert lower is not None
    assert (round(lower.value, 6), lower.beyond_seeds) == (0.003, True), "of what is better the lower it is"
    assert [contest.wins("psnr") for contest in (best, alone, published)] == [(2, 2), (1, 2), (1, 2)]


def test_the_verdict_in_words() -> None:
    ours, theirs = points(PLOT, measured()), published_points(PLOT, PUBLISHED)
    text = markdown(PLOT, planned(), measured(), ours, theirs)
    assert "| best of gq, wide | 2 of 2 | 2 of 2 | **4 of 4** |" in text
    assert "| gq alone | 1 of 2 | 1 of 2 | **2 of 4** |" in text
    assert "| published numbers | 1 of 2 | 0 of 2, 2 undecided | **1 of 4, 2 undecided** |" in text
    row = next(line for line in text.splitlines() if line.startswith("| vit, 0.25 | **+"))
    assert row.split(" | ")[1] == "**+0.30**, beyond the seeds (wide over vq)"
    assert row.split(" | ")[2:] == ["**\N{MINUS SIGN}0.50**, within the seeds (gq over vq)", "**+1.00** (gq over vq) |"]
    assert "missing" not in text


def test_what_is_missing_is_said_and_decides_nothing() -> None:
    some = measured(("vq", 16, 0), ("vq", 16, 1), ("gq", 32, 1))
    text = markdown(PLOT, planned(), some, points(PLOT, some), [])
    assert "| best of gq, wide | 1 of 2, 1 undecided | 1 of 2, 1 undecided | **2 of 4, 2 undecided** |" in text
    assert "| vit, 0.25 | undecided: no vq | undecided: no vq |" in text
    assert "| vit, 0.5 | **+0.30** (gq over fsq) |" in text, "one seed has no spread"
    assert "3 of 16 arms are missing: vit-gq-32-1, vit-vq-16-0, vit-vq-16-1." in text
    # a rate of which nothing is there counts as well, and a series that is planned and never measured
    few = [content for content in some if content["arm"]["rate"] == 32]
    assert "**2 of 4, 2 undecided**" in markdown(PLOT, planned(), few, points(PLOT, few), [])
    more = planned(("gq", "wide", "vq", "fsq", "bsq"))
    assert "| gq alone | 0 of 2, 2 undecided |" in markdown(PLOT, more, measured(), points(PLOT, measured()), [])


def test_what_tokens_lose_against_their_gaussian_vae() -> None:
    several = measured()
    for content, (gaussian, share) in zip(
        [each for each in several if each["arm"]["method"] == "wide"], [(21.4, 0.9), (21.9, 1.0)], strict=False
    ):
        content["metrics"] |= {"gaussian_psnr": gaussian, "share_within_alpha": share}
    text = markdown(PLOT, planned(), several, points(PLOT, several), [])
    # 21.4 - 20.9 and 21.9 - 21.1
    assert "| vit wide, 0.25 | 0.650 (0.500 to 0.800) | 95.0% (90.0% to 100.0%) |" in text
    assert "vit vq, 0.25" not in text
