"""The relay's state folder: private, and locked by one process."""

import contextlib
import errno
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

from relayd.store.base import StorageFull, StoreError, StoreInUse

LOCK_NAME = "relayd.lock"


def file_error(fault: OSError, what: str, advice: str) -> StoreError:
    """Convert an error of the system, with what to do about it.

    Args:
        fault: the error.
        what: what failed, and for which file.
        advice: what to do if no other cause is known.
    """
    if fault.errno in (errno.ENOSPC, errno.EDQUOT):
        return StorageFull(f"{what}: no space left on its disk: free some space there")
    if fault.errno == errno.EROFS:
        advice = "make its disk writable, or choose another folder with --state-dir"
    return StoreError(f"{what}: {fault.strerror or fault}; {advice}")


def make_state_dir(state_dir: Path) -> None:
    """Create the folder if necessary, private to the owner; an existing folder keeps its mode.

    Raises:
        StoreError: the folder cannot be created or is not writable.
    """
    try:
        state_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as fault:
        raise file_error(
            fault, f"cannot create the state folder {state_dir}", "choose another with --state-dir"
        ) from fault
    if not os.access(state_dir, os.W_OK | os.X_OK):
        raise StoreError(
            f"cannot write to the state folder {state_dir}: correct its owner, or choose another with --state-dir"
        )


def open_private(path: Path) -> int:
    """Open `path`, and create it with mode 0600 if necessary; as root, make the folder's owner its owner.

    Otherwise `sudo relayd token create` would leave files that the daemon's user cannot open.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    if os.geteuid() == 0:
        folder = path.parent.stat()
        os.fchown(descriptor, folder.st_uid, folder.st_gid)
    return descriptor


@contextlib.contextmanager
def lock_state_dir(state_dir: Path) -> Iterator[None]:
    """Lock the folder for this process; the kernel releases the lock when the process ends.

    Raises:
        StoreInUse: another process holds the lock.
        StoreError: the lock cannot be created.
    """
    make_state_dir(state_dir)
    path = state_dir / LOCK_NAME
    try:
        descriptor = open_private(path)
    except OSError as fault:
        raise file_error(fault, f"cannot open {path}", "it must belong to the daemon's user") from fault
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as fault:
            if fault.errno not in (errno.EAGAIN, errno.EACCES):
                advice = "choose a folder on a local disk with --state-dir"
                raise file_error(fault, f"cannot lock {path}", advice) from fault
            pid = os.pread(descriptor, 32, 0).decode(errors="replace").strip() or "unknown"
            holder = f"another relayd (pid {pid})"
            raise StoreInUse(
                f"{holder} uses {state_dir}; stop it, choose another folder with --state-dir, or take over when it "
                "ends with relayd serve --wait",
                holder,
            ) from None
        with contextlib.suppress(OSError):  # only for people; the lock holds without it
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
        yield
    finally:
        os.close(descriptor)
