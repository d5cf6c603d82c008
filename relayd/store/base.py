"""What a restart must not forget: records, the changes made to them, and the `Store` that takes changes."""

import abc
import contextlib
import errno
import fcntl
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import attrs

from protocol.wire.errors import ErrorCode
from protocol.wire.messages import ENDED_STATES, Submit
from protocol.wire.structs import AudioFormat, InputRule
from protocol.wire.validators import Value
from relayd.config.schema import SpaceConfig
from relayd.stats.histogram import DISK_S, Histogram

LOCK_NAME = "relayd.lock"
#: Entries that wait for a disk that takes nothing: a few minutes of a busy relay, some 50 MiB.
MAX_POSTED = 100_000


class StoreError(Exception):
    """The store cannot do what it was asked for; the text says what to do about it.

    Attributes:
        code: what to answer a peer with: `storage_full` or `internal`.
    """

    code = ErrorCode.INTERNAL


class StorageFull(StoreError):
    """No room is left on the disk; the store goes on, and takes changes again once there is room."""

    code = ErrorCode.STORAGE_FULL


class StoreInUse(StoreError):
    """Another process holds this state folder."""


@attrs.frozen(kw_only=True)
class SpaceRecord:
    """A space.

    Args:
        made_by: `config` for one that stands in relayd.toml, else `command`.
        params: JSON Schema that its last worker registered; empty before the first.
        inputs: input name -> what that worker takes under it.
        format: of the audio that worker makes.
        created_at: Unix seconds, as every time in a record.
    """

    name: str
    config: SpaceConfig = attrs.field(factory=SpaceConfig)
    paused: bool = False
    made_by: str = "command"
    engine: str = ""
    params: dict[str, Value] = attrs.field(factory=dict)
    inputs: Mapping[str, InputRule] = attrs.field(factory=dict)
    format: AudioFormat | None = None
    created_at: float = 0.0


@attrs.frozen(kw_only=True)
class TokenLimits:
    """What one token may have at once, over all spaces; None is no limit but the spaces' own."""

    max_queued: int | None = None
    max_running: int | None = None
    max_connections: int | None = None


@attrs.frozen(kw_only=True)
class TokenRecord:
    """A token, known by its SHA-256 alone.

    Args:
        token_id: names it in listings and for `revoke`; no secret.
        principal: who it speaks for.
        role: `client`, `worker` or `operator`.
        spaces: patterns of the spaces it may use; empty for all.
        sha256: of the token's ASCII text.
    """

    token_id: str
    principal: str
    role: str
    spaces: tuple[str, ...] = ()
    sha256: bytes = attrs.field(repr=False)
    limits: TokenLimits = attrs.field(factory=TokenLimits)
    created_at: float
    expires_at: float | None = None
    revoked_at: float | None = None

    def live(self, now: float) -> bool:
        """Whether it still opens the door at Unix second `now`."""
        return self.revoked_at is None and (self.expires_at is None or now < self.expires_at)


@attrs.frozen(kw_only=True)
class RequestRecord:
    """A request, without its inputs' bytes and its frames.

    Args:
        ticket: the order requests came in; rises by at least one for each.
        state: one of the states of DESIGN §2.
        has_output: whether a listener may have heard something of the current attempt.
        reproducible: as the scheduler's `Entry.reproducible`, of the current attempt.
        stopping: why it is being stopped for good while it runs; None where it is not.
        worker_id: where the current attempt runs; None where none does.
        code: why it failed.
    """

    request_id: str
    principal: str
    ticket: int
    submit: Submit
    state: str = "queued"
    attempt: int = 0
    losses: int = 0
    has_output: bool = False
    reproducible: str = ""
    stopping: str | None = None
    worker_id: str | None = None
    created_at: float
    ended_at: float | None = None
    code: str | None = None
    message: str | None = None


# -- changes ------------------------------------------------------------------------------------------------------


@attrs.frozen
class PutSpace:
    """The space is as the record says, whatever it was before."""

    record: SpaceRecord


