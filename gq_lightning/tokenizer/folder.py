"""The folder of a tokenizer or a prior, in huggingface_hub's conventions: config.json (how to build it), model.safetensors (its weights).

config.json pins the SHA-256 of model.safetensors and records facts that follow from both; the weights carry the codebook's fingerprint.
A folder with a changed or damaged file is refused, since it would silently decode tokens to wrong images.
"""

import hashlib
import json
import os
import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from gq_lightning.errors import UserError
from gq_lightning.files import Draft, RunFolder, one_writer, open_regular, parse_json
from gq_lightning.tokenizer.box import boxed, names

CONFIG, WEIGHTS, CARD = "config.json", "model.safetensors", "README.md"
FORMAT = 2
Kind = Literal["tokenizer", "prior"]
WRITTEN_BY = {"tokenizer": "by fit or by `python -m gq_lightning convert`", "prior": "by `python -m gq_lightning prior fit`"}
# for the model card
TAGS = {"tokenizer": "image-tokenizer, vector-quantization, gaussian-quant", "prior": "image-generation, autoregressive"}
USE = {
    "tokenizer": "from gq_lightning import ImageTokenizer\n\ntokenizer = ImageTokenizer.from_pretrained(...)\n"
    "tokens = tokenizer.encode(images)  # (B, 3, H, W) in [-1, 1] -> (B, h, w, n) int64\nimages = tokenizer.decode(tokens)",
    "prior": "from gq_lightning.priors import Prior\n\nprior = Prior.from_pretrained(...)\n"
    "bits = prior(tokens, labels)  # (B, h, w, n), (B,) int64 -> bits of each symbol (B, h * w, n * digits)",
}
BESIDE = re.compile(r"model-[0-9a-f]{64}\.safetensors")


def write_folder(
    folder: str | Path, description: dict[str, Any], state: dict[str, Tensor], facts: dict[str, Any], kind: Kind = "tokenizer"
) -> None:
    """Writes or overwrites the folder. If the process is killed, either the old or the new content is there, complete.

    config.json decides which, since it names the hash of its weights. Until it is in place, the new weights have a temporary name. Besides
    the description it has `facts`, see `check_facts`. Raises UserError if the folder cannot be written.
    """
    folder = Path(folder)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    halves = {name: tensor.half() for name, tensor in tensors.items() if tensor.dtype == torch.float32}
    stored = {}
    half_already = any(tensor.dtype == torch.float16 for tensor in tensors.values())
    if halves and not half_already and all(torch.equal(half.float(), tensors[name]) for name, half in halves.items()):
        # half precision loses nothing: the weights were rounded before, for a file of half the size
        tensors, stored = tensors | halves, {"stored": "float16"}
    weights = save(tensors, metadata={"format": "pt"})
    digest = hashlib.sha256(weights).hexdigest()
    config = {"format": FORMAT, kind: description, "weights": {"file": WEIGHTS, "sha256": digest, **stored}, **facts}
    card = f"---\nlibrary_name: gq_lightning\ntags: [{TAGS[kind]}]\n---\n\n# Image {kind}\n\n```python\n{USE[kind]}\n```\n"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with one_writer(folder):
            contents = {WEIGHTS: weights, CARD: card.encode(), CONFIG: (json.dumps(config, indent=2) + "\n").encode()}
            with ExitStack() as stack:
                drafts = [stack.enter_context(Draft(folder / name)) for name in contents]
                for draft, content in zip(drafts, contents.values(), strict=True):
                    draft.file.write(content)
                    draft.complete()
                for draft in drafts:
                    draft.place(_beside(digest) if draft.path.name == WEIGHTS else None)
            os.replace(folder / _beside(digest), folder / WEIGHTS)
            for left in folder.iterdir():  # left by a killed writer
                if BESIDE.fullmatch(left.name):
                    left.unlink()
    except OSError as error:
        raise UserError(
            f"{folder}: the {kind} cannot be written there ({error.strerror}): make room, or choose another folder; an earlier one"
            " there can still be loaded"
        ) from error


def _beside(digest: str) -> str:
    return f"model-{digest}.safetensors"


