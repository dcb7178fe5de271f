"""The experiment on generation: its stages fit together, what is drawn without a prior, the table and the sheet."""

import json
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from small import small_tokenizer

import drawn
import generation
from arms import ROOT, arms, choose, read
from gq_lightning.priors.counts import counted_bits_per_pixel
from gq_lightning.tokens import TokenSet
from gq_lightning.tokens.token_set import Header, sha256_of
from running import Runner

SPEC = ROOT / "experiments/generation.yaml"


def test_every_stage_reads_what_an_earlier_one_writes() -> None:
    stages = {name: arms(choose(read(SPEC), name), f"runs/generation/{name}") for name in ("tokens", "prior", "control")}
    assert {name: len(found) for name, found in stages.items()} == {"tokens": 2, "prior": 4, "control": 4}
    made = {f"{arm.folder}/{part}" for arm in stages["tokens"] for part in ("tokens", "tokenizer")}
    for arm in stages["prior"] + stages["control"]:
        words = [word for command in (arm.command, *arm.then) for word in command]
        assert {word for word in words if "/tokens/" in word} <= made
        assert f"{arm.folder}/details.json" in words and arm.with_data("/d").count("/d/val") == 1
        given = shlex.split(arm.line)
        seeds = [given[at + 1] for at, word in enumerate(given) if word in ("--seed", "--seed_everything")]
        assert set(seeds) == {str(arm.values["seed"])}
    for arm in stages["prior"]:
        assert arm.folder == "/".join(arm.command[arm.command.index(option) + 1] for option in ("--runs", "--name"))
    assert [("order" in " ".join(arm.settings)) for arm in stages["tokens"]] == [True, False]


@pytest.fixture
def sets(tmp_path: Path) -> Path:
    """Token sets of a small tokenizer: training uses four tokens at the first place of a position and one at the second."""
    tokenizer = small_tokenizer("vit")
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    for split, count in (("train", 50), ("val", 3)):
        (folder := tmp_path / "sets" / split).mkdir(parents=True)
        header = Header((4, 4, 2), 256, 8, tokenizer.tokens_fingerprint, [], ["centre"], "", split, [], {})
        rows = np.zeros(count, header.record)
        rows["tokens"][..., 0] = np.random.default_rng(0).choice([5, 6, 7, 8], (count, 1, 4, 4), p=[0.4, 0.3, 0.2, 0.1])
        rows["tokens"][..., 1] = 9
        rows["label"] = -1
        np.save(folder / "000000.npy", rows)
        told = {"plan": "", "sha256": "", "names": [str(index) for index in range(count)], "left_out": {}}
        (folder / "000000.json").write_text(json.dumps(told))
        shards = [(count, *(sha256_of(folder / f"000000.{suffix}") for suffix in ("npy", "json")))]
        Header(**{**vars(header), "shards": shards}).write(folder)
    return tmp_path


def test_tokens_are_drawn_by_their_counts(sets: Path) -> None:
    training = TokenSet(sets / "sets/train")
    tokens = drawn.by_counts(training, 200, 0)
    assert tokens.shape == (200, 4, 4, 2) and (tokens[..., 1] == 9).all()
    shares = np.bincount(tokens[..., 0].flatten(), minlength=9)[5:] / (200 * 16)
    np.testing.assert_allclose(shares, training.counts()[0][5:9] / 800, atol=0.03)
    assert torch.equal(tokens, drawn.by_counts(training, 200, 0)) and not torch.equal(tokens, drawn.by_counts(training, 200, 1))
    options = ["--root", str(sets / "sets"), "--tokenizer", str(sets / "tokenizer"), "--count", "5"]
    for kind, count in (("counts", 5), ("held_out", 3)):
        assert drawn.main(["--tokens", kind, *options, "--out", str(sets / kind)]) == 0
        assert len(list((sets / kind / "pictures").iterdir())) == count
        metrics = json.loads((sets / kind / "metrics.json").read_text())
        assert metrics["bits_per_pixel_counts"] == counted_bits_per_pixel(training, TokenSet(sets / "sets/val", first_view=True))
        assert ("bits_per_pixel" in metrics) == (kind == "counts") and metrics["bits_per_pixel_uniform"] == 0.25


def arm(folder: Path, stage: str, name: str, values: dict[str, Any], metrics: dict[str, float], gfid: float) -> None:
    (folder / "results" / stage).mkdir(parents=True, exist_ok=True)
    content = {"arm": {"bits_per_position": 32} | values, "metrics": metrics, "details": {"gfid": gfid, "precision": 0.5}}
    (folder / "results" / stage / f"{name}.json").write_text(json.dumps(content))
    pictures = folder / "runs" / stage / name / "pictures"
    pictures.mkdir(parents=True)
    for number in range(generation.SHOWN):
        Image.new("RGB", (8, 8), "red").save(pictures / f"{number:06d}.png")


def test_the_table_and_the_sheet(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--results", str(tmp_path / "results"), "--runs", str(tmp_path / "runs")]
    assert generation.main(options) == 2 and "no finished arms" in capsys.readouterr().err
    for seed, bits in ((0, 0.3), (1, 0.32)):
        arm(tmp_path, "prior", f"gq_wide-32-{seed}", {"quantizer": "gq_wide", "seed": seed}, {"bits_per_pixel": bits}, 60 + seed)
    arm(
        tmp_path, "control", "fsq_tuned-32-counts-0", {"quantizer": "fsq_tuned", "tokens": "counts", "seed": 0}, {"bits_per_pixel": 0.4}, 99
    )
    assert generation.main(options) == 0
    rows = (tmp_path / "results/generation.md").read_text().splitlines()
    assert rows[2] == "| GQ, 32 bits, prior | 0.3100 (0.3000 to 0.3200) |  |  | 60.5 (60.0 to 61.0) |  |  | 0.500 (0.500 to 0.500) |  |"
    assert rows[3] == "| FSQ, 32 bits, tokens drawn from counts | 0.4000 |  |  | 99.0 |  |  | 0.500 |  |" and len(rows) == 4
    with Image.open(tmp_path / "results/generation.png") as picture:
        assert picture.height > 2 * 20 and np.asarray(picture.convert("RGB")).reshape(-1, 3).tolist().count([255, 0, 0]) > 1000


def test_a_prior_s_parameters_are_those_it_says(tmp_path: Path) -> None:
    (tmp_path / "prior").mkdir()
    (tmp_path / "prior/config.json").write_text('{"parameters": 123}')
    assert Runner(tmp_path)._parameters(tmp_path) == {"total": 123}
