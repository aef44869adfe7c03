"""Memory that the process keeps for its next tensors instead of handing it back."""

import ctypes
import functools
import sys

_TRIM_THRESHOLD = -1
_MMAP_THRESHOLD = -3
_LARGEST_MMAP_THRESHOLD = 32 * 1024**2
_NEVER_TRIM = 2**31 - 1


@functools.cache
def keep_freed_memory() -> bool:
    """Tell glibc's allocator to keep what tensors free; True where it took the setting.

    A curvature product frees and takes the same tens of megabytes again and again. By default
    glibc returns them to the system each time and every page then has to be faulted in anew,
    which was a fifth of the time of a product on a small convolutional network
    (docs/results/ihvp.md).
    The process keeps its peak of memory until it ends. Elsewhere than on Linux with glibc, and for
    tensors above 32 MiB each, nothing changes.

    Source:
        mallopt(3), M_TRIM_THRESHOLD and M_MMAP_THRESHOLD.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except AttributeError:  # another C library
        return False
    taken = mallopt(_MMAP_THRESHOLD, _LARGEST_MMAP_THRESHOLD)
    return bool(taken and mallopt(_TRIM_THRESHOLD, _NEVER_TRIM))
