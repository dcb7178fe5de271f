"""TokenSets: a Lightning data module of a training set and an evaluation set of tokens."""

from functools import cached_property
from pathlib import Path
from typing import Any

from torch.utils.data import default_collate

from gq_lightning.data.module import ResumableDataModule
from gq_lightning.errors import UserError
from gq_lightning.tokens.token_set import Header, TokenSet, read_json


class TokenSets(ResumableDataModule):
    """The output of `python -m gq_lightning tokenize`: all views of ROOT/train, and the first view of each picture in ROOT/val.

    Batches are tokens (B, h, w, n) int64 and labels (B,) int64, -1 for no class. Order, ranks and resuming work as in the data modules of
    pictures.

    Args:
        root: folder of the two sets.
        tokenizer: folder of the tokenizer that made them; any other is refused.
        batch_size: rows in a training batch, on each device.
        evaluation_batch_size: pictures in an evaluation batch; null takes batch_size.
        workers: processes that read rows, at most one per core. Rows are mapped into memory, so 0 is often as fast.
        verify: compare the checksums of all files at the start, which reads them once.

    Attributes:
        header: header of the training set.

    Raises:
        UserError: there is no token set, or another tokenizer made it.
    """

    def __init__(
        self,
        root: str,
        tokenizer: str,
        batch_size: int = 64,
        evaluation_batch_size: int | None = None,
        workers: int = 0,
        verify: bool = True,
    ) -> None:
        super().__init__(batch_size, evaluation_batch_size, workers, default_collate)
        self.root, self.tokenizer, self.verify = Path(root).expanduser(), Path(tokenizer).expanduser(), verify
        self.header, fingerprint = Header.read(self.root / "train"), _recorded(self.tokenizer)
        if self.header.tokenizer != fingerprint:
            raise UserError(
                f"data.init_args.tokenizer {self.tokenizer}: it is {fingerprint[:12]}, but the tokens in {self.root} were made by "
                f"{self.header.tokenizer[:12]}: give that one, or tokenize the pictures again"
            )

    @cached_property
    def _training(self) -> TokenSet:
        return self.training_set()

    @cached_property
    def _evaluation(self) -> TokenSet:
        return self.evaluation_set()

    def training_set(self) -> TokenSet:
        """All views of the training pictures."""
        return TokenSet(self.root / "train", self.header.tokenizer, verify=self.verify)

    def evaluation_set(self) -> TokenSet:
        """The first view of each held-out picture."""
        held_out = TokenSet(self.root / "val", self.header.tokenizer, first_view=True, verify=self.verify)
        for name in ("grid", "codebook_size", "classes"):
            if getattr(held_out.header, name) != getattr(self.header, name):
                raise UserError(f"{self.root}: train and val differ in {name}: tokenize both with the same options")
        return held_out

    def protocol(self) -> dict[str, Any]:
        """Description of the evaluation set as plain data."""
        tokens = self._evaluation
        return {
            "data": type(self).__name__,
            "split": tokens.header.split,
            "images": len(tokens),
            "preparation": tokens.header.preparation,
            "tokenizer": tokens.header.tokenizer,
        }


def _recorded(tokenizer: Path) -> str:
    """The fingerprint recorded in a tokenizer's folder for its tokens."""
    try:
        config = read_json(tokenizer / "config.json")
        return str(config.get("tokens_fingerprint", config["fingerprint"]))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"data.init_args.tokenizer {tokenizer}: not a tokenizer's folder ({type(error).__name__}): give one that fit wrote"
        ) from error
