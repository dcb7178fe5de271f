"""Token sets: what is in them, who writes them, how they end, and what is refused."""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from small import CONFIGS, small_tokenizer

from gq_lightning import ImageTokenizer, UserError
from gq_lightning.cli.main import main
from gq_lightning.data import ImageFolder, Photographs
from gq_lightning.data.order import Shuffled
from gq_lightning.files import whole
from gq_lightning.tokens import TokenSet, TokenSets
from gq_lightning.tokens.token_set import sha256_of
from gq_lightning.tokens.tokenizing import class_names, write_token_set

BROKEN = "dogs/2.png"


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two classes, one picture broken."""
    folder = tmp_path_factory.mktemp("pictures") / "all"
    for index in range(7):
        for name in ("cats", "dogs"):
            (folder / name).mkdir(parents=True, exist_ok=True)
            pixels = np.random.default_rng(index + 50 * (name == "dogs")).integers(0, 255, (5, 6, 3), dtype=np.uint8)
            Image.fromarray(pixels).resize((48, 40), Image.Resampling.BICUBIC).save(folder / name / f"{index}.png")
    (folder / BROKEN).write_bytes(b"no picture")
    others = folder.with_name("others") / "cats"
    others.mkdir(parents=True)
    Image.new("RGB", (48, 40), "red").save(others / "0.png")
    return folder


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    small_tokenizer("vit").save_pretrained(folder)
    return folder


def data(pictures: Path) -> ImageFolder:
    return ImageFolder(str(pictures), str(pictures.with_name("others")), image_size=32, workers=0)


def write(tokenizer: ImageTokenizer, pictures: Path, out: Path, **options: object) -> TokenSet:
    images = data(pictures).training_set()
    arguments = {"image_size": 32, "classes": class_names(images), "batch_size": 2, "shard_pictures": 4, "workers": 0} | options
    return write_token_set(tokenizer, images, out, **arguments)  # type: ignore[arg-type]


def contents(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.rglob("*.*"))}


@pytest.mark.parametrize("views", ["one", "flip", "ten_crop"])
def test_rows_are_the_tokens_of_the_pictures(
    views: str, pictures: Path, saved: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tokenizer = ImageTokenizer.from_pretrained(saved)
    written = write(tokenizer, pictures, tmp_path / "set", views=views)
    count = {"one": 1, "flip": 2, "ten_crop": 10}[views]
    assert len(written) == 13 * count and written.views == count
    assert [written.name(row) for row in range(0, len(written), count)] == [
        f"{name}/{index}.png" for name in ("cats", "dogs") for index in range(7) if f"{name}/{index}.png" != BROKEN
    ]
    assert list(written.header.left_out) == [BROKEN] and "left out a broken picture" in caplog.text and BROKEN in caplog.text
    images = ImageFolder(str(pictures.with_name("others")), str(pictures), image_size=32).evaluation_set()
    index = next(i for i in range(len(images)) if images.name(i) == "dogs/3.png")
    row = next(row for row in range(len(written)) if written.name(row) == "dogs/3.png")
    tokens, label = written[row]
    assert (tokens.dtype, tokens.shape, label) == (torch.int64, (4, 4, 2), 1)
    if views != "ten_crop":
        assert torch.equal(tokens, tokenizer.encode(images[index][None])[0])
    if views == "flip":
        assert torch.equal(written[row + 1][0], tokenizer.encode(images[index][None].flip(-1))[0])
    if views == "ten_crop":
        with Image.open(pictures / "dogs/3.png") as picture:
            larger = picture.resize((42, 35), Image.Resampling.BILINEAR)
        corner = torch.from_numpy(np.array(larger))[3:35, 10:42].permute(2, 0, 1).float() / 127.5 - 1
        assert torch.equal(written[row + 8][0], tokenizer.encode(corner[None])[0]), "the lower right corner"
    again = TokenSet(tmp_path / "set", tokenizer.fingerprint, first_view=True)
    assert len(again) == 13 and torch.equal(again[-1][0], written[len(written) - count][0])
    found = again.counts()
    assert found.shape == (2, 256) and np.array_equal(
        found[1], np.bincount(torch.stack([t for t, _ in again])[..., 1].flatten(), minlength=256)
    )


def test_crops_are_drawn_from_their_place(saved: Path, tmp_path: Path) -> None:
    """Pictures that are random crops are the same at every call, and have no ten crops."""
    tokenizer, images = ImageTokenizer.from_pretrained(saved), Photographs(32, crops_per_epoch=6).training_set()
    one, two = (write_token_set(tokenizer, images, tmp_path / name, 32, workers=0) for name in "ab")
    assert contents(one.path) == contents(two.path)
    assert one.header.classes == [] and {label for _, label in one} == {-1}
    assert not torch.equal(one[0][0], one[1][0])
    with pytest.raises(UserError, match="--views ten_crop: .* use flip"):
        write_token_set(tokenizer, images, tmp_path / "c", 32, views="ten_crop")


class Killed(BaseException):
    pass


def test_a_killed_call_goes_on(pictures: Path, saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = ImageTokenizer.from_pretrained(saved)
    write(tokenizer, pictures, tmp_path / "whole")
    expected, out, calls = contents(tmp_path / "whole"), tmp_path / "set", []
    place = whole.Draft.place
    for kill in (0, 1, 2, 5, 2):  # in front of the first file, between a shard's two files, in front of set.json

        def dying(draft: whole.Draft, kill: int = kill) -> None:
            calls.append(draft.path.name)
            if len(calls) > kill:
                raise Killed
            place(draft)

        calls.clear()
        with monkeypatch.context() as patch:
            patch.setattr(whole.Draft, "place", dying)
            with pytest.raises(Killed):
                write(tokenizer, pictures, out)
        with pytest.raises(UserError, match=r"set.json: no token set, or an unfinished one"):
            TokenSet(out)
    encoded = []
    monkeypatch.setattr(ImageTokenizer, "encode", lambda *arguments: encoded.append(arguments))
    write(tokenizer, pictures, out)
    assert contents(out) == expected and not encoded, "only the header was missing"


def arguments_of(pictures: Path, saved: Path, folder: Path) -> list[str]:
    (config := folder / "data.yaml").write_text(
        "data:\n  class_path: gq_lightning.data.ImageFolder\n"
        f"  init_args: {{root: {pictures}, validation_root: {pictures.with_name('others')}, image_size: 32, workers: 0}}\n"
    )
    options = ["--tokenizer", str(saved), "--config", str(config), "--views", "flip", "--batch_size", "2", "--shard_pictures", "4"]
    return ["tokenize", *options]


DYING = """
import os, signal, sys
from gq_lightning.files import whole
place, calls = whole.Draft.place, []
def dying(draft, *arguments):
    calls.append(draft)
    if len(calls) == int(sys.argv[1]):
        os.kill(os.getpid(), signal.SIGKILL)
    place(draft, *arguments)
