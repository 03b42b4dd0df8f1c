"""How this process handles freed memory, and how it says that there is none."""

from __future__ import annotations

import ctypes
import sys

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # M_TRIM_THRESHOLD and M_MMAP_THRESHOLD of glibc's malloc.h
_KEEP_BYTES = 2**30
_OF_THE_CPU = "DefaultCPUAllocator: "  # in torch's RuntimeError


def keep_freed_memory() -> bool:
    """Tells glibc to reuse freed blocks instead of handing them back to the system.

    Training small networks frees and takes the same few hundred kilobytes at every step; by default each time costs a
    round trip to the kernel and a page fault per 4 kB, about a tenth of a LeNet-5 step. The process keeps what it once
    needed at its peak.

    Returns:
        Whether it was done; other C libraries are left alone.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    return bool(mallopt(_MMAP_THRESHOLD, _KEEP_BYTES) and mallopt(_TRIM_THRESHOLD, _KEEP_BYTES))


def host_lacks_memory(error: Exception) -> bool:
    """Returns whether this is how Python or torch says that the host, or its card, has no memory left."""
    import torch

    of_the_cpu = isinstance(error, RuntimeError) and _OF_THE_CPU in str(error)
    return of_the_cpu or isinstance(error, MemoryError | torch.OutOfMemoryError)
