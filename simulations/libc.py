"""What a process asks of the C library that Python has no words for. No name and no number here comes from anywhere else."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
"""M_TRIM_THRESHOLD and M_MMAP_THRESHOLD of mallopt(3)."""
_DIE_WITH_PARENT = 1
"""PR_SET_PDEATHSIG of prctl(2)."""
_KEPT_BYTES = 64 * 2**20
_LARGE_BYTES = 32 * 2**20  # as large as it may be


def keep_memory(*, trim: bool = False) -> None:
    """Let this process keep what it frees. A step's tensors are megabytes that come and go: to give their pages back to the system, and
    to get them cleared again, took a sixth of the time.

    Args:
        trim: give back, once, what is free now.
    """
    with contextlib.suppress(OSError, AttributeError):  # another system's library
        library = ctypes.CDLL(None)
        library.mallopt(_TRIM_THRESHOLD, _KEPT_BYTES)
        library.mallopt(_MMAP_THRESHOLD, _LARGE_BYTES)
        if trim:
            library.malloc_trim(0)


def die_with(parent: int) -> None:
    """Have this process, a child of `parent`, killed when that ends, at once, whatever it does then. Linux."""
    ctypes.CDLL(None).prctl(_DIE_WITH_PARENT, signal.SIGKILL)
    if os.getppid() != parent:  # it ended before we asked
        os._exit(0)
