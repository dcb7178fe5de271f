"""Freed memory stays with the process, so that its pages need not be faulted in again."""

import ctypes
import os
import sys

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # malloc.h
LARGEST_INT = 2**31 - 1


def keep_freed_memory() -> None:
    """Has glibc's allocator reuse the memory of large tensors; by default it returns each to the system when it is freed.

    At 256x256 pixels on a CPU, an evaluation without rFID spent a fifth of its time on the page faults that follow. Does nothing with
    another C library, or if GLIBC_TUNABLES is set. Only the command line calls this, since it owns its process.
    """
    if sys.platform != "linux" or "GLIBC_TUNABLES" in os.environ:
        return
    library = ctypes.CDLL(None)
    if hasattr(library, "gnu_get_libc_version"):
        library.mallopt(M_MMAP_MAX, 0)
        library.mallopt(M_TRIM_THRESHOLD, LARGEST_INT)
