import shutil
from collections.abc import Callable
from pathlib import Path
from unittest.mock import Mock, patch

import numpy as np
import pytest
import torch
from PIL import Image

from gq_lightning.data import ImageFolder, ImageNet
from gq_lightning.data.folders import position
from gq_lightning.data.sets import PictureSet, TrainingCrop
from gq_lightning.errors import UserError


def fill(folder: Path, names: list[str], size: tuple[int, int] = (8, 8)) -> None:
    for index, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.random.default_rng(index).integers(0, 256, (*size, 3), dtype=np.uint8)).save(folder / name)


def names(pictures: object) -> list[str]:
    return [pictures.name(index) for index in range(len(pictures))]  # type: ignore[attr-defined, arg-type]


def test_hashed_split(tmp_path: Path) -> None:
    everything = sorted(f"{i % 3}/{i}.png" for i in range(200))
    fill(tmp_path / "a", everything)
    data = ImageFolder(str(tmp_path / "a"), validation_share=0.2, image_size=8)
    training, held_out = names(data.training_set()), names(data.evaluation_set())
    assert sorted(training + held_out) == everything and not set(training) & set(held_out)
    assert 20 <= len(held_out) <= 60  # 40 expected, standard deviation 5.7
    fill(tmp_path / "b", [*everything, "new/1.png", "new/2.png"])  # elsewhere, and grown
    grown = names(ImageFolder(str(tmp_path / "b"), validation_share=0.2).evaluation_set())
    assert [name for name in grown if not name.startswith("new")] == held_out


def test_position_is_pinned() -> None:
    # printf a.png | sha256sum: another rule would move pictures between the splits of published results
    assert position("a.png") == 0x7F071235805F / 16**12


def test_small_folder_still_has_both_splits(tmp_path: Path) -> None:
    fill(tmp_path, ["a.png", "b.png"])
    data = ImageFolder(str(tmp_path), validation_share=1e-9)
    assert len(data.training_set()) == len(data.evaluation_set()) == 1
    (tmp_path / "b.png").unlink()
    with pytest.raises(UserError, match="no pictures left to train on"):
        ImageFolder(str(tmp_path)).training_set()


def test_validation_root(tmp_path: Path) -> None:
    fill(tmp_path / "a", ["1.png", "2.png"])
    fill(tmp_path / "b", ["3.png"], size=(9, 9))
    data = ImageFolder(str(tmp_path / "a"), validation_root=str(tmp_path / "b"))
    assert names(data.training_set()) == ["1.png", "2.png"] and names(data.evaluation_set()) == ["3.png"]


def inside(root: Path) -> Path:
    """root/val, of which root/link is the same file, root/copy.png has the same bytes, and root/linked is the folder itself."""
    fill(root, [f"{index}.png" for index in range(5)])
    (root / "val").mkdir()
    (root / "1.png").rename(root / "val" / "1.png")
    (root / "2.png").rename(root / "val" / "2.png")
    return root / "val"


def link(root: Path) -> Path:
    (root / "link.png").symlink_to(inside(root) / "1.png")
    return root / "val"


def copy(root: Path) -> Path:
    shutil.copy(inside(root) / "2.png", root / "another name.png")
    return root / "val"


def linked_folder(root: Path) -> Path:
    validation = inside(root / "real")
    (root / "val").symlink_to(validation)
    for path in (root / "real").glob("*.png"):
        path.rename(root / path.name)
    validation.rename(root / "elsewhere")
    (root / "val").unlink()
    (root / "val").symlink_to(root / "elsewhere")
    return root / "val"


