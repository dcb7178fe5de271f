"""Metrics of generated pictures: against other computations, from every kind of reference, and what is refused."""

import json
import math
import zipfile
from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
import torch
from PIL import Image
from torch import Tensor, nn
from torch_fidelity.metric_fid import fid_statistics_to_metric

from gq_lightning import weights
from gq_lightning.cli.main import main
from gq_lightning.evaluation import archive
from gq_lightning.metrics.generation import Seen, generation_metrics
from gq_lightning.weights import classifier as classifiers
from gq_lightning.weights import feature_cache, inception, sources

FEATURES, SPATIAL = 100, 90  # of the stand-in


def features(count: int, size: int = 12, seed: int = 0, shift: float = 0.0) -> np.ndarray:
    generator = np.random.default_rng(seed)
    mix = np.random.default_rng(9).standard_normal((size, size))
    return (generator.standard_normal((count, size)) @ mix + shift).astype(np.float32)


def seen(pooled: np.ndarray, spatial: np.ndarray) -> Seen:
    both = [(rows.astype(np.float64).mean(0), np.cov(rows.astype(np.float64), rowvar=False)) for rows in (pooled, spatial)]
    return Seen(torch.from_numpy(pooled), *both)


def test_every_number_against_another_computation(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs, head = features(60), features(50, seed=1, shift=0.4), features(7, seed=2) / 4
    spatial = [features(60, 20, seed=3), features(50, 20, seed=4, shift=0.2)]
    monkeypatch.setattr("gq_lightning.metrics.generation.classifier", lambda: torch.from_numpy(head))
    found, left_out = generation_metrics(seen(ours, spatial[0]), seen(theirs, spatial[1]))
    assert not left_out
    # Fréchet distances by the square root of a matrix, and by torch-fidelity
    for name, (a, b) in {"gfid": (ours, theirs), "sfid": spatial}.items():
        means, covariances = [x.mean(0, dtype=np.float64) for x in (a, b)], [np.cov(x.astype(np.float64), rowvar=False) for x in (a, b)]
        root = scipy.linalg.sqrtm(covariances[0] @ covariances[1]).real
        expected = ((means[0] - means[1]) ** 2).sum() + np.trace(covariances[0] + covariances[1] - 2 * root)
        other = fid_statistics_to_metric(*({"mu": m, "sigma": c} for m, c in zip(means, covariances, strict=True)), verbose=False)
        assert found[name] == pytest.approx(expected, rel=1e-5) == pytest.approx(other["frechet_inception_distance"], rel=1e-4)
    # the shuffle is numpy's of that seed
    logits = (ours @ head.T)[np.random.RandomState(2020).permutation(60)].astype(np.float64)
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    scores = [math.exp((part * np.log(part / part.mean(0))).sum(1).mean()) for part in np.split(p, 10)]
    assert found["inception_score"] == pytest.approx(np.mean(scores), rel=1e-5)
    assert found["inception_score_std"] == pytest.approx(np.std(scores), rel=1e-4)
    # precision: the share of ours within the third neighbour's distance of one of theirs
    for name, (a, b) in {"precision": (ours, theirs), "recall": (theirs, ours)}.items():
        radius = [sorted(np.linalg.norm(b - one, axis=1))[3] for one in b]
        inside = [any(np.linalg.norm(one - other) <= r for other, r in zip(b, radius, strict=True)) for one in a]
        assert found[name] == pytest.approx(np.mean(inside)) and 0 < np.mean(inside) < 1
    few, left_out = generation_metrics(seen(ours[:3], spatial[0][:3]), seen(theirs, spatial[1]))
    assert few.keys() == {"gfid", "sfid"} and left_out.keys() == {"inception_score", "precision and recall"}


def test_spatial_features_are_the_first_seven_channels_of_a_layer(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The layers one by one, up to the first branch of the seventh block, which is TensorFlow's mixed_6/conv."""
    monkeypatch.setattr(feature_cache, "cache_folder", lambda: tmp_path)
    image = torch.randint(0, 256, (1, 3, 299, 299), generator=torch.Generator().manual_seed(0)).float()
    network = inception._extractor(torch.device("cpu"))
    x = (image - 128) / 128
    for name in ("Conv2d_1a_3x3", "Conv2d_2a_3x3", "Conv2d_2b_3x3", "MaxPool_1", "Conv2d_3b_1x1", "Conv2d_4a_3x3", "MaxPool_2"):
        x = getattr(network, name)(x)
    for name in ("5b", "5c", "5d", "6a", "6b", "6c"):
        x = getattr(network, f"Mixed_{name}")(x)
    layer = network.Mixed_6d.branch1x1  # type: ignore[union-attr]
    x = nn.functional.relu(layer.bn(layer.conv(x)))  # type: ignore[union-attr, operator]
    pooled, spatial = inception.spatial_features(image, cached=True)
    assert spatial.shape == (1, 2023) and spatial.std() > 0.01
    torch.testing.assert_close(spatial.view(17, 17, 7), x[0, :7].permute(1, 2, 0).double(), atol=1e-4, rtol=1e-3)
    assert torch.equal(pooled, inception.inception_features(image)) and not layer._forward_hooks
    assert all(torch.equal(*pair) for pair in zip(inception.spatial_features(image, cached=True), (pooled, spatial), strict=True))


def cheap(images: Tensor, cached: bool = False) -> tuple[Tensor, Tensor]:
    """Stands in for the Inception."""
    small = nn.functional.interpolate(images.round() / 64, (8, 8)).flatten(1).double()
    return small[:, :FEATURES], small[:, FEATURES : FEATURES + SPATIAL]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Twelve generated pictures with their sheet, ten larger ones for reference, and no Inception."""
    monkeypatch.setattr(inception, "spatial_features", cheap)
    monkeypatch.setattr(inception, "FEATURES", FEATURES)
    monkeypatch.setattr(inception, "SPATIAL", SPATIAL)
    monkeypatch.setattr(archive, "POOLED", FEATURES)
    monkeypatch.setattr(archive, "SPATIAL", SPATIAL)
    head = torch.randn(5, FEATURES, generator=torch.Generator().manual_seed(0)) / 10
    monkeypatch.setattr("gq_lightning.metrics.generation.classifier", lambda: head)
    for name, count, size in (("ours", 12, (16, 16)), ("theirs", 10, (24, 20))):
        (tmp_path / name).mkdir()
        for index in range(count):
            pixels = np.random.default_rng(index + 100 * (name == "ours")).integers(0, 255, (4, 4, 3), dtype=np.uint8)
            Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC).save(tmp_path / name / f"{index}.png")
    Image.new("RGB", (40, 40)).save(tmp_path / "ours/sheet.png")
    (tmp_path / "ours/generated.json").write_text("{}")
    return tmp_path


def evaluate(folder: Path, reference: str, generated: str = "ours", *more: str) -> int:
    paths = [f"--generated={folder / generated}", f"--reference={folder / reference}", f"--out={folder}/metrics.json"]
    return main(["evaluate", *paths, "--workers=0", "--batch_size=5", *more])


def read(folder: Path) -> dict:
    return json.loads((folder / "metrics.json").read_text())


def prepared(folder: Path) -> np.ndarray:
    """The reference's pictures as evaluation prepares them, (N, 16, 16, 3)."""
    rows = []
    for path in sorted((folder / "theirs").iterdir()):
        with Image.open(path) as picture:
            smaller = picture.resize((19, 16), Image.Resampling.BILINEAR)
        rows.append(np.asarray(smaller)[:, 2:18])
    return np.stack(rows)


def test_every_kind_of_reference_gives_the_same(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert evaluate(folder, "theirs") == 0
    first = read(folder)
    assert {"gfid", "sfid", "inception_score", "precision", "recall"} <= first.keys() and first["gfid"] > 1
    assert "gFID" in capsys.readouterr().out
    data = first["protocol"]["data"]
    assert (data["generated"]["images"], data["reference"]["images"]) == (12, 10), "without the sheet"
    pixels = prepared(folder)
    np.savez(folder / "batch.npz", pixels)
    pooled, spatial = cheap(torch.from_numpy(pixels).movedim(-1, 1).float())
    moments = {"mu": pooled.mean(0), "sigma": np.cov(pooled.T), "mu_s": spatial.mean(0), "sigma_s": np.cov(spatial.T)}
    np.savez(folder / "half.npz", mu=moments["mu"].float(), sigma=moments["sigma"].astype("f4"))
    np.savez_compressed(folder / "all.npz", arr_0=pixels, arr_1=np.arange(10), **moments)
    distances, shares = ("gfid", "sfid"), ("precision", "recall")
    for name, measured in {"batch": distances + shares, "half": ("gfid",), "all": distances + shares}.items():
        assert evaluate(folder, f"{name}.npz") == 0
        found = read(folder)
        assert {key: found[key] for key in measured} == pytest.approx({key: first[key] for key in measured}, rel=1e-4), name
        assert found["inception_score"] == first["inception_score"]
        left_out = found["protocol"]["left_out"].keys()
        assert ("sfid" in found) != ("sfid" in left_out) and ("recall" in found) != ("precision and recall" in left_out)
    assert evaluate(folder, "theirs", "batch.npz") == 0
    assert read(folder)["gfid"] == pytest.approx(0, abs=1e-6) and read(folder)["precision"] == 1, "pictures against themselves"


def test_without_the_classifier_the_score_is_left_out(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("gq_lightning.metrics.generation.classifier", lambda: None)
    assert evaluate(folder, "theirs") == 0
    assert "inception_score" not in read(folder) and "left out inception_score: " in capsys.readouterr().err


def wrong(folder: Path) -> dict[str, tuple[str, str, str]]:
    """By name, what is generated, its reference, and words of the error."""
    (folder / "empty").mkdir()
    for name, sizes in {"one": [(16, 16)], "mixed": [(16, 16), (16, 15)], "wide": [(20, 16)] * 2, "broken": [(16, 16)] * 2}.items():
        (folder / name).mkdir()
        for index, size in enumerate(sizes):
            Image.new("RGB", size).save(folder / name / f"{index}.png")
    (folder / "broken/2.png").write_bytes(b"no picture")
    good = {
        "mu": np.zeros(FEATURES),
        "sigma": np.eye(FEATURES, dtype="f4"),
        "mu_s": np.zeros(SPATIAL),
        "sigma_s": np.eye(SPATIAL, dtype="f4"),
    }
    pictures = np.zeros((4, 16, 16, 3), np.uint8)
    files: dict[str, tuple[dict, str]] = {
        "nothing": ({"x": np.zeros(3)}, "neither pictures"),
        "mean alone": ({"mu": good["mu"]}, "neither pictures"),
        "short": (good | {"mu": np.zeros(FEATURES - 1)}, "mu has shape"),
        "huge": (good | {"sigma": np.zeros((1, 1, 1))}, "sigma has shape"),
        "whole numbers": (good | {"sigma": np.eye(FEATURES, dtype="u1")}, "uint8"),
        "not finite": (good | {"mu": np.full(FEATURES, np.nan)}, "mu has values that are not finite"),
        "no covariance": (good | {"sigma": np.triu(np.ones((FEATURES, FEATURES), "f4"))}, "sigma is not a covariance"),
        "half spatial": ({key: good[key] for key in ("mu", "sigma", "mu_s")}, "sigma_s"),
        "objects": (good | {"mu": np.array([{}] * 3, dtype=object)}, "object"),
        "floats": ({"arr_0": pictures.astype("f4")}, "float32"),
        "grey": ({"arr_0": pictures[..., 0]}, "arr_0 has shape"),
        "larger": ({"arr_0": np.zeros((4, 32, 32, 3), np.uint8)}, "pictures of 32x32: give 16x16"),
        "single": ({"arr_0": pictures[:1]}, "too few"),
    }
    for name, (arrays, _) in files.items():
        np.savez(folder / f"{name}.npz", **arrays)
    np.savez(folder / "fine.npz", arr_0=pictures)
    content = (folder / "fine.npz").read_bytes()
    (folder / "cut.npz").write_bytes(content[: len(content) // 2])
    (folder / "text.npz").write_bytes(b"no archive")
    with zipfile.ZipFile(folder / "short pictures.npz", "w") as archive:
        header = b"\x93NUMPY\x01\x00" + (118).to_bytes(2, "little")
        text = "{'descr': '|u1', 'fortran_order': False, 'shape': (4, 16, 16, 3), }"
        archive.writestr("arr_0.npy", header + text.ljust(117).encode() + b"\n" + bytes(100))
    return {
        "no pictures": ("empty", "theirs", "empty has no pictures"),
        "not there": ("nowhere", "theirs", "nowhere is not a folder"),
        "reference empty": ("ours", "empty", "empty has no pictures"),
        "reference not there": ("ours", "nowhere.npz", "no such file"),
        "one picture": ("one", "theirs", "1 pictures are too few"),
        "one for reference": ("ours", "one", "1 pictures are too few"),
        "sizes differ": ("mixed", "theirs", "1.png: 15x16, but the first picture has 16x16"),
        "not square": ("wide", "theirs", "pictures of 16x20: give square ones"),
        "broken picture": ("broken", "theirs", "2.png"),
        "statistics generated": ("short.npz", "theirs", "has statistics but no pictures"),
        "cut archive": ("ours", "cut.npz", "damaged, or not in ADM's format"),
        "no archive": ("ours", "text.npz", "damaged, or not in ADM's format"),
        "short pictures": ("ours", "short pictures.npz", "short pictures.npz: damaged"),
        **{name: ("ours", f"{name}.npz", words) for name, (_, words) in files.items()},
    }


def test_wrong_input_is_one_line(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for name, (generated, reference, words) in wrong(folder).items():
        assert evaluate(folder, reference, generated) == 2, name
        error = capfd.readouterr().err.strip()
        assert error.startswith("error: ") and words in error and "\n" not in error, (name, error)
    assert not (folder / "metrics.json").exists()
    assert evaluate(folder, "theirs", "broken", "--skip_broken") == 0
    for options in (["--generated=a"], ["--generated=a", "--data=b"], ["--tokenizer=a", "--data=b", "--reference=c"]):
        assert main(["evaluate", *options]) == 2
        assert "give --tokenizer and --data, or --generated and --reference" in capfd.readouterr().err
    for option in ("--size=32", "--no_rfid", "--no_gaussian"):
        assert evaluate(folder, "theirs", "ours", option) == 2
        assert "is for --tokenizer" in capfd.readouterr().err


def test_the_classifier_is_taken_from_the_official_file_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inception, fc = weights.load("inception"), torch.randn(1008, 2048, generator=torch.Generator().manual_seed(0))
    monkeypatch.setenv("GQ_LIGHTNING_HOME", str(tmp_path / "home"))
    official = dict(inception)
    calls = []
    monkeypatch.setattr(sources, "official", lambda name: calls.append(name) or official)
    assert classifiers.classifier() is None, "no such layer in the file"
    official["fc.weight"] = fc
    monkeypatch.setenv("GQ_LIGHTNING_OFFLINE", "1")
    assert classifiers.classifier() is None and len(calls) == 1
    monkeypatch.delenv("GQ_LIGHTNING_OFFLINE")
    name = next(iter(inception))
    official[name] = inception[name] + 1
    assert classifiers.classifier() is None, "another network's"
    official[name] = inception[name]
    for _ in range(2):
        found = classifiers.classifier()
        assert found is not None and torch.equal(found, fc)
    assert len(calls) == 3, "the second from the cache"
    (file,) = (tmp_path / "home/weights").glob("*.safetensors")
    content = bytearray(file.read_bytes())
    content[-3] ^= 1
    file.write_bytes(content)
    found = classifiers.classifier()
    assert found is not None and torch.equal(found, fc) and len(calls) == 4


def test_an_official_file_is_checked_by_the_digits_in_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.save({"fc.weight": torch.zeros(1)}, tmp_path / "net-12345678.pth")
    monkeypatch.setattr(sources, "URLS", {"inception": (tmp_path / "net-12345678.pth").as_uri()})
    with pytest.raises(sources.SourceError, match="its SHA-256 does not begin with 12345678"):
        sources.official("inception")
