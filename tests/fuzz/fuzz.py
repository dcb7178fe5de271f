"""Damaged and forged files, thousands of them: each is read as it was, or refused by the package's own error, within seconds.

    PYTHONPATH=tests python tests/fuzz/fuzz.py [--minutes 3] [--seed N] [--kind tokens]

A failure is printed with its seed, which repeats the one file: --seed S --cases 1 --kind KIND. What counts as one: another exception than
UserError, a message of several lines or without the file's name, more than ten seconds, a class or function that the file has named and
that has been imported or called, and tokens or weights that are not those that were written.
"""

import argparse
import copy
import hashlib
import io
import json
import os
import pickle
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
import zipfile
from collections.abc import Callable
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

import torch
from published_networks import VIT, reference

from gq_lightning import ImageTokenizer, UserError, read_tokens, write_tokens
from gq_lightning.callbacks import CheckpointFiles
from gq_lightning.data import ImageFolder, Shards
from gq_lightning.data.shards.writing import write_shards
from gq_lightning.importers.authors import import_checkpoint
from gq_lightning.priors import Prior
from gq_lightning.tokens import TokenSet
from gq_lightning.tokens.tokenizing import write_token_set

KEPT = Path(__file__).parents[1] / "kept"
LIMIT = 10  # seconds
VALUES = (
    *(None, True, -1, 0, 1, 2, 7, 2**31, 2**63, 10**30, 0.5, -0.0, 1e308, float("nan"), float("inf"), "", "x", "os.system", "canary.Bird"),
    *(
        "{class_path: canary.Bird}",
        [],
        [1],
        [[]],
        {},
        {"class_path": "canary.Bird"},
        {"class_path": "os.system", "init_args": {"command": "x"}},
    ),
    *("gq_lightning.quantizers.VectorQuantizer", "gq_lightning.backbones.UNet", "\n", "\x00", "ä" * 5000),
)


class Code:
    """Would run if it were unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return __import__, ("canary",)


# Mutations


def damage(draw: random.Random, content: bytes) -> bytes:
    """Bits flipped, bytes cut out, doubled, or exchanged for others."""
    data = bytearray(content)
    for _ in range(draw.choice((1, 1, 1, 2, 8))):
        start = draw.randrange(len(data) + 1)
        end = min(len(data), start + draw.choice((1, 1, 4, 64, 4096)))
        kind = draw.randrange(6)
        if kind <= 1 and start < len(data):
            data[start] ^= 1 << draw.randrange(8)
        elif kind == 2:
            del data[start:end]
        elif kind == 3:
            data[start:start] = data[start:end]
        elif kind == 4:
            data[start:end] = draw.randbytes(end - start)
        else:
            data[start:] = b""
    return bytes(data)


def forge(draw: random.Random, content: Any) -> Any:
    """Plain data with one or two of its values, or names, exchanged for those that one would try."""
    content = copy.deepcopy(content)
    for _ in range(draw.choice((1, 1, 2))):
        places: list[tuple[Any, Any]] = []
        left = [content]
        while left:
            thing = left.pop()
            inside = list(thing.items()) if isinstance(thing, dict) else list(enumerate(thing)) if isinstance(thing, list) else []
            places += [(thing, key) for key, _ in inside]
            left += [value for _, value in inside]
        if not places:
            return draw.choice(VALUES)
        thing, key = draw.choice(places)
        if isinstance(thing, dict) and draw.random() < 0.3:
            thing[draw.choice(("class_path", "init_args", "dict_kwargs", "init_args.seed", "loss", "", "self"))] = thing.pop(key)
        else:
            thing[key] = draw.choice(VALUES)
    return content


def tensor(draw: random.Random, value: torch.Tensor) -> Any:
    """A tensor's place taken by what does not fit there."""
    return draw.choice(
        (
            lambda: value.to(torch.float16),
            lambda: value.to(torch.int64),
            lambda: torch.zeros(1).expand(2 ** draw.randrange(20, 45)),
            lambda: torch.full_like(value, float("nan")) if value.is_floating_point() else value + 1,
            lambda: torch.zeros(draw.randrange(4), draw.randrange(4)),
            lambda: value.to_sparse(),
            lambda: torch.empty(3, device="meta"),
            lambda: torch.zeros(2, dtype=torch.complex64),
            lambda: torch.quantize_per_tensor(torch.zeros(2), 0.1, 0, torch.qint8),
            lambda: "text",
            lambda: None,
            Code,
        )
    )()


