"""A worker's connection: its frames in, its assignments out.

A frame is appended to its request's log as the bytes that came; only the envelope is looked at here.
"""

from collections.abc import Callable, Mapping
from typing import Any

import attrs
import structlog
import trio

from protocol.link.base import Link
from protocol.wire.audio_envelope import PREFIX_BYTES, audio_prefix, match_audio, match_audio_run
from protocol.wire.codec import decode
from protocol.wire.errors import ErrorCode, LinkError, ProtocolError, UnknownType
from protocol.wire.frames import (
    Audio,
    Cancelled,
    Completed,
    Failed,
    Frame,
    Output,
    Progress,
    Started,
)
from protocol.wire.messages import (
    FROM_WORKER,
    MAX_INPUT_CHUNK_BYTES,
    Ack,
    Assign,
    Cancel,
    Drain,
    Draining,
    Error,
    Input,
    Ping,
    Pong,
    Register,
    Registered,
    Rejected,
    Undrain,
)
from protocol.wire.params_schema import check_schema
from protocol.wire.structs import Running
from protocol.wire.validators import Message
from relayd.auth.tokens import Principal
from relayd.core.relay import Relay
from relayd.frames.frame_log import FrameLog
from relayd.requests.request import Request
from relayd.scheduling.model import ScheduledRequest, State
from relayd.stats.counters import WorkerStats

log = structlog.get_logger("relayd.worker")

#: Codes of `failed` that tell of a broken engine, not of a bad request: such an attempt may be tried again.
ENGINE_FAULTS = frozenset({ErrorCode.ENGINE_FAILED, ErrorCode.MODEL_NOT_LOADED})
#: A global is found faster than a member of an enum, and every frame asks.
_RUNNING = State.RUNNING
#: Of a worker's name in its id, which the wire gives 64 characters.
MAX_NAME_CHARS = 48
#: Input bytes on their way to a worker at once, so that assignments and cancels are not stuck behind an upload.
FEED_BYTES = 1024 * 1024


@attrs.define(eq=False)
class ActiveAttempt:
    """An attempt that runs here, and where its frames go."""

    request: Request
    entry: ScheduledRequest
    log: FrameLog
    attempt: int
    #: Of one sample over all channels.
    sample_bytes: int = 0

    @classmethod
    def of(cls, request: Request) -> "ActiveAttempt":
        """The attempt of a request that runs now."""
        form = request.format
        return cls(request, request.entry, request.log, request.entry.attempt, form.sample_bytes if form else 0)