def read_folder(folder: str | Path, kind: Kind = "tokenizer") -> tuple[Any, dict[str, Tensor], dict[str, Any]]:
    """The description, the verified state_dict and the whole config.json of a folder. Raises UserError if a file is missing, damaged, or in
    another format."""
    folder = Path(folder)
    config = _read_config(folder, kind)
    expected, actual = config["weights"]["sha256"], ""
    # the temporary name first: a concurrent writer may rename it to the final one between the two reads
    for name in (_beside(expected), WEIGHTS):
        with suppress(FileNotFoundError):
            weights = _content(folder / name)
            actual = hashlib.sha256(weights).hexdigest()
            if actual == expected:
                try:
                    state = dict(sorted(load(weights).items()))  # safetensors gives them in another order each time
                    return config[kind], _widened(state, config["weights"].get("stored")), config
                except (SafetensorError, ValueError, KeyError) as error:
                    raise UserError(f"{folder / WEIGHTS}: not a safetensors file ({error}): copy it again") from error
    if not actual:
        raise UserError(f"{folder}: no {WEIGHTS} there; a {kind}'s folder is written {WRITTEN_BY[kind]}")
    if _read_config(folder, kind) != config:  # overwritten in the meantime
        return read_folder(folder, kind)
    raise UserError(
        f"{folder / WEIGHTS}: SHA-256 {actual[:16]}… is not the {expected[:16]}… of {CONFIG}: damaged or changed; copy it again"
    )


def check_facts(facts: dict[str, Any], recorded: dict[str, Any], source: str) -> None:
    """Raises UserError if config.json (`source` in messages) records other facts than follow from the description and the weights."""
    for fact, value in facts.items():
        if (given := recorded.get(fact, value)) != value:
            raise UserError(
                f"{source}: {fact} {given!r:.80} is recorded, but the description gives {value!r:.80}: the file was changed or is damaged;"
                " copy it again, or change it in Python and save it"
            )


@contextmanager
def weights_must_fit(kind: Kind, source: str) -> Iterator[None]:
    """Raises UserError if torch finds, within the block, that weights do not fit a module."""
    try:
        yield
    except RuntimeError as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        raise UserError(f"{source}: its weights do not fit the {kind} it describes: {' '.join(lines[1:2])[:300]}") from error


def _widened(state: dict[str, Tensor], stored: str | None) -> dict[str, Tensor]:
    """Weights that were stored in half precision, as float32 again."""
    return {name: tensor.float() if stored and tensor.dtype == torch.float16 else tensor for name, tensor in state.items()}


def _read_config(folder: Path, kind: Kind) -> dict[str, Any]:
    path = folder / CONFIG
    try:
        config = parse_json(_content(path))
        if (version := config["format"]) != FORMAT:
            cure = "install the version of gq_lightning that wrote it, or train again"
            raise UserError(f"{path}: format {version!r:.40} is not {FORMAT}: {cure}")
        if not re.fullmatch("[0-9a-f]{64}", config["weights"]["sha256"]):
            raise ValueError("weights.sha256 is not a SHA-256")
        for name in (kind, "fingerprint"):
            config[name]
        return config
    except FileNotFoundError as error:
        raise UserError(f"{folder}: no {CONFIG} there; a {kind}'s folder is written {WRITTEN_BY[kind]}") from error
    except (ValueError, KeyError, TypeError) as error:
        reason = f"{type(error).__name__}: {error}"[:200]
        raise UserError(f"{path}: not a {kind}'s config ({reason}); restore the file") from error


def _content(path: Path) -> bytes:
    try:
        with open_regular(path) as file:
            return file.read()
    except FileNotFoundError:
        raise
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error


def locate(name: str | Path, kind: Kind = "tokenizer", **download: Any) -> Path:
    """The folder of a tokenizer or a prior: `name` itself or inside a run's folder, a shipped tokenizer, or `owner/repository` on the hub.
    A prior's repository contains the folder of its tokenizer. `download` are options of `huggingface_hub.snapshot_download`."""
    if os.path.exists(name):  # False for a name that no file can have
        of_a_run = RunFolder(name).tokenizer if kind == "tokenizer" else RunFolder(name).prior
        return next((folder for folder in (Path(name), of_a_run) if (folder / CONFIG).is_file()), Path(name))
    if kind == "tokenizer" and (folder := boxed(name)) is not None:
        return folder
    # imported late: slow, and not needed for a folder
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        patterns = [CONFIG, WEIGHTS, *([f"tokenizer/{CONFIG}", f"tokenizer/{WEIGHTS}"] if kind == "prior" else [])]
        return Path(snapshot_download(str(name), allow_patterns=patterns, **download))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        first = str(error).strip().splitlines()[0]
        box = f", a shipped tokenizer ({', '.join(names())})" if kind == "tokenizer" else ""
        raise UserError(f"{name}: neither a folder{box} nor a reachable {kind} on the hub ({first}): correct the name") from error


def upload(folder: str | Path, repository: str, token: str | None = None, private: bool | None = None) -> str:
    """Uploads a tokenizer's folder to `owner/repository` on the hub, created if missing, and returns the commit's URL."""
    from huggingface_hub import HfApi

    api = HfApi(token=token)
    name = api.create_repo(repo_id=repository, private=private, exist_ok=True).repo_id
    return str(api.upload_folder(repo_id=name, folder_path=folder, allow_patterns=[CONFIG, WEIGHTS, CARD]))