whole.Draft.place = dying
from gq_lightning.cli.main import main
sys.exit(main(sys.argv[2:]))
"""


@pytest.mark.slow
def test_killed_with_sigkill_it_ends_in_the_same_bytes(pictures: Path, saved: Path, tmp_path: Path) -> None:
    """The command itself, killed again and again, each time a little later; what is left of half-written files goes, too."""
    arguments = arguments_of(pictures, saved, tmp_path)
    assert main([*arguments, "--out", str(tmp_path / "whole")]) == 0
    (script := tmp_path / "dying.py").write_text(DYING)
    environment, kills = {**os.environ, "PYTHONPATH": str(CONFIGS.parent), "OMP_NUM_THREADS": "1"}, 0
    for kill in (1, 2, 3, 2, 99):
        call = [sys.executable, str(script), str(kill), *arguments, "--out", str(tmp_path / "killed")]
        done = subprocess.run(call, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode in (0, -signal.SIGKILL), done.stderr[-2000:]
        kills += done.returncode != 0
    assert done.returncode == 0 and kills >= 3
    found = {str(path.relative_to(tmp_path / "killed")) for path in (tmp_path / "killed").rglob("*") if path.is_file()}
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole") and not [name for name in found if name.endswith(".tmp")]


def test_two_ranks_write_what_one_writes(pictures: Path, saved: Path, tmp_path: Path) -> None:
    arguments = arguments_of(pictures, saved, tmp_path)
    environment = {**os.environ, "PYTHONPATH": str(CONFIGS.parent), "OMP_NUM_THREADS": "1"}
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "29617", "-m", "gq_lightning"]
    calls = [subprocess.Popen([*launch, *arguments, "--out", str(tmp_path / "two")], env=environment, stderr=subprocess.PIPE, text=True)]
    assert main([*arguments, "--out", str(tmp_path / "one")]) == 0
    errors = [process.communicate(timeout=300)[1] for process in calls]
    assert [process.returncode for process in calls] == [0], errors[0][-3000:]
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    assert {path.name for path in (tmp_path / "one").iterdir()} == {"train", "val"}


@pytest.fixture
def small_set(pictures: Path, saved: Path, tmp_path: Path) -> Iterator[Path]:
    write(ImageTokenizer.from_pretrained(saved), pictures, tmp_path / "set")
    yield tmp_path / "set"


def test_what_is_cut_short_or_changed_is_refused(small_set: Path) -> None:
    for path in sorted(small_set.iterdir()):
        content = path.read_bytes()
        for place in (0, len(content) // 2, len(content) - 2):
            path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
            with pytest.raises(UserError, match=rf"^\S*{path.name}: .*(make it|copy)"):
                TokenSet(small_set)
        path.write_bytes(content[:-9])
        with pytest.raises(UserError, match=path.name):
            TokenSet(small_set)
        if path.suffix == ".npy":
            with pytest.raises(UserError, match=f"{path.name}: truncated"):
                TokenSet(small_set, verify=False)
        path.unlink()
        with pytest.raises(UserError, match=path.name):
            TokenSet(small_set)
        path.write_bytes(content)
    assert len(TokenSet(small_set)) == 13


def test_what_does_not_belong_together_is_refused(small_set: Path, saved: Path, pictures: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="made by tokenizer .*, not by 000000000000: give the tokenizer that made them"):
        TokenSet(small_set, "0" * 64)
    tokenizer = ImageTokenizer.from_pretrained(saved)
    with pytest.raises(UserError, match="choose another --out, or delete that folder"):
        write(tokenizer, pictures, small_set, views="flip")
    with pytest.raises(UserError, match="image_size 36: use a multiple of 8 that is at least 32"):
        write(tokenizer, pictures, tmp_path / "other", image_size=36)
    other = small_tokenizer("unet")
    other.save_pretrained(tmp_path / "unet")
    (tmp_path / "sets").mkdir()
    shutil.copytree(small_set, tmp_path / "sets/train")
    with pytest.raises(UserError, match=r"data.init_args.tokenizer .*unet: it is .*: give that one, or tokenize the pictures again"):
        TokenSets(str(tmp_path / "sets"), str(tmp_path / "unet"))
    with pytest.raises(UserError, match="not a tokenizer's folder"):
        TokenSets(str(tmp_path / "sets"), str(tmp_path / "nothing"))


def test_batches_are_resumed_and_shared(small_set: Path, saved: Path, tmp_path: Path) -> None:
    (tmp_path / "sets").mkdir()
    for split in ("train", "val"):
        shutil.copytree(small_set, tmp_path / "sets" / split)

    def module() -> TokenSets:
        made = TokenSets(str(tmp_path / "sets"), str(saved), batch_size=4)
        made.seed = 5
        return made

    first = module()
    loader = first.train_dataloader()
    epochs = [[batch for batch in loader] for _ in range(2)]
    assert [len(epoch) for epoch in epochs] == [3, 3] and not torch.equal(epochs[0][0][0], epochs[1][0][0])
    tokens, labels = epochs[0][0]
    assert (tokens.shape, tokens.dtype, labels.shape, labels.dtype) == ((4, 4, 4, 2), torch.int64, (4,), torch.int64)
    second = module()
    second.load_state_dict({"seed": 5, "epoch": 1, "batches": 2})
    resumed = second.train_dataloader()
    resumed.sampler.set_epoch(1)  # type: ignore[attr-defined]
    (batch,) = list(resumed)
    assert torch.equal(batch[0], epochs[1][2][0])
    places = [[index for index, _ in Shuffled(first._training, 2, rank, 5)] for rank in range(2)]
    assert sorted(places[0] + places[1]) == sorted({*places[0], *places[1]}) and len(places[0]) == 6
    assert [len(batch[1]) for batch in first.val_dataloader()] == [4, 4, 4, 1]


FORGED: list[dict[str, object]] = [
    *(
        {"grid": grid}
        for grid in ([-1, 4, 2], [2**31, 2**31, 2], [10**6, 10**6, 2], [10**30, 1, 1], ["4", 4, 2], [4, 4], "442", [4.0, 4, 2])
    ),
    *({"codebook_size": size} for size in (0, 2, 2**32 + 1, 10**30, "256", None, 256.0, [256])),
    *({"downsampling": size} for size in (0, -8, "8", None, 8.5)),
    *({"classes": classes} for classes in (None, 5, "ab", [1], ["cats"], {"cats": 0})),
    *({"views": views} for views in (None, 5, [], "a", [1])),
    *({"shards": shards} for shards in (None, 5, [], [[13]], [13], [[-1, "", ""]], [["4", "", ""]], [[4.0, "", ""]], "abc")),
    *({"tokenizer": tokenizer} for tokenizer in (None, 5, ["f"])),
    *({"left_out": left_out} for left_out in (None, [], {"a": 1})),
    {"another": 1},
]


@pytest.mark.parametrize("fields", FORGED, ids=str)
def test_a_header_that_was_written_with_other_values(fields: dict[str, object], one_set: Path, tmp_path: Path) -> None:
    shutil.copytree(one_set, tmp_path / "set")
    seal(tmp_path / "set", **fields)
    with pytest.raises(UserError, match=r"^\S*set/(set.json|00000.\.npy): .*copy the set again"):
        TokenSet(tmp_path / "set")


@pytest.mark.parametrize(
    "told", [None, [], {}, {"names": 5}, {"names": None}, {"names": ["a"]}, {"names": [1] * 4}, {"left_out": 5}, {"more": 1}]
)
def test_names_that_are_none(told: object, one_set: Path, tmp_path: Path) -> None:
    shutil.copytree(one_set, tmp_path / "set")
    path = tmp_path / "set/000000.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **told} if isinstance(told, dict) and told else told))
    seal(tmp_path / "set", files=True)
    with pytest.raises(UserError, match=r"^\S*000000.json: .*copy the set again"):
        TokenSet(tmp_path / "set").name(0)


@pytest.mark.parametrize(("field", "value"), [("tokens", 255), ("label", 2), ("label", -2)])
def test_rows_that_the_header_excludes(field: str, value: int, one_set: Path, tmp_path: Path) -> None:
    shutil.copytree(one_set, tmp_path / "set")
    rows = np.load(tmp_path / "set/000000.npy")
    rows["tokens"] %= 255
    rows[field][-1] = value
    np.save(tmp_path / "set/000000.npy", rows)
    seal(tmp_path / "set", files=True, codebook_size=255)
    with pytest.raises(UserError, match=f"000000.npy: {field} outside"):
        TokenSet(tmp_path / "set")


@pytest.mark.parametrize(
    "content", [b"", b"PK\x05\x06" + bytes(18), b"\x93NUMPY\x01\x00\x10\x27" + b"(" * 10000], ids=["empty", "zip", "nested"]
)
def test_arrays_that_are_none(content: bytes, one_set: Path, tmp_path: Path) -> None:
    shutil.copytree(one_set, tmp_path / "set")
    (tmp_path / "set/000000.npy").write_bytes(content)
    seal(tmp_path / "set", files=True)
    with pytest.raises(UserError, match=r"000000.npy: truncated or damaged"):
        TokenSet(tmp_path / "set")


@pytest.fixture(scope="module")
def one_set(pictures: Path, saved: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("one") / "set"
    write(ImageTokenizer.from_pretrained(saved), pictures, folder)
    return folder


def seal(folder: Path, files: bool = False, **fields: object) -> None:
    """Changes fields of a header, or the checksums of the first shard to those of its files, and makes the header's own checksum right."""
    content = json.loads((folder / "set.json").read_text())
    del content["sha256"]
    if files:
        content["shards"][0][1:] = [sha256_of(folder / f"000000.{suffix}") for suffix in ("npy", "json")]
    content |= fields
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    (folder / "set.json").write_text(json.dumps({**content, "sha256": digest}))