@attrs.define(eq=False)
class WorkerHandler:
    """One connection of a worker; `nursery` holds the inputs on their way to it."""

    connection_id: str
    link: Link
    principal: Principal
    relay: Relay
    nursery: trio.Nursery
    agent: str = ""
    worker_id: str = ""
    engine: str = ""
    registered: bool = False
    #: What audio frames of an attempt begin with -> the attempt; of those that have begun, and have a format.
    _active: dict[bytes, ActiveAttempt] = attrs.field(factory=dict)
    _stats: WorkerStats = attrs.field(factory=WorkerStats)

    @property
    def principal_name(self) -> str:
        """Whose worker it is."""
        return self.principal.name

    @property
    def peer(self) -> str:
        """Where it connects from."""
        return self.link.peer

    @property
    def rtt_s(self) -> float | None:
        """Round trip of the last ping."""
        return self.link.rtt_s

    @property
    def received_at(self) -> float:
        """Trio time of the last sign of life."""
        return self.link.received_at

    # -- what the relay asks of it

    def send(self, message: Message) -> None:
        """Send a message; without effect on a link that is gone, whose end is seen elsewhere."""
        try:
            self.link.send(message)
        except LinkError:
            return

    def assign(self, request: Request, from_seq: int) -> None:
        """Hand it a request; the inputs follow as fast as it takes them."""
        submit, entry = request.submit, request.entry
        self.send(
            Assign(
                request_id=request.request_id,
                attempt=entry.attempt,
                from_seq=from_seq,
                space=submit.space,
                principal=request.principal,
                params=submit.params,
                inputs=submit.inputs,
                run_timeout_s=request.run_timeout_s,
            )
        )
        if submit.inputs and self.link.gone is None:  # else its nursery may be closed
            self.nursery.start_soon(self._send_inputs, request, entry.attempt)

    async def _send_inputs(self, request: Request, attempt: int) -> None:
        """Send the inputs of an attempt, for as long as it is the one that runs here."""
        try:
            for name in request.submit.inputs:
                data = await self.relay.read_input(request, name)
                if data is None:
                    return
                for offset in range(0, len(data), MAX_INPUT_CHUNK_BYTES):
                    await self.link.drained(FEED_BYTES)
                    if self.relay.attempt_of(self, request.request_id, attempt) is None:
                        return
                    piece = bytes(data[offset : offset + MAX_INPUT_CHUNK_BYTES])
                    self.send(Input(request_id=request.request_id, name=name, offset=offset, data=piece))
        except LinkError:
            return
        except Exception:  # this task lives in the nursery of all connections
            log.exception("internal error in request", request_id=request.request_id)
            self.relay.fail_internal(request)

    def cancel(self, request_id: str, reason: str) -> None:
        """Have it stop a request."""
        self.send(Cancel(request_id=request_id, reason=reason))

    def acknowledge(self, ack: Ack) -> None:
        """Have it forget an attempt."""
        self.send(ack)

    def drain(self, reason: str) -> None:
        """Have it finish and leave."""
        self.send(Drain(reason=reason))

    def undrain(self) -> None:
        """Have it take requests again."""
        self.send(Undrain())

    def disconnect(self, reason: str) -> None:
        """Cut it off; it may come back."""
        self.link.abort(reason)

    # -- its life

    def on_messages(self, messages: list[bytes]) -> None:
        """Take its messages.

        Raises:
            ProtocolError: the worker broke the rules.
        """
        if len(messages) == 1:
            if not self.forward_audio(messages[0]):
                self._handle_message(messages[0])
            return
        streak: dict[bytes, list[bytes]] = {}
        for data in messages:
            active = data[:PREFIX_BYTES]
            frames = streak.get(active)
            if frames is not None:
                frames.append(data)
            elif active in self._active:
                streak[active] = [data]
            else:  # no audio of an attempt that is known; what came before it counts before it
                self._flush_run(streak)
                self._handle_message(data)
        self._flush_run(streak)

    def forward_audio(self, data: bytes) -> bool:
        """Take a message if it is audio of an attempt that runs here, and due; else return False."""
        active = self._active.get(data[:PREFIX_BYTES])
        if active is None:
            return False
        pcm_bytes = match_audio(data, active.log.next_seq)
        return (
            pcm_bytes >= 0 and not pcm_bytes % active.sample_bytes and self._add(active, [data], len(data), pcm_bytes)
        )

    def _flush_run(self, streak: dict[bytes, list[bytes]]) -> None:
        for name, frames in streak.items():
            active = self._active.get(name)
            pcm_bytes = match_audio_run(frames, active.log.next_seq, active.sample_bytes) if active is not None else -1
            if active is None or pcm_bytes < 0 or not self._add(active, frames, sum(map(len, frames)), pcm_bytes):
                for data in frames:
                    self._handle_message(data)
        streak.clear()

    def _handle_message(self, data: bytes) -> None:
        """Take a message of any kind."""
        try:
            message = decode(data, FROM_WORKER)
        except UnknownType as fault:
            self.send(Error(code=fault.code, message=str(fault)))
            return
        if not self.registered and not isinstance(message, Register | Ping | Pong):
            raise ProtocolError(f"{message.TYPE} before register")
        HANDLERS[type(message)](self, message, data)

    def close(self) -> None:
        """Its link is gone."""
        self._active.clear()
        if self.registered:
            log.info("worker disconnected", worker=self.worker_id, why=self.link.reason or "closed")
            self.relay.workers.unlink(self)

    # -- messages

    def _ping(self, ping: Ping, _data: bytes) -> None:
        self.send(Pong(timestamp=ping.timestamp, server_time=self.relay.now_unix()))

    def _register(self, register: Register, _data: bytes) -> None:
        if self.registered:
            self.relay.workers.update_registration(self, register)
            return
        self.worker_id = f"{register.worker[:MAX_NAME_CHARS]}-{register.instance[:8]}"
        self.engine = register.engine
        if refusal := self._refusal(register):
            self.send(refusal)
            return
        joined = self.relay.workers.register(self, register)
        if isinstance(joined, Rejected):
            log.warning("worker refused", worker=self.worker_id, code=joined.code, why=joined.message)
            self.send(joined)
            return
        self.registered = True
        self._stats = self.relay.stats.worker(self.worker_id)
        log.info(
            "worker registered",
            worker=self.worker_id,
            spaces=register.spaces,
            slots=register.slots,
            engine=register.engine,
            resumes=len(joined.resume),
        )
        # Answered before anything that follows from it is carried out: an `assign` finds the worker ready.
        resume = tuple(
            Running(
                request_id=entry.request_id,
                attempt=entry.attempt,
                next_seq=self.relay.requests[entry.request_id].log.next_seq,
            )
            for entry in joined.resume
        )
        # What has ended here and is not safe yet is kept there: it is acknowledged in a moment.
        owed = tuple(each for each in register.running if self.relay.has_pending_ack(each.request_id, each.attempt))
        abandon = sorted(set(joined.abandon).difference(each.request_id for each in owed))
        self.send(Registered(worker_id=self.worker_id, resume=resume + owed, abandon=abandon))
        for entry in joined.resume:  # it may not have heard the `cancel`
            if entry.cancel_reason is not None:
                self.cancel(entry.request_id, entry.cancel_reason)
        self.relay.workers.finish_registration(register, self.worker_id, joined)

    def _refusal(self, register: Register) -> Rejected | None:
        for name in register.spaces:
            if not self.principal.may_use(name):
                message = f"principal {self.principal_name!r} may not serve space {name!r}; ask for a token that may"
                return Rejected.because(ErrorCode.FORBIDDEN, message)
        if self.relay.draining.is_set() and not register.running:  # what still runs may come to its end
            return Rejected.because(
                ErrorCode.SHUTTING_DOWN, "the relay is shutting down; try again when it is back", retry_after_s=1.0
            )
        try:
            check_schema(register.params)
        except ValueError as fault:
            return Rejected.because(ErrorCode.INVALID_PARAMS, f"register: {fault}")
        return None

    def _draining(self, _draining: Draining, _data: bytes) -> None:
        self.relay.workers.drain(self.worker_id)

    def _frame(self, frame: Frame, data: bytes) -> None:
        """A frame that is not the last: into the log as it came, or dropped if its attempt is over."""
        request = self._request_of(frame)
        if request is None:
            self._active.pop(audio_prefix(frame.request_id, frame.attempt), None)
            return
        if not self._is_next(request, frame):
            return
        pcm_bytes, is_output = 0, isinstance(frame, Audio | Output)
        if isinstance(frame, Audio):
            pcm_bytes = len(frame.pcm)
            if request.format is None or pcm_bytes % request.format.sample_bytes:
                raise ProtocolError("audio before `started` with a format, or not of whole samples")
        elif isinstance(frame, Started):
            self.relay.stats.count_restarted(request)
            request.format = frame.format
        elif isinstance(frame, Progress):
            request.fraction = frame.fraction
        active = ActiveAttempt.of(request)
        # Audio need not go through the codec from now on; also that of a worker which came back in the middle of it.
        if active.sample_bytes and (name := audio_prefix(frame.request_id, frame.attempt)):
            self._active[name] = active
        self._add(active, [data], len(data), pcm_bytes, is_output)

    def _add(
        self, active: ActiveAttempt, frames: list[bytes], size: int, pcm_bytes: int, is_output: bool = True
    ) -> bool:
        """Add the frames that are due to a request's log, and keep account of them.

        Args:
            active: their attempt.
            frames: none of them the last.
            size: of them together, in bytes.
            pcm_bytes: of audio in them.
            is_output: whether they are something to hear or to have.

        Returns:
            False where the attempt does not run here any more; they are then as they were.
        """
        request, entry, frame_log = active.request, active.entry, active.log
        if entry.state is not _RUNNING or entry.attempt != active.attempt or entry.worker_id != self.worker_id:
            return False
        frame_log.extend(frames, size)  # first: whoever listens need not wait for the accounts
        request.audio_bytes += pcm_bytes
        request.last_frame_at = self.link.received_at
        if is_output and (request.first_frame_at is None or not entry.has_output):
            self._on_first_output(request)
        stats, relay = self._stats, self.relay
        stats.frames += len(frames)
        stats.frame_bytes += size
        entry.next_seq = frame_log.next_seq
        if relay.watchers:
            relay.mark_busy("requests", request.request_id)
        if frame_log.size_bytes > (limit := relay.config.limits.max_result_bytes):
            relay.fail(
                request,
                ErrorCode.RESULT_TOO_LARGE,
                f"its result is over {limit} bytes; ask for less, or raise limits.max_result_bytes",
            )
        return True

    def _on_first_output(self, request: Request) -> None:
        """It has put something out, for the first time or again."""
        if not request.entry.has_output:
            request.entry.has_output = True
            self.relay.save_status(request)  # a relay that is started again must not try anew what was heard
        if request.first_frame_at is None:
            request.first_frame_at = now = request.last_frame_at
            request.add_timeline("first_frame")
            self.relay.stats.observe_first_frame(request, now)
            self.relay.mark_changed("requests", request.request_id)

    def _last_frame(self, frame: Frame, data: bytes) -> None:
        """The attempt's end: its slot is free, whether anybody still waits for it or not."""
        self._active.pop(audio_prefix(frame.request_id, frame.attempt), None)
        request = self._request_of(frame)
        relay = self.relay
        is_next = request is not None and self._is_next(request, frame)
        ack = Ack(request_id=frame.request_id, attempt=frame.attempt, seq=frame.seq)
        owed = (self.worker_id, ack)
        if request is None or not is_next:
            if not relay.has_pending_ack(frame.request_id, frame.attempt):
                self.send(ack)
        elif isinstance(frame, Failed) and frame.retryable and frame.code in ENGINE_FAULTS:
            self.send(ack)  # first, so that the worker forgets this attempt before it is handed the next
            relay.workers.lose_attempt_of_live_worker(
                request, self, ErrorCode(frame.code), frame.message, frame.details
            )
        elif isinstance(frame, Cancelled) and request.entry.cancel_reason is None:
            # Nobody cancelled the request: it was told to stop an attempt that was given up, and was cut off before it
            # had; or it stopped one by itself.
            self.send(ack)
            relay.workers.lose_attempt_of_live_worker(
                request, self, ErrorCode.WORKER_LOST, f"its worker stopped it: {frame.reason}"
            )
        elif isinstance(frame, Completed):
            relay.finish_request(request, data, State.COMPLETED, owed=owed)
        elif isinstance(frame, Failed):
            relay.finish_request(request, data, State.FAILED, code=frame.code, message=frame.message, owed=owed)
        elif isinstance(frame, Cancelled):
            relay.finish_request(request, data, State.CANCELLED, message=frame.reason, owed=owed)
        relay.workers.release(self, frame.request_id, frame.attempt)

    def _request_of(self, frame: Frame) -> Request | None:
        request = self.relay.attempt_of(self, frame.request_id, frame.attempt)
        if request is None:
            self.relay.fenced_frames += 1
        return request

    def _is_next(self, request: Request, frame: Frame) -> bool:
        """Whether it is the frame that is missing; one that is here already was sent again after a cut."""
        missing = request.log.next_seq
        if frame.seq > missing:
            raise ProtocolError(f"frame {frame.seq} of request {frame.request_id}, and {missing} has not come")
        return frame.seq == missing


#: Of the class: bound methods kept by each link would refer to it, and keep it until a garbage collection.
HANDLERS: Mapping[type[Message], Callable[[WorkerHandler, Any, bytes], None]] = {
    Ping: WorkerHandler._ping,
    Pong: lambda _worker, _pong, _data: None,
    Register: WorkerHandler._register,
    Draining: WorkerHandler._draining,
    Started: WorkerHandler._frame,
    Progress: WorkerHandler._frame,
    Audio: WorkerHandler._frame,
    Output: WorkerHandler._frame,
    Completed: WorkerHandler._last_frame,
    Failed: WorkerHandler._last_frame,
    Cancelled: WorkerHandler._last_frame,
}
