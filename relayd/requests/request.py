"""A request while the relay knows it: what was asked, who holds it, its frame log and its deadlines."""

import hashlib
from enum import Enum
from typing import Any, Protocol

import attrs
import msgpack
import trio

from protocol.wire.errors import ErrorCode
from protocol.wire.messages import Ack, Rejected, Submit
from protocol.wire.structs import AudioFormat
from protocol.wire.validators import Value
from relayd.config.schema import SpaceConfig
from relayd.frames.frame_log import FrameLog, Sink
from relayd.requests.summary import summarize
from relayd.scheduling.model import QueuePosition, ScheduledRequest, State

#: Steps of a request that are remembered: its first ones, and the latest.
FIRST_STEPS, LATEST_STEPS = 12, 36
#: What is kept of what an ended request asked for.
KEPT_BYTES = 1024
#: How long an attempt that has put out nothing waits for its worker's return before it is tried elsewhere. A worker
#: reconnects within 0.5 s when only its network blinked; docs/design.md §6 promises the second attempt within 2 s.
UNHEARD_GRACE_S = 1.5


class Expiry(Enum):
    """What happens to a request at its next deadline."""

    NOBODY_HOLDS = "nobody holds it"
    QUEUE_TIMEOUT = "queue_timeout"
    RUN_TIMEOUT = "run_timeout"
    IDLE_TIMEOUT = "idle_timeout"
    WORKER_GONE = "worker_gone"
    CANCEL_UNANSWERED = "cancel_unanswered"


class Holder(Sink, Protocol):
    """A client's connection, as far as its requests see it."""

    def on_accepted(self, request: "Request") -> None:
        """The request is safe; its frames may be read."""

    def on_position(self, request: "Request", place: QueuePosition) -> None:
        """Where the request stands in the queue."""

    def on_rejected(self, request: "Request", refusal: Rejected) -> None:
        """The request was not taken after all."""

    def on_ended(self, request: "Request") -> None:
        """The request needs no holder any more."""


