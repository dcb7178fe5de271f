"""The benchmarks time what they say: the same result from every form, parts that add up, files that are whole."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import evaluation
import lightning.pytorch as pl
import loader
import machine
import pytest
import scale
import search
import token_set
import torch
from small import small_tokenizer, small_training

from gq_lightning.data import Photographs
from gq_lightning.evaluation.evaluate import evaluate
from gq_lightning.evaluation.summary import summarize
from gq_lightning.tokens import TokenSet

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("m", [1, 4])
def test_the_forms_of_the_search_agree(m: int) -> None:
    posteriors = search.problem(40, 1024, m)
    calls = search.forms(*posteriors)
    assert calls.keys() == {"search", "plain", "product"} | ({"blocked"} if m > 1 else set())
    expected = calls["search"](40)
    assert len(expected) == 40
    for name in calls.keys() - {"search", "product"}:
        assert torch.equal(calls[name](40), expected), name
    rows = search.cell(7, 1024, m, 0.001)
    assert [(row["K"], row["m"], row["N"], row["form"]) for row in rows] == [(1024, m, 7, name) for name in calls]
    assert all(row["seconds"] > 0 and 0 < row["timed"] <= 7 for row in rows)


@pytest.mark.filterwarnings("ignore:The image decoding:DeprecationWarning")
def test_the_loader_is_compared_with_its_decoder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loader, "WORKERS", (0,))
    assert loader.write_photographs(tmp_path, 16) > 16 * 20_000
    rates = loader.measure(tmp_path, 16, 1)
    assert rates.keys() == {"decode", "half", "torchvision", "picture", "item", "fast", "shards", "workers 0"}
    assert min(rates["half"]["median"], rates["decode"]["median"]) > rates["item"]["median"] > 1


def test_tokenize_is_compared_with_its_encoder(tmp_path: Path) -> None:
    loader.write_photographs(tmp_path, 3)
    tokenizer = small_tokenizer("vit")
    taken = token_set.measure(tokenizer, tmp_path, 32, 1, 0)
    assert {name: len(times) for name, times in taken.items()} == {"bare": 1, "set": 1}
    assert all(wall > 0 and processor > 0 for times in taken.values() for wall, processor in times)
    written = TokenSet(tmp_path / "set")
    assert len(written) == 6 and written.header.views == ["centre", "mirrored"]


@pytest.mark.slow
def test_the_parts_of_a_step_add_up(tmp_path: Path) -> None:
    out = tmp_path / "step.json"
    call = [sys.executable, str(ROOT / "experiments/benchmarks/step.py"), "--out", str(out), "--scale", "demo", "--backbone", "vit"]
    subprocess.run([*call, "--steps", "4"], check=True, capture_output=True, cwd=tmp_path)
    content: dict[str, Any] = json.loads(out.read_text())
    (run,) = content["runs"]
    assert content["machine"]["torch"] == torch.__version__
    assert out.with_suffix(".png").stat().st_size > 10_000
    assert abs(sum(part["ms"] for part in run["parts"].values()) / run["step_ms"] - 1) < 0.01
    assert all(run["parts"][part]["ms"] > 0 for part in ("data", "encoder", "decoder", "LPIPS", "backward", "optimizer", "TDC update"))
    assert run["parts"]["backward"]["ms"] > run["parts"]["TDC update"]["ms"]


@pytest.mark.parametrize("backbone", ["vit", "unet"])
def test_a_training_step_is_counted(backbone: str) -> None:
    """Three times what encoding and decoding take: a backward pass is two products for each of the forward pass, save for the images."""
    training, count = small_training(backbone), scale.Count()
    quiet: dict[str, Any] = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    trainer = pl.Trainer(accelerator="cpu", devices=1, max_steps=1, limit_val_batches=0, callbacks=[count], **quiet)
    trainer.fit(training, Photographs(image_size=32, batch_size=2, workers=0))
    once = summarize(training.tokenizer, 32)
    forward = 2 * (once.encode_flops + once.decode_flops)
    assert 2.8 * forward < count.counter.get_total_flops() < 3.1 * forward


def test_ratios_stand_beside_those_of_before(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "a.json"
    machine.write_ratios({"seconds": 1}, path, {"first": 1.23456}, {"first": 1.1})
    machine.write_ratios({"seconds": 2}, path, {"first": 0.5, "second": 2}, {"first": 1.1})
    assert json.loads(path.read_text()) == {
        "seconds": 2,
        "ratios": {"first": 0.5, "second": 2},
        "ratios_before": {"first": 1.235},
        "wanted": {"first": 1.1},
    }
    printed = capsys.readouterr().out
    assert all(text in printed for text in ("0.5", "1.235", "1.1"))


def test_the_plain_evaluation_gives_the_same_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And its parts add up to the whole."""
    values: dict[str, dict[str, float]] = {}

    def kept(form: str) -> dict[str, float]:
        monkeypatch.setattr(evaluation, "evaluate", lambda *args, **kwargs: values.setdefault(form, evaluate(*args, **kwargs)[0]))
        return evaluation.once(small_tokenizer("vit").eval(), [pictures])

    monkeypatch.setattr(evaluation.feature_cache, "cache_folder", lambda: tmp_path)
    pictures = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with evaluation.plain():
        taken = kept("plain")
    kept("evaluation")
    assert sum(seconds for part, seconds in taken.items() if part != "all") == pytest.approx(taken["all"])
    for name in ("psnr", "lpips", "rfid", "gaussian_rfid"):
        assert values["plain"][name] == pytest.approx(values["evaluation"][name], rel=1e-4), name
