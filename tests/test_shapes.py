"""Pictures that are not square: [height, width] wherever a size is given, and whole pictures of any size in `evaluate`."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from small import CONFIGS, small_training
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torchvision.transforms import v2

from gq_lightning import ImageTokenizer, UserError
from gq_lightning.backbones import UNet, VisionTransformer
from gq_lightning.cli.main import main
from gq_lightning.construction import Size, build, describe, sides
from gq_lightning.data import ImageFolder, Photographs, load_picture, to_tensor
from gq_lightning.data.pictures.reading import INTERPOLATION, center_crop, resize_shorter
from gq_lightning.data.sets import Cut, TrainingCrop
from gq_lightning.tokenizer.windows import see_in_windows
from gq_lightning.tokens import TokenSet

HEIGHT, WIDTH = SIZE = (24, 40)
SMALL = {"width": 16, "layers": 1, "heads": 2, "head_width": 16}
WIDTHS = {"encoder_channels": 8, "latent_channels": 4}


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    coarse = np.random.default_rng(seed).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    for number, (width, height) in enumerate([(50, 75), (75, 50), (64, 64), (33, 129), (41, 24)]):
        picture(width, height, number).save(folder / f"{number}.png")
    return folder


def test_a_pair_of_equal_sides_is_an_int() -> None:
    described = [describe(VisionTransformer(**WIDTHS, image_size=size, **SMALL)) for size in (32, (32, 32))]
    assert described[0] == described[1]
    assert described[0]["init_args"]["image_size"] == 32
    wide = VisionTransformer(**WIDTHS, image_size=SIZE, **SMALL)
    stored = json.loads(json.dumps(describe(wide)))
    rebuilt = build(VisionTransformer, stored, "here")
    assert rebuilt.fixed_image_size == SIZE
    assert rebuilt.identity() == wide.identity()


def test_a_vit_has_a_grid_of_its_pictures_shape() -> None:
    vit = VisionTransformer(**WIDTHS, image_size=SIZE, **SMALL)
    features = vit.encode(torch.zeros(2, 3, HEIGHT, WIDTH))
    assert features.shape == (2, 8, HEIGHT // 8, WIDTH // 8)
    assert vit.decode(torch.zeros(2, 4, HEIGHT // 8, WIDTH // 8)).shape == (2, 3, HEIGHT, WIDTH)
    for wrong in ((WIDTH, HEIGHT), (HEIGHT, HEIGHT)):
        with pytest.raises(UserError, match=f"image is {wrong[0]}x{wrong[1]}, not 24x40"):
            vit.encode(torch.zeros(1, 3, *wrong))
    with pytest.raises(UserError, match="image width 41 is not a multiple of 8"):
        VisionTransformer(**WIDTHS, image_size=(24, 41), **SMALL)


def test_a_vits_rows_and_columns_are_those_of_the_picture() -> None:
    """Without position embedding and attention a patch's feature depends on that patch alone, so it tells its place."""
    vit = VisionTransformer(**WIDTHS, image_size=SIZE, **SMALL).eval()
    with torch.no_grad():
        for name, parameter in vit.named_parameters():
            if "position" in name or "attn.proj" in name:
                parameter.zero_()
        images = torch.zeros(1, 3, HEIGHT, WIDTH)
        images[:, :, 16:24, 32:40] = 1
        features = vit.encode(images)[0]
        changed = (features - features[:, :1, :1]).abs().amax(0) > 1e-6
        assert changed.nonzero().tolist() == [[2, 4]]
        latents = torch.zeros(1, 4, 3, 5)
        latents[0, :, 2, 4] = 1
        decoded = vit.decode(latents)[0]
        changed = (decoded.unfold(1, 8, 8).unfold(2, 8, 8) - decoded[:, None, None, :8, :8]).abs().amax((0, 3, 4)) > 1e-6
    assert changed.nonzero().tolist() == [[2, 4]]


def test_attention_of_a_unet_follows_the_shorter_side() -> None:
    def levels(size: Size) -> list[int]:
        unet = UNet(**WIDTHS, image_size=size, channels=32, multipliers=[1, 1, 1, 1], blocks=1, attention_resolutions=[4, 8])
        names = {name.split(".")[1] for name, _ in unet.encoder.named_parameters() if "levels." in name and "attention" in name}
        return sorted(map(int, names))

    assert levels((32, 64)) == levels(32) == [2, 3]
    assert levels((64, 128)) == levels(64)


@pytest.mark.parametrize("given", [(50, 75), (75, 50), (64, 64), (24, 40), (10, 200)])
@pytest.mark.parametrize("size", [(24, 40), (40, 24), (17, 17)])
def test_the_centre_crop_covers_height_and_width(given: tuple[int, int], size: tuple[int, int]) -> None:
    height, width = size
    before = picture(*given)
    resized = resize_shorter(before, size)
    # one side fits exactly, and the other is in proportion
    factor = max(height / before.height, width / before.width)
    exact = (int(before.width * factor + 1e-9), int(before.height * factor + 1e-9))
    assert resized.size == exact
    assert resized.height == height or resized.width == width
    expected = v2.CenterCrop(size)(resized)
    assert np.array_equal(np.asarray(center_crop(resized, size)), np.asarray(expected))


