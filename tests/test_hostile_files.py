"""What a file of others cannot do: say what code runs or what it costs, set options, be damaged without notice."""

import json
import os
import random
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch import Trainer
from safetensors.torch import load_file, save_file
from small import small_tokenizer, small_training

from gq_lightning import ImageTokenizer, UserError, read_tokens
from gq_lightning.backbones import UNet, VisionTransformer
from gq_lightning.callbacks import CheckpointFiles
from gq_lightning.cli import training as cli
from gq_lightning.cli.loading import load_tokenizer
from gq_lightning.cli.main import main
from gq_lightning.files import open_regular, parse_json
from gq_lightning.lightning_internals import explain_restoring
from gq_lightning.quantizers import FiniteScalarQuantizer, GaussianQuantizer, VectorQuantizer
from gq_lightning.tokenizer import folder as files
from gq_lightning.tokenizer.checkpoint_file import read_checkpoint

KEPT = Path(__file__).parent / "kept"
GAUSSIAN = "gq_lightning.quantizers.GaussianQuantizer"


@pytest.fixture
def canary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A module that says when it has been imported."""
    witness = tmp_path / "witness"
    (tmp_path / "canary.py").write_text(f"from pathlib import Path\nPath({str(witness)!r}).touch()\nclass Bird: ...\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "canary", raising=False)
    return witness


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    small_tokenizer("vit").save_pretrained(tmp_path / "tokenizer")
    return tmp_path / "tokenizer"


def refused(call: Callable[[], object], *words: str) -> str:
    with pytest.raises(UserError) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message and all(word in message for word in words), message
    return message


# What runs


def quantizer_of(config: dict[str, Any]) -> dict[str, Any]:
    return config["init_args"]["quantizer"]


FORGERIES: dict[str, Callable[[dict[str, Any]], object]] = {
    "class as a string": lambda config: config["init_args"].update(quantizer="canary.Bird"),
    "known class as a string": lambda config: config["init_args"].update(quantizer=GAUSSIAN),
    "inline YAML": lambda config: config["init_args"].update(quantizer="{class_path: canary.Bird}"),
    "another argument": lambda config: config["init_args"].update(loss="canary.Bird"),
    "dotted key": lambda config: quantizer_of(config).update({"init_args.seed": 1}),
    "dict_kwargs": lambda config: quantizer_of(config).update(dict_kwargs={"bird": {"class_path": "canary.Bird"}}),
    "class in an argument": lambda config: quantizer_of(config)["init_args"].update(seed={"class_path": "canary.Bird"}),
    "class in a list": lambda config: quantizer_of(config)["init_args"].update(seed=[{"class_path": "canary.Bird"}]),
    "class of another module": lambda config: quantizer_of(config).update(class_path="canary.Bird"),
    "a function": lambda config: quantizer_of(config).update(class_path="os.system", init_args={"command": "touch witness"}),
    "an attribute of a class": lambda config: quantizer_of(config).update(class_path=f"{GAUSSIAN}.forward"),
    "a lazy import": lambda config: quantizer_of(config).update(class_path="gq_lightning.cli.training.CommandLine"),
    "the abstract class": lambda config: quantizer_of(config).update(class_path="gq_lightning.quantizers.Quantizer"),
    "a backbone": lambda config: quantizer_of(config).update(class_path="gq_lightning.backbones.UNet"),
    "another top": lambda config: config.update(class_path="canary.Bird"),
    "a list": lambda config: config.update(init_args=[1]),
    "a number": lambda config: config["init_args"].update(backbone=1),
    "self": lambda config: quantizer_of(config)["init_args"].update(self=1),
}


@pytest.mark.parametrize("forge", FORGERIES.values(), ids=FORGERIES)
def test_a_file_does_not_decide_what_runs(forge: Callable[[dict[str, Any]], object], saved: Path, canary: Path, tmp_path: Path) -> None:
    config = json.loads((saved / "config.json").read_text())
    forge(config["tokenizer"])
    (saved / "config.json").write_text(json.dumps(config))
    refused(lambda: ImageTokenizer.from_pretrained(saved), "config.json: ")
    checkpoint = torch.load(KEPT / "last.ckpt", weights_only=True)
    forge(checkpoint["tokenizer"])
    torch.save(checkpoint, tmp_path / "last.ckpt")
    refused(lambda: ImageTokenizer.from_checkpoint(tmp_path / "last.ckpt"), "last.ckpt: ")
    assert not canary.exists() and "canary" not in sys.modules


class Stop(BaseException): ...


@pytest.mark.parametrize("hyper", [{"learning_rate": 9.0}, {"_class_path": "canary.Bird"}, {"backbone": "canary.Bird"}, [1], "text"])
def test_a_checkpoint_sets_no_options(hyper: object, tmp_path: Path, canary: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def look(self: cli.CommandLine) -> None:
        seen.append(self.config.validate.model.learning_rate)
        raise Stop

    monkeypatch.setattr(cli.CommandLine, "before_instantiate_classes", look)
    torch.save({"hyper_parameters": hyper}, tmp_path / "last.ckpt")
    (tmp_path / "damaged.ckpt").write_bytes(b"PK\x03\x04")
    configs = Path(__file__).parents[1] / "configs"
    for name in ("last", "damaged"):
        with pytest.raises(Stop):
            main(["validate", "--config", str(configs / "demo.yaml"), "--ckpt_path", str(tmp_path / f"{name}.ckpt")])
    asked = yaml.safe_load((configs / "demo.yaml").read_text())["model"]["learning_rate"]
    assert seen == [asked] * 2 and not canary.exists(), seen


@pytest.mark.parametrize(
    "change",
    [
        lambda content: content.clear(),
        lambda content: content.update(state_dict={"a": torch.zeros(1)}),
        lambda content: content.update(state_dict=3),
        lambda content: next(iter(content["state_dict"].values())).fill_(torch.nan),
        lambda content: content.update(loops={"fit_loop": []}),
        lambda content: content.update(optimizer_states=[{}]),
        lambda content: content.update(optimizer_states="text"),
        lambda content: content.update(callbacks=[1]),
        lambda content: content.update({"pytorch-lightning_version": ["x"]}),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_a_checkpoint_that_does_not_fit_is_one_line(change: Callable[[dict[str, Any]], object], tmp_path: Path) -> None:
    content = torch.load(KEPT / "last.ckpt", weights_only=True)
    change(content)
    torch.save(content, tmp_path / "other.ckpt")
    options = {"enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False, "logger": False}
    trainer = Trainer(accelerator="cpu", devices=1, max_steps=1, plugins=[CheckpointFiles()], default_root_dir=tmp_path, **options)
    explain_restoring(trainer)
    batches = torch.utils.data.DataLoader(torch.zeros(1, 3, 32, 32))
    refused(lambda: trainer.fit(small_training("vit"), batches, ckpt_path=tmp_path / "other.ckpt"), "ckpt")


def test_a_checkpoint_does_not_decide_what_is_removed(tmp_path: Path) -> None:
    """Lightning removes the worst of the best, and reads from the checkpoint which these are."""
    folder, precious = tmp_path / "checkpoints", tmp_path / "precious"
    for each in (folder, precious):
        each.mkdir()
    (precious / "a.ckpt").touch()
    for path in (f"{folder}/../precious", f"{folder}/../precious/a.ckpt", str(precious), str(folder)):
        CheckpointFiles().remove_checkpoint(path)
    assert (precious / "a.ckpt").exists() and folder.exists()


# What it costs


@pytest.mark.parametrize(
    ("make", "number"),
    [
        (lambda: GaussianQuantizer(28, codebook_size=2**28), "268435456 codewords"),
        (lambda: VectorQuantizer(28, codebook_size=2**28), "268435456 codewords"),
        (lambda: GaussianQuantizer(16, latent_channels=2**40), "1099511627776"),
        (lambda: FiniteScalarQuantizer(16, [2] * 10**6), "1000000 channels"),
        (lambda: GaussianQuantizer(16, initial_log_variance=float("nan")), "nan"),
        (lambda: VisionTransformer(8, 4, layers=10**7), "20000000 blocks"),
        (lambda: VisionTransformer(8, 4, layers=0), "layers 0"),
        (lambda: VisionTransformer(8, 4, mlp_ratio=1e6), "GB"),
        (lambda: VisionTransformer(8, 4, mlp_ratio=float("nan")), "nan"),
        (lambda: VisionTransformer(8, 4, mlp_ratio=-1.0), "-1.0"),
        (lambda: VisionTransformer(8, 4, patch_size=0), "patch_size 0"),
        (lambda: VisionTransformer(8, 4, patch_size=-8), "patch_size -8"),
        (lambda: VisionTransformer(8, 4, image_size=2**30), "GB"),
        (lambda: VisionTransformer(8, 4, image_size=2**62), "GB"),
        (lambda: VisionTransformer(8, 4, head_width=2**50), "GB"),
        (lambda: VisionTransformer(2**60, 4, width=64, heads=1), "GB"),
        (lambda: UNet(8, 4, blocks=10**7), "blocks"),
        (lambda: UNet(8, 4, channels=2**40), "GB"),
        (lambda: UNet(8, 0), "latent_channels 0"),
        (lambda: UNet(2**60, 4), "GB"),
    ],
)
def test_a_size_is_refused_before_anything_is_made(make: Callable[[], object], number: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: object, **__: object) -> None:
        raise AssertionError("made")

    for name in ("empty", "randn", "from_numpy"):
        monkeypatch.setattr(torch, name, never)
    refused(make, number)


def test_a_config_costs_no_more_than_its_weights(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """32 GB of weights that are not in the file, on a machine that could hold them."""
    monkeypatch.setattr("os.sysconf", lambda name: 2**20)
    config = json.loads((saved / "config.json").read_text())
    config["tokenizer"]["init_args"]["backbone"]["init_args"]["mlp_ratio"] = 2.0**20
    (saved / "config.json").write_text(json.dumps(config))
    refused(lambda: ImageTokenizer.from_pretrained(saved), "config.json: its weights do not fit")


def test_a_tensor_asks_for_no_more_than_its_file_holds(tmp_path: Path) -> None:
    torch.save({"state_dict": {"a": torch.zeros(1).expand(3 * 2**30)}}, tmp_path / "wide.ckpt")
    torch.save({"optimizer_states": [{"state": {0: (torch.zeros(1, 5).expand(2**40, 5),)}}]}, tmp_path / "deep.ckpt")
    for path, size in ((tmp_path / "wide.ckpt", 12 * 2**30), (tmp_path / "deep.ckpt", 20 * 2**40)):
        refused(lambda path=path: CheckpointFiles().load_checkpoint(path), path.name, str(size))
        refused(lambda path=path: ImageTokenizer.from_checkpoint(path), path.name, str(size))
        call = ["import-checkpoint", str(path), "--backbone", "vit", "--bits-per-position", "16", "--out", str(tmp_path / "out")]
        assert main(call) == 2


def test_a_compressed_checkpoint_is_refused(tmp_path: Path) -> None:
    """A thousandth of what it asks for is on the disk."""
    torch.save({"a": torch.zeros(10**6)}, tmp_path / "a.ckpt")
    with zipfile.ZipFile(tmp_path / "a.ckpt") as old, zipfile.ZipFile(tmp_path / "b.ckpt", "w", zipfile.ZIP_DEFLATED) as new:
        for name in old.namelist():
            new.writestr(name, old.read(name))
    refused(lambda: read_checkpoint(tmp_path / "b.ckpt"), "b.ckpt", "compressed")


@pytest.mark.parametrize("place", ["config.json", "model.safetensors", "last.ckpt", "a.tokens.safetensors"])
def test_what_is_no_file_is_not_waited_for(place: str, saved: Path) -> None:
    readers: dict[str, list[Callable[[Path], object]]] = {
        "last.ckpt": [ImageTokenizer.from_checkpoint, read_checkpoint],
        "a.tokens.safetensors": [read_tokens],
    }
    path = saved / place
    path.unlink(missing_ok=True)
    os.mkfifo(path)
    for kind in ("named pipe", "device"):
        for read in readers.get(place, [lambda path: ImageTokenizer.from_pretrained(path.parent)]):
            refused(lambda read=read: read(path), place, kind)  # type: ignore[misc]
        path.unlink()
        path.symlink_to("/dev/zero")
    with pytest.raises(FileNotFoundError):
        open_regular(saved / "nothing")


@pytest.mark.parametrize(
    "text",
    [
        "[" * 10**6,
        '{"a": 1, "a": 2}',
        '{"a": NaN}',
        '{"a": -Infinity}',
        '{"a": ' + "9" * 10**4 + "}",
        '{"a": {"b": 1, "b": 1}}',
        "\xff",
        "",
    ],
)
def test_json_that_is_none(text: str, saved: Path) -> None:
    with pytest.raises(ValueError):
        parse_json(text)
    (saved / "config.json").write_text(text)
    refused(lambda: ImageTokenizer.from_pretrained(saved), "config.json")


# Damage


def test_no_flipped_bit_of_a_checkpoint_goes_unnoticed(tmp_path: Path) -> None:
    """Either it is refused, or what is read is what was written: some bits, such as the members' dates, nobody reads."""
    draw, whole, path = random.Random(0), (KEPT / "last.ckpt").read_bytes(), tmp_path / "last.ckpt"
    original = read_checkpoint(KEPT / "last.ckpt")
    noticed = 0
    for _ in range(100):
        content = bytearray(whole)
        content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
        path.write_bytes(content)
        try:
            torch.testing.assert_close(read_checkpoint(path)["state_dict"], original["state_dict"], rtol=0, atol=0)
        except UserError as error:
            assert str(path) in str(error) and "\n" not in str(error)
            noticed += 1
    assert noticed > 30


