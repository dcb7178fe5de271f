"""TensorBoard's charts, its table of runs, and the pictures: what a run writes is what the page reads."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from small import CONFIGS, small_tokenizer
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar.layout_pb2 import Layout
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

from gq_lightning.callbacks.watching.dashboard import charts_of_priors, charts_of_tokenizers
from gq_lightning.callbacks.watching.reconstructions import LONGEST, whole_pictures
from gq_lightning.cli.main import main
from gq_lightning.data import ImageFolder
from gq_lightning.evaluation.panel import heat_map, panel


@pytest.fixture(scope="module")
def events(tmp_path_factory: pytest.TempPathFactory) -> EventAccumulator:
    runs = tmp_path_factory.mktemp("runs")
    files = ("base.yaml", "backbone/vit_small.yaml", "data/photographs.yaml", "scale/smoke.yaml", "machine/cpu.yaml")
    small = {"backbone.init_args.width": 32, "backbone.init_args.layers": 1, "quantizer.init_args.codebook_size": 256}
    arguments = [text for file in files for text in ("--config", str(CONFIGS / file))]
    arguments += [f"--model.{name}={value}" for name, value in small.items()]
    arguments += [
        "--trainer.max_steps=4",
        "--trainer.val_check_interval=2",
        "--trainer.log_every_n_steps=1",
        "--trainer.limit_val_batches=1",
    ]
    assert main(["fit", *arguments, "--export.rfid=false", f"--runs={runs}", "--name=seen"]) == 0
    return EventAccumulator(str(runs / "seen"), size_guidance={"images": 0}).Reload()


def test_every_chart_shows_scalars_of_the_run(events: EventAccumulator) -> None:
    layout = Layout()
    layout.ParseFromString(events.Tensors("custom_scalars__config__")[0].tensor_proto.string_val[0])
    charts = {chart.title: list(chart.multiline.tag) for category in layout.category for chart in category.chart}
    assert list(charts) == [title for section in charts_of_tokenizers().values() for title in section]
    scalars = events.Tags()["scalars"]
    shown = {title: {name for name in scalars for tag in tags if re.search(tag, name)} for title, tags in charts.items()}
    assert shown["bits per token"] == {"bits/min", "bits/mean", "bits/max", "chart/target_low", "chart/target_high"}
    assert shown["PSNR, dB \N{UPWARDS ARROW}"] == {"val/psnr", "val/gaussian_psnr"}
    assert [title for title, found in shown.items() if not found] == ["rFID \N{DOWNWARDS ARROW}"]  # which only the end of fit measures
    for name in ("min", "mean", "max"):
        multiplier, logarithm = (events.Scalars(tag)[-1].value for tag in (f"tdc/lambda_{name}", f"chart/log10_lambda_{name}"))
        assert 10**logarithm == pytest.approx(multiplier)


def test_the_table_has_choices_and_results(events: EventAccumulator) -> None:
    def plugin(tag: str) -> HParamsPluginData:
        return HParamsPluginData.FromString(events.SummaryMetadata(tag).plugin_data.content)

    choices = plugin("_hparams_/session_start_info").session_start_info.hparams
    assert choices["backbone"].string_value == "VisionTransformer"
    assert choices["quantizer.codebook_size"].number_value == 256
    assert choices["max_steps"].number_value == 4
    results = {info.name.tag for info in plugin("_hparams_/experiment").experiment.metric_infos}
    assert {"final/psnr", "final/lpips", "val/psnr"} <= results & set(events.Tags()["scalars"])
    assert plugin("_hparams_/session_end_info").HasField("session_end_info")


def test_no_card_holds_a_constant(events: EventAccumulator) -> None:
    assert not {"val/images", "val/tokens", "final/tokens", "final/evaluation_seconds"} & set(events.Tags()["scalars"])


def test_whole_pictures_are_shown_at_each_validation(events: EventAccumulator) -> None:
    assert [event.step for event in events.Images("whole/0")] == [1, 3]
    image = events.Images("whole/1")[0]
    assert image.width > 2 * LONGEST > image.height > 256  # two columns of a picture that is wider than high


def test_charts_of_a_prior_name_what_it_logs() -> None:
    (tags,) = (tags for section in charts_of_priors().values() for tags in section.values())
    for name in ("bits_per_pixel", "val/bits_per_pixel", "val/bits_per_pixel_uniform", "val/bits_per_pixel_counts"):
        assert any(re.search(tag, name) for tag in tags), name


@pytest.mark.parametrize("backbone", ["vit", "unet"])
def test_whole_pictures(backbone: str, tmp_path: Path) -> None:
    """At their size up to a limit, on the tokenizer's grid; what is broken or smaller than the ViT's window is left out."""
    tokenizer = small_tokenizer(backbone)
    for name, size in (("a", (70, 45)), ("c", (900, 300)), ("d", (20, 20))):
        Image.new("RGB", size, "teal").save(tmp_path / f"{name}.png")
    (tmp_path / "b.png").write_bytes(b"broken")
    pictures = ImageFolder(str(tmp_path), str(tmp_path), image_size=32, batch_size=1, workers=0).evaluation_set()
    found = [tuple(picture.shape[1:]) for picture in whole_pictures(pictures, 4, tokenizer)]
    assert found == [(40, 64), (168, 504), *([(16, 16)] if backbone == "unet" else [])]


def test_a_heat_map_rises_from_black_to_pale_yellow() -> None:
    colours = np.asarray(heat_map(torch.tensor([[0.0, 1.0, 2.0], [3.0, 4.0, 9.0]]), 0, 4)).astype(int)
    brightness = colours.sum(-1).flatten()
    assert (np.diff(brightness[:5]) > 0).all() and brightness[4] == brightness[5]


def test_a_panel_has_room_for_each_picture() -> None:
    original = torch.rand(3, 48, 80) * 2 - 1
    with_bits, without = panel(original, original, torch.rand(6, 10, 2)), panel(original, original)
    assert with_bits.size == without.size == (2 * 80 + 18, 2 * (48 + 30) + 6)
    assert np.asarray(without)[-40:, -80:].min() == 255 > np.asarray(with_bits)[-40:, -80:].min()
