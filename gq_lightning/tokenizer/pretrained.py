"""A tokenizer's way to a folder or the hub and back, as huggingface_hub's own mixin has it: save_pretrained, from_pretrained."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

from torch import Tensor, nn

from gq_lightning.backbones.base import Backbone
from gq_lightning.construction import build, describe, fingerprint
from gq_lightning.errors import UserError
from gq_lightning.quantizers.base import Quantizer
from gq_lightning.tokenizer import folder as files


class Pretrained(nn.Module):
    """Mixin of a module with a backbone and a quantizer: both together are all that a user of its tokens needs."""

    backbone: Backbone
    quantizer: Quantizer

    def description(self) -> dict[str, Any]:
        """What `construction.build` needs to make this tokenizer again, without what only training needs."""
        parts = {name: describe(getattr(self, name)) for name in ("backbone", "quantizer")}
        return {"class_path": "gq_lightning.ImageTokenizer", "init_args": parts}

    @property
    def fingerprint(self) -> str:
        """SHA-256 of what decides tokens and pictures: classes, their arguments but for those of the training, and weights.

        Tokens are only worth something together with the tokenizer of this fingerprint.
        """
        return fingerprint([self.backbone.identity(), self.quantizer.identity()], self.state_dict())

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes config.json and model.safetensors, from which `from_pretrained` makes an equal tokenizer."""
        facts = {
            "bits_per_pixel": self.quantizer.bits_per_position / self.backbone.downsampling**2,
            "codebook_size": self.quantizer.codebook_size,
            "tokens_per_position": self.quantizer.tokens_per_position,
            "downsampling": self.backbone.downsampling,
            "fingerprint": self.fingerprint,
        }
        if isinstance(codebook := getattr(self.quantizer, "codebook_fingerprint", None), Tensor):
            facts["codebook"] = {"recipe": self.quantizer.recipe, "sha256": bytes(codebook.tolist()).hex()}
        files.write_folder(folder, self.description(), self.state_dict(), facts)

    @classmethod
    def from_pretrained(cls, name: str | Path, **download: Any) -> Self:
        """A tokenizer from a folder or from `owner/repository` on the hub, in eval mode and frozen.

        Args:
            name: folder or repository.
            download: `revision`, `token`, `cache_dir`, `force_download`, `local_files_only` of huggingface_hub.

        Raises:
            UserError: a file is missing, damaged or changed.
        """
        folder = files.locate(name, **download)
        description, state, recorded = files.read_folder(folder)
        source = str(folder / files.CONFIG)
        tokenizer = cls.from_description(description, state, source)
        if (fingerprint := tokenizer.fingerprint) != recorded:
            raise UserError(
                f"{source}: fingerprint {recorded[:16]}… was recorded, but what it describes has {fingerprint[:16]}…: it was changed or is"
                " damaged; copy it again, or change a tokenizer in Python and save it"
            )
        return tokenizer

    @classmethod
    def from_description(cls, description: dict[str, Any], state: Mapping[str, Tensor], source: str) -> Self:
        """A tokenizer from what `description` gave and its weights; `source` is the file named in errors."""
        tokenizer = build(cls, description, source)
        try:
            tokenizer.load_state_dict(state)
        except RuntimeError as error:
            lines = [line.strip() for line in str(error).splitlines() if line.strip()]
            raise UserError(f"{source}: its weights do not fit the tokenizer it describes: {' '.join(lines[1:2])}") from error
        except UserError as error:
            raise UserError(f"{source}: {error}") from error
        return tokenizer.eval().requires_grad_(False)

    def push_to_hub(self, repository: str, folder: str | Path, token: str | None = None, private: bool | None = None) -> str:
        """Saves to `folder` and uploads it as `owner/repository`; returns the commit's address."""
        self.save_pretrained(folder)
        return files.upload(folder, repository, token, private)
