"""A tokenizer as a folder, in huggingface_hub's conventions: config.json (how to build it), model.safetensors (its weights).

config.json pins the SHA-256 of model.safetensors, and the weights carry the fingerprint of the codebook. A folder with a changed or
damaged part is refused, since it would silently decode tokens to something else.
"""

import hashlib
import json
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Literal

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from gq_lightning.errors import UserError
from gq_lightning.files import Draft

CONFIG, WEIGHTS, CARD = "config.json", "model.safetensors", "README.md"
FORMAT = 2
Kind = Literal["tokenizer", "prior"]
# what a folder's card shows
USE = {
    "tokenizer": "from gq_lightning import ImageTokenizer\n\ntokenizer = ImageTokenizer.from_pretrained(...)\n"
    "tokens = tokenizer.encode(images)  # (B, 3, H, W) in [-1, 1] -> (B, h, w, n) int64\nimages = tokenizer.decode(tokens)",
    "prior": "from gq_lightning.priors import Prior\n\nprior = Prior.from_pretrained(...)\n"
    "bits = prior(tokens, labels)  # (B, h, w, n), (B,) int64 -> bits of each symbol (B, h * w, n * digits)",
}
WRITTEN_BY = {"tokenizer": "by fit or by `python -m gq_lightning convert`", "prior": "by `python -m gq_lightning prior fit`"}
TAGS = {"tokenizer": "image-tokenizer, vector-quantization, gaussian-quant", "prior": "image-generation, autoregressive"}


def write_folder(
    folder: str | Path, description: dict[str, Any], state: dict[str, Tensor], facts: dict[str, Any], kind: Kind = "tokenizer"
) -> None:
    """Writes the folder of a tokenizer or a prior. All files are complete under temporary names before the first one is put in place.

    Args:
        folder: made if missing.
        description: of the module, see `construction.describe`.
        state: its state_dict.
        facts: further entries of config.json, for people to read.
    """
    folder = Path(folder)
    weights = save({name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}, metadata={"format": "pt"})
    config = {
        "format": FORMAT,
        kind: description,
        "weights": {"file": WEIGHTS, "sha256": hashlib.sha256(weights).hexdigest()},
        **facts,
    }
    card = f"---\nlibrary_name: gq_lightning\ntags: [{TAGS[kind]}]\n---\n\n# Image {kind}\n\n```python\n{USE[kind]}\n```\n"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        contents = {WEIGHTS: weights, CARD: card.encode(), CONFIG: (json.dumps(config, indent=2) + "\n").encode()}
        with ExitStack() as stack:
            drafts = [stack.enter_context(Draft(folder / name)) for name in contents]
            for draft, content in zip(drafts, contents.values(), strict=True):
                draft.file.write(content)
                draft.complete()
            for draft in drafts:
                draft.place()
    except OSError as error:
        raise UserError(f"{folder}: the {kind} cannot be written there ({error.strerror}); what was there before is unchanged") from error


def read_folder(folder: str | Path, kind: Kind = "tokenizer") -> tuple[dict[str, Any], dict[str, Tensor], str]:
    """The description, the verified state_dict and the recorded fingerprint of such a folder.

    Raises:
        UserError: a file is missing, damaged, or of another format.
    """
    folder = Path(folder)
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise UserError(f"{folder}: no {name} there; a {kind}'s folder is written {WRITTEN_BY[kind]}")
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        if (version := config["format"]) != FORMAT:
            cure = "install the version of gq_lightning that wrote it, or train again"
            raise UserError(f"{folder / CONFIG}: format {version!r} is not {FORMAT}: {cure}")
        description, expected, fingerprint = config[kind], config["weights"]["sha256"], config["fingerprint"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder / CONFIG}: not a {kind}'s config ({type(error).__name__}: {error}); restore the file") from error
    weights = (folder / WEIGHTS).read_bytes()
    actual = hashlib.sha256(weights).hexdigest()
    if actual != expected:
        raise UserError(
            f"{folder / WEIGHTS}: SHA-256 {actual[:16]}… is not the {str(expected)[:16]}… of {CONFIG}: damaged or changed; copy it again"
        )
    try:
        return description, load(weights), str(fingerprint)
    except SafetensorError as error:
        raise UserError(f"{folder / WEIGHTS}: not a safetensors file ({error})") from error


def locate(name: str | Path, **download: Any) -> Path:
    """The local folder of a tokenizer: `name` itself if it is one, else the hub's repository of that name, downloaded and cached.

    Args:
        name: a folder or `owner/repository`.
        download: revision, token, cache_dir, force_download, local_files_only of `huggingface_hub.snapshot_download`.
    """
    if Path(name).is_dir():
        return Path(name)
    # a folder needs nothing of the hub, whose import takes a while
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(str(name), allow_patterns=[CONFIG, WEIGHTS], **download))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        first = str(error).strip().splitlines()[0]
        raise UserError(f"{name}: neither a folder nor a tokenizer on the hub that can be reached ({first})") from error


def upload(folder: str | Path, repository: str, token: str | None = None, private: bool | None = None) -> str:
    """Uploads a tokenizer's folder to `owner/repository` on the hub, made if missing, and returns the commit's address."""
    from huggingface_hub import HfApi

    api = HfApi(token=token)
    name = api.create_repo(repo_id=repository, private=private, exist_ok=True).repo_id
    return str(api.upload_folder(repo_id=name, folder_path=folder, allow_patterns=[CONFIG, WEIGHTS, CARD]))
