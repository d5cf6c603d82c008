"""What the C library does with memory that was freed.

Frames come and go by the thousand, 8 KiB each, and glibc gives the end of its heap back to the kernel as soon as
128 KiB of it are free: the next frames then fault every page in anew, which costs more than passing them on (some
6 µs a frame on a virtual machine). So a daemon keeps what a few results take.
"""

import ctypes
import sys

#: Free memory at the end of the heap that is kept.
KEPT_BYTES = 16 * 1024 * 1024
#: Asked of the kernel at once, in place of 128 KiB.
STEP_BYTES = 1024 * 1024
#: Larger blocks come from the kernel and go back to it: above the longest message.
LARGE_BYTES = 4 * 1024 * 1024
# malloc.h
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD = -1, -2, -3


def keep_freed_memory() -> bool:
    """Have up to `KEPT_BYTES` of freed memory kept; False where the C library is not glibc, and does as it likes."""
    if sys.platform != "linux":
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except AttributeError:  # musl
        return False
    wanted = ((_M_MMAP_THRESHOLD, LARGE_BYTES), (_M_TRIM_THRESHOLD, KEPT_BYTES), (_M_TOP_PAD, STEP_BYTES))
    return all(mallopt(option, value) == 1 for option, value in wanted)
