"""What is reported of a process is its own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

PEAK = """
import torch
from gq_lightning.callbacks.watching.diagnostics import peak_memory
print(peak_memory(torch.device("cpu")))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no /proc")
def test_the_peak_is_not_that_of_the_process_which_started_this_one() -> None:
    ballast = b"x" * 5 * 2**28
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run([sys.executable, "-c", PEAK], check=True, capture_output=True, env=environment)
    assert 2**27 < float(done.stdout) < len(ballast)
