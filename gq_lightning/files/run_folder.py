"""RunFolder: the names of the files in runs/NAME, and a lock on the folder while a fit writes there."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from gq_lightning.errors import UserError
from gq_lightning.files.whole import lock

# locks held by this process; a forked worker closes them, since it may outlive the process by seconds
_claims: list[BinaryIO] = []
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=lambda: [claim.close() for claim in _claims])


class RunFolder:
    """The folder RUNS/NAME, which is the trainer's `default_root_dir` with any logger. A folder with a `config` is a run.

    `fit` writes `checkpoints`, `broken_pictures` and `non_finite`, and at its end the `tokenizer`, its `metrics` and `reconstructions`;
    `prior fit` writes the `prior` with its tokenizer, and `samples`; `predict` writes `tokens`.

    Other files in it are left alone, even when a run is overwritten: `lock`, `log.txt`, `command.txt` and `details.json` of the
    experiments, and files of loggers that are not Lightning's.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = path = Path(path)
        self.config = path / "config.yaml"
        self.checkpoints = path / "checkpoints"
        self.best, self.last = self.checkpoints / "best.ckpt", self.checkpoints / "last.ckpt"
        self.tokenizer = path / "tokenizer"
        self.metrics = path / "metrics.json"
        self.reconstructions = path / "reconstructions.png"
        self.prior = path / "prior"
        self.samples = path / "samples.png"
        self.tokens = path / "tokens"
        self.broken_pictures = path / "broken_pictures.txt"
        self.non_finite = path / "non_finite"

    @contextmanager
    def claimed(self, go_on: bool, overwrite: bool) -> Iterator[None]:
        """Locks the folder for a fit. Two fits in one folder would mix their checkpoints and curves.

        Rank 0 holds the lock for all ranks. The kernel releases it when the process ends for any reason. An existing run is accepted if the
        fit goes on from it or overwrites it, for which `clear` removes it once the new one can start.

        Raises:
            UserError: another process holds the lock, a run exists that is neither resumed nor overwritten, or the folder is not writable.
        """
        if not _is_rank_zero():
            yield
            return
        claim = self._claim()
        _claims.append(claim)
        try:
            if not go_on and not overwrite and self.config.exists():
                choices = "--ckpt_path last resumes it, --overwrite true replaces it, --name chooses another"
                raise UserError(f"{self.path}: a run exists there already; {choices}")
            yield
        finally:
            with suppress(OSError):
                os.unlink(claim.name)
            _claims.remove(claim)
            claim.close()
            with suppress(OSError):
                self.path.rmdir()  # if fit has written nothing

    def _claim(self) -> BinaryIO:
        # not `lock`, which the experiments' parent process holds
        path = self.path / ".claim"
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            file = open(path, "ab")  # noqa: SIM115
        except OSError as error:
            raise UserError(f"{self.path}: nothing can be written there ({error.strerror}): choose another --runs or --name") from error
        with suppress(OSError):  # not every file system has locks
            if not lock(file):
                file.close()
                raise UserError(f"{self.path}: another fit is writing there: wait until it ends, or choose another --name")
        return file

    def clear(self) -> None:
        """Removes the run, including the files of Lightning's loggers. Rank 0 does so for all ranks. Raises UserError."""
        if not _is_rank_zero():
            return
        files = [self.config, self.metrics, self.reconstructions, self.samples, self.broken_pictures, self.path / "hparams.yaml"]
        folders = [self.checkpoints, self.tokenizer, self.prior, self.tokens, self.non_finite]
        # a folder may be a link to a larger disk: keep the link, remove the content
        inside = [path for folder in folders if folder.is_symlink() and folder.is_dir() for path in folder.iterdir()]
        try:
            # the config last, so that a partly removed folder still counts as a run
            logged = [path for pattern in ("events.out.tfevents.*", "version_[0-9]*", "metrics.csv") for path in self.path.glob(pattern)]
            for path in [*logged, *inside, *folders, *reversed(files)]:
                if path.is_dir() and not path.is_symlink():
                    shutil.rmtree(path)
                elif path not in folders:
                    path.unlink(missing_ok=True)
        except OSError as error:
            raise UserError(
                f"{self.path}: the run there cannot be removed ({error.filename}: {error.strerror}): remove it manually"
            ) from error


def _is_rank_zero() -> bool:
    """Whether this process has global rank 0, by its launcher's environment variables, since there is no process group yet."""
    if "RANK" in os.environ:
        return os.environ["RANK"] == "0"
    # Lightning's launcher sets NODE_RANK, and LOCAL_RANK in the processes that it starts; srun sets SLURM_PROCID
    rank = os.environ.get("LOCAL_RANK", os.environ.get("SLURM_PROCID", "0"))
    return rank == "0" and os.environ.get("NODE_RANK", os.environ.get("GROUP_RANK", "0")) == "0"
