"""save_pretrained, from_pretrained and push_to_hub, as in huggingface_hub's mixin."""

from collections import Counter
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

from gq_lightning.backbones.base import Backbone
from gq_lightning.construction import describe, fingerprint
from gq_lightning.errors import UserError
from gq_lightning.files import RunFolder
from gq_lightning.quantizers.base import Quantizer
from gq_lightning.tokenizer import folder as files
from gq_lightning.tokenizer.checkpoint_file import read_checkpoint

CLASS_PATH = "gq_lightning.ImageTokenizer"
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class Pretrained(nn.Module):
    """Mixin that saves and loads a module with a backbone and a quantizer."""

    backbone: Backbone
    quantizer: Quantizer
    # of the tokenizer whose tokens these are, and of the encoder that both have
    tokens_of: tuple[str, str] | None = None

    def description(self) -> dict[str, Any]:
        """The description from which `construction.build` rebuilds this tokenizer, without the parts used only in training."""
        parts = {name: describe(getattr(self, name)) for name in ("backbone", "quantizer")}
        kept = {"tokens_of": list(self.tokens_of)} if self.tokens_of is not None and self.has_tokens_of_another else {}
        return {"class_path": CLASS_PATH, "init_args": parts} | kept

    @property
    def fingerprint(self) -> str:
        """SHA-256 of everything that determines tokens and images: classes, their arguments except those of training, and weights.

        Tokens can be decoded by tokenizers with the same `tokens_fingerprint`.
        """
        return self._fingerprint(self.state_dict())

    @property
    def encoder_fingerprint(self) -> str:
        """SHA-256 of what decides tokens alone: the same, but for the weights of the decoder."""
        return self._fingerprint({name: value for name, value in self.state_dict().items() if not name.startswith("backbone.decoder.")})

    def _fingerprint(self, state: Mapping[str, Tensor]) -> str:
        return fingerprint([self.backbone.identity(), self.quantizer.identity()], state)

    @property
    def tokens_fingerprint(self) -> str:
        """What token files, token sets and priors call their tokenizer: its own fingerprint, or, where its decoder alone has been trained
        further, that of the tokenizer which this training started from. Both have the same tokens."""
        return self.tokens_of[0] if self.tokens_of is not None and self.has_tokens_of_another else self.fingerprint

    @property
    def has_tokens_of_another(self) -> bool:
        """Whether the encoder is still the one that `keep_tokens` saw."""
        return self.tokens_of is not None and self.tokens_of[1] == self.encoder_fingerprint

    def keep_tokens(self) -> None:
        """To be called before the decoder changes: its tokens stay those of this tokenizer, as long as nothing else changes."""
        self.tokens_of = (self.tokens_fingerprint, self.encoder_fingerprint)

    def facts(self) -> dict[str, Any]:
        """The entries of config.json besides the description. They all follow from the description and the weights."""
        facts = {
            "bits_per_pixel": self.quantizer.bits_per_position / self.backbone.downsampling**2,
            "codebook_size": self.quantizer.codebook_size,
            "tokens_per_position": self.quantizer.tokens_per_position,
            "downsampling": self.backbone.downsampling,
            "fingerprint": self.fingerprint,
        }
        if self.has_tokens_of_another:
            facts["tokens_fingerprint"] = self.tokens_fingerprint
        if isinstance(codebook := getattr(self.quantizer, "codebook_fingerprint", None), Tensor):
            facts["codebook"] = {"recipe": self.quantizer.recipe, "sha256": bytes(codebook.tolist()).hex()}
        return facts

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes config.json and model.safetensors, from which `from_pretrained` makes an equal tokenizer."""
        files.write_folder(folder, self.description(), self.state_dict(), self.facts())

    @classmethod
    def from_pretrained(cls, name: str | Path, **download: Any) -> Self:
        """A tokenizer from a folder or from `owner/repository` on the hub, in eval mode and frozen. To train it further, call
        ``tokenizer.train().requires_grad_(True)``.

        Args:
            name: folder of a tokenizer or of a run, training checkpoint, name of a shipped tokenizer, or repository.
            download: `revision`, `token`, `cache_dir`, `force_download`, `local_files_only` of huggingface_hub.

        Raises:
            UserError: a file is missing, damaged or changed.
        """
        folder = files.locate(name, **download)
        if not (folder / files.CONFIG).is_file() and (folder.is_file() or RunFolder(folder).last.is_file()):
            return cls.from_checkpoint(folder)
        description, state, recorded = files.read_folder(folder)
        source = str(folder / files.CONFIG)
        tokenizer = cls.from_description(description, state, source)
        files.check_facts(tokenizer.facts(), recorded, source)
        return tokenizer

    @classmethod
    def from_checkpoint(cls, path: Path) -> Self:
        """The tokenizer of a training checkpoint, or of the last checkpoint in a run's folder. Raises UserError if there is no checkpoint,
        or this package did not write it."""
        if path.is_dir():
            run = RunFolder(path)
            existing = [candidate for candidate in (run.last, *sorted(run.checkpoints.glob("*.ckpt"))) if candidate.is_file()]
            if not existing:
                raise UserError(f"{path}: no checkpoints/*.ckpt in this folder; give a run's folder or a checkpoint")
            path = existing[0]
        try:
            checkpoint = read_checkpoint(path, mmap=True)
        except FileNotFoundError as error:
            raise UserError(f"{path}: no such checkpoint") from error
        try:
            description = checkpoint["tokenizer"]
            recipe = description["init_args"]["quantizer"]
            # copied from the mapped file, which may be overwritten later
            own = {name: value for name, value in checkpoint["state_dict"].items() if name.startswith("tokenizer.")}
            state = {name.removeprefix("tokenizer."): value.clone() for name, value in own.items()}
        except (KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{path}: not a checkpoint of gq_lightning (no {error}): give one that fit wrote") from error
        if (name := "quantizer.codebook_fingerprint") in state:
            # a conversion draws the codebook again from its recipe; no token depends on the codebook of the training
            state[name] = Quantizer.from_description(recipe, str(path)).state_dict()["codebook_fingerprint"]
        return cls.from_description(description, state, source=str(path))

    @classmethod
    def from_description(cls, description: Any, state: Mapping[str, Tensor], source: str) -> Self:
        """A tokenizer from its `description` and weights, in the weights' floating-point type; errors name the file `source`.

        A backbone of this package is built without memory for its weights and takes those of the file, so that a forged description
        cannot allocate more memory than its file has.
        """
        fields = description if isinstance(description, dict) else {}
        parts = fields.get("init_args")
        if fields.get("class_path") != CLASS_PATH or not isinstance(parts, dict) or parts.keys() != {"backbone", "quantizer"}:
            raise UserError(f"{source}: does not describe a {CLASS_PATH} of backbone and quantizer: restore the file")
        with torch.device("meta") if _is_of_this_package(parts["backbone"]) else nullcontext():
            backbone = Backbone.from_description(parts["backbone"], source)
        try:
            with files.weights_must_fit("tokenizer", source):
                tokenizer = cls(backbone, Quantizer.from_description(parts["quantizer"], source))
                _check_weights(state, tokenizer.quantizer.state_dict())
                tokenizer.load_state_dict(state, assign=True)
            tokenizer._read_tokens_of(fields.get("tokens_of"))
        except UserError as error:
            raise UserError(f"{source}: {str(error).removeprefix(f'{source}: ')}") from error
        return tokenizer.eval().requires_grad_(False)

    def _read_tokens_of(self, recorded: Any) -> None:
        if recorded is None:
            return
        if not (isinstance(recorded, list) and len(recorded) == 2 and all(isinstance(one, str) for one in recorded)):
            raise UserError(f"tokens_of: {recorded!r:.80} is not two fingerprints: restore the file")
        self.tokens_of = (recorded[0], recorded[1])
        if not self.has_tokens_of_another:
            raise UserError(
                f"tokens_of: it was recorded that its tokens are those of {recorded[0]:.12}, but the encoder or the codebook has changed:"
                " copy the tokenizer again"
            )

    def push_to_hub(self, repository: str, folder: str | Path, token: str | None = None, private: bool | None = None) -> str:
        """Saves to `folder` and uploads it as `owner/repository`; returns the commit's URL."""
        self.save_pretrained(folder)
        return files.upload(folder, repository, token, private)


def _is_of_this_package(description: Any) -> bool:
    return isinstance(description, dict) and str(description.get("class_path")).startswith("gq_lightning.")


def _check_weights(state: Mapping[str, Tensor], quantizer: Mapping[str, Tensor]) -> None:
    """Raises UserError unless all weights are finite, the backbone's share one floating-point type and the quantizer's have their own."""
    dtypes = Counter(tensor.dtype for name, tensor in state.items() if name.startswith("backbone.") and tensor.dtype in FLOATS)
    dtype = dtypes.most_common(1)[0][0] if dtypes else None  # the few that differ are named, not the many
    for name, tensor in state.items():
        wanted = quantizer.get(name.removeprefix("quantizer."), tensor).dtype if name.startswith("quantizer.") else dtype
        if tensor.dtype != wanted and (tensor.dtype.is_floating_point or name.startswith("quantizer.")):
            raise UserError(f"{name} is {tensor.dtype}, not {wanted}: save the tokenizer again with its backbone in one type")
        if tensor.dtype.is_floating_point and not bool(tensor.isfinite().all()):
            raise UserError(f"{name} has values that are not finite: the training diverged or the file is damaged; use another")
