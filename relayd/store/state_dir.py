"""The relay's state folder: private, and one daemon's alone."""

import contextlib
import errno
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

from relayd.store.base import StoreError, StoreInUse

LOCK_NAME = "relayd.lock"


def make_state_dir(state_dir: Path) -> None:
    """Make the folder if need be, for the owner alone; one that is there keeps its mode.

    Raises:
        StoreError: it cannot be made or written to.
    """
    try:
        state_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as fault:
        raise StoreError(f"cannot make the state folder {state_dir}: {fault.strerror}") from fault
    if not os.access(state_dir, os.W_OK | os.X_OK):
        raise StoreError(
            f"cannot write to the state folder {state_dir}: set its owner, or name another with --state-dir"
        )


def open_private(path: Path) -> int:
    """A descriptor of `path`, made with mode 0600 if need be; root gives it to the folder's owner.

    Without that, a `sudo relayd token create` would leave files that the daemon's own user cannot open.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    if os.geteuid() == 0:
        folder = path.parent.stat()
        os.fchown(descriptor, folder.st_uid, folder.st_gid)
    return descriptor


@contextlib.contextmanager
def lock_state_dir(state_dir: Path) -> Iterator[None]:
    """Hold the folder for this process alone; the lock ends with the process, however that ends.

    Raises:
        StoreInUse: another process holds it.
        StoreError: the lock cannot be made.
    """
    make_state_dir(state_dir)
    path = state_dir / LOCK_NAME
    try:
        descriptor = open_private(path)
    except OSError as fault:
        raise StoreError(f"cannot open {path}: {fault.strerror}") from fault
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as fault:
            if fault.errno not in (errno.EAGAIN, errno.EACCES):
                raise StoreError(f"cannot lock {path}: {fault.strerror}") from fault
            holder = os.pread(descriptor, 32, 0).decode(errors="replace").strip() or "unknown"
            raise StoreInUse(
                f"another relayd (pid {holder}) uses {state_dir}; stop it, or name another folder with --state-dir"
            ) from None
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
        yield
    finally:
        os.close(descriptor)
