"""Where the frames of requests are kept, within memory and disk, and when ended requests are forgotten.

When a request ends, `relayd.core.finalize` has its frames written into a file. Where the disk takes nothing, results
stay in memory; only a request whose frames fit neither in memory nor on the disk fails.
"""

from enum import Enum

import attrs
import structlog
import trio

from protocol.wire.errors import ErrorCode
from relayd.core.interfaces import ResultsOwner
from relayd.frames.frame_file import Contents, ResultFolder
from relayd.frames.frame_log import FrameLog, MemoryBudget
from relayd.frames.spool import NoRoom, Spool
from relayd.requests.final_frame import make_final_frame
from relayd.requests.request import Request
from relayd.scheduling.model import State
from relayd.store.base import StoreError
from relayd.store.records import DeleteRequest

log = structlog.get_logger("relayd.results")

FOLDER_NAME = "results"
#: How often ended requests are checked, and results that the disk did not take are written again.
REAP_INTERVAL_S = 5.0
#: Ended requests that are remembered at most; the oldest go first. One costs about 3 KiB without its frames.
MAX_ENDED = 10_000
#: Memory is freed down to this part of its limit, so that not every frame causes another round.
LOW_WATER = 7 / 8
#: Before another round where nothing could be freed.
RETRY_S = 0.25


class Stored(Enum):
    """Where the frames of an ended request are."""

    FILE = "in a file"
    BOTH = "in a file, and still in memory"
    MEMORY = "in memory alone"


