"""A request: its submission, holders, frame log and deadlines, from its submission until it is forgotten."""

import hashlib
import math
from enum import Enum
from typing import Any, Protocol

import attrs
import msgpack
import trio

from protocol.wire.errors import ErrorCode
from protocol.wire.messages import MAX_REPORT_CHARS, Ack, Queued, Rejected, Submit, WorkerAway, WorkerBack
from protocol.wire.structs import AudioFormat, VideoFormat
from protocol.wire.validators import Value
from relayd.config.schema import SpaceConfig
from relayd.frames.frame_log import FrameLog, Sink
from relayd.requests.live_input import LiveInput
from relayd.requests.outcome import Outcome
from relayd.requests.summary import summarize
from relayd.scheduling.model import QueuePosition, ScheduledRequest, State

#: Number of timeline entries that are kept: the first ones and the latest ones.
FIRST_STEPS, LATEST_STEPS = 12, 36
#: Largest summary of the submission that is kept of an ended request.
KEPT_BYTES = 1024
#: How long an attempt without output waits for its worker to reconnect before it is tried elsewhere. After a short
#: network failure a worker reconnects within 0.5 s; docs/design.md §6 promises the second attempt within 2 s.
UNHEARD_GRACE_S = 1.5
NOT_ENDED = Outcome()


class Expiry(Enum):
    """The deadlines of a request."""

    NOBODY_HOLDS = "nobody holds it"
    QUEUE_TIMEOUT = "queue_timeout"
    RUN_TIMEOUT = "run_timeout"
    IDLE_TIMEOUT = "idle_timeout"
    FEED_TIMEOUT = "feed_timeout"
    WORKER_GONE = "worker_gone"
    CANCEL_UNANSWERED = "cancel_unanswered"


class Holder(Sink, Protocol):
    """A client's connection, as its requests see it."""

    def on_accepted(self, request: "Request") -> None:
        """Handle that the request is stored; its frames may be read."""

    def on_position(self, request: "Request", position: QueuePosition) -> None:
        """Handle a changed position of the request in the queue."""

    def on_worker(self, request: "Request") -> None:
        """Handle that its worker is away, or that a worker runs it again."""

    def on_rejected(self, request: "Request", refusal: Rejected) -> None:
        """Handle that the request was rejected after it was admitted, or what this holder feeds to it."""

    def on_input_stored(self, request: "Request", name: str, *, again: bool = False) -> None:
        """Handle that more of a live input is stored, or its end; what this holder sent beyond is to come `again`."""

    def on_ended(self, request: "Request") -> None:
        """Handle that the request has ended and no longer needs a holder."""


class Feeding(Protocol):
    """What sends the live and piped inputs of an attempt to its worker, or what feeds a piped input."""

    def wake(self) -> None:
        """There may be something to send, or the attempt may be over."""


