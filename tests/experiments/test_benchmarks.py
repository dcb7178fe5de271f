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

import configs
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


def test_larger_blocks_of_the_search_agree_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, where there is one."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    shapes = []
    monkeypatch.setitem(search.BLOCKS, device, (16, 500))
    monkeypatch.setattr(torch.Tensor, "__matmul__", lambda rows, columns: shapes.append((len(rows), columns.shape[1])))
    search.product(torch.zeros(40, 2, device=device), torch.zeros(1024, 2, device=device))
    monkeypatch.undo()
    assert shapes == [(rows, columns) for rows in (16, 16, 8) for columns in (500, 500, 24)]
    posteriors = search.problem(40, 1024, 4, device)
    assert all(part.device.type == device for part in posteriors)
    calls = search.forms(*posteriors)
    assert torch.equal(calls["plain"](40), calls["search"](40))
    rows = search.cell(7, 1024, 4, 0.001, device)
    assert len(rows) == 4 and all(row["seconds"] > 0 for row in rows)


@pytest.mark.filterwarnings("ignore:The image decoding:DeprecationWarning")
def test_the_loader_is_compared_with_its_decoder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loader, "WORKERS", (0,))
    assert loader.write_photographs(tmp_path, 16) > 16 * 20_000
    rates = loader.measure(tmp_path, 16, 1)
    assert rates.keys() == {"decode", "half", "torchvision", "picture", "resize", "resize, torch", "item", "fast", "shards", "workers 0"}
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


@pytest.mark.slow  # what a test of step.py shows of the trainer, this shows again
def test_fit_takes_longer_than_a_bare_loop(tmp_path: Path) -> None:
    out = tmp_path / "loop.json"
    call = [sys.executable, str(ROOT / "experiments/benchmarks/loop.py"), "--out", str(out), "--case", "tiny", "--blocks", "2"]
    subprocess.run(call, check=True, capture_output=True, cwd=tmp_path)
    found = json.loads(out.read_text())
    tiny = found["cases"]["tiny"]
    assert tiny["milliseconds"].keys() == {"fit", "loop", "plain"} and all(taken > 0 for taken in tiny["milliseconds"].values())
    assert sum(tiny["shares"].values()) == pytest.approx(1, abs=0.01) and tiny["shares"]["products"] > 0.02
    overhead = tiny["milliseconds"]["fit"] - tiny["milliseconds"]["loop"]
    assert found["ratios"]["overhead of tiny, ms"] == pytest.approx(overhead, abs=1e-3) and overhead > 0


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


def test_every_shipped_config_is_run() -> None:
    runs = configs.runs()
    paths = {path for run in runs for path in run.paths}
    assert all((ROOT / path).is_file() for path in paths)
    for axis in ("backbone", "quantizer", "scale", "prior"):
        assert {str(path.relative_to(ROOT)) for path in (ROOT / "configs" / axis).glob("*.yaml")} <= paths
    assert len({run.name for run in runs}) == len(runs)


def test_both_precisions_of_a_config_share_a_row() -> None:
    one = {"name": "a", "precision": "bf16-mixed", "batch_size": 16, "image_size": 64, "parameters": 1_500_000, "step_ms": 12.34}
    one |= {"data_ms": 0.5, "images_per_second": 1234.5, "peak_mib": 512.0, "last_loss": 1.01}
    failed = {"name": "b", "precision": "32-true", "error": "out of memory"}
    _, *body = configs.rows([one, {**one, "precision": "32-true", "step_ms": 1234.5, "last_loss": 1.0}, failed])
    numbers = ["12.3 / 1,234", "0.500 / 0.500", "1,234 / 1,234", "0.500 / 0.500"]
    assert body[0] == ["a", "16 of 64²", "1.5 M", *numbers, "1.000%"]
    assert body[1] == ["b", "", "", *["missing / failed"] * 4, ""]