def forged_checkpoint(draw: random.Random, content: dict[str, Any]) -> bytes:
    content = copy.deepcopy(content)
    kind = draw.randrange(5)
    if kind == 0:
        content["tokenizer"] = forge(draw, content.get("tokenizer"))
    elif kind == 1:
        content = forge(draw, {name: value for name, value in content.items() if name != "state_dict"}) | {}
    elif kind == 2:
        content[draw.choice(("hyper_parameters", "callbacks", "loops", "extra"))] = draw.choice((*VALUES, Code()))
    else:
        name = draw.choice(list(content["state_dict"]))
        content["state_dict"][draw.choice((name, name, "extra"))] = tensor(draw, content["state_dict"][name])
    buffer = io.BytesIO()
    try:
        torch.save(content, buffer)
    except (RuntimeError, NotImplementedError, pickle.PicklingError):
        return b""
    return buffer.getvalue()


def repacked(draw: random.Random, content: bytes) -> bytes:
    """An archive whose members are damaged and whose checksums are right."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(buffer, "w", draw.choice((0, 0, zipfile.ZIP_DEFLATED))) as new:
        names = old.namelist()
        chosen = draw.choice([name for name in names if name.endswith("data.pkl")] if draw.random() < 0.7 else names)
        for name in names:
            new.writestr(name, damage(draw, old.read(name)) if name == chosen else old.read(name))
    return buffer.getvalue()


# What is read, and how


class Kinds:
    """One method for each kind of file: writes a mutated one below `folder`, reads it, and checks what came out."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.tokens = (KEPT / "picture.tokens.safetensors").read_bytes()
        self.config = json.loads((KEPT / "tokenizer" / "config.json").read_text())
        self.content = torch.load(KEPT / "last.ckpt", weights_only=True)
        self.theirs = {"epoch": 3, "state_dict": dict(reference("vit").state_dict())}
        self.sizes = folder / "sizes.yaml"
        backbone = {"class_path": "gq_lightning.backbones.VisionTransformer", "init_args": VIT}
        self.sizes.write_text(json.dumps({"model": {"backbone": backbone}}))
        self.state = self.content["state_dict"]
        kept = read_tokens(KEPT / "picture.tokens.safetensors")
        self.written = kept.tokens
        write_tokens(folder / "whole.tokens", kept)
        self.coded = (folder / "whole.tokens").read_bytes()
        self.fingerprint = ImageTokenizer.from_pretrained(KEPT / "tokenizer").fingerprint
        pictures = folder / "pictures"
        pictures.mkdir()
        shutil.copy(KEPT / "decoded.png", pictures / "a.png")
        shutil.copy(KEPT / "decoded.png", pictures / "b.png")
        write_shards(pictures, folder / "shards", workers=0)
        tokenizer = ImageTokenizer.from_pretrained(KEPT / "tokenizer")
        data = ImageFolder(str(pictures), str(pictures), image_size=32, workers=0)
        self.rows = list(write_token_set(tokenizer, data.evaluation_set(), folder / "set", 32, workers=0, shard_pictures=1))
        prior = Prior((4, 4, 1), tokenizer.codebook_size, 8, self.fingerprint, ["a", "b"], width=16, layers=1, heads=2, head_layers=1)
        prior.save_pretrained(folder / "prior")
        self.of_prior = prior.fingerprint

    def tokens_file(self, draw: random.Random) -> None:
        path = self.folder / "a.tokens.safetensors"
        path.write_bytes(damage(draw, self.tokens))
        assert torch.equal(read_tokens(path).tokens, self.written), "other tokens"

    def coded_file(self, draw: random.Random) -> None:
        path = self.folder / "a.tokens"
        path.write_bytes(damage(draw, self.coded))
        assert torch.equal(read_tokens(path).tokens, self.written), "other tokens"

    def tokenizer(self, draw: random.Random) -> None:
        path = self.folder / "tokenizer"
        shutil.copytree(KEPT / "tokenizer", path, dirs_exist_ok=True)
        if draw.random() < 0.7:
            config = (path / "config.json").read_bytes()
            forged = draw.random() < 0.7
            (path / "config.json").write_bytes(json.dumps(forge(draw, self.config)).encode() if forged else damage(draw, config))
        else:
            (path / "model.safetensors").write_bytes(damage(draw, (path / "model.safetensors").read_bytes()))
        assert ImageTokenizer.from_pretrained(path).fingerprint == self.fingerprint, "another tokenizer"

    def _checkpoint(self, draw: random.Random, content: dict[str, Any]) -> tuple[Path, bool]:
        """Its path, and whether it was forged: then what it gives is its own affair."""
        path, kind, whole = self.folder / "last.ckpt", draw.randrange(3), io.BytesIO()
        torch.save(content, whole)
        mutated = (damage, repacked)[kind](draw, whole.getvalue()) if kind < 2 else forged_checkpoint(draw, content)
        path.write_bytes(mutated)
        return path, kind > 0

    def convert(self, draw: random.Random) -> None:
        path, forged = self._checkpoint(draw, self.content)
        tokenizer = ImageTokenizer.from_checkpoint(path)
        assert forged or tokenizer.fingerprint == self.fingerprint, "another tokenizer"
        with suppress(UserError) if forged else nullcontext():  # finite weights may overflow; `decode` does not know their file
            tokenizer.decode(self.written[None])

    def resume(self, draw: random.Random) -> None:
        path, forged = self._checkpoint(draw, self.content)
        content = CheckpointFiles().load_checkpoint(path)
        if not forged:
            state = content["state_dict"]
            assert state.keys() == self.state.keys() and all(torch.equal(state[name], self.state[name]) for name in state), "other weights"

    def imported(self, draw: random.Random) -> None:
        import_checkpoint(self._checkpoint(draw, self.theirs)[0], "vit", 16, 256, self.sizes)

    def shards(self, draw: random.Random) -> None:
        path = self.folder / "mutated"
        shutil.copytree(self.folder / "shards", path, dirs_exist_ok=True)
        chosen = draw.choice(sorted(file for file in path.iterdir() if file.is_file()))
        chosen.write_bytes(damage(draw, chosen.read_bytes()))
        data = Shards(str(path), training="*.tar", validation="*.tar", image_size=16, batch_size=1, workers=0)
        pictures = data.evaluation_set()
        for index in range(len(pictures)):
            pictures.load(index)

    def token_set(self, draw: random.Random) -> None:
        path, forged = self.folder / "mutated_set", draw.random() < 0.6
        shutil.copytree(self.folder / "set", path, dirs_exist_ok=True)
        header = json.loads((path / "set.json").read_text())
        del header["sha256"]
        chosen = draw.choice(sorted(path.iterdir()))
        if forged and chosen.suffix == ".json":
            chosen.write_text(json.dumps(forge(draw, header if chosen.name == "set.json" else json.loads(chosen.read_text()))))
        else:
            chosen.write_bytes(damage(draw, chosen.read_bytes()))
        if forged:  # with all checksums right, as far as there are places for them
            with suppress(ValueError, TypeError, KeyError, IndexError, AttributeError):
                header = json.loads(chosen.read_text()) if chosen.name == "set.json" else header
                for number, shard in enumerate(header["shards"]):
                    shard[1:] = (hashlib.sha256((path / f"{number:06d}.{suffix}").read_bytes()).hexdigest() for suffix in ("npy", "json"))
                header["sha256"] = hashlib.sha256(json.dumps(header, sort_keys=True).encode()).hexdigest()
                (path / "set.json").write_text(json.dumps(header))
        tokens = TokenSet(path)
        rows = [tokens[index] for index in range(min(len(tokens), 100))]
        tokens.name(0)
        tokens.counts() if tokens.header.codebook_size < 2**20 else None
        same = len(rows) == len(self.rows) and all(torch.equal(one[0], other[0]) for one, other in zip(rows, self.rows, strict=True))
        assert forged or same, "other tokens"

    def prior(self, draw: random.Random) -> None:
        path = self.folder / "mutated_prior"
        shutil.copytree(self.folder / "prior", path, dirs_exist_ok=True)
        chosen = draw.choice(sorted(path.iterdir()))
        if chosen.suffix == ".json" and draw.random() < 0.7:
            chosen.write_text(json.dumps(forge(draw, json.loads(chosen.read_text()))))
        else:
            chosen.write_bytes(damage(draw, chosen.read_bytes()))
        assert Prior.from_pretrained(path).fingerprint == self.of_prior, "another prior"