def test_all_that_read_checkpoints_notice(tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    content = bytearray((KEPT / "last.ckpt").read_bytes())
    with zipfile.ZipFile(KEPT / "last.ckpt") as archive:
        weights = max(archive.infolist(), key=lambda member: member.file_size)
    content[weights.header_offset + 1000] ^= 1
    path.write_bytes(content)
    refused(lambda: ImageTokenizer.from_checkpoint(path), "last.ckpt", "CRC")
    refused(lambda: CheckpointFiles().load_checkpoint(path), "last.ckpt", "CRC")
    for command in (["convert"], ["import-checkpoint", "--backbone", "vit", "--bits-per-position", "16"]):
        assert main([*command, str(path), "--out", str(tmp_path / "out")]) == 2
    assert not (tmp_path / "out").exists()


def test_no_flipped_bit_of_a_config_goes_unnoticed(tmp_path: Path) -> None:
    """Either it is refused, or the tokenizer is the same: an argument of the training shapes no tokens."""
    draw, folder = random.Random(0), tmp_path / "tokenizer"
    folder.mkdir()
    (folder / "model.safetensors").symlink_to(KEPT / "tokenizer" / "model.safetensors")
    whole = (KEPT / "tokenizer" / "config.json").read_bytes()
    tokenizer = ImageTokenizer.from_pretrained(KEPT / "tokenizer")
    for index in range(len(whole)):
        content = bytearray(whole)
        content[index] ^= 1 << draw.randrange(8)
        (folder / "config.json").write_bytes(content)
        try:
            again = ImageTokenizer.from_pretrained(folder)
        except UserError as error:
            assert "config.json" in str(error) or "SHA-256" in str(error), error
        else:
            assert again.fingerprint == tokenizer.fingerprint, content


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers(value: float, saved: Path, tmp_path: Path) -> None:
    state = load_file(saved / "model.safetensors")
    config = json.loads((saved / "config.json").read_text())
    state["backbone.decoder.head.bias"][0] = value
    files.write_folder(saved, config["tokenizer"], state, {"fingerprint": ""})
    refused(lambda: ImageTokenizer.from_pretrained(saved), "decoder.head.bias", "not finite")
    checkpoint = torch.load(KEPT / "last.ckpt", weights_only=True)
    checkpoint["state_dict"]["tokenizer.backbone.decoder.head.bias"][0] = value
    torch.save(checkpoint, tmp_path / "last.ckpt")
    refused(lambda: ImageTokenizer.from_checkpoint(tmp_path / "last.ckpt"), "decoder.head.bias", "not finite")


@pytest.mark.parametrize("name", ["x" * 5000, "x" * 300 + "/y", "a\0b"])
def test_names_that_no_file_can_have(name: str) -> None:
    refused(lambda: ImageTokenizer.from_pretrained(name, local_files_only=True), "correct the name")


@pytest.mark.parametrize("threads", [0, -1, 10**6])
def test_threads_that_cannot_be(threads: int, saved: Path) -> None:
    refused(lambda: load_tokenizer(str(saved), "cpu", threads), f"--threads {threads}: give 1 to")


def test_nothing_is_made_of_what_is_no_number() -> None:
    tokenizer = small_tokenizer("vit").eval().requires_grad_(False)
    images = torch.rand(1, 3, 32, 32) * 2 - 1
    tokens = tokenizer.encode(images)
    tokenizer.backbone.decoder.head.bias[0] = float("nan")  # type: ignore[union-attr]
    refused(lambda: tokenizer.decode(tokens), "images are not finite")
    tokenizer.backbone.encoder.linear_out.bias[0] = float("inf")  # type: ignore[union-attr]
    refused(lambda: tokenizer.encode(images), "features are not finite")


@pytest.mark.parametrize("place", [0, -1])
def test_weights_of_several_types(saved: Path, place: int) -> None:
    """The one that differs is named, wherever it stands in the file."""
    state = load_file(saved / "model.safetensors")
    config = json.loads((saved / "config.json").read_text())
    name = sorted(name for name in state if name.startswith("backbone."))[place]
    state[name] = state[name].half()
    files.write_folder(saved, config["tokenizer"], state, {"fingerprint": ""})
    refused(lambda: ImageTokenizer.from_pretrained(saved), f"{name} is torch.float16")


def test_weights_come_in_one_order(saved: Path) -> None:
    names = list(files.read_folder(saved)[1])
    assert names == sorted(names)


def test_a_file_of_weights_that_is_none(saved: Path) -> None:
    for content in (b"", b"\xff" * 100, b"\x10" + b"\0" * 7 + b"{" * 16):
        (saved / "model.safetensors").write_bytes(content)
        config = json.loads((saved / "config.json").read_text())
        config["weights"]["sha256"] = files.hashlib.sha256(content).hexdigest()
        (saved / "config.json").write_text(json.dumps(config))
        refused(lambda: ImageTokenizer.from_pretrained(saved), "model.safetensors")
    save_file({"a": torch.zeros(1)}, saved / "model.safetensors")
    refused(lambda: ImageTokenizer.from_pretrained(saved), "SHA-256")