@pytest.mark.parametrize(("make", "left_out", "count"), [(inside, 2, 5), (link, 3, 6), (copy, 3, 6), (linked_folder, 2, 5)])
def test_no_picture_is_trained_on_and_evaluated(
    make: Callable[[Path], Path], left_out: int, count: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    validation = make(tmp_path)
    data = ImageFolder(str(tmp_path), validation_root=str(validation))
    assert names(data.training_set()) == ["0.png", "3.png", "4.png"] and names(data.evaluation_set()) == ["1.png", "2.png"]
    assert caplog.messages == [f"{tmp_path}: {left_out} of {count} pictures are left out of training, because they are validation pictures"]


def test_training_inside_validation(tmp_path: Path) -> None:
    inside(tmp_path)
    data = ImageFolder(str(tmp_path / "val"), validation_root=str(tmp_path))
    with pytest.raises(UserError, match="no pictures left to train on besides the validation pictures"):
        data.training_set()
    fill(tmp_path / "more", ["9.png"], size=(9, 9))
    (tmp_path / "val" / "gone.png").symlink_to("nowhere")
    assert names(ImageFolder(str(tmp_path / "val"), validation_root=str(tmp_path / "more")).training_set()) == [
        "1.png",
        "2.png",
        "gone.png",
    ]


def test_copies_do_not_straddle_a_split_by_names(tmp_path: Path) -> None:
    fill(tmp_path / "a", [f"{index}.png" for index in range(40)])
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    data = ImageFolder(str(tmp_path), validation_share=0.2)
    training, held_out = ({Path(name).name for name in names(pictures)} for pictures in (data.training_set(), data.evaluation_set()))
    assert not training & held_out and training | held_out == {f"{index}.png" for index in range(40)}


def test_image_folder_errors(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nowhere is not a folder"):
        ImageFolder(str(tmp_path / "nowhere")).train_dataloader()
    with pytest.raises(UserError, match="has no pictures"):
        ImageFolder(str(tmp_path)).val_dataloader()
    for share in (0.0, 1.0, -1.0, float("nan")):
        with pytest.raises(UserError, match=r"data.validation_share"):
            ImageFolder(str(tmp_path), validation_share=share)


def test_imagenet_flat_or_in_classes(tmp_path: Path) -> None:
    fill(tmp_path, ["train/n01/a.JPEG", "train/n02/b.JPEG", "val/ILSVRC2012_val_00000001.JPEG"])
    data = ImageNet(str(tmp_path), image_size=8)
    assert names(data.training_set()) == ["n01/a.JPEG", "n02/b.JPEG"]
    assert names(data.evaluation_set()) == ["ILSVRC2012_val_00000001.JPEG"]
    fill(tmp_path, ["val/n01/c.JPEG"])
    assert names(data.evaluation_set()) == ["ILSVRC2012_val_00000001.JPEG", "n01/c.JPEG"]
    with pytest.raises(UserError, match=r"train is not a folder: data.root must hold train"):
        ImageNet(str(tmp_path / "val")).training_set()


def test_evaluation_crop_is_the_centre(tmp_path: Path) -> None:
    fill(tmp_path, ["val/a.png"], size=(8, 12))
    pixels = np.asarray(Image.open(tmp_path / "val" / "a.png"))
    image = ImageNet(str(tmp_path), image_size=8).evaluation_set()[0]
    assert torch.equal(image, torch.from_numpy(pixels[:, 2:10].copy()).permute(2, 0, 1) / 127.5 - 1)


def test_training_crops(tmp_path: Path) -> None:
    fill(tmp_path, ["train/a.png"], size=(16, 20))
    pixels = torch.from_numpy(np.asarray(Image.open(tmp_path / "train" / "a.png")).copy()).permute(2, 0, 1) / 127.5 - 1
    windows = [pixels[:, :, left : left + 16] for left in range(5)]
    possible = windows + [window.flip(2) for window in windows]
    plain = ImageNet(str(tmp_path), crop="plain", image_size=16).training_set()
    crops = [plain[0] for _ in range(100)]
    seen = {next(i for i, window in enumerate(possible) if torch.equal(window, crop)) for crop in crops}
    assert len(seen) > 6  # ten are possible
    resized = ImageNet(str(tmp_path), image_size=16).training_set()
    torch.manual_seed(0)
    first = resized[0]
    assert first.shape == (3, 16, 16) and first.min() >= -1 and first.max() <= 1 and not torch.equal(first, resized[0])
    torch.manual_seed(0)
    assert torch.equal(first, resized[0])
    with pytest.raises(UserError, match=r"data.scale"):
        ImageNet(str(tmp_path), scale=(1.0, 0.5))


def test_fast_crops_are_the_resized_ones_but_for_rounding(tmp_path: Path) -> None:
    fill(tmp_path, ["train/a.png"], size=(90, 110))
    resized, fast = (ImageNet(str(tmp_path), crop=crop, image_size=32).training_set() for crop in ("resized", "fast"))  # type: ignore[arg-type]
    for seed in range(40):
        images = []
        for pictures in (resized, fast):
            torch.manual_seed(seed)
            images.append(pictures[0])
        first, second = images
        assert second.shape == (3, 32, 32) and second.is_contiguous()
        assert (first - second).abs().max() * 127.5 < 1.5


@pytest.mark.parametrize("scale", [(0.1, 1.0), (1.0, 1.0)])
@pytest.mark.parametrize("size", [(1600, 1200), (300, 2000), (70, 66)])
def test_large_jpegs_are_decoded_smaller_for_fast_crops_alone(size: tuple[int, int], scale: tuple[float, float], tmp_path: Path) -> None:
    """Every window still has the wanted pixels, and the crops look the same. Evaluation and the other crops decode all of it."""
    for split in ("train", "val"):
        (tmp_path / split / "class").mkdir(parents=True)
        Image.radial_gradient("L").resize(size).convert("RGB").save(tmp_path / split / "class/a.jpg", quality=95)

    def first(pictures: PictureSet) -> tuple[torch.Tensor, tuple[int, int]]:
        """The first image, and the size of the decoded picture."""
        torch.manual_seed(0)
        with patch.object(pictures, "prepare", Mock(wraps=pictures.prepare, suffices=pictures.prepare.suffices)) as prepare:  # type: ignore[attr-defined]
            return pictures[0], prepare.call_args.args[0].size

    crops = ("fast", "resized", "plain", "native", "center")
    data = {crop: ImageNet(str(tmp_path), crop=crop, image_size=64, scale=scale) for crop in crops}  # type: ignore[arg-type]
    for crop in crops[1:]:
        assert first(data[crop].training_set())[1] == size
    assert first(data["fast"].evaluation_set())[1] == size
    fast, decoded = first(data["fast"].training_set())
    assert (decoded[0] < size[0]) == (min(size) > 100)
    window = TrainingCrop(64, "fast", scale).window
    for _ in range(200):
        drawn = window.make_params([Image.new("L", decoded)])
        assert min(drawn["height"], drawn["width"]) >= 64 or decoded == size
    if size == (1600, 1200):  # for others, the sizes' rounding may reject other windows
        assert (fast - first(data["resized"].training_set())[0]).abs().max() < 0.2
