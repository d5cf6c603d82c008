"""The relay's counters: over the last seconds, the last minute, five minutes, and since startup.

Frequent events only increment plain numbers; once a second, `sample` computes rates from them.
"""

from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Protocol, TypeVar

import attrs
import structlog
import trio

from protocol.wire.errors import ErrorCode
from relayd.requests.request import Request
from relayd.scheduling.model import State
from relayd.stats.histogram import REAL_TIME_FACTORS, WAIT_S, Histogram
from relayd.stats.windows import SAMPLE_S, End, MinuteWindow, OutcomeWindow, Rate, SampleWindow

T = TypeVar("T")
log = structlog.get_logger("relayd.stats")

#: Number of remembered worker ids, used to distinguish reconnects from first registrations.
MAX_SEEN_WORKERS = 1_000
#: Codes counted by name; workers may fail requests with arbitrary codes.
KNOWN_CODES = frozenset(str(code) for code in ErrorCode)
OTHER_CODE = "other"


class SentBytes(Protocol):
    """A connection to which frames are sent, as needed for counting."""

    sampled_bytes: int

    @property
    def connection_id(self) -> str:
        """Id of the connection."""

    @property
    def bytes_sent(self) -> int:
        """Bytes sent since its login."""


@attrs.define(eq=False)
class SpaceStats:
    """The counters of one space."""

    accepted: MinuteWindow = attrs.field(factory=MinuteWindow)
    first_audio: SampleWindow = attrs.field(factory=SampleWindow)
    ends: OutcomeWindow = attrs.field(factory=OutcomeWindow)
    #: Error code -> count since startup.
    failed: dict[str, int] = attrs.field(factory=dict)
    rejected: dict[str, int] = attrs.field(factory=dict)
    retried: int = 0
    resumed: int = 0
    reconnects: int = 0
    #: Requests answered with the frames of equal ones, and requests for which there was none.
    cache_hits: int = 0
    cache_misses: int = 0
    #: Audio of ended attempts. In whole milliseconds, because their sums never decrease through rounding.
    audio_ms: int = 0
    #: Bytes of live inputs, and the pieces in which they came.
    input_bytes: int = 0
    input_pieces: int = 0
    wait_s: Histogram = attrs.field(factory=lambda: Histogram(WAIT_S))
    first_audio_s: Histogram = attrs.field(factory=lambda: Histogram(WAIT_S))
    run_s: Histogram = attrs.field(factory=lambda: Histogram(WAIT_S))
    real_time_factor: Histogram = attrs.field(factory=lambda: Histogram(REAL_TIME_FACTORS))


@attrs.define(eq=False)
class WorkerStats:
    """Identity and counters of one worker, kept while it is disconnected."""

    name: str = ""
    engine: str = ""
    agent: str = ""
    principal: str = ""
    peer: str = ""
    heard_at: float = 0.0
    frames: int = 0
    frame_bytes: int = 0
    rate: Rate = attrs.field(factory=Rate)
    ends: OutcomeWindow = attrs.field(factory=OutcomeWindow)


@attrs.define(eq=False)
class TalkStats:
    """The counters of conversations."""

    #: Conversations that are kept, and replies in them that wait or are being made.
    talks: int = 0
    unended: int = 0
    #: Dialect -> its open WebSockets.
    websockets: dict[str, int] = attrs.field(factory=dict)
    #: State in which replies ended -> how many.
    turns: dict[str, int] = attrs.field(factory=dict)
    #: Why replies were not spoken, or not to their end -> how many.
    unspoken: dict[str, int] = attrs.field(factory=dict)
    #: Calls that live; that ended in order; and why others did not -> how many.
    calls: int = 0
    calls_hung_up: int = 0
    calls_failed: dict[str, int] = attrs.field(factory=dict)
    #: From what was said to the first word, and to the first sample, of the reply.
    first_word_s: Histogram = attrs.field(factory=lambda: Histogram(WAIT_S))
    first_audio_s: Histogram = attrs.field(factory=lambda: Histogram(WAIT_S))

    @contextmanager
    def connected(self, dialect: str) -> Iterator[None]:
        """Count an open WebSocket in the block."""
        self.websockets[dialect] = self.websockets.get(dialect, 0) + 1
        try:
            yield
        finally:
            self.websockets[dialect] -= 1


