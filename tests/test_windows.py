import itertools
import random

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from gq_lightning import ImageTokenizer
from gq_lightning.errors import UserError
from gq_lightning.evaluation.evaluate import evaluate
from gq_lightning.metrics import ReconstructionMetrics
from gq_lightning.tokenizer.windows import apply_in_windows, starts


def identity(x: Tensor) -> Tensor:
    return x


def enlarge(x: Tensor) -> Tensor:
    return functional.interpolate(x, scale_factor=4, mode="nearest")


def shrink(x: Tensor) -> Tensor:
    return functional.avg_pool2d(x, 4)


@pytest.mark.parametrize("tile", [None, 32])
def test_an_empty_batch(tokenizer: ImageTokenizer, tile: int | None) -> None:
    for side in (32, 64):
        tokens = tokenizer.encode(torch.zeros(0, 3, side, side), tile=tile)
        assert tokens.shape == (0, side // 8, side // 8, 2) and tokens.dtype == torch.int64
        assert tokenizer.decode(tokens, tile=tile).shape == (0, 3, side, side)
    metrics = ReconstructionMetrics(tokenizer.quantizer, False)
    before = metrics.compute()
    images = torch.zeros(0, 3, 32, 32)
    metrics.update(images, images, torch.zeros(0, 4, 4, 2, dtype=torch.int64), images, torch.zeros(0, 4, 4, 2))
    assert metrics.compute() == before == {}
    with pytest.raises(UserError, match="no image to evaluate"):
        evaluate(tokenizer, [images], False, progress=False)


def test_starts_cover_every_length() -> None:
    generator = random.Random(0)
    for _ in range(2000):
        window = generator.randint(1, 40)
        overlap = generator.randint(0, window - 1)
        length = generator.randint(window, 300)
        positions = starts(length, window, overlap)
        assert positions[0] == 0 and positions[-1] == length - window
        steps = [after - before for before, after in itertools.pairwise(positions)]
        assert all(step == window - overlap for step in steps[:-1])
        assert all(0 < step <= window - overlap for step in steps)
        covered = {element for position in positions for element in range(position, position + window)}
        assert covered == set(range(length))


def test_starts_of_one_window() -> None:
    assert starts(32, 32, 8) == [0]
    assert starts(4, 4, 8) == [0]
    assert starts(56, 32, 8) == [0, 24]
    assert starts(57, 32, 8) == [0, 24, 25]


@pytest.mark.parametrize("batch_size", [1, 3, 64])
@pytest.mark.parametrize("overlap", [0, 1, 5, 11])
def test_identity_is_reproduced(overlap: int, batch_size: int) -> None:
    x = torch.randn(2, 3, 29, 47, generator=torch.Generator().manual_seed(0))
    result = apply_in_windows(identity, x, (12, 16), overlap, batch_size=batch_size)
    torch.testing.assert_close(result, x, rtol=1e-6, atol=1e-6)


def test_resizing_is_reproduced() -> None:
    x = torch.randn(2, 3, 52, 44, generator=torch.Generator().manual_seed(0))
    smaller = apply_in_windows(shrink, x, (16, 24), 8, scale_in=4, scale_out=1, batch_size=2)
    torch.testing.assert_close(smaller, shrink(x), rtol=1e-6, atol=1e-6)
    larger = apply_in_windows(enlarge, x, (16, 24), 7, scale_in=1, scale_out=4, batch_size=2)
    torch.testing.assert_close(larger, enlarge(x), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_dtype_is_kept(dtype: torch.dtype) -> None:
    x = torch.full((1, 1, 20, 50), 0.7, dtype=dtype)
    result = apply_in_windows(identity, x, (8, 8), 3)
    assert result.dtype == dtype
    torch.testing.assert_close(result, x, rtol=1e-12 if dtype == torch.float64 else 0, atol=0)


def test_blending_is_a_linear_ramp() -> None:
    def number(windows: Tensor) -> Tensor:  # one window a call: the first gives 0, the second 1
        return torch.full_like(windows, float(next(count)))

    count = iter(range(2))
    result = apply_in_windows(number, torch.zeros(1, 1, 4, 12), (4, 8), 4)
    expected = torch.tensor([0, 0, 0, 0, 0.125, 0.375, 0.625, 0.875, 1, 1, 1, 1])
    torch.testing.assert_close(result, expected.expand(1, 1, 4, 12))


def test_one_window_is_the_function_itself() -> None:
    torch.manual_seed(0)
    convolution = torch.nn.Conv2d(3, 5, 3, padding=1).requires_grad_(False)
    x = torch.randn(4, 3, 16, 24)
    assert torch.equal(apply_in_windows(convolution, x, (16, 24), 8, batch_size=2), convolution(x))


@pytest.mark.parametrize("batch_size", [1, 4, 7])
def test_pictures_do_not_depend_on_their_neighbours(batch_size: int) -> None:
    torch.manual_seed(0)
    convolution = torch.nn.Conv2d(3, 5, 3, padding=1).requires_grad_(False)
    x = torch.randn(3, 3, 40, 30)
    together = apply_in_windows(convolution, x, (16, 16), 4, batch_size=batch_size)
    for index in range(3):
        alone = apply_in_windows(convolution, x[index : index + 1], (16, 16), 4, batch_size=batch_size)
        assert torch.equal(together[index], alone[0])


def test_the_function_sees_windows_only() -> None:
    shapes = []

    def recording(windows: Tensor) -> Tensor:
        shapes.append(tuple(windows.shape))
        return windows

    apply_in_windows(recording, torch.zeros(1, 2, 40, 24), (16, 16), 4, batch_size=4)
    assert [shape[0] for shape in shapes] == [4, 2]
    assert {shape[1:] for shape in shapes} == {(2, 16, 16)}