@attrs.define(eq=False, kw_only=True)
class Request:
    """One request. `entry` is the scheduler's part of it. Times are monotonic seconds unless their names say otherwise.

    Its life, in order: `uploaded`, `accepted`, `queued_at`, `entry.started_at`, `first_frame_at`, possibly
    `abandoned_at` or `stopped_at`, `ended_at`, `pending_ack` cleared, `has_result` False.
    """

    submit: Submit
    principal: str
    entry: ScheduledRequest
    created_at: float
    created_unix: float
    queue_timeout_s: float
    run_timeout_s: float
    idle_timeout_s: float
    #: SHA-256 of the submission, as `content_hash` returns it.
    content: bytes
    #: What equal requests have in common, as `cache_key` returns it.
    cache_key: bytes = b""
    log: FrameLog = attrs.field(factory=FrameLog)
    inputs: dict[str, bytearray] = attrs.field(factory=dict)
    _digests: dict[str, "hashlib._Hash"] = attrs.field(factory=dict)
    #: The inputs that are fed while it is live, by name.
    fed: dict[str, LiveInput] = attrs.field(factory=dict)
    feeding: Feeding | None = None
    #: What feeds its piped inputs.
    pipes: list[Feeding] = attrs.field(factory=list)
    holders: set[Holder] = attrs.field(factory=set)
    #: The id of its worker, and the `ack` that the worker gets when the end is stored.
    pending_ack: tuple[str, Ack] | None = None
    #: Whether all of its inputs have arrived: it is being stored, and accepts no more input.
    uploaded: bool = False
    #: Whether it is in the store, and `accepted` was sent.
    accepted: bool = False
    #: When a holder last came.
    held_at: float = -math.inf
    #: Since when it has had no holder, which begins its resume window; None while it has one.
    abandoned_at: float | None = None
    queued_at: float = 0.0
    last_frame_at: float = 0.0
    #: When this relay started its attempt, and until when that may only make again what the relay has, without a word.
    attempt_started_at: float = -math.inf
    catches_up_until: float = -math.inf
    #: How long an attempt took to make what the relay has, or longer; infinite where nobody knows.
    made_s: float = math.inf
    #: The `entry.started_at` for which its wait was last counted.
    wait_counted_at: float | None = None
    #: When its worker was asked to stop it; None again when it is queued again or another attempt starts.
    stopped_at: float | None = None
    #: When it was restored after a restart of the relay.
    restored_at: float = -math.inf
    #: How long its worker may take to reconnect, counted from `entry.worker_lost_at`.
    worker_grace_s: float = 0.0
    first_frame_at: float | None = None
    ended_at: float | None = None
    format: AudioFormat | None = None
    video: VideoFormat | None = None
    audio_bytes: int = 0
    fraction: float | None = None
    #: Whether there are `output` frames among its frames.
    has_outputs: bool = False
    code: str | None = None
    message: str | None = None
    #: Code and message of the latest loss of an attempt.
    lost: tuple[str, str] | None = None
    #: Of the latest loss of an attempt; of the failure once it has ended.
    details: dict[str, Value] = attrs.field(factory=dict)
    #: For operators only: what its attempts that did not complete printed, the latest last.
    report: str = ""
    #: What else is known once it has ended.
    outcome: Outcome = NOT_ENDED
    #: Its timeline: one packed map per entry, so that 10,000 ended requests take little memory.
    timeline: list[bytes] = attrs.field(factory=list)
    timeline_dropped: int = 0
    #: A summary of the submission, once it has ended; see `relayd.requests.summary`.
    summary: bytes = b""
    #: The position and queue length last sent to the holders.
    last_position_sent: tuple[int, int] | None = None
    #: False once it is completed and its frames are no longer kept.
    has_result: bool = True
    changed: trio.Event = attrs.field(factory=trio.Event)

    @property
    def request_id(self) -> str:
        """The id that the client chose."""
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
        """Make a request that begins now; timeouts that `submit` does not set are those of its space."""
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
            cache_key=cache_key(submit, principal, config),
            **more,
        )
        request.add_timeline("taken_up" if request.accepted else "created")
        return request

    def begin_attempt(self, from_seq: int, now: float) -> None:
        """Note that an attempt starts. It has twice the time that an earlier one took to make what is known again."""
        if self.attempt_started_at < self.last_frame_at and math.isfinite(self.attempt_started_at):
            self.made_s = self.last_frame_at - self.attempt_started_at
        self.catches_up_until = now + 2.0 * self.made_s if from_seq else -math.inf
        self.attempt_started_at = self.last_frame_at = now

    def add_timeline(self, event: str, **more: Value) -> None:
        """Add an event to the timeline; when it is full, an entry in the middle is dropped."""
        if len(self.timeline) >= FIRST_STEPS + LATEST_STEPS:
            del self.timeline[FIRST_STEPS]
            self.timeline_dropped += 1
        at_s = round(trio.current_time() - self.created_at, 3)
        fields = {key: value for key, value in more.items() if value is not None}
        self.timeline.append(msgpack.packb({"at_s": at_s, "event": event, **fields}))

    def add_report(self, text: str) -> None:
        """Add what an attempt printed, once, even if it is sent again over a new link; the oldest is cut off."""
        if text.strip() not in self.report:
            self.report = f"{self.report}\n{text}".strip()[-MAX_REPORT_CHARS:]

    def resumed(self) -> None:
        """Note that its worker has reconnected and continues with it."""
        entry, log = self.entry, self.log
        is_silent = self.last_frame_at <= self.attempt_started_at
        self.last_frame_at = trio.current_time()
        if is_silent:  # it has not sent a frame yet
            self.attempt_started_at = self.last_frame_at
        self.add_timeline("worker_back", worker_id=entry.worker_id, attempt=entry.attempt)
        if entry.attempt > 1 and not entry.reproducible and not (log.next_seq or log.starts):
            # After a restart of the relay: a reader with frames of an earlier attempt must start this one from 0.
            log.restart(entry.attempt, 0)
        self.notify_worker_state()
        self.wake()

    def notify_worker_state(self) -> None:
        """Notify its holders that its worker is away, or that a worker runs it again."""
        for holder in self.holders:
            holder.on_worker(self)

    def worker_message(self) -> WorkerAway | WorkerBack:
        """Return what a reader of this running request has to know about its worker."""
        lost_at = self.entry.worker_lost_at
        if lost_at is None:
            return WorkerBack(request_id=self.request_id, attempt=self.entry.attempt)
        left_s = lost_at + self.worker_grace_s - trio.current_time()
        return WorkerAway(request_id=self.request_id, wait_s=round(max(0.0, left_s), 3))

    def queued_message(self, place: QueuePosition) -> Queued:
        """Return what a reader has to know about its place, and why it waits again."""
        code, message = self.lost or (None, "")
        return Queued(
            request_id=self.request_id,
            position=place.position,
            of=place.of,
            eta_s=place.eta_s,
            code=code,
            message=message,
        )

    def hold(self, holder: Holder) -> None:
        """Add a holder: while a request has one, its resume window does not run."""
        self.holders.add(holder)
        self.held_at = trio.current_time()
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
        """Release what only a running request needs: its params, up to 64 KiB, and its inputs."""
        self.summary = self.summary or self.summarize(KEPT_BYTES)
        self.submit = attrs.evolve(self.submit, params={}, inputs={})
        self.drop_inputs()
        self.fed = {}

    def summarize(self, most_bytes: int) -> bytes:
        """Summarize what it asks for; see `relayd.requests.summary`."""
        return summarize(self.submit, most_bytes, {name: fed.size for name, fed in self.fed.items()})

    def drop_inputs(self) -> None:
        """Release the inputs, which are in the store."""
        self.inputs.clear()
        self._digests.clear()

    def same_content(self, submit: Submit) -> bool:
        """Whether `submit` equals this request, apart from the id."""
        return self.content == content_hash(submit)

    @property
    def audio_s(self) -> float | None:
        """Seconds of audio that the current attempt has produced; None if it has no audio format."""
        if self.format is None:
            return self.outcome.audio_s
        return round(self.audio_bytes / self.format.sample_bytes / self.format.sample_rate, 3)

    @property
    def makes_video(self) -> bool:
        """Whether the current attempt, or the one that it ended with, has a video format."""
        return self.video is not None or self.outcome.has_video

    def delivered(self) -> dict[str, Value]:
        """Return how much was delivered, for the `details` of a failure; empty if nothing was."""
        if not self.log.next_seq:
            return {}
        return {"delivered_frames": self.log.next_seq} | ({"delivered_s": self.audio_s} if self.audio_s else {})

    def wake(self) -> None:
        """Wake the request's tasks, since a deadline may have changed, or the attempt may be over."""
        self.changed.set()
        self.changed = trio.Event()
        if self.feeding is not None:
            self.feeding.wake()
            if not self.live:
                self.feeding = None
        for pipe in self.pipes:
            pipe.wake()
        if not self.live:
            self.pipes = []

    def missing_input(self) -> str | None:
        """Return the name of an input that is not complete yet; None if all are."""
        return next((n for n, info in self.submit.inputs.items() if len(self.inputs.get(n, b"")) < info.size), None)

    def add_input(self, name: str, offset: int, data: bytes) -> ErrorCode | None:
        """Add a piece of an input; bytes that were received before (from a client that reconnected) are ignored.

        Returns:
            None if the piece was added; `INPUT_MISMATCH` if the input was not announced or the piece leaves a gap;
            `INPUT_TOO_LARGE` if it exceeds the announced size.
        """
        info = self.submit.inputs.get(name)
        if info is None:
            return ErrorCode.INPUT_MISMATCH
        have = self.inputs.setdefault(name, bytearray())
        if offset > len(have):
            return ErrorCode.INPUT_MISMATCH
        if offset + len(data) > info.size:
            return ErrorCode.INPUT_TOO_LARGE
        added = data[len(have) - offset :]
        have += added
        self._digests.setdefault(name, hashlib.sha256()).update(added)
        return None

    def damaged_input(self) -> str | None:
        """Return the name of an input that does not match its announced SHA-256; None if all match."""
        for name, info in self.submit.inputs.items():
            if info.is_fed:
                continue
            digest = self._digests.get(name) or hashlib.sha256()
            if digest.hexdigest() != info.sha256:
                return name
        return None

    def deadline(
        self, resume_window_s: float, cancel_grace_s: float, feed_idle_timeout_s: float = math.inf
    ) -> tuple[float, Expiry]:
        """Return the earliest deadline (monotonic seconds), and which one it is."""
        entry = self.entry
        due: list[tuple[float, Expiry]] = []
        if self.abandoned_at is not None and not self.submit.detach and self.stopped_at is None:
            due.append((self.abandoned_at + resume_window_s, Expiry.NOBODY_HOLDS))
        if self.waits_for_source:
            pass  # its own waiting begins when it is queued
        elif entry.state is not State.RUNNING:
            due.append((self._once_settled(self.queued_at + self.queue_timeout_s), Expiry.QUEUE_TIMEOUT))
        elif self.stopped_at is not None:
            due.append((self.stopped_at + cancel_grace_s, Expiry.CANCEL_UNANSWERED))
        elif not entry.copied:  # otherwise the deadlines of the request that it is copied from hold
            due.append((self._once_settled(entry.started_at + self.run_timeout_s), Expiry.RUN_TIMEOUT))
            if entry.worker_lost_at is not None:
                due.append((entry.worker_lost_at + self.worker_grace_s, Expiry.WORKER_GONE))
            elif any(fed.is_starving for fed in self.fed.values()):
                if self.awaited_inputs:
                    fed_at = max(max(fed.received_at, fed.taken_at) for fed in self.fed.values())
                    since = max(fed_at, entry.started_at, self.held_at, self.abandoned_at or -math.inf)
                    due.append((since + feed_idle_timeout_s, Expiry.FEED_TIMEOUT))
            elif entry.streams:
                took_at = max((max(fed.taken_at, fed.starved_until) for fed in self.fed.values()), default=-math.inf)
                silent_until = self.catches_up_until if self.last_frame_at <= self.attempt_started_at else -math.inf
                since = max(self.last_frame_at, took_at, silent_until)
                due.append((since + self.idle_timeout_s, Expiry.IDLE_TIMEOUT))
        return min(due, key=lambda pair: pair[0], default=(math.inf, Expiry.RUN_TIMEOUT))

    @property
    def waits_for_source(self) -> bool:
        """Whether it is complete, and is queued only when each source of its piped inputs has begun."""
        return self.entry.state is State.UPLOADING and self.uploaded and self.entry.is_piped

    def _once_settled(self, due: float) -> float:
        """Return a deadline that is not the first thing after a restart: the worker may come back with the end."""
        return min(due + UNHEARD_GRACE_S, max(due, self.restored_at + UNHEARD_GRACE_S))

    @property
    def awaited_inputs(self) -> list[str]:
        """Return the inputs of which a client is to send more in time; if it is away, its resume window decides."""
        is_held = self.abandoned_at is None
        if not is_held and not self.submit.detach:
            return []
        return [name for name, fed in self.fed.items() if fed.awaits_feeder and not (fed.patient and is_held)]