@pytest.mark.parametrize("cut", ["resized", "fast", "plain", "native", "center"])
def test_training_crops_have_the_shape_and_keep_proportions(cut: Cut) -> None:
    # white and black stripes of equal width: a distorted crop would change the length of a period along one axis only
    for given in ((200, 100), (100, 200)):
        crop = TrainingCrop((16, 48), cut, (0.5, 1.0))(picture(*given))
        assert crop.shape == (3, 16, 48)
        assert crop.dtype == torch.uint8
    torch.manual_seed(0)
    windows = [TrainingCrop((16, 48), "resized").window.get_params(picture(300, 300), (0.2, 0.4), (9 / 4, 4)) for _ in range(50)]
    assert all(9 / 4 - 0.2 < width / height < 4 + 0.2 for _, _, height, width in windows)
    assert TrainingCrop((16, 48), "resized").window.ratio == (9 / 4, 4)


def test_photographs_are_cut_to_any_shape() -> None:
    data = Photographs(image_size=(24, 40), crops_per_epoch=64)
    training, evaluation = data.training_set(), data.evaluation_set()
    assert {training[index].shape for index in range(64)} == {(3, 24, 40)}  # transposition, which augments squares, would swap sides
    assert evaluation[0].shape == (3, 24, 40)
    whole = resize_shorter(evaluation.whole(0), 256)
    assert torch.equal(evaluation[0], to_tensor(whole.crop((0, 0, 40, 24))))
    assert data.protocol()["image_size"] == (24, 40)


@pytest.mark.parametrize("window", [(24, 40), (40, 24), (32, 32)])
@pytest.mark.parametrize("size", [(48, 40), (64, 120), (40, 41 * 8)])
def test_windows_of_any_shape_blend_to_what_they_cover(window: tuple[int, int], size: tuple[int, int]) -> None:
    seen = set()

    def itself(windows: torch.Tensor) -> torch.Tensor:
        seen.add(tuple(windows.shape[2:]))
        return windows

    images = torch.rand(2, 3, *size)
    assert torch.allclose(see_in_windows(itself, images, 8, 8, window, None), images, atol=1e-6)
    assert seen == {window}
    with pytest.raises(UserError, match=f"pictures of 16x16 are smaller than the backbone's {window[0]}x{window[1]}"):
        see_in_windows(itself, torch.rand(1, 3, 16, 16), 8, 8, window, None)


