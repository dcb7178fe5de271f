"""Features of originals are computed once, and nobody can tell from the numbers whether they were."""

import math
import threading

import pytest
import torch
from torch import Tensor, nn

from gq_lightning.metrics.rfid import RFID
from gq_lightning.quantizers import FiniteScalarQuantizer
from gq_lightning.weights import feature_cache, inception


class Counted(nn.Module):
    """Stands in for the Inception: a projection of the pixels to 2048 numbers, whose calls are counted."""

    def __init__(self) -> None:
        super().__init__()
        self.matrix = torch.randn(3 * 16 * 16, 2048, generator=torch.Generator().manual_seed(0))
        self.seen: list[int] = []

    def forward(self, pixels: Tensor) -> tuple[Tensor]:
        assert pixels.dtype == torch.uint8
        self.seen.append(len(pixels))
        return (pixels.flatten(1).float() @ self.matrix,)


@pytest.fixture
def extractor(monkeypatch, tmp_path):
    counted = Counted()
    monkeypatch.setattr(inception, "_extractor", lambda device: counted)
    monkeypatch.setattr(feature_cache, "cache_folder", lambda: tmp_path)
    return counted


def pictures(count, seed=0):
    return torch.rand(count, 3, 16, 16, generator=torch.Generator().manual_seed(seed)) * 255


def files(folder):
    return sorted(path for path in folder.rglob("*") if path.is_file())


def rfid(images, candidates, batch):
    metric = RFID(FiniteScalarQuantizer(16))
    for original, candidate in zip(images.split(batch), candidates.split(batch), strict=True):
        metric.update(candidate, original)
    return metric.compute()["rfid"]


def test_originals_are_computed_once_and_rfid_is_the_same_to_the_bit(extractor, tmp_path):
    images, candidates = pictures(10), pictures(10, seed=1)
    first = rfid(images, candidates, batch=4)
    assert extractor.seen == [4, 4, 4, 4, 2, 2]
    assert len(files(tmp_path)) == 10, "reconstructions are not kept"
    extractor.seen.clear()
    assert rfid(images, candidates, batch=4) == first
    assert extractor.seen == [4, 4, 2], "the reconstructions alone"
    by_hand = torch.cat([part.round().flatten(1) @ extractor.matrix for part in images.split(4)])
    assert torch.equal(inception.inception_features(images[:4], cached=True), by_hand[:4].double())
    assert math.isfinite(first)


def test_any_order_and_subset_of_one_batch_size_is_found(extractor):
    images = pictures(8)
    features = torch.cat([inception.inception_features(part, cached=True) for part in images.split(4)])
    extractor.seen.clear()
    order = torch.tensor([6, 1, 0, 5])
    assert torch.equal(inception.inception_features(images[order], cached=True), features[order])
    assert extractor.seen == []
    # a batch of another size may differ in its last bits, and so may one with a stranger in it: both are computed
    inception.inception_features(images[:3], cached=True)
    inception.inception_features(torch.cat([images[:3], pictures(1, seed=2)]), cached=True)
    assert extractor.seen == [3, 4]


def test_pictures_of_one_rounding_are_one_and_shapes_are_told_apart(extractor, tmp_path):
    image = torch.full((1, 3, 16, 16), 7.0)
    inception.inception_features(image, cached=True)
    inception.inception_features(image + 0.3, cached=True)
    assert len(files(tmp_path)) == 1
    inception.inception_features(torch.full((1, 3, 8, 32), 7.0), cached=True)
    assert len(files(tmp_path)) == 2


@pytest.mark.parametrize("content", [b"", b"short", b"\0" * (32 + 8192)])
def test_what_is_damaged_is_written_again(extractor, tmp_path, content):
    images = pictures(2)
    features = inception.inception_features(images, cached=True)
    whole = {path: path.read_bytes() for path in files(tmp_path)}
    files(tmp_path)[0].write_bytes(content)
    assert torch.equal(inception.inception_features(images, cached=True), features)
    assert extractor.seen == [2, 2]
    assert {path: path.read_bytes() for path in files(tmp_path)} == whole


def test_other_weights_threads_and_libraries_are_another_place(extractor, monkeypatch):
    images = pictures(2).to(torch.uint8)
    places = {feature_cache._how(images)}
    monkeypatch.setattr(feature_cache.weights, "checksum", lambda name: "other")
    places.add(feature_cache._how(images))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    places.add(feature_cache._how(images))
    monkeypatch.setattr(feature_cache, "version", lambda package: "9")
    places.add(feature_cache._how(images))
    assert len(places) == 4


def test_a_folder_that_cannot_be_written_costs_nothing_but_time(extractor, monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setattr(feature_cache, "cache_folder", lambda: tmp_path / "file")
    images = pictures(2)
    assert torch.equal(inception.inception_features(images, cached=True), inception.inception_features(images))


def test_writers_at_once(extractor, tmp_path):
    images, found = pictures(6), []
    threads = [threading.Thread(target=lambda: found.append(inception.inception_features(images, cached=True))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4
    assert all(torch.equal(features, found[0]) for features in found)
    assert len(files(tmp_path)) == 6, "and no temporary ones"
