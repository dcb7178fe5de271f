"""Order and crops of training, as functions of seed, epoch and place."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from gq_lightning.data import ImageFolder, sets
from gq_lightning.data.order import Shuffled, derived_seed, random_numbers


@pytest.fixture
def folder(tmp_path: Path) -> Callable[..., ImageFolder]:
    for name in ("train", "val"):
        (tmp_path / name).mkdir()
    for index in range(24):
        pixels = np.random.default_rng(index).integers(0, 255, (12, 14, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((42, 36)).save(tmp_path / "train" / f"{index}.png")
    Image.new("RGB", (20, 20)).save(tmp_path / "val" / "0.png")

    def make(batch_size: int = 4, workers: int = 0, seed: int = 1) -> ImageFolder:
        torch.manual_seed(seed)
        return ImageFolder(str(tmp_path / "train"), str(tmp_path / "val"), image_size=16, batch_size=batch_size, workers=workers)

    return make


def become_rank(monkeypatch: pytest.MonkeyPatch, rank: int, ranks: int) -> None:
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
    monkeypatch.setattr("torch.distributed.get_world_size", lambda group=None: ranks)
    monkeypatch.setattr("torch.distributed.get_rank", lambda group=None: rank)


def test_global_batches_do_not_depend_on_the_ranks(folder: Callable[..., ImageFolder], monkeypatch: pytest.MonkeyPatch) -> None:
    """24 pictures: the same crops of the same pictures, whoever takes them."""
    alone = list(folder(8).train_dataloader())
    assert len(alone) == 3
    for ranks in (2, 4):
        shares = []
        for rank in range(ranks):
            become_rank(monkeypatch, rank, ranks)
            shares.append(list(folder(8 // ranks).train_dataloader()))
        for batch, *parts in zip(alone, *shares, strict=True):
            assert torch.equal(torch.stack(parts, dim=1).flatten(0, 1), batch)


def test_epochs_and_seeds_differ_and_come_again(folder: Callable[..., ImageFolder]) -> None:
    loader = folder().train_dataloader()
    first, second = torch.cat(list(loader)), torch.cat(list(loader))
    assert not torch.equal(first, second)
    assert not torch.equal(torch.cat(list(folder(seed=2).train_dataloader())), first)
    again = folder(workers=2).train_dataloader()
    torch.rand(7)
    assert torch.equal(torch.cat(list(again)), first)
    assert torch.equal(torch.cat(list(again)), second)


def test_crops_leave_the_random_numbers_of_the_model_alone(folder: Callable[..., ImageFolder]) -> None:
    loader = folder().train_dataloader()
    before = torch.get_rng_state()
    assert not torch.equal(next(iter(loader))[0], next(iter(loader))[1])
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("workers", [0, 2])
def test_an_epoch_goes_on_where_it_stopped(folder: Callable[..., ImageFolder], workers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    loader = folder(workers=workers).train_dataloader()
    whole, following = list(loader), list(loader)
    assert loader.state_dict() == {"epoch": 1, "pictures": 24}

    stopped = folder(workers=workers)
    batches = iter(stopped.train_dataloader())
    for _ in range(2):  # what workers have read ahead does not count
        next(batches)
    state = stopped.state_dict()
    assert state == {"seed": 1, "epoch": 0, "pictures": 8}

    resumed = folder(workers=workers, seed=9)
    resumed.load_state_dict(state)
    read: list[Path] = []
    load = sets.load_picture
    monkeypatch.setattr(sets, "load_picture", lambda path, suffices: read.append(path) or load(path, suffices=suffices))
    loader = resumed.train_dataloader()
    assert len(loader) == 6
    assert loader.state_dict() == {"epoch": 0, "pictures": 8}, "before it has begun"
    for batches, rest in ((whole[2:], list(loader)), (following, list(loader))):
        assert torch.equal(torch.cat(rest), torch.cat(batches))
    if workers == 0:
        assert len(read) == 4 * (4 + 6), "what went before is not read again"


@pytest.mark.parametrize("state", [{"epoch": 0, "pictures": 24}, {"epoch": 1, "pictures": 0}, {"epoch": 0, "batches": 6}])
def test_between_epochs(folder: Callable[..., ImageFolder], state: dict[str, int]) -> None:
    loader = folder().train_dataloader()
    _, following = list(loader), list(loader)
    resumed = folder()
    resumed.load_state_dict({"seed": 1, **state})
    loader = resumed.train_dataloader()
    loader.sampler.set_epoch(1)  # type: ignore[attr-defined]
    assert torch.equal(torch.cat(list(loader)), torch.cat(following))


def test_other_ranks_and_batches_go_on_at_the_next_picture(folder: Callable[..., ImageFolder], monkeypatch: pytest.MonkeyPatch) -> None:
    """8 of 24 pictures by one process, 8 more by two, then by one whose batches do not divide what is left."""
    expected = [torch.stack(list(batch)) for batch in torch.cat(list(folder(24).train_dataloader())).split(1)]
    shown, state = list[torch.Tensor](), None
    for ranks, batch_size, batches in ((1, 8, 1), (2, 4, 1), (1, 3, 2)):
        shares = []
        for rank in range(ranks):
            become_rank(monkeypatch, rank, ranks)
            data = folder(batch_size)
            if state is not None:
                data.load_state_dict(state)
            loader = data.train_dataloader()
            # Lightning is to see as many batches as there are
            assert len(loader) - data.batches_before(0) == (24 - len(shown)) // (batch_size * ranks)
            iterator = iter(loader)
            shares.append([next(iterator) for _ in range(batches)])
            names = [data.batch_names(0, data.batches_before(0) + index) for index in range(batches)]
            assert [len(each) for each in names] == [batch_size] * batches
        state = data.state_dict()
        for parts in zip(*shares, strict=True):
            shown += list(torch.stack(parts, dim=1).flatten(0, 1))
        assert state == {"seed": 1, "epoch": 0, "pictures": len(shown)}
    assert len(shown) == 22
    for image, other in zip(shown, expected, strict=False):
        assert torch.equal(image, other[0])


def test_places(folder: Callable[..., ImageFolder]) -> None:
    pictures = folder().training_set()
    shares = [list(Shuffled(pictures, 5, rank, seed=0)) for rank in range(5)]
    assert {len(share) for share in shares} == {len(Shuffled(pictures, 5, 0, seed=0))} == {len(pictures) // 5}
    places = [place for share in shares for place in share]
    assert len({index for index, _ in places}) == len({seed for _, seed in places}) == len(places)


def test_seeds() -> None:
    keys = [(seed, epoch, batch) for seed in range(4) for epoch in range(4) for batch in range(4)]
    assert len({derived_seed(*key) % 2**32 for key in keys}) == len(keys)
    torch.manual_seed(0)
    expected = torch.rand(2)
    torch.manual_seed(0)
    first = torch.rand(())
    with random_numbers(7):
        inner = torch.rand(())
    with random_numbers(7):
        assert torch.rand(()) == inner
    with random_numbers(None):
        assert torch.equal(torch.stack([first, torch.rand(())]), expected)
