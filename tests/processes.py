"""Ranks as processes that begin with their imports done: forked from a server that has made these imports and nothing else."""

import multiprocessing
import os
import runpy
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import distributed

PACKAGE = Path(__file__).parents[1]
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["lightning.pytorch", "gq_lightning.cli.training", "processes"])


def on_ranks(file: str, name: str, folder: Path, ranks: int, *arguments: Any, timeout: float = 300) -> str:
    """Calls the function `name` of a test file with (folder, rank, ranks, *arguments) on ranks that form a process group (gloo), or in one
    process without a group. Returns what they wrote to stderr. Raises AssertionError with it if one of them failed."""
    (folder / "store").unlink(missing_ok=True)
    environment = {**os.environ, "PYTHONPATH": str(PACKAGE), "OMP_NUM_THREADS": "1"}
    environment.pop("PL_GLOBAL_SEED", None)
    started = [
        _context.Process(target=_rank, args=(file, name, folder, rank, ranks, arguments, {**environment, "LOCAL_RANK": str(rank)}))
        for rank in range(ranks)
    ]
    for process in started:
        process.start()
    try:
        for process in started:
            process.join(timeout)
        codes = [process.exitcode for process in started]
    finally:
        for process in started:
            process.kill()
    errors = "\n".join((folder / f"stderr{rank}").read_text()[-3000:] for rank in range(ranks))
    assert codes == [0] * ranks, errors
    return errors


def _rank(file: str, name: str, folder: Path, rank: int, ranks: int, arguments: tuple[Any, ...], environment: dict[str, str]) -> None:
    for number, path in ((1, os.devnull), (2, folder / f"stderr{rank}")):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    os.environ.clear()
    os.environ.update(environment)
    sys.path.insert(0, str(PACKAGE))
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    if ranks > 1:
        # Lightning takes over a process group that is there already; this one needs no port
        distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=ranks)
    runpy.run_path(file)[name](folder, rank, ranks, *arguments)
    if ranks > 1:
        distributed.destroy_process_group()
