import threading

import pytest
import torch

from gq_lightning import weights
from gq_lightning.errors import UserError
from gq_lightning.weights import cache, sources


@pytest.fixture
def home(tmp_path, monkeypatch):
    """An empty cache, and no download that answers."""
    monkeypatch.setenv("GQ_LIGHTNING_HOME", str(tmp_path))
    monkeypatch.delenv("GQ_LIGHTNING_OFFLINE", raising=False)

    def unreachable(name):
        raise sources.SourceError("cannot be reached")

    monkeypatch.setattr(sources, "download", unreachable)
    return tmp_path / "weights"


@pytest.fixture(scope="module")
def alexnet():
    return weights.load("alexnet")


def as_source(tensors, calls=None):
    def download(name):
        if calls is not None:
            calls.append(name)
        return dict(tensors)

    return download


@pytest.mark.parametrize("name", weights.WEIGHTS)
def test_content_is_the_pinned_one_and_strictly_what_the_networks_have(name):
    from torchvision import models

    tensors = weights.load(name)
    assert cache.content_sha256(tensors) == weights.checksum(name)
    if name != "inception":
        with torch.device("meta"):
            network = getattr(models, name)(weights=None)
        expected = {key: value.shape for key, value in network.state_dict().items() if key.startswith("features.")}
        assert {key: value.shape for key, value in tensors.items()} == expected
    # rows that torchvision's own files are known to begin with
    first = {"alexnet": [0.1186, 0.0941, 0.0954], "vgg16": [-0.5537, 0.1427, 0.5290]}.get(name)
    if first:
        assert tensors["features.0.weight"][0, 0, 0, :3].tolist() == pytest.approx(first, abs=1e-4)


def test_content_hash_sees_names_shapes_and_values():
    tensors = {"a": torch.arange(6.0), "b": torch.ones(2)}
    changed = [
        {"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(2)},
        {"c": torch.arange(6.0), "b": torch.ones(2)},
        {"a": torch.arange(6.0), "b": torch.tensor([1.0, 1.0 + 2**-23])},
    ]
    assert cache.content_sha256(dict(reversed(tensors.items()))) == cache.content_sha256(tensors)
    assert len({cache.content_sha256(other) for other in [tensors, *changed]}) == 4


def test_official_files_give_the_same_content(alexnet, tmp_path, monkeypatch):
    file = tmp_path / "official.pth"
    torch.save({**alexnet, "classifier.1.weight": torch.ones(2, 2)}, file)
    inception = weights.load("inception")
    extra = {"fc.weight": torch.ones(1008, 2048), "Conv2d_1a_3x3.bn.num_batches_tracked": torch.tensor(0)}
    torch.save({**inception, **extra}, tmp_path / "inception.pth")
    urls = {"alexnet": file.as_uri(), "inception": (tmp_path / "inception.pth").as_uri()}
    monkeypatch.setattr(sources, "URLS", urls)
    for name in urls:
        assert cache.content_sha256(sources.download(name)) == weights.checksum(name)


def test_official_failures_are_source_errors(tmp_path, monkeypatch):
    (tmp_path / "broken.pth").write_bytes(b"not a checkpoint")
    urls = {"alexnet": (tmp_path / "broken.pth").as_uri(), "vgg16": (tmp_path / "absent.pth").as_uri()}
    monkeypatch.setattr(sources, "URLS", urls)
    with pytest.raises(sources.SourceError, match="broken.pth cannot be read"):
        sources.download("alexnet")
    with pytest.raises(sources.SourceError, match="absent.pth cannot be reached"):
        sources.download("vgg16")


def test_urls_are_those_of_the_networks_authors():
    from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3
    from torchvision.models import AlexNet_Weights, VGG16_Weights

    theirs = {"alexnet": AlexNet_Weights.IMAGENET1K_V1.url, "vgg16": VGG16_Weights.IMAGENET1K_V1.url, "inception": URL_INCEPTION_V3}
    assert theirs == sources.URLS


def test_other_content_is_not_taken(home, alexnet, monkeypatch):
    wrong = {name: tensor + 1e-3 for name, tensor in alexnet.items()}
    monkeypatch.setattr(sources, "download", as_source(wrong))
    with pytest.raises(UserError, match="content found is not the pinned one"):
        weights.fetch("alexnet")
    with pytest.raises(UserError, match="content found is not the pinned one"):
        weights.store("alexnet", wrong)
    assert not (home / "alexnet.safetensors").exists()
    assert weights.store("alexnet", alexnet) == home / "alexnet.safetensors"
    assert cache.content_sha256(weights.load("alexnet")) == weights.checksum("alexnet")


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty"])
def test_a_damaged_file_is_fetched_again_and_said_so(home, alexnet, monkeypatch, capsys, damage):
    monkeypatch.setattr(sources, "download", as_source(alexnet))
    path = weights.fetch("alexnet")
    good = path.read_bytes()
    bad = bytearray(good)
    bad[-5] ^= 1
    path.write_bytes({"cut": good[: len(good) // 2], "flipped": bytes(bad), "empty": b""}[damage])
    with pytest.raises(UserError, match="damaged"):
        weights.load("alexnet", download=False)
    assert cache.content_sha256(weights.load("alexnet")) == weights.checksum("alexnet")
    assert path.read_bytes() == good
    assert "damaged" in capsys.readouterr().err
    assert sorted(file.name for file in home.iterdir() if file.suffix != ".lock" and file.name != ".lock") == ["alexnet.safetensors"]


def test_without_a_network_the_error_is_one_line_with_the_fix(home):
    with pytest.raises(UserError) as error:
        weights.load("inception")
    message = str(error.value)
    assert "\n" not in message
    for part in ("inception.safetensors", str(home), "python -m gq_lightning weights", "make weights"):
        assert part in message


def test_offline_never_asks_a_source(home, alexnet, monkeypatch):
    calls = []
    monkeypatch.setattr(sources, "download", as_source(alexnet, calls))
    monkeypatch.setenv("GQ_LIGHTNING_OFFLINE", "1")
    with pytest.raises(UserError, match="is missing and downloads are off"):
        weights.load("alexnet")
    assert calls == []
    weights.load("alexnet", download=True)
    weights.load("alexnet")
    assert calls == ["alexnet"]


def test_concurrent_fetches_ask_the_source_once(home, alexnet, monkeypatch):
    calls = []
    monkeypatch.setattr(sources, "download", as_source(alexnet, calls))
    results = []
    threads = [threading.Thread(target=lambda: results.append(weights.load("alexnet"))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 4
    assert calls == ["alexnet"]


def test_a_folder_that_cannot_be_written_is_a_user_error(home, alexnet, monkeypatch):
    monkeypatch.setattr(sources, "download", as_source(alexnet))
    home.parent.joinpath("weights").write_text("a file, not a folder")
    with pytest.raises(UserError, match="cannot be written"):
        weights.fetch("alexnet")


def test_unknown_name():
    for function in (weights.load, weights.fetch, weights.checksum):
        with pytest.raises(UserError, match="resnet"):
            function("resnet")
