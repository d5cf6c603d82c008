"""The last resort of a daemon that is leaving: whatever hangs then, the process ends, and says where it hung.

A shutdown waits for other code (threads, shielded clean-up, the interpreter's own end), and after a `MemoryError` any
of it may fail to happen. The kernel's timer needs neither memory, nor a thread, nor the event loop.
"""

import faulthandler
import signal


def prepare_exit_deadline() -> None:
    """Have SIGALRM print where each thread waits, and end the process. Call it early, while there is memory."""
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, (signal.SIGALRM,))
    faulthandler.register(signal.SIGALRM, all_threads=True, chain=True)


def end_within(limit_s: float) -> None:
    """End this process by SIGALRM unless it ends by itself within `limit_s`; only the first call counts."""
    if not signal.getitimer(signal.ITIMER_REAL)[0]:
        signal.setitimer(signal.ITIMER_REAL, limit_s)
