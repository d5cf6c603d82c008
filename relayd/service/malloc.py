"""Configures glibc to keep freed memory.

The relay allocates and frees thousands of frames of 8 KiB, and glibc returns the end of its heap to the kernel as soon
as 128 KiB of it are free. The next frames then fault every page in again, which costs more than forwarding them (some
6 µs per frame on a virtual machine). So the daemon keeps enough memory for a few results.
"""

import ctypes
import sys

#: Free memory kept at the end of the heap.
KEPT_BYTES = 16 * 1024 * 1024
#: Heap growth requested from the kernel at once, instead of 128 KiB.
STEP_BYTES = 1024 * 1024
#: Larger blocks are allocated from the kernel and returned to it; above the longest message.
LARGE_BYTES = 4 * 1024 * 1024
# malloc.h
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD = -1, -2, -3


def keep_freed_memory() -> bool:
    """Keep up to `KEPT_BYTES` of freed memory; False, without effect, if the C library is not glibc."""
    if sys.platform != "linux":
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except AttributeError:  # musl
        return False
    wanted = ((_M_MMAP_THRESHOLD, LARGE_BYTES), (_M_TRIM_THRESHOLD, KEPT_BYTES), (_M_TOP_PAD, STEP_BYTES))
    return all(mallopt(option, value) == 1 for option, value in wanted)