@attrs.define(eq=False, kw_only=True)
class Request:
    """One request. `entry` is the scheduler's part of it; times are monotonic seconds unless they say otherwise."""

    submit: Submit
    principal: str
    entry: ScheduledRequest
    created_at: float
    created_unix: float
    queue_timeout_s: float
    run_timeout_s: float
    idle_timeout_s: float
    #: SHA-256 of what was asked for.
    content: bytes
    log: FrameLog = attrs.field(factory=FrameLog)
    inputs: dict[str, bytearray] = attrs.field(factory=dict)
    _digests: dict[str, "hashlib._Hash"] = attrs.field(factory=dict)
    holders: set[Holder] = attrs.field(factory=set)
    #: The acknowledgement that its worker waits for until the end is safe, and which worker that is.
    pending_ack: tuple[str, Ack] | None = None
    #: Whether all of its inputs have come: it is on its way to the store, and takes no more of them.
    uploaded: bool = False
    #: Whether `accepted` was sent: it is in the store.
    accepted: bool = False
    abandoned_at: float | None = None
    queued_at: float = 0.0
    last_frame_at: float = 0.0
    #: The `entry.started_at` up to which its waiting was counted.
    wait_counted_at: float | None = None
    #: When its worker was told to stop, while it has not answered.
    stopped_at: float | None = None
    #: How long its worker may stay away, from `entry.worker_lost_at` on.
    worker_grace_s: float = 0.0
    first_frame_at: float | None = None
    ended_at: float | None = None
    format: AudioFormat | None = None
    audio_bytes: int = 0
    fraction: float | None = None
    code: str | None = None
    message: str | None = None
    details: dict[str, object] = attrs.field(factory=dict)
    #: What has become of it, step by step: a packed map each, to have 10,000 ended requests cost little.
    timeline: list[bytes] = attrs.field(factory=list)
    timeline_dropped: int = 0
    #: What was asked, in brief, once it has ended; see `relayd.requests.summary`.
    summary: bytes = b""
    #: Position and queue length last told to the holders.
    last_position_sent: tuple[int, int] | None = None
    #: False once it is completed and its frames are not kept any more.
    has_result: bool = True
    changed: trio.Event = attrs.field(factory=trio.Event)

    @property
    def request_id(self) -> str:
        """The client's own id for it."""
        return self.submit.request_id

    @property
    def live(self) -> bool:
        """Whether it has not ended."""
        return self.entry.state.live

    @classmethod
    def of(
        cls,
        submit: Submit,
        principal: str,
        entry: ScheduledRequest,
        config: SpaceConfig,
        created_unix: float,
        **more: Any,
    ) -> "Request":
        """A request whose times begin now; what it does not say of its deadlines, its space does."""
        now = trio.current_time()
        request = cls(
            submit=submit,
            principal=principal,
            entry=entry,
            created_at=now,
            created_unix=created_unix,
            queued_at=now,
            last_frame_at=now,
            queue_timeout_s=config.queue_timeout_s if submit.queue_timeout_s is None else submit.queue_timeout_s,
            run_timeout_s=config.run_timeout_s if submit.run_timeout_s is None else submit.run_timeout_s,
            idle_timeout_s=config.idle_timeout_s,
            content=content_hash(submit),
            **more,
        )
        request.add_timeline("taken_up" if request.accepted else "created")
        return request

    def add_timeline(self, event: str, **more: Value) -> None:
        """Remember what became of it just now."""
        if len(self.timeline) >= FIRST_STEPS + LATEST_STEPS:
            del self.timeline[FIRST_STEPS]
            self.timeline_dropped += 1
        at_s = round(trio.current_time() - self.created_at, 3)
        told = {key: value for key, value in more.items() if value is not None}
        self.timeline.append(msgpack.packb({"at_s": at_s, "event": event, **told}))

    def resumed(self) -> None:
        """Its worker is back, and goes on with it."""
        entry, log = self.entry, self.log
        self.last_frame_at = trio.current_time()
        self.add_timeline("worker_back", worker_id=entry.worker_id, attempt=entry.attempt)
        if entry.attempt > 1 and not entry.reproducible and not (log.next_seq or log.starts):
            # After a restart of the relay: who has frames of an earlier attempt must not go on behind them in this one.
            log.restart(entry.attempt, 0)
        self.wake()

    def hold(self, holder: Holder) -> None:
        """Add a holder: while a request has one, its resume window does not run."""
        self.holders.add(holder)
        self.abandoned_at = None
        self.wake()

    def release(self, holder: Holder, now: float) -> None:
        """Remove a holder; when the last one leaves a live request, its resume window begins at `now`."""
        if holder not in self.holders:
            return
        self.holders.discard(holder)
        if not self.holders and self.live:
            self.abandoned_at = now
            self.wake()

    def renew(self, now: float) -> None:
        """Restart the resume window of a request that nobody holds."""
        if self.abandoned_at is not None:
            self.abandoned_at = now
            self.wake()

    def release_run_data(self) -> None:
        """It has ended: let go of what only a run needs, which may be 64 KiB and all of its inputs."""
        self.summary = self.summary or summarize(self.submit, KEPT_BYTES)
        self.submit = attrs.evolve(self.submit, params={}, inputs={})
        self.drop_inputs()

    def drop_inputs(self) -> None:
        """Let go of the inputs' bytes: the store has them."""
        self.inputs.clear()
        self._digests.clear()

    def same_content(self, submit: Submit) -> bool:
        """Whether `submit` asks for exactly this."""
        return self.content == content_hash(submit)

    @property
    def audio_s(self) -> float | None:
        """Seconds of audio that the attempt at hand has put out; None where it makes none."""
        if self.format is None:
            return None
        return round(self.audio_bytes / self.format.sample_bytes / self.format.sample_rate, 3)

    def delivered(self) -> dict[str, object]:
        """How much of it was put out, for the `details` of its failure; empty where nothing was."""
        if not self.log.next_seq:
            return {}
        return {"delivered_frames": self.log.next_seq} | ({"delivered_s": self.audio_s} if self.audio_s else {})

    def wake(self) -> None:
        """Wake the request's task: a deadline may lie elsewhere now."""
        self.changed.set()
        self.changed = trio.Event()

    def missing_input(self) -> str | None:
        """Name of an input that has not come whole yet."""
        return next((n for n, info in self.submit.inputs.items() if len(self.inputs.get(n, b"")) < info.size), None)

    def add_input(self, name: str, offset: int, data: bytes) -> ErrorCode | None:
        """Take a piece of an input; pieces that came before (a client that reconnected) are passed over.

        Returns:
            None if it fits; else what is wrong: not announced, a gap, or more than was announced.
        """
        info = self.submit.inputs.get(name)
        if info is None:
            return ErrorCode.INPUT_MISMATCH
        have = self.inputs.setdefault(name, bytearray())
        if offset > len(have):
            return ErrorCode.INPUT_MISMATCH
        if offset + len(data) > info.size:
            return ErrorCode.INPUT_TOO_LARGE
        fresh = data[len(have) - offset :]
        have += fresh
        self._digests.setdefault(name, hashlib.sha256()).update(fresh)
        return None

    def damaged_input(self) -> str | None:
        """Name of an input whose bytes are not those whose SHA-256 was announced."""
        for name, info in self.submit.inputs.items():
            digest = self._digests.get(name) or hashlib.sha256()
            if digest.hexdigest() != info.sha256:
                return name
        return None

    def deadline(self, resume_window_s: float, cancel_grace_s: float) -> tuple[float, Expiry]:
        """When something happens to it if nothing else does before, and what."""
        entry = self.entry
        due: list[tuple[float, Expiry]] = []
        if self.abandoned_at is not None and not self.submit.detach and self.stopped_at is None:
            due.append((self.abandoned_at + resume_window_s, Expiry.NOBODY_HOLDS))
        if entry.state is not State.RUNNING:
            due.append((self.queued_at + self.queue_timeout_s, Expiry.QUEUE_TIMEOUT))
        elif self.stopped_at is not None:
            due.append((self.stopped_at + cancel_grace_s, Expiry.CANCEL_UNANSWERED))
        else:
            due.append((entry.started_at + self.run_timeout_s, Expiry.RUN_TIMEOUT))
            if entry.worker_lost_at is not None:
                due.append((entry.worker_lost_at + self.worker_grace_s, Expiry.WORKER_GONE))
            else:
                due.append((self.last_frame_at + self.idle_timeout_s, Expiry.IDLE_TIMEOUT))
        return min(due, key=lambda pair: pair[0])


def content_hash(submit: Submit) -> bytes:
    """SHA-256 of all that a `submit` asks for, its id aside; the order of a map's keys does not count."""
    wire = submit.to_map()
    del wire["request_id"]
    return hashlib.sha256(msgpack.packb(_in_order(wire))).digest()


def _in_order(value: Value) -> Value:
    if isinstance(value, dict):
        return {key: _in_order(value[key]) for key in sorted(value)}
    return [_in_order(item) for item in value] if isinstance(value, list) else value
