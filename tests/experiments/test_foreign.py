"""The measurement on foreign pictures: its sets, and what it says of a tokenizer whose bits are known."""

import json
from pathlib import Path

import pytest
import torch
from small import small_tokenizer

import foreign
from gq_lightning.quantizers import GaussianQuantizer


def test_the_sets_are_the_same_every_time_and_within_range() -> None:
    first, second = foreign.foreign(32, None), foreign.foreign(32, None)
    assert list(first) == ["photographs", "textures", "text", "flat", "noise"]
    for name, images in first.items():
        assert images.shape == (foreign.CROPS, 3, 32, 32)
        assert torch.equal(images, second[name])
        assert images.abs().max() <= 1
    assert first["flat"].flatten(2).std(dim=-1).max() < 1e-6


def test_exact_divergence_is_at_its_target_on_all_of_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(foreign, "CROPS", 24)
    for name, exact in (("vit-exact", True), ("vit-plain", False)):
        quantizer = GaussianQuantizer(16, latent_channels=8, codebook_size=256, exact_divergence=exact)
        small_tokenizer("vit", quantizer).save_pretrained(tmp_path / "runs" / name / "tokenizer")
    runs = [str(tmp_path / "runs" / name) for name in ("vit-exact", "vit-plain")]
    assert foreign.main([*runs, "--results", str(tmp_path / "results")]) == 0
    exact, plain = (json.loads((tmp_path / f"results/{name}.json").read_text()) for name in ("vit-exact", "vit-plain"))
    for measured in exact["sets"].values():
        assert measured["share_within_alpha"] == 1
        assert measured["bits_mean"] == pytest.approx(8, abs=1e-3)
        assert sum(measured["histogram"]["counts"]) == 24 * 16 * 2
    assert any(measured["bits_max"] - measured["bits_min"] > 0.01 for measured in plain["sets"].values())
    assert (tmp_path / "results/foreign.png").stat().st_size > 10_000
    assert "vit-exact" in (tmp_path / "results/foreign.md").read_text()


def test_without_results_it_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        foreign.main(["--results", str(tmp_path)])
    assert end.value.code == 2
    assert "name the runs to measure" in capsys.readouterr().err