def cache_key(submit: Submit, principal: str, config: SpaceConfig) -> bytes:
    """Return what a request has in common with those whose results may answer it; b"" if none may.

    Params are compared as they were sent: the default that a schema names is only an annotation. What is in a fed input
    is not known before its end.
    """
    if not config.cache_s or submit.cache is False or any(info.is_fed for info in submit.inputs.values()):
        return b""
    inputs = {name: [info.media_type, info.sha256] for name, info in submit.inputs.items()}
    asked = [submit.space, None if config.cache_shared else principal, submit.params, inputs]
    return hashlib.sha256(msgpack.packb(_with_sorted_keys(asked))).digest()


def content_hash(submit: Submit) -> bytes:
    """Return the SHA-256 of what a `submit` asks for; the order of keys in its maps does not matter.

    Its id does not count, nor do priority and timeouts: an operator's limits change them, and a submit that is sent
    again after such a change is still the same request.
    """
    wire = submit.to_map()
    for name in ("request_id", "priority", "queue_timeout_s", "run_timeout_s"):
        wire.pop(name, None)
    if wire.get("cache"):  # as if it were absent
        del wire["cache"]
    return hashlib.sha256(msgpack.packb(_with_sorted_keys(wire))).digest()


def _with_sorted_keys(value: Value) -> Value:
    if isinstance(value, dict):
        return {key: _with_sorted_keys(value[key]) for key in sorted(value)}
    return [_with_sorted_keys(item) for item in value] if isinstance(value, list) else value
