"""What glibc's allocator does with freed memory (mallopt(3))."""

import ctypes

__all__ = ["keep_freed_memory"]

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
_MOST = 2**31 - 1


def keep_freed_memory() -> None:
    """Has this process keep what it frees, for the next step of the same size, instead of handing it to the kernel and back each time.

    Steps are then no longer at the mercy of page faults, which are slow on virtual machines; the process keeps its peak. Without glibc
    nothing happens.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        for threshold in (_TRIM_THRESHOLD, _MMAP_THRESHOLD):
            mallopt(threshold, _MOST)