@attrs.define(eq=False)
class WyomingStats:
    """The counters of the Wyoming protocol."""

    #: Open connections.
    connections: int = 0
    #: What was asked for, by the type of its event -> how often.
    asked: dict[str, int] = attrs.field(factory=dict)
    #: Error code -> connections that were ended with it.
    errors: dict[str, int] = attrs.field(factory=dict)


@attrs.define(eq=False)
class Stats:
    """The counters of the whole relay.

    A frame is counted only by its worker and by its reader; totals are computed on demand.
    """

    #: Audio produced up to the last sample.
    audio_s: float = 0.0
    #: Audio of ended attempts, as in `SpaceStats.audio_ms`.
    audio_ms: int = 0
    #: Bytes sent to HTTP clients, to disconnected clients, and to connected clients up to the last sample.
    out_bytes: int = 0
    #: Frames and bytes from workers that are no longer known.
    past_frames: int = 0
    past_frame_bytes: int = 0
    accepted: MinuteWindow = attrs.field(factory=MinuteWindow)
    errors: MinuteWindow = attrs.field(factory=MinuteWindow)
    audio: MinuteWindow = attrs.field(factory=MinuteWindow)
    first_audio: SampleWindow = attrs.field(factory=SampleWindow)
    talk: TalkStats = attrs.field(factory=TalkStats)
    wyoming: WyomingStats = attrs.field(factory=WyomingStats)
    spaces: dict[str, SpaceStats] = attrs.field(factory=dict)
    workers: dict[str, WorkerStats] = attrs.field(factory=dict)
    #: Rates of clients to which frames were sent in the last seconds.
    clients: dict[str, Rate] = attrs.field(factory=dict)
    out: Rate = attrs.field(factory=Rate)
    frames_in: Rate = attrs.field(factory=Rate)
    #: Error code -> requests to spaces that do not exist; not per space, because clients choose the names freely.
    rejected: dict[str, int] = attrs.field(factory=dict)
    _seen_workers: dict[str, None] = attrs.field(factory=dict)

    def space(self, name: str) -> SpaceStats:
        """Return the counters of a space, creating them if necessary."""
        if name not in self.spaces:
            self.spaces[name] = SpaceStats()
        return self.spaces[name]

    def worker(self, worker_id: str) -> WorkerStats:
        """Return the counters of a worker, creating them if necessary."""
        if worker_id not in self.workers:  # called for each frame, so without `setdefault`
            self.workers[worker_id] = WorkerStats()
        return self.workers[worker_id]

    @property
    def frames(self) -> int:
        """Number of frames received from workers since startup."""
        return self.past_frames + sum(worker.frames for worker in self.workers.values())

    @property
    def frame_bytes(self) -> int:
        """Bytes of those frames."""
        return self.past_frame_bytes + sum(worker.frame_bytes for worker in self.workers.values())

    def sent_bytes(self, clients: Mapping[str, SentBytes]) -> int:
        """Return the bytes of frames sent since startup; `clients` are the connected ones."""
        return self.out_bytes + sum(client.bytes_sent - client.sampled_bytes for client in clients.values())

    # -- events

    def count_accepted(self, request: Request) -> None:
        """Count an accepted request."""
        now = trio.current_time()
        self.accepted.add(now)
        self.space(request.submit.space).accepted.add(now)

    def count_rejected(self, space: str | None, code: str) -> None:
        """Count a rejected request; `space` is None if the space does not exist."""
        count(self.rejected if space is None else self.space(space).rejected, code)

    def count_input(self, request: Request, size: int) -> None:
        """Count a piece of a live input."""
        space = self.space(request.submit.space)
        space.input_bytes += size
        space.input_pieces += 1

    def count_started(self, request: Request, from_seq: int) -> None:
        """Count the assignment of a request to a worker, whose frames begin at `from_seq`."""
        started_at = request.entry.started_at
        if started_at != request.wait_counted_at:  # else it was assigned again to the same worker
            request.wait_counted_at = started_at
            self.space(request.submit.space).wait_s.add(max(0.0, started_at - request.queued_at))
        if not from_seq:
            self.count_restarted(request)

    def count_restarted(self, request: Request) -> None:
        """Count the audio of an attempt whose output is discarded; the next one has its own format."""
        self._count_audio(request)
        request.audio_bytes, request.format, request.video = 0, None, None

    def _count_audio(self, request: Request) -> None:
        """Add the audio of an ended attempt to the totals."""
        made_ms = audio_ms(request)
        self.audio_ms += made_ms
        self.space(request.submit.space).audio_ms += made_ms

    def count_retried(self, request: Request) -> None:
        """Count a lost attempt whose request is queued again."""
        self.space(request.submit.space).retried += 1

    def count_resumed(self, request: Request) -> None:
        """Count a request that continues after its worker reconnected."""
        self.space(request.submit.space).resumed += 1

    def count_registration(self, worker_id: str, spaces: Iterable[str]) -> None:
        """Count the registration of a worker."""
        seen = self._seen_workers
        if worker_id in seen:
            for space in spaces:
                self.space(space).reconnects += 1
            del seen[worker_id]  # moves it to the end
        elif len(seen) >= MAX_SEEN_WORKERS:
            del seen[next(iter(seen))]
        seen[worker_id] = None

    def observe_first_frame(self, request: Request, now: float) -> None:
        """Record the time to the first output of a request."""
        waited_s = now - request.created_at
        self.first_audio.add(now, waited_s)
        space = self.space(request.submit.space)
        space.first_audio.add(now, waited_s)
        space.first_audio_s.add(waited_s)

    def count_ended(self, request: Request, state: State, now: float) -> None:
        """Count a request that has ended in `state`."""
        self._count_audio(request)
        space = self.space(request.submit.space)
        if state is State.FAILED:
            self.errors.add(now)
            count(space.failed, request.code or ErrorCode.INTERNAL)
        if state is State.CANCELLED:
            return
        done = state is State.COMPLETED and request.entry.worker_id is not None
        end = End(
            now,
            failed=state is State.FAILED,
            run_s=now - request.entry.started_at if done else 0.0,
            audio_s=request.audio_s or 0.0 if done else 0.0,
        )
        space.ends.add(end)
        if done:
            space.run_s.add(end.run_s)
        if end.audio_s:
            space.real_time_factor.add(end.run_s / end.audio_s)
        if request.entry.worker_id in self.workers:
            self.workers[request.entry.worker_id].ends.add(end)

    # -- once a second

    def sample(
        self,
        now: float,
        live: Iterable[Request],
        clients: Mapping[str, SentBytes],
        spaces: Container[str],
        workers: Container[str],
    ) -> None:
        """Update the rates, and drop the counters of spaces, workers and clients that no longer exist."""
        self.audio_s = (self.audio_ms + sum(map(audio_ms, live))) / 1000
        self.audio.add(now, self.audio_s - self.audio.total)
        self.frames_in.sample(now, self.frame_bytes)
        for worker in self.workers.values():
            worker.rate.sample(now, worker.frame_bytes)
        self._sample_clients(clients, now)
        self.out.sample(now, self.out_bytes)
        _forget(self.spaces, spaces)
        for gone in _forget(self.workers, workers):
            self.past_frames += gone.frames
            self.past_frame_bytes += gone.frame_bytes

    def _sample_clients(self, clients: Mapping[str, SentBytes], now: float) -> None:
        """Update the rates of clients; only the few that receive frames have one."""
        for client in [client for client in clients.values() if client.bytes_sent != client.sampled_bytes]:
            if client.connection_id not in self.clients:
                self.clients[client.connection_id] = Rate(begin=client.sampled_bytes)
            self.out_bytes += client.bytes_sent - client.sampled_bytes
            client.sampled_bytes = client.bytes_sent
        for connection_id, rate in list(self.clients.items()):
            sent = clients.get(connection_id)
            if sent is not None:
                rate.sample(now, sent.bytes_sent)
            if sent is None or not rate.per_s:
                del self.clients[connection_id]


def audio_ms(request: Request) -> int:
    """Return the milliseconds of audio produced by the current attempt; none if it is copied."""
    return 0 if request.entry.copied else round(1000 * (request.audio_s or 0.0))


def count(counts: dict[str, int], code: str) -> None:
    """Count an error by its code."""
    name = str(code) if code in KNOWN_CODES else OTHER_CODE
    counts[name] = counts.get(name, 0) + 1


def _forget(known: dict[str, T], there: Container[str]) -> list[T]:
    return [known.pop(name) for name in list(known) if name not in there]


async def serve_stats(sample: Callable[[float], None]) -> None:
    """Call `sample` once a second, until cancelled."""
    while True:
        await trio.sleep(SAMPLE_S)
        try:
            sample(trio.current_time())
        except Exception:
            log.exception("internal error in stats loop")
