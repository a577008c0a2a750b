"""Tells the C library to keep memory that was freed.

So not every step faults the same pages in again.
"""

from __future__ import annotations

import ctypes
import os
from functools import cache

__all__ = ["keep_freed_memory"]

_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD = -1, -2, -3
_MEBIBYTE = 2**20


@cache
def keep_freed_memory() -> bool:
    """Set the heap's limits once in a process; whether it was done.

    Blocks below 32 MiB come from the heap, and up to 1 GiB of free heap is kept.

    Activations of a CPU step are a few MiB each. By default glibc maps and unmaps each of them, and
    the kernel clears their pages every time. Where the user has set MALLOC_ variables, or the C
    library is another one, nothing is done.
    """
    if any(name.startswith("MALLOC_") for name in os.environ) or "glibc" in os.environ.get(
        "GLIBC_TUNABLES", ""
    ):
        return False
    set_option = getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None
    if set_option is None:
        return False
    wanted = (
        (_MMAP_THRESHOLD, 32 * _MEBIBYTE),
        (_TRIM_THRESHOLD, 1024 * _MEBIBYTE),
        (_TOP_PAD, 16 * _MEBIBYTE),
    )
    return all([set_option(option, value) == 1 for option, value in wanted])
