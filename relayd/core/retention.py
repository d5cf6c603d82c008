"""What becomes of results: made safe when a request ends, kept within memory and disk, and forgotten in the end.

An end that a worker tells is passed on at once, and acknowledged when the frames are in a file and the end is in the
store: until then the worker has all of it. An end of the relay's own, which nobody else knows, is stored before it is
told. Where the disk takes nothing, results stay in memory and ends are acknowledged all the same; only a request
whose frames neither fit in memory nor on the disk fails.
"""

import functools

import attrs
import structlog
import trio

from protocol.wire.codec import encode
from protocol.wire.errors import ErrorCode
from protocol.wire.frames import Cancelled, Failed
from relayd.core.interfaces import ResultsOwner
from relayd.frames.frame_file import Contents, ResultFolder
from relayd.frames.frame_log import FrameLog, MemoryBudget
from relayd.frames.spool import NoRoom, Spool
from relayd.requests.request import Request
from relayd.scheduling.model import State
from relayd.store.base import StoreError
from relayd.store.records import DeleteRequest

log = structlog.get_logger("relayd.results")

FOLDER_NAME = "results"
#: How often ended requests are looked over, and results that the disk did not take are tried again.
REAP_INTERVAL_S = 5.0
#: Ended requests that are remembered at most; the oldest go first. One costs about 3 KiB without its frames.
MAX_ENDED = 10_000
#: MemoryBudget is relieved down to this part of what it may be, so that not every frame asks for more.
LOW_WATER = 7 / 8
#: Before another look where nothing could be let go of.
RETRY_S = 0.25


