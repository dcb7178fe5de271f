"""Commands keep the memory that they free, where the C library can."""

import os
import subprocess
import sys

import pytest

from gq_lightning.cli import memory

# page faults of a buffer of 32 MiB that is made and freed again and again, with every page touched
FAULTS = """
import ctypes, resource, sys
from gq_lightning.cli.memory import keep_freed_memory
if sys.argv[1] == "kept":
    keep_freed_memory()
library = ctypes.CDLL(None)
library.malloc.restype, library.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
faults = []
for _ in range(4):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    buffer = library.malloc(ctypes.c_size_t(2**25))
    ctypes.memset(buffer, 1, 2**25)
    library.free(buffer)
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(faults[-1])
"""


@pytest.mark.skipif("glibc" not in os.confstr("CS_GNU_LIBC_VERSION"), reason="another C library")
def test_pages_are_faulted_in_once() -> None:
    def faults(form: str, **environment: str) -> int:
        return int(subprocess.check_output([sys.executable, "-c", FAULTS, form], env={**os.environ, **environment}, text=True))

    assert faults("kept") < 100 < 2**25 // 4096 // 2 < faults("plain")
    assert faults("kept", GLIBC_TUNABLES="glibc.malloc.mmap_max=65536") > 2**25 // 4096 // 2  # the user's choice stands


def test_nothing_is_done_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory.sys, "platform", "darwin")
    monkeypatch.setattr(memory.ctypes, "CDLL", lambda name: pytest.fail("no library is opened"))
    memory.keep_freed_memory()


def test_a_library_without_mallopt(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory.sys, "platform", "linux")
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    monkeypatch.setattr(memory.ctypes, "CDLL", lambda name: object())
    memory.keep_freed_memory()