@attrs.define(eq=False)
class Retention:
    """The frames of all requests. Without a spool (`store = "memory"`) they are in memory alone."""

    relay: ResultsOwner
    memory: MemoryBudget = attrs.field(init=False)
    spool: Spool | None = None
    #: Where the frames of ended requests are stored, in the order in which that was last decided.
    stored: dict[Request, Stored] = attrs.field(factory=dict)
    _pressed: trio.Event = attrs.field(factory=trio.Event)
    _full: bool = False

    def __attrs_post_init__(self) -> None:
        self.memory = MemoryBudget(self.relay.config.results.memory_bytes, on_exceeded=lambda: self._pressed.set())

    async def open(self, ended: dict[str, float]) -> dict[str, Contents]:
        """Begin to use files, where the store outlives the daemon; returns the complete results there.

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
        """Size of all files."""
        return self.spool.used_bytes if self.spool is not None else 0

    def track(self, request: Request) -> None:
        """Account for the log of a request, before it holds anything."""
        frames = request.log
        frames.request_id, frames.created_unix = request.request_id, request.created_unix
        frames.memory = self.memory
        self.memory.add(frames.memory_bytes)
        if self.spool is not None:
            frames.fetch = self.spool.fetch
            if frames.file_part.sealed:
                self._set_stored(request, Stored.FILE)

    def forget(self, request: Request) -> None:
        """Drop everything of a request that nobody reads."""
        self.stored.pop(request, None)
        self._drop(request.log)

    def _drop(self, frames: FrameLog, last_frame: bytes | None = None) -> None:
        frames.drop(last_frame)
        if self.spool is not None and self.spool.has_file(frames):
            self.relay.nursery.start_soon(self.spool.remove, frames)

    # -- files

    async def seal(self, request: Request) -> bool:
        """Write a result into a file; False if the disk does not take it, and it stays in memory."""
        try:
            if self.spool is not None:
                await self.spool.seal(request.log)
        except NoRoom as fault:
            self._log_full(fault)
        if not request.log.is_complete or self.relay.requests.get(request.request_id) is not request:
            return False
        if request.log.file_part.sealed:
            self._log_full(None)
            self._set_stored(request, Stored.BOTH)
            return True
        self._set_stored(request, Stored.MEMORY)
        return False

    def _set_stored(self, request: Request, where: Stored) -> None:
        """Note where a request's frames are; one that moves goes to the end, behind those stored before it."""
        if self.stored.get(request) is not where:
            self.stored.pop(request, None)
            self.stored[request] = where

    def _all_stored(self, *where: Stored) -> list[Request]:
        """Ended requests whose frames are in one of these places, oldest first."""
        return [request for request, place in self.stored.items() if place in where]

    @property
    def unsaved_count(self) -> int:
        """Results that are in memory alone."""
        return len(self._all_stored(Stored.MEMORY))

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
        for request in self._all_stored(Stored.BOTH):
            if self.memory.held_bytes <= enough:
                break
            self.stored[request] = Stored.FILE
            request.log.release_written()
        while self.spool is not None and self.memory.held_bytes > enough:
            largest = max(self.relay.live_requests(), key=lambda request: request.log.memory_bytes, default=None)
            if largest is None or not largest.log.memory_bytes:
                break
            try:
                await self.spool.spill(largest.log)
            except NoRoom as fault:
                self._log_full(fault)
                if self.memory.over and not self._drop_unsaved() and largest.live:
                    self._fail_full(largest, fault)
                if not self.memory.over:
                    return
        if self.memory.over:
            self._drop_unsaved()

    def _drop_unsaved(self) -> bool:
        """Drop the oldest results that nobody reads and no file has, until memory suffices; whether there were any."""
        dropped = False
        for request in self._all_stored(Stored.MEMORY):
            if not self.memory.over:
                break
            if not request.log.readers:
                self._evict(request)
                dropped = True
        return dropped

    def _fail_full(self, request: Request, fault: NoRoom) -> None:
        log.error("no room for the frames of a request", request_id=request.request_id, why=str(fault))
        words = "the relay has no room left for its frames, neither in memory nor on disk; try again later"
        self.relay.fail(request, ErrorCode.STORAGE_FULL, words)
        self._drop(request.log)

    # -- forgetting

    def _evict(self, request: Request) -> None:
        """Drop an ended request's frames; a failure or a cancellation stays known for longer."""
        self.stored.pop(request, None)
        if request.entry.state is State.COMPLETED:
            request.has_result = False
            self._drop(request.log)
        else:
            self._drop(request.log, make_final_frame(request))

    async def _make_room(self, more: int) -> bool:
        """Implement `Spool.make_room`: the oldest results go first, except those that are being read."""
        assert self.spool is not None
        for request in self._all_stored(Stored.FILE, Stored.BOTH):
            if self.spool.used_bytes + more <= self.spool.disk_bytes:
                break
            if request in self.stored and not request.log.readers:
                self._evict(request)
                await self.spool.remove(request.log)  # begun already, but to be waited for
        return self.spool.used_bytes + more <= self.spool.disk_bytes

    def _broken(self, frames: FrameLog, why: str) -> None:
        """Implement `Spool.on_broken`."""
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
                for request in self._all_stored(Stored.MEMORY):
                    if self.spool is None or (request in self.stored and not await self.seal(request)):
                        break
            except Exception:
                log.exception("internal error in retention loop")

    async def _keep_limits(self) -> None:
        """Apply the settings, which may have been reloaded."""
        settings = self.relay.config.results
        self.memory.limit_bytes = settings.memory_bytes
        self.memory.add(0)
        if self.spool is not None:
            self.spool.disk_bytes = settings.disk_bytes
            await self._make_room(0)

    def _reap(self, now: float) -> None:
        relay = self.relay
        ended = [r for r in relay.requests.values() if r.ended_at is not None and not self.relay.is_finalizing(r)]
        ended = [request for request in ended if not request.log.readers]
        ended.sort(key=lambda request: request.ended_at or 0.0)
        too_many = len(ended) - MAX_ENDED
        for number, request in enumerate(ended):
            if number < too_many or now - (request.ended_at or 0.0) >= relay.config.results.retain_s:
                relay.remove_request(request)
                relay.store.post(DeleteRequest(request.request_id))
