"""Configures glibc to keep freed memory for a while.

The relay allocates and frees thousands of frames of 8 KiB, and glibc returns the end of its heap to the kernel as soon
as 128 KiB of it are free. The next frames then fault every page in again, which costs more than forwarding them (some
6 µs per frame on a virtual machine). So the daemon keeps enough memory for a few results.

What is freed between blocks that live on would never return that way: after a burst of long results, the daemon would
stay as large as at its peak. Twice a minute it returns all of that: this takes milliseconds. If it forwards nothing, it
returns the end of the heap, too.
"""

import ctypes
import sys
from collections.abc import Callable

import trio

#: Free memory kept at the end of the heap.
KEPT_BYTES = 16 * 1024 * 1024
#: Heap growth requested from the kernel at once, instead of 128 KiB.
STEP_BYTES = 1024 * 1024
#: Larger blocks are allocated from the kernel and returned to it; above the longest message.
LARGE_BYTES = 4 * 1024 * 1024
#: Time between two returns of what is free within the heap.
RETURN_INTERVAL_S = 30.0
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


def return_freed_memory(kept_bytes: int = KEPT_BYTES) -> bool:
    """Return free memory to the kernel, but for the end of the heap; False if there is none, or no glibc."""
    try:
        trim = ctypes.CDLL(None).malloc_trim
    except AttributeError:  # musl, macOS
        return False
    return bool(trim(ctypes.c_size_t(kept_bytes)))


async def serve_memory_return(count_frames: Callable[[], int]) -> None:
    """Return freed memory regularly, until cancelled.

    Args:
        count_frames: returns how many frames came so far. While none come, nothing is kept.
    """
    before = 0
    while True:
        await trio.sleep(RETURN_INTERVAL_S)
        frames = count_frames()
        return_freed_memory(KEPT_BYTES if frames > before else 0)
        before = frames
