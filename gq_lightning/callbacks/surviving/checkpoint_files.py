"""Writes checkpoints atomically, even if the process is killed or the disk is full."""

from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io import CheckpointIO, TorchCheckpointIO

from gq_lightning.errors import UserError
from gq_lightning.files import whole_file
from gq_lightning.tokenizer.checkpoint_file import read_checkpoint


class CheckpointFiles(CheckpointIO):
    """Writes to a temporary name in the same folder, waits for the disk, and renames.

    Lightning's own plugin writes to the system's temporary folder and moves the file. On another file system the move is a copy, and a
    process killed during it leaves half a checkpoint in place of the last good one.
    """

    def __init__(self) -> None:
        self._io = TorchCheckpointIO()

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Raises UserError if the file cannot be written; an existing file then stays unchanged."""
        if "://" in str(path):
            self._io.save_checkpoint(checkpoint, path, storage_options)
            return
        path = Path(path)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with whole_file(path) as file:
                torch.save(checkpoint, file)
        except (OSError, RuntimeError) as error:
            # after an OSError, torch's writer raises its own error about the unfinished file
            reason = error if isinstance(error, OSError) else error.__context__
            if not isinstance(reason, OSError):
                raise
            kept = "the one before it is kept" if path.exists() else "there is none before it"
            raise UserError(f"{path}: the checkpoint could not be written ({reason.strerror or reason}), {kept}") from error

    def load_checkpoint(self, path: str | Path, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        """Tensors and plain data. A pickle that would run code is refused, unless `weights_only` is explicitly False. Raises UserError if
        the file is damaged, is not a checkpoint, or holds other objects, and FileNotFoundError."""
        location = map_location or (lambda storage, location: storage)
        if "://" in str(path):
            return self._io.load_checkpoint(path, location, weights_only is not False)
        return read_checkpoint(path, map_location=location, weights_only=weights_only is not False)

    def remove_checkpoint(self, path: str | Path) -> None:
        """Removes a checkpoint file. Lightning's own method would remove folders, and any path that a checkpoint lists among the best."""
        if "://" in str(path):
            self._io.remove_checkpoint(path)
        elif ".." not in Path(path).parts and Path(path).suffix == ".ckpt" and Path(path).is_file():
            Path(path).unlink()