@attrs.frozen
class DeleteSpace:
    """The space is gone; its requests are deleted one by one by who decides that."""

    name: str


@attrs.frozen
class PutToken:
    """The token is as the record says, whatever it was before."""

    record: TokenRecord


@attrs.frozen
class DeleteToken:
    """The token is forgotten."""

    token_id: str


@attrs.frozen
class PutRequest:
    """A request with its inputs' bytes (by name; never changed afterwards); one of the same id is replaced."""

    record: RequestRecord
    inputs: Mapping[str, bytes | bytearray] = attrs.field(factory=dict, repr=False)


@attrs.frozen(kw_only=True)
class UpdateRequest:
    """The part of a request that changes while it lives; passed over when the store knows no such request.

    With one of the ended states its inputs are dropped.
    """

    request_id: str
    state: str
    attempt: int
    losses: int
    has_output: bool = False
    reproducible: str = ""
    stopping: str | None = None
    worker_id: str | None = None
    ended_at: float | None = None
    code: str | None = None
    message: str | None = None

    @property
    def ends(self) -> bool:
        """Whether the request's inputs are needed no more."""
        return self.state in ENDED_STATES

    def fields(self) -> dict[str, Any]:
        """What changes, by the names of `RequestRecord`."""
        values = attrs.asdict(self, recurse=False)
        del values["request_id"]
        return values


@attrs.frozen
class DeleteRequest:
    """The request and its inputs are forgotten."""

    request_id: str


Change = PutSpace | DeleteSpace | PutToken | DeleteToken | PutRequest | UpdateRequest | DeleteRequest


@attrs.frozen(kw_only=True)
class Loaded:
    """All that the store holds, but the inputs' bytes.

    Args:
        requests: by ascending ticket.
        damaged: what could not be read, in words; it was left where it is.
    """

    spaces: tuple[SpaceRecord, ...] = ()
    tokens: tuple[TokenRecord, ...] = ()
    requests: tuple[RequestRecord, ...] = ()
    damaged: tuple[str, ...] = ()


class Store(abc.ABC):
    """Takes changes, in the order of the calls, whoever makes them: `commit` and `post` share one queue.

    Attributes:
        commit_s: seconds from the call of `commit` until it was durable; of none that failed.
        failed_commits: of calls.
        dropped: posts that were lost: over `MAX_POSTED`, refused for good, or still waiting at the end.
    """

    def __init__(self) -> None:
        self.commit_s = Histogram(DISK_S)
        self.failed_commits = 0
        self.dropped = 0

    @property
    def transactions(self) -> int:
        """Transactions written so far, each with one fsync."""
        return 0

    @property
    def queued(self) -> int:
        """Calls whose changes are not written yet."""
        return 0

    @abc.abstractmethod
    async def load(self) -> Loaded:
        """All that is held now; changes that are still queued are in it.

        Raises:
            StoreError: it cannot be read.
        """

    @abc.abstractmethod
    async def commit(self, *changes: Change) -> None:
        """Make `changes`, all of them or none; durable when this returns.

        Raises:
            StorageFull: no room; nothing of `changes` was made.
            StoreError: any other trouble of the disk; as above.

        Cancellation: the changes are made all the same, or fail unheard. They keep their place, so a change that
        takes them back, queued afterwards, is made after them.
        """

    @abc.abstractmethod
    def post(self, *changes: Change) -> None:
        """Have `changes` made soon, all of them or none; after a crash they may be missing.

        Never waits and never fails: posted changes are tried again until the disk takes them. While more than
        `MAX_POSTED` wait for a disk that takes nothing, new ones are dropped, counted and logged.
        """

    @abc.abstractmethod
    async def flush(self) -> None:
        """Return when all that was queued before is durable.

        Raises:
            StoreError: the disk does not take it.
        """

    @abc.abstractmethod
    async def read_input(self, request_id: str, name: str) -> bytes:
        """The bytes of an input of a committed request.

        Raises:
            KeyError: there is no such input (the request ended, or never was).
            StoreError: it cannot be read.
        """


# -- the state folder ---------------------------------------------------------------------------------------------


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
