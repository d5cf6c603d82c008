"""Keeps the frames of requests within the limits of memory and disk, and forgets ended requests.

When a request ends, `relayd.core.finalize` has its frames written into a file. If the disk cannot be written, results
stay in memory; a request fails only if its frames fit neither in memory nor on the disk.
"""

import heapq
import math
from collections import Counter, deque
from collections.abc import Callable, Container, Iterator, Sequence
from enum import Enum
from itertools import islice

import attrs
import structlog
import trio

from protocol.wire.errors import ErrorCode
from relayd.core.interfaces import ResultsOwner
from relayd.core.result_cache import ResultCache
from relayd.frames.frame_file import Contents, ResultFolder
from relayd.frames.frame_log import FrameLog, MemoryBudget
from relayd.frames.spool import NoRoom, Spool
from relayd.requests.final_frame import make_final_frame
from relayd.requests.request import Request
from relayd.scheduling.model import State
from relayd.store.records import DeleteRequest
from relayd.store.state_dir import file_error

log = structlog.get_logger("relayd.results")

FOLDER_NAME = "results"
#: How often ended requests are checked, and writing of results that could not be written is tried again.
REAP_INTERVAL_S = 5.0
#: Most ended requests that are kept; the oldest go first. One takes about 3 KiB without its frames.
MAX_ENDED = 10_000
#: Memory is freed down to this share of its limit, so that not every frame causes another round.
LOW_WATER = 7 / 8
#: A round that makes room looks at every result. Of many, it drops one in so many at once: then few rounds are needed.
ONE_IN = 64
#: Wait before another round when too little could be freed.
RETRY_S = 0.25


class Stored(Enum):
    """Where the frames of an ended request are."""

    FILE = "in a file"
    BOTH = "in a file, and still in memory"
    MEMORY = "only in memory"


