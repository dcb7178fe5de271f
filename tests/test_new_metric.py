"""A metric is added in one place: what is in METRICS is measured, logged, written down, reported and drawn."""

import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import lightning.pytorch as pl
import pytest
import torch
from rich.console import Console
from small import small_training
from torch import Tensor
from torch.utils.data import DataLoader

import tables
from arms import Arm
from gq_lightning.evaluation.evaluate import evaluate, write_metrics
from gq_lightning.evaluation.report import metrics_table
from gq_lightning.metrics import METRICS, ImageMetric, Number, reconstruction
from panels import figure
from plot import markdown
from points import Plot, points
from verdict import contests


class Error(ImageMetric):
    numbers = (Number("error", "mean error, grey values", ".3f", "lower", logarithmic=True),)
    protocol: ClassVar = {"error": "mean over all pixels and channels"}

    def of_each(self, images: Tensor, originals: Tensor) -> Tensor:
        return (images - originals).abs().mean(dim=(1, 2, 3))


@pytest.fixture(autouse=True)
def _registered() -> Iterator[None]:
    METRICS.append(Error)
    yield
    METRICS.remove(Error)


HEADING = "mean error, grey values \N{DOWNWARDS ARROW}"
PLOT: Plot = {
    **{"name": "new", "x": "bits_per_pixel", "y": ["psnr", "error"], "series": "quantizer", "style": "backbone"},
    **{"method": ["gq"], "baselines": ["vq"], "lead": "error", "rate": "rate"},
}


@pytest.fixture
def content(tmp_path: Path) -> dict[str, Any]:
    """What metrics.json has of an untrained tokenizer."""
    training = small_training("vit")
    images = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    values, protocol = evaluate(training.tokenizer, [images[:2], images[2:]], rfid=False, progress=False)
    training.tokenizer.eval()
    decoded = training.tokenizer.decode(training.tokenizer.encode(images))
    assert values["error"] == pytest.approx((decoded - images).abs().mean().item() * 127.5, rel=1e-4)
    write_metrics(tmp_path / "metrics.json", values, protocol, {})
    return json.loads((tmp_path / "metrics.json").read_text())


def test_it_is_in_metrics_json_with_its_protocol(content: dict[str, Any]) -> None:
    assert content["error"] > 0
    assert content["gaussian_error"] > 0
    assert content["protocol"]["error"] == "mean over all pixels and channels"


class Costly(Error):
    numbers = (Number("costly", "what takes long", ".3f"),)
    costly = True


def test_it_is_logged_and_what_is_costly_is_left_to_test(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reconstruction, "METRICS", [Error, Costly])
    quiet: dict[str, Any] = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer, loader = pl.Trainer(accelerator="cpu", devices=1, **quiet), DataLoader(torch.zeros(2, 3, 32, 32))  # type: ignore[arg-type]
    trainer.validate(small_training("vit"), loader, verbose=False)
    assert trainer.callback_metrics.keys() == {"val/error", "val/gaussian_error"}
    assert all(value > 0 for value in trainer.callback_metrics.values())
    trainer.test(small_training("vit"), loader, verbose=False)
    assert trainer.callback_metrics.keys() == {f"test/{prefix}{name}" for prefix in ("", "gaussian_") for name in ("error", "costly")}


def test_it_is_in_the_report(content: dict[str, Any]) -> None:
    stream = io.StringIO()
    Console(file=stream, width=120).print(metrics_table(content, "title"))
    row = next(line for line in stream.getvalue().splitlines() if HEADING in line)
    assert f"{content['error']:.3f}" in row
    assert f"{content['gaussian_error']:.3f}" in row


def test_it_is_in_the_tables_and_has_an_axis_in_the_figure(content: dict[str, Any]) -> None:
    arms = [{"quantizer": quantizer, "backbone": "vit", "rate": 16} for quantizer in ("gq", "vq")]
    worse = content | {"error": 2 * content["error"]}
    measured = [{"arm": arm, "metrics": metrics} for arm, metrics in zip(arms, (content, worse), strict=True)]
    planned = [Arm(arm["quantizer"], arm, {}, [], "") for arm in arms]
    table = tables.markdown({"rows": "quantizer", "columns": ["error", "gaussian_error"]}, measured)
    assert table.startswith(f"| quantizer | {HEADING} | Gaussian mean error, grey values \N{DOWNWARDS ARROW} |")
    assert f"| gq | {content['error']:.3f} | {content['gaussian_error']:.3f} |" in table
    found = points(PLOT, measured)
    axes = figure(PLOT, planned, found, []).axes
    assert (axes[1].get_title(), axes[1].get_yscale()) == (HEADING, "log")
    assert axes[-1].get_ylabel() == "lead, mean error, grey values"
    assert HEADING in markdown(PLOT, found, [])
    assert contests(PLOT, planned, found, [])["gq"].wins("error") == (1, 1), "lower is better"
    [choice] = tables.choices({"of": {"quantizer": "q"}, "by": ["backbone"], "metric": "error"}, measured)
    assert choice.best == {"quantizer": "gq"}
