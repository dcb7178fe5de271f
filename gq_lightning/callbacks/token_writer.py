"""Writes the output of `predict`: one token file per image of the evaluation set."""

from collections.abc import Callable, Sequence
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import BasePredictionWriter

from gq_lightning.files import RunFolder
from gq_lightning.tokens.token_file import SUFFIX, TokenFile, write_tokens
from gq_lightning.training.module import TokenizerTraining


class TokenWriter(BasePredictionWriter):
    """Writes RUN/tokens/NAME.tokens, in the format of `encode`, batch by batch."""

    def __init__(self) -> None:
        super().__init__(write_interval="batch")
        self._fingerprint = ""
        self._name: Callable[[int], str] = str

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, TokenizerTraining)
        self._fingerprint = pl_module.tokenizer.tokens_fingerprint
        self._name = trainer.datamodule.evaluation_set().name  # type: ignore[attr-defined]

    def write_on_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        prediction: Any,
        batch_indices: Sequence[int] | None,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int,
    ) -> None:
        assert isinstance(pl_module, TokenizerTraining)
        folder = RunFolder(trainer.default_root_dir).tokens
        height, width = batch.shape[-2:]
        for index, tokens in zip(batch_indices or (), prediction, strict=True):
            path = folder / (self._name(index) + SUFFIX)
            done = f"{height}x{width} of the evaluation set"
            tokenizer = pl_module.tokenizer
            geometry = (tokenizer.codebook_size, tokenizer.downsampling)
            write_tokens(path, TokenFile(tokens.cpu(), height, width, done, self._fingerprint, *geometry))