@pytest.fixture(scope="module", params=["vit", pytest.param("unet", marks=pytest.mark.slow)])
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run on pictures of 24 x 40."""
    runs = tmp_path_factory.mktemp("runs")
    configs = ("base", f"backbone/{request.param}_small", "data/photographs", "scale/smoke", "machine/cpu")
    narrow = {"vit": ["width=32", "layers=1"], "unet": ["channels=32", "multipliers=[1, 1, 1, 1]", "blocks=1"]}[request.param]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("warnings.filters", [("ignore", None, Warning, None, 0)])
        arguments = [
            *(part for name in configs for part in ("--config", str(CONFIGS / f"{name}.yaml"))),
            *(f"--model.backbone.init_args.{option}" for option in narrow),
            *("--model.quantizer.init_args.codebook_size=256", "--model.quantizer.init_args.latent_channels=4"),
            *("--data.init_args.image_size=[24, 40]", "--trainer.enable_progress_bar=false", "--trainer.max_steps=2"),
            *("--trainer.limit_val_batches=2", "--export.rfid=false", "--export.columns=3", f"--runs={runs}"),
        ]
        assert main(["fit", *arguments, f"--name={request.param}"]) == 0
    return runs / request.param


def test_a_run_on_pictures_that_are_not_square(run: Path) -> None:
    metrics = json.loads((run / "metrics.json").read_text())
    assert metrics["tokens"] == metrics["images"] * 3 * 5 * ImageTokenizer.from_pretrained(run).tokens_per_position
    assert metrics["protocol"]["data"]["image_size"] == [24, 40]
    events = EventAccumulator(str(run), size_guidance={"images": 0})
    events.Reload()
    with load_picture(run / "reconstructions.png") as drawn:
        assert drawn.width > drawn.height
    logged = events.Images("reconstructions")[-1]
    # three rows of 24 pixels, doubled, and four columns of 40
    assert (logged.width, logged.height) == (96 + 4 * (2 * 40 + 4), 3 * (2 * 24 + 4) + 4)


def test_tools_take_height_and_width(run: Path, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer = ["--tokenizer", str(run)]
    assert main(["encode", str(pictures), *tokenizer, "--fit=resize", "--size=[32,48]", "--out", str(tmp_path / "tokens")]) == 0
    assert main(["decode", str(tmp_path / "tokens"), *tokenizer, "--out", str(tmp_path / "back")]) == 0
    assert {load_picture(path).size for path in (tmp_path / "back").iterdir()} == {(48, 32)}
    evaluate = ["evaluate", *tokenizer, "--data", str(pictures), "--out", str(tmp_path / "m.json"), "--no_rfid", "--workers=0"]
    assert main([*evaluate, "--size=[24,40]"]) == 0
    assert json.loads((tmp_path / "m.json").read_text())["protocol"]["data"]["resize"] == "to cover 24 x 40"
    capsys.readouterr()
    for wrong in ("[24,41]", "[24]", "[24,40,3]", "[0,40]", "[-8,8]", "part", "[24,x]"):
        assert main([*evaluate, f"--size={wrong}"]) == 2, wrong
        error = capsys.readouterr().err.strip()
        assert len(error.splitlines()) == 1, error
        assert "--size" in error


def test_token_sets_have_rows_and_columns(run: Path, pictures: Path, tmp_path: Path) -> None:
    data = ["--data=ImageFolder", f"--data.init_args.root={pictures}", "--data.init_args.workers=0", "--data.init_args.image_size=[24,40]"]
    for views, count in (("flip", 2), ("ten_crop", 10)):
        out = tmp_path / views
        assert main(["tokenize", f"--tokenizer={run}", *data, f"--out={out}", f"--views={views}"]) == 0
        tokens = TokenSet(out / "train")
        assert tokens.header.grid[:2] == (3, 5)
        assert len(tokens.header.views) == count


def test_whole_pictures_are_measured_as_encode_and_decode_give_them(run: Path, pictures: Path, tmp_path: Path) -> None:
    tokenizer, out = ["--tokenizer", str(run)], tmp_path / "m.json"
    assert main(["encode", str(pictures), *tokenizer, "--out", str(tmp_path / "tokens")]) == 0
    assert main(["decode", str(tmp_path / "tokens"), *tokenizer, "--out", str(tmp_path / "back")]) == 0
    call = ["evaluate", *tokenizer, "--data", str(pictures), "--out", str(out), "--no_rfid", "--workers=0", "--size=whole"]
    assert main(call) == 0
    metrics = json.loads(out.read_text())
    decibels, tokens = [], 0
    for path in sorted(pictures.iterdir()):
        original, decoded = (np.asarray(load_picture(file), float) for file in (path, tmp_path / "back" / path.name))
        decibels.append(10 * np.log10(255**2 / np.mean((original - decoded) ** 2)))
    assert metrics["images"] == 5
    assert metrics["psnr"] == pytest.approx(np.mean(decibels), abs=0.02)  # decoded files are rounded
    loaded = ImageTokenizer.from_pretrained(run)
    for path in pictures.iterdir():
        sizes = load_picture(path).size[::-1]
        grid = [max(-(-length // 8), least // 8) for length, least in zip(sizes, sides(loaded.fixed_image_size or 8), strict=True)]
        tokens += grid[0] * grid[1] * loaded.tokens_per_position
    assert metrics["tokens"] == tokens
    told = metrics["protocol"]["data"]
    assert told["image_size"].startswith("whole")
    assert told["interpolation"] == INTERPOLATION
    assert told["windows"] == ("24x40, overlapping by a quarter, for larger pictures" if loaded.fixed_image_size else "none")


def test_whole_pictures_in_tiles(pictures: Path, tmp_path: Path) -> None:
    small_training("unet").tokenizer.save_pretrained(tmp_path / "tokenizer")
    call = ["evaluate", f"--tokenizer={tmp_path / 'tokenizer'}", "--data", str(pictures), "--no_rfid", "--workers=0", "--size=whole"]
    assert main([*call, f"--out={tmp_path / 'm.json'}", "--tile=32"]) == 0
    assert json.loads((tmp_path / "m.json").read_text())["protocol"]["data"]["windows"].startswith("32x32")
    assert main([*call, f"--out={tmp_path / 'm.json'}", "--tile=33"]) == 2


def test_a_folder_is_split_alike_for_any_shape(pictures: Path) -> None:
    square, wide = (ImageFolder(str(pictures), image_size=size, batch_size=1, workers=0) for size in (24, (24, 40)))
    names = [[part.name(index) for index in range(len(part))] for part in (square.evaluation_set(), wide.evaluation_set())]
    assert names[0] == names[1]
    assert next(iter(wide.val_dataloader())).shape == (1, 3, 24, 40)
    assert next(iter(wide.train_dataloader())).shape == (1, 3, 24, 40)
    with pytest.raises(UserError, match="image_size"):
        ImageFolder(str(pictures), image_size=(24, 0))