@attrs.define(eq=False)
class Retention:
    """The frames of all requests. Without a spool (`store = "memory"`) they are only in memory."""

    relay: ResultsOwner
    memory: MemoryBudget = attrs.field(init=False)
    #: Results that are kept to answer equal requests.
    cache: ResultCache = attrs.field(factory=ResultCache)
    spool: Spool | None = None
    #: Where the frames of ended requests are stored; the request whose place changed last comes last.
    stored: dict[Request, Stored] = attrs.field(factory=dict)
    _pressed: trio.Event = attrs.field(factory=trio.Event)
    _full: bool = False
    #: Principal -> for how many bytes no room could be made a moment ago, and when that is tried again.
    _refused: dict[str, int] = attrs.field(factory=dict)
    _try_again_at: float = -math.inf

    def __attrs_post_init__(self) -> None:
        self.memory = MemoryBudget(self.relay.config.results.memory_bytes, on_exceeded=lambda: self._pressed.set())

    async def open(
        self, ended: dict[str, float], left_alone: Container[str] = (), recorded_first: Container[str] = ()
    ) -> dict[str, Contents]:
        """Start to use files, if the store outlives the daemon.

        Args:
            ended: request id -> creation time (Unix seconds) of every ended request; other files are deleted.
            left_alone: ids whose files are kept all the same, because their records cannot be read.
            recorded_first: ids of requests whose end was stored before their file was completed: it may be unfinished.

        Returns:
            The contents of every complete file, by request id.

        Raises:
            StoreError: the results folder cannot be used.
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
            return await self.spool.sweep(ended, left_alone, recorded_first)
        except OSError as fault:
            raise file_error(fault, f"cannot use {path}", "it must be a folder of the daemon's user") from fault

    @property
    def disk_bytes(self) -> int:
        """Total size of the files in bytes."""
        return self.spool.used_bytes if self.spool is not None else 0

    def track(self, request: Request) -> None:
        """Account for the log of a new or restored request."""
        frames = request.log
        frames.request_id, frames.created_unix = request.request_id, request.created_unix
        frames.memory = self.memory
        self.memory.add(frames.memory_bytes)
        if self.spool is not None:
            frames.fetch = self.spool.fetch
            if frames.file_part.sealed:
                self._set_stored(request, Stored.FILE)

    def forget(self, request: Request) -> None:
        """Drop the frames of a request that nobody reads."""
        self.cache.forget(request)
        self.stored.pop(request, None)
        self._drop(request.log)

    def _drop(self, frames: FrameLog, last_frame: bytes | None = None) -> None:
        frames.drop(last_frame)
        if self.spool is not None and self.spool.has_file(frames):
            self.relay.nursery.start_soon(self.spool.remove, frames)

    # -- files

    async def seal(self, request: Request) -> bool:
        """Write a result into a file; returns False if that failed, and the result stays in memory."""
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
        """Note where the frames of a request are; a request whose place changes moves to the end of the order."""
        if self.stored.get(request) is not where:
            self.stored.pop(request, None)
            self.stored[request] = where

    def _all_stored(self, *where: Stored) -> list[Request]:
        """Return the ended requests whose frames are in one of these places, oldest first."""
        return [request for request, place in self.stored.items() if place in where]

    @property
    def unsaved_count(self) -> int:
        """Number of results that are only in memory."""
        return len(self._all_stored(Stored.MEMORY))

    def _log_full(self, fault: NoRoom | None) -> None:
        if self._full != (fault is not None):
            self._full = fault is not None
            if fault is not None:
                log.error("results cannot be written to disk; they stay in memory", why=str(fault))
            else:
                log.info("results can be written to disk again")

    def _file_bytes(self, request: Request) -> int:
        return self.spool.file_bytes(request.log) if self.spool is not None else 0

    # -- memory

    async def serve_memory(self) -> None:
        """Keep the frames in memory within their limit, until cancelled."""
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
                if self.memory.over and not self._drop_unsaved() and (heaviest := self._heaviest_live()) is not None:
                    self._fail_full(heaviest, fault)
                    await self.spool.remove(heaviest.log)  # begun already; its room may be enough for the others
                if not self.memory.over:
                    return
        if self.memory.over:
            self._drop_unsaved()

    def _drop_unsaved(self) -> bool:
        """Drop results that nobody reads and no file has, until memory suffices; whether there were any.

        Those that only the cache keeps go first, then the oldest of the principal that has most.
        """
        dropped, unread = 0, [request for request in self._all_stored(Stored.MEMORY) if not request.log.readers]
        for request in self._in_order(unread, lambda request: request.log.memory_bytes):
            if not self.memory.over and dropped >= len(unread) // ONE_IN:
                break
            self._evict(request)
            dropped += 1
        return dropped > 0

    def _heaviest_live(self) -> Request | None:
        """The largest live request of the principal whose live requests are largest."""
        live = self.relay.live_requests()
        held = Counter[str]()
        for request in live:
            held[request.principal] += request.log.size_bytes
        return max(live, key=lambda request: (held[request.principal], request.log.size_bytes), default=None)

    def _fail_full(self, request: Request, fault: NoRoom) -> None:
        log.error("no space for the frames of a request", request_id=request.request_id, why=str(fault))
        message = "the relay has no space left for its frames, neither in memory nor on disk; try again later"
        self.relay.fail(request, ErrorCode.STORAGE_FULL, message)
        self._drop(request.log)

    # -- forgetting

    def _evict(self, request: Request) -> None:
        """Drop the frames of an ended request; of a failed or cancelled one, the last frame stays."""
        self.cache.forget(request)
        self.stored.pop(request, None)
        last_frame = None
        if request.entry.state is not State.COMPLETED:
            try:
                last_frame = make_final_frame(request)
            except Exception:  # what makes room for others must not fail with this one
                log.exception("internal error in request", request_id=request.request_id)
        request.has_result = last_frame is not None
        self._drop(request.log, last_frame)

    def _in_order(self, requests: list[Request], weigh: Callable[[Request], int]) -> Iterator[Request]:
        """Requests in the order in which they go."""
        begin = trio.current_time() - self.relay.config.results.retain_s
        spare = {each for each in requests if self.cache.has(each) and (each.ended_at or 0.0) <= begin}
        yield from (request for request in requests if request in spare)
        yield from _heaviest_first([request for request in requests if request not in spare], weigh)

    async def _make_room(self, more: int, frames: FrameLog | None = None) -> bool:
        """Implement `Spool.make_room`: results that only the cache keeps go first, then as in `_drop_unsaved`.

        Results that are being read stay, and so do those of principals that have less than the one that needs room:
        one that streams without end drops its own results, and then fails.
        """
        assert self.spool is not None
        if self.spool.used_bytes + more <= self.spool.disk_bytes:
            return True
        if (now := trio.current_time()) >= self._try_again_at:
            self._refused.clear()
            self._try_again_at = now + RETRY_S
        asking = self.relay.requests.get(frames.request_id) if frames is not None else None
        who = asking.principal if asking is not None else ""
        if more >= self._refused.get(who, math.inf):
            return False
        unread = [request for request in self._all_stored(Stored.FILE, Stored.BOTH) if not request.log.readers]
        if asking is not None:
            used = Counter[str]()
            for request in self.relay.requests.values():
                used[request.principal] += self._file_bytes(request)
            own_bytes = used[who] + more
            unread = [r for r in unread if r.principal == who or used[r.principal] >= own_bytes]
        dropped = 0
        for request in self._in_order(unread, self._file_bytes):
            fits = self.spool.used_bytes + more <= self.spool.disk_bytes
            if fits and dropped >= len(unread) // ONE_IN:
                break
            # Still: it may be read by now, or forgotten, and another request have its id and file.
            if request in self.stored and not request.log.readers:
                self._evict(request)
                await self.spool.remove(request.log)  # `_evict` has started this already; wait for it
                dropped += 1
        if self.spool.used_bytes + more <= self.spool.disk_bytes:
            return True
        self._refused[who] = more
        return False

    def _broken(self, frames: FrameLog, why: str) -> None:
        request = self.relay.requests.get(frames.request_id)
        if request is None or request.log is not frames:
            return
        log.error("frames cannot be read back", request_id=request.request_id, why=why)
        if request.live:
            message = "the relay cannot read its frames back from the disk; see the relay's log"
            self.relay.fail(request, ErrorCode.INTERNAL, message)
            self._drop(frames)
            return
        for reader in tuple(frames.readers):
            reader.close()
            reader.sink.on_read_error(reader)
        if frames.ended:
            self._evict(request)

    async def serve_retention(self) -> None:
        """Forget ended requests after `results.retain_s`, and retry failed writes of results; until cancelled."""
        while True:
            await trio.sleep(REAP_INTERVAL_S)
            try:
                await self._keep_limits()
                self._reap(trio.current_time())
                for request in self._all_stored(Stored.MEMORY):
                    if not await self.seal(request):
                        break
            except Exception:
                log.exception("internal error in retention loop")

    async def _keep_limits(self) -> None:
        """Apply the current settings, which may have been reloaded."""
        settings = self.relay.config.results
        self.memory.limit_bytes = settings.memory_bytes
        self.memory.add(0)
        if self.spool is not None:
            self.spool.disk_bytes = settings.disk_bytes
            await self._make_room(0)

    def _reap(self, now: float) -> None:
        relay = self.relay
        self.cache.trim({name: space.config for name, space in relay.spaces.items()}, now)
        ended_at = {
            request: request.ended_at
            for request in relay.requests.values()
            if request.ended_at is not None
            and not relay.is_finalizing(request)
            and not request.log.readers
            and not self.cache.has(request)
        }
        ended = sorted(ended_at, key=ended_at.__getitem__)
        kept = [request for request in ended if now - ended_at[request] < relay.config.results.retain_s]
        counts = Counter(request.principal for request in kept)
        too_many = {name: count - self._max_retained(name) for name, count in counts.items()}
        forgotten = set(ended).difference(kept)
        for request in kept:
            if too_many[request.principal] > 0:
                too_many[request.principal] -= 1
                forgotten.add(request)
        left = [request for request in kept if request not in forgotten]
        forgotten.update(islice(_heaviest_first(left, lambda _request: 1), max(0, len(left) - MAX_ENDED)))
        for request in ended:
            if request in forgotten:
                relay.remove_request(request)
                relay.store.post(DeleteRequest(request.request_id))

    def _max_retained(self, principal: str) -> int:
        """The limit of its latest submit; after a restart there is none until it submits again."""
        own = self.relay.principals.usage_of(principal).max_retained
        return MAX_ENDED if own is None else own


def _heaviest_first(requests: Sequence[Request], weigh: Callable[[Request], int]) -> Iterator[Request]:
    """Requests in the order in which they go: each time the first one of the principal that has most then.

    Whoever keeps little loses nothing to a principal that fills the relay.
    """
    lanes: dict[str, deque[tuple[int, Request]]] = {}
    for request in requests:
        lanes.setdefault(request.principal, deque()).append((weigh(request), request))
    heap = [(-sum(weight for weight, _ in lane), name) for name, lane in lanes.items()]
    heapq.heapify(heap)
    while heap:
        weight, name = heap[0]
        mine, request = lanes[name].popleft()
        if lanes[name]:
            heapq.heapreplace(heap, (weight + mine, name))
        else:
            heapq.heappop(heap)
        yield request