@attrs.define(eq=False)
class Retention:
    """Every request's frames, after they have come. Without a spool (`store = "memory"`) they lie in memory alone."""

    relay: ResultsOwner
    memory: MemoryBudget = attrs.field(init=False)
    spool: Spool | None = None
    #: Ended requests that are not safe yet; their workers have not been told to forget them.
    unfinalized: set[Request] = attrs.field(factory=set)
    #: Ended requests in order of their ends: with a file; with a file, and in memory still; in memory alone.
    sealed: dict[Request, None] = attrs.field(factory=dict)
    _doubled: dict[Request, None] = attrs.field(factory=dict)
    unsealed: dict[Request, None] = attrs.field(factory=dict)
    _pressed: trio.Event = attrs.field(factory=trio.Event)
    _concluded: trio.Event = attrs.field(factory=trio.Event)
    _full: bool = False

    def __attrs_post_init__(self) -> None:
        self.memory = MemoryBudget(self.relay.config.results.memory_bytes, on_exceeded=lambda: self._pressed.set())

    async def open(self, ended: dict[str, float]) -> dict[str, Contents]:
        """Begin to use files, where the store outlives the daemon; what whole results there are.

        Args:
            ended: request id -> when it was made (Unix seconds), of all that have ended; other files are deleted.

        Raises:
            StoreError: the folder of the files cannot be used.
        """
        config = self.relay.config
        if config.store == "memory":
            return {}
        path = config.state_dir / FOLDER_NAME
        try:
            folder = await trio.to_thread.run_sync(ResultFolder, path)
            self.spool = Spool(
                folder, self.relay.nursery, config.results.disk_bytes, make_room=self._make_room, on_broken=self._broken
            )
            return await self.spool.sweep(ended)
        except OSError as fault:
            raise StoreError(f"cannot use {path}: {fault.strerror}; it must belong to the daemon's user") from fault

    @property
    def disk_bytes(self) -> int:
        """Of all files."""
        return self.spool.used_bytes if self.spool is not None else 0

    def track(self, request: Request) -> None:
        """Take the log of a request in, before anything is in memory of it."""
        frames = request.log
        frames.request_id, frames.created_unix = request.request_id, request.created_unix
        frames.memory = self.memory
        self.memory.add(frames.memory_bytes)
        if self.spool is not None:
            frames.fetch = self.spool.fetch
            if frames.file_part.sealed:
                self.sealed[request] = None

    def forget(self, request: Request) -> None:
        """Let go of everything of a request that nobody reads."""
        for kept in (self.sealed, self._doubled, self.unsealed):
            kept.pop(request, None)
        self._drop(request.log)

    def _drop(self, frames: FrameLog, last_frame: bytes | None = None) -> None:
        frames.drop(last_frame)
        if self.spool is not None and self.spool.has_file(frames):
            self.relay.nursery.start_soon(self.spool.remove, frames)

    # -- an end

    def finalize(self, request: Request, last_frame: bytes | None) -> None:
        """Make an end safe, and acknowledge it then.

        Args:
            request: it was accepted, and has ended.
            last_frame: the relay's own; None where the log has the worker's already.
        """
        self.unfinalized.add(request)
        self.relay.nursery.start_soon(functools.partial(self._finalize, request, last_frame))

    async def _finalize(self, request: Request, last_frame: bytes | None) -> None:
        try:
            if last_frame is None:
                await self._seal(request)
                await self._record(request)
            else:
                await self._record(request)
                request.log.append(last_frame, ends=True)
                if request.log.next_seq > 1 or request.details:  # else its record says as much
                    await self._seal(request)
            if request.pending_ack is not None:
                self.relay.acknowledge(*request.pending_ack)
        except Exception:
            log.exception("internal error in request", request_id=request.request_id)
        finally:
            request.pending_ack = None
            self.unfinalized.discard(request)
            if not self.unfinalized:
                self._concluded.set()
                self._concluded = trio.Event()

    async def wait_finalized(self) -> None:
        """Wait until every end is safe."""
        while self.unfinalized:
            await self._concluded.wait()

    async def _record(self, request: Request) -> None:
        update = self.relay.status_update(request)
        try:
            await self.relay.store.commit(update)
        except StoreError as fault:
            log.error("request end not stored, retrying", request_id=request.request_id, why=str(fault))
            self.relay.store.post(update)

    async def _seal(self, request: Request) -> bool:
        """Whether the disk took the result; else it stays in memory."""
        try:
            if self.spool is not None:
                await self.spool.seal(request.log)
        except NoRoom as fault:
            self._log_full(fault)
        if not request.log.is_complete or self.relay.requests.get(request.request_id) is not request:
            return False
        self.unsealed.pop(request, None)
        if request.log.file_part.sealed:
            self._log_full(None)
            self.sealed[request] = self._doubled[request] = None
            return True
        self.unsealed[request] = None
        return False

    def _log_full(self, fault: NoRoom | None) -> None:
        if self._full != (fault is not None):
            self._full = fault is not None
            if fault is not None:
                log.error("the disk takes no results; they stay in memory", why=str(fault))
            else:
                log.info("the disk takes results again")

    # -- memory

    async def serve_memory(self) -> None:
        """Keep what lies in memory within its bounds, until cancelled."""
        while True:
            if not self.memory.over:
                self._pressed = trio.Event()
                await self._pressed.wait()
            try:
                await self._free_memory()
            except Exception:
                log.exception("internal error while freeing memory")
            if self.memory.over:
                await trio.sleep(RETRY_S)

    async def _free_memory(self) -> None:
        enough = self.memory.limit_bytes * LOW_WATER
        while self._doubled and self.memory.held_bytes > enough:
            request = next(iter(self._doubled))
            del self._doubled[request]
            request.log.release_written()
        while self.spool is not None and self.memory.held_bytes > enough:
            largest = max(self.relay.live_requests(), key=lambda request: request.log.memory_bytes, default=None)
            if largest is None or not largest.log.memory_bytes:
                break
            try:
                await self.spool.spill(largest.log)
            except NoRoom as fault:
                self._log_full(fault)
                if self.memory.over and not self._drop_unsealed() and largest.live:
                    self._fail_full(largest, fault)
                if not self.memory.over:
                    return
        while self.memory.over and self._drop_unsealed():
            pass

    def _drop_unsealed(self) -> bool:
        """Let go of the oldest result that nobody reads and no file has; False if there is none."""
        request = next((request for request in self.unsealed if not request.log.readers), None)
        if request is not None:
            self._evict(request)
        return request is not None

    def _fail_full(self, request: Request, fault: NoRoom) -> None:
        log.error("no room for the frames of a request", request_id=request.request_id, why=str(fault))
        words = "the relay has no room left for its frames, neither in memory nor on disk; try again later"
        self.relay.fail(request, ErrorCode.STORAGE_FULL, words)
        self._drop(request.log)

    # -- what is kept of an ended request

    def _evict(self, request: Request) -> None:
        """Let go of an ended request's frames; how it failed, or that it was cancelled, is told for longer."""
        for kept in (self.sealed, self._doubled, self.unsealed):
            kept.pop(request, None)
        if request.entry.state is State.COMPLETED:
            request.has_result = False
            self._drop(request.log)
        else:
            self._drop(request.log, make_final_frame(request))

    async def _make_room(self, more: int) -> bool:
        """As `Spool.make_room`: the oldest results go first, but for those that are being read."""
        assert self.spool is not None
        for request in list(self.sealed):
            if self.spool.used_bytes + more <= self.spool.disk_bytes:
                break
            if request in self.sealed and not request.log.readers:
                self._evict(request)
                await self.spool.remove(request.log)  # begun already, but to be waited for
        return self.spool.used_bytes + more <= self.spool.disk_bytes

    def _broken(self, frames: FrameLog, why: str) -> None:
        """As `Spool.on_broken`."""
        request = self.relay.requests.get(frames.request_id)
        if request is None or request.log is not frames:
            return
        log.error("frames cannot be read back", request_id=request.request_id, why=why)
        if request.live:
            words = "the relay cannot read its frames back from the disk; see the relay's log"
            self.relay.fail(request, ErrorCode.INTERNAL, words)
            self._drop(frames)
            return
        for reader in tuple(frames.readers):
            reader.close()
            reader.sink.on_read_error(reader)
        if frames.ended:
            self._evict(request)

    async def serve_retention(self) -> None:
        """Forget ended requests after `results.retain_s`, and try again what the disk did not take; until cancelled."""
        while True:
            await trio.sleep(REAP_INTERVAL_S)
            try:
                await self._keep_limits()
                self._reap(trio.current_time())
                for request in list(self.unsealed):
                    if self.spool is None or (request in self.unsealed and not await self._seal(request)):
                        break
            except Exception:
                log.exception("internal error in retention loop")

    async def _keep_limits(self) -> None:
        """The settings may have been read anew."""
        settings = self.relay.config.results
        self.memory.limit_bytes = settings.memory_bytes
        self.memory.add(0)
        if self.spool is not None:
            self.spool.disk_bytes = settings.disk_bytes
            await self._make_room(0)

    def _reap(self, now: float) -> None:
        relay = self.relay
        ended = [r for r in relay.requests.values() if r.ended_at is not None and r not in self.unfinalized]
        ended = [request for request in ended if not request.log.readers]
        ended.sort(key=lambda request: request.ended_at or 0.0)
        too_many = len(ended) - MAX_ENDED
        for number, request in enumerate(ended):
            if number < too_many or now - (request.ended_at or 0.0) >= relay.config.results.retain_s:
                relay.remove_request(request)
                relay.store.post(DeleteRequest(request.request_id))


def make_final_frame(request: Request) -> bytes:
    """The last frame of a request that failed or was cancelled, from what is known of it without its frames."""
    request_id, attempt, seq = request.request_id, request.entry.attempt, max(0, request.log.next_seq - 1)
    words = request.message or ""
    if request.entry.state is State.CANCELLED:
        return encode(Cancelled(request_id=request_id, attempt=attempt, seq=seq, reason=words))
    code = request.code or ErrorCode.INTERNAL.value
    retryable = any(code == known and known.retryable for known in ErrorCode)
    return encode(
        Failed(request_id=request_id, attempt=attempt, seq=seq, code=code, message=words, retryable=retryable)
    )
