"""What lies in the folder of a run, runs/NAME, by what name; and to whom the folder belongs while a fit writes there."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from gq_lightning.errors import UserError
from gq_lightning.files.whole import lock

# claims of this process, which a worker forked from it does not share: it may outlive it by seconds
_claims: list[BinaryIO] = []
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=lambda: [claim.close() for claim in _claims])


class RunFolder:
    """The folder RUNS/NAME, which is the trainer's `default_root_dir`, whatever its logger is.

    Other files that lie there are left alone, in a run that is overwritten, too: `lock`, `log.txt`, `command.txt` and `details.json` of
    the experiments, and what a logger writes elsewhere than Lightning's write it.

    Attributes:
        config: all arguments of the fit. Where it is, there is a run.
        checkpoints: their folder, with `best` and `last`.
        tokenizer: a tokenizer's folder, written when fit ends, as are `metrics` and the picture `reconstructions`.
        prior: a prior's folder, with its tokenizer's, and a picture of `samples`: what `prior fit` writes in place of those.
        tokens: what `predict` writes.
        broken_pictures: the names of those that the training went without.
        non_finite: batches after which a loss was not finite.
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
        """Holds the folder for a fit. Two in one folder would mix their checkpoints and curves.

        Rank 0 holds it for all ranks. The kernel gives it free when the process ends, however it does.

        Args:
            go_on: a run that is there is to be resumed.
            overwrite: else one that is there is to be removed.

        Raises:
            UserError: another process holds it, there is a run that is neither resumed nor overwritten, or it cannot be written.
        """
        if not _is_rank_zero():
            yield
            return
        claim = self._claim()
        _claims.append(claim)
        try:
            if not go_on and not overwrite and self.config.exists():
                choices = "--ckpt_path last resumes it, --overwrite true replaces it, --name chooses another"
                raise UserError(f"{self.path}: a run is there already; {choices}")
            if not go_on and overwrite:
                self.clear()
            yield
        finally:
            with suppress(OSError):
                os.unlink(claim.name)
            _claims.remove(claim)
            claim.close()
            with suppress(OSError):
                self.path.rmdir()  # of a fit that has written nothing

    def _claim(self) -> BinaryIO:
        # not `lock`, which the experiments hold from outside, around this process
        path = self.path / ".claim"
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            file = open(path, "ab")  # noqa: SIM115
        except OSError as error:
            raise UserError(f"{self.path}: nothing can be written there ({error.strerror}): choose another --runs or --name") from error
        with suppress(OSError):  # where a file system has no locks, care is the user's
            if not lock(file):
                file.close()
                raise UserError(f"{self.path}: another fit is writing there: wait for its end, or choose another --name")
        return file

    def clear(self) -> None:
        """Removes all of the run that is there, what Lightning's loggers have left included. Raises UserError."""
        files = [self.config, self.metrics, self.reconstructions, self.samples, self.broken_pictures, self.path / "hparams.yaml"]
        folders = [self.checkpoints, self.tokenizer, self.prior, self.tokens, self.non_finite]
        # a folder may be a link to a larger disk, which stays
        inside = [path for folder in folders if folder.is_symlink() and folder.is_dir() for path in folder.iterdir()]
        try:
            # the config last: until all is gone there is a run
            logged = [path for pattern in ("events.out.tfevents.*", "version_[0-9]*", "metrics.csv") for path in self.path.glob(pattern)]
            for path in [*logged, *inside, *folders, *reversed(files)]:
                if path.is_dir() and not path.is_symlink():
                    shutil.rmtree(path)
                elif path not in folders:
                    path.unlink(missing_ok=True)
        except OSError as error:
            raise UserError(
                f"{self.path}: the run there cannot be removed ({error.filename}: {error.strerror}): remove it by hand"
            ) from error


def _is_rank_zero() -> bool:
    """Whether this process is rank 0 of all, by the environment that its launcher gave it: before there is a process group."""
    if "RANK" in os.environ:
        return os.environ["RANK"] == "0"
    # Lightning's launcher counts nodes in NODE_RANK and the processes that it begins in LOCAL_RANK; srun counts processes in SLURM_PROCID
    rank = os.environ.get("LOCAL_RANK", os.environ.get("SLURM_PROCID", "0"))
    return rank == "0" and os.environ.get("NODE_RANK", os.environ.get("GROUP_RANK", "0")) == "0"