KINDS = {
    "tokens": Kinds.tokens_file,
    "coded": Kinds.coded_file,
    "tokenizer": Kinds.tokenizer,
    "convert": Kinds.convert,
    "resume": Kinds.resume,
    "import": Kinds.imported,
    "shards": Kinds.shards,
    "set": Kinds.token_set,
    "prior": Kinds.prior,
}


def late(*_: object) -> None:
    raise TimeoutError(f"more than {LIMIT} seconds")


def failure(call: Callable[[Kinds, random.Random], None], kinds: Kinds, seed: int) -> str | None:
    """What is wrong with one case, or None."""
    signal.alarm(LIMIT)
    try:
        call(kinds, random.Random(seed))
    except UserError as error:
        if "\n" in str(error) or str(kinds.folder) not in str(error):
            return f"the message {str(error)!r:.300}"
    except BaseException:
        return traceback.format_exc(limit=-4)
    finally:
        signal.alarm(0)
    return "it ran what a file named" if "canary" in sys.modules else None


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=3.0)
    parser.add_argument("--seed", type=int, help="of the first case; the clock's where it is not given")
    parser.add_argument("--cases", type=int, help="of each kind, instead of --minutes")
    parser.add_argument("--kind", choices=KINDS, action="append")
    given = parser.parse_args(arguments)
    seed = given.seed if given.seed is not None else time.time_ns() // 10**6 % 10**9
    names = given.kind or list(KINDS)
    print(f"seed {seed}", flush=True)
    torch.set_num_threads(1)
    signal.signal(signal.SIGALRM, late)
    # torch says what it thinks of the kinds of tensors that are made here
    warnings.simplefilter("ignore")
    end, done, failures = time.monotonic() + 60 * given.minutes, 0, 0
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "canary.py").write_text("class Bird: ...\n")
        sys.path.insert(0, folder)
        os.environ["GQ_LIGHTNING_HOME"] = folder
        kinds = Kinds(Path(folder))
        while done < given.cases if given.cases is not None else time.monotonic() < end:
            for name in names:
                if (what := failure(KINDS[name], kinds, seed + done)) is not None:
                    failures += 1
                    print(f"\n--kind {name} --seed {seed + done} --cases 1:\n{what}", flush=True)
            done += 1
        sys.path.remove(folder)
    print(f"{done} files of each kind ({', '.join(names)}), {failures} failures")
    return int(failures > 0)


if __name__ == "__main__":
    sys.exit(main())
