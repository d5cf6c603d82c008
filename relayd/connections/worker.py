"""A worker's connection: handles its messages and frames, and sends its assignments.

The bytes of a frame are appended to the log of its request unchanged; only the envelope is examined here.
"""

import time
from collections.abc import Callable, Mapping
from typing import Any

import attrs
import structlog
import trio

from protocol.link.base import Link
from protocol.log_lines import redacted
from protocol.printable import printable
from protocol.wire.audio_envelope import PREFIX_BYTES, audio_prefix, match_audio, match_audio_run
from protocol.wire.codec import decode, repair
from protocol.wire.errors import BadText, ErrorCode, LinkError, ProtocolError, UnknownType
from protocol.wire.frames import (
    Audio,
    Cancelled,
    Completed,
    Failed,
    Frame,
    Output,
    Progress,
    Started,
    Video,
)
from protocol.wire.messages import (
    FROM_WORKER,
    Ack,
    Assign,
    Cancel,
    Drain,
    Draining,
    Error,
    InputAck,
    Ping,
    Pong,
    Register,
    Registered,
    Rejected,
    Report,
    Undrain,
)
from protocol.wire.params_schema import check_schema
from protocol.wire.structs import Running
from protocol.wire.validators import Message
from relayd.auth.tokens import Principal
from relayd.connections.connection import log_lines
from relayd.connections.input_sender import InputSender
from relayd.core.access import find_space
from relayd.core.principals import PROGRESS_S, PrincipalUsage
from relayd.core.relay import Relay
from relayd.core.workers import REGISTER_AGAIN_S
from relayd.frames.frame_log import FrameLog
from relayd.requests.request import Request
from relayd.scheduling.model import ScheduledRequest, State
from relayd.scheduling.scheduler import ENGINE_FAULTS
from relayd.stats.counters import WorkerStats

log = structlog.get_logger("relayd.worker")

#: A global is faster than a member of an enum, and it is used for every frame.
_RUNNING = State.RUNNING
#: Characters of a worker's name in its id, for which the wire allows 64 characters.
MAX_NAME_CHARS = 48
#: Spaces of a worker that a log line names.
MAX_LISTED = 16


@attrs.define(eq=False)
class ActiveAttempt:
    """An attempt that runs on this worker, and the log for its frames."""

    request: Request
    entry: ScheduledRequest
    log: FrameLog
    attempt: int
    #: Bytes of one sample over all channels; 0 without an audio format.
    sample_bytes: int = 0

    @classmethod
    def of(cls, request: Request) -> "ActiveAttempt":
        """Return the current attempt of a request."""
        audio = request.format
        return cls(request, request.entry, request.log, request.entry.attempt, audio.sample_bytes if audio else 0)


@attrs.define(eq=False)
class WorkerHandler:
    """One connection of a worker; the tasks that send inputs run in `nursery`."""

    connection_id: str
    link: Link
    principal: Principal
    relay: Relay
    nursery: trio.Nursery
    agent: str = ""
    worker_id: str = ""
    #: What its principal uses; None for one that is not limited.
    usage: PrincipalUsage | None = None
    engine: str = ""
    registered: bool = False
    #: One process of its engine serves all slots.
    shared: bool = False
    #: Trio time of the first refusal, 0 before.
    refused_at: float = 0.0
    #: First bytes of an attempt's audio frames -> the attempt, for running attempts that have an audio format.
    _active: dict[bytes, ActiveAttempt] = attrs.field(factory=dict)
    _stats: WorkerStats = attrs.field(factory=WorkerStats)
    _inputs: InputSender = attrs.field(init=False)

    def __attrs_post_init__(self) -> None:
        self._inputs = InputSender(self.link, self.relay, self.nursery)

    @property
    def principal_name(self) -> str:
        """Name of the worker's principal."""
        return self.principal.name

    def may_serve(self, space: str) -> bool:
        """Whether the worker's principal may serve a space."""
        return self.principal.may_use(space)

    @property
    def peer(self) -> str:
        """Address that the worker connects from."""
        return self.link.peer

    @property
    def rtt_s(self) -> float | None:
        """Round-trip time of the last ping in seconds; None before the first."""
        return self.link.rtt_s

    @property
    def received_at(self) -> float:
        """Trio time at which data was last received."""
        return self.link.received_at

    # -- `WorkerPort`: messages to the worker

    def send(self, message: Message) -> None:
        """Send a message; no effect on a link that has ended, which is handled elsewhere."""
        try:
            self.link.send(message)
        except LinkError:
            return

    def assign(self, request: Request, from_seq: int) -> None:
        """Send `assign`; the inputs follow as fast as the worker reads them."""
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
        self._inputs.begin(self, request)

    def cancel(self, request_id: str, reason: str) -> None:
        """Send `cancel`."""
        self.send(Cancel(request_id=request_id, reason=reason))

    def acknowledge(self, ack: Ack) -> None:
        """Send `ack`."""
        self.send(ack)

    def drain(self, reason: str) -> None:
        """Send `drain`."""
        self.send(Drain(reason=reason))

    def undrain(self) -> None:
        """Send `undrain`."""
        self.send(Undrain())

    def ping(self) -> None:
        """Ask for a sign of life."""
        self.send(Ping(timestamp=self.relay.now_unix()))

    def disconnect(self, reason: str) -> None:
        """End the connection; the worker may reconnect."""
        self.link.abort(reason)

    # -- life cycle

    def on_messages(self, messages: list[bytes]) -> int:
        """See `RoleHandler.on_messages`; audio that is due is not counted, because passing it on costs next to nothing.

        Raises:
            ProtocolError: the worker broke the rules.
        """
        usage = self.usage
        began = time.thread_time() if usage is not None else 0.0
        if len(messages) == 1 and self.forward_audio(messages[0]):
            if usage is not None:
                usage.waive(time.thread_time() - began)
            return 1
        if usage is not None and not usage.charge(0.0, trio.current_time()):
            return 0
        run: dict[bytes, list[bytes]] = {}
        for number, data in enumerate(messages, 1):
            prefix = data[:PREFIX_BYTES]
            frames = run.get(prefix)
            if frames is not None:
                frames.append(data)
            elif prefix in self._active:
                run[prefix] = [data]
            else:  # not audio of a known attempt; the frames before it are added first
                self._flush_run(run)
                self._handle_message(data)
                if usage is not None:
                    ended = time.thread_time()
                    if not usage.charge(ended - began, trio.current_time()):
                        return number
                    began = ended
        decoded = self._flush_run(run)
        if usage is not None:
            spent_s = time.thread_time() - began
            if decoded:
                usage.charge(spent_s, trio.current_time())
            else:
                usage.waive(spent_s)
        return len(messages)

    def forward_audio(self, data: bytes) -> bool:
        """Add a message to its log if it is the next audio frame of a running attempt; otherwise return False."""
        active = self._active.get(data[:PREFIX_BYTES])
        if active is None:
            return False
        pcm_bytes = match_audio(data, active.log.next_seq)
        return (
            pcm_bytes >= 0 and not pcm_bytes % active.sample_bytes and self._add(active, [data], len(data), pcm_bytes)
        )

    def _flush_run(self, run: dict[bytes, list[bytes]]) -> bool:
        """Add the frames of a run to their logs; returns whether some had to be decoded."""
        decoded = False
        for prefix, frames in run.items():
            active = self._active.get(prefix)
            pcm_bytes = match_audio_run(frames, active.log.next_seq, active.sample_bytes) if active is not None else -1
            if active is None or pcm_bytes < 0 or not self._add(active, frames, sum(map(len, frames)), pcm_bytes):
                decoded = True
                for data in frames:
                    self._handle_message(data)
        run.clear()
        return decoded

    def _handle_message(self, data: bytes) -> None:
        """Decode and handle a message of any type."""
        try:
            try:
                message = decode(data, FROM_WORKER)
            except BadText as fault:  # words of one request's engine: the worker's other requests go on
                data = repair(fault)
                message = decode(data, FROM_WORKER)
        except UnknownType as fault:
            self.send(Error(code=fault.code, message=str(fault)))
            return
        if not self.registered and not isinstance(message, Register | Ping | Pong):
            raise ProtocolError(f"{message.TYPE} before register")
        HANDLERS[type(message)](self, message, data)

    def close(self) -> None:
        """Note that the link has ended, and unlink the worker."""
        self._active.clear()
        if self.registered:
            if (more := log_lines(self.usage)) is not None:
                log.info("worker disconnected", worker=self.worker_id, why=self.link.reason or "closed", **more)
            self.relay.workers.unlink(self)

    # -- messages

    def _ping(self, ping: Ping, _data: bytes) -> None:
        self.send(Pong(timestamp=ping.timestamp, server_time=self.relay.now_unix()))

    def _register(self, register: Register, _data: bytes) -> None:
        if self.registered:
            self.relay.workers.update_registration(self, register)
            return
        if len(spaces := list(dict.fromkeys(register.spaces))) < len(register.spaces):
            register = attrs.evolve(register, spaces=spaces)
        self.worker_id = f"{register.worker[:MAX_NAME_CHARS]}-{register.instance[:8]}"
        self.engine, self.shared = register.engine, register.shared
        if refusal := self._refusal(register):
            self._refuse(refusal)
            return
        impossible = {each.request_id for each in register.running if not self._inputs.is_possible(each)}
        received = {each.request_id: each.inputs for each in register.running}
        if impossible:
            running = tuple(each for each in register.running if each.request_id not in impossible)
            register = attrs.evolve(register, running=running)
        joined = self.relay.workers.register(self, register)
        if isinstance(joined, Rejected):
            self.refused_at = self.refused_at or trio.current_time()
            joined = self.relay.workers.recheck_refusal(self, register, joined, self.refused_at)
            self._refuse(joined)
            return
        self.registered = True
        self._stats = self.relay.stats.worker(self.worker_id)
        if (more := log_lines(self.usage)) is not None:
            log.info(
                "worker registered",
                worker=self.worker_id,
                principal=self.principal_name,
                spaces=register.spaces[:MAX_LISTED],
                slots=register.slots,
                engine=register.engine,
                resumes=len(joined.resume),
                **more,
            )
        # The answer is sent before the decisions are carried out, so that the worker is ready for an `assign`.
        resume = tuple(
            Running(
                request_id=entry.request_id,
                attempt=entry.attempt,
                next_seq=self.relay.requests[entry.request_id].log.next_seq,
            )
            for entry in joined.resume
        )
        # The worker must keep attempts whose end is not stored yet; they are acknowledged soon.
        pending = tuple(each for each in register.running if self.relay.has_pending_ack(each.request_id, each.attempt))
        abandon = sorted({*joined.abandon, *impossible}.difference(each.request_id for each in pending))
        self.send(Registered(worker_id=self.worker_id, resume=resume + pending, abandon=abandon))
        for entry in joined.resume:
            self._inputs.resume(self, self.relay.requests[entry.request_id], received[entry.request_id])
            # The worker may not have received the `cancel`.
            if entry.cancel_reason is not None:
                self.cancel(entry.request_id, entry.cancel_reason)
        self.relay.workers.finish_registration(register, self.worker_id, joined)

    def _refuse(self, refusal: Rejected) -> None:
        if (more := log_lines(self.usage)) is not None:
            who = {"worker": self.worker_id, "principal": self.principal_name, "peer": self.peer}
            log.warning("worker refused", **who, code=refusal.code, why=refusal.message, **more)
        self.send(refusal)

    def _refusal(self, register: Register) -> Rejected | None:
        if self.usage is not None and (wait_s := self.usage.registrations.consume(trio.current_time())):
            message = f"the workers of {self.principal_name!r} register too often; register again later, and less often"
            return Rejected.because(ErrorCode.RATE_LIMITED, message, retry_after_s=max(wait_s, REGISTER_AGAIN_S))
        for field, words in (("worker", register.worker), ("engine", register.engine)):
            if (shown := printable(words)) != words:
                message = f"register.{field}: '{shown}' has control characters; give it another name"
                return Rejected.because(ErrorCode.INVALID_PARAMS, message)
        for name in register.spaces:
            if not self.principal.may_use(name):
                message = f"principal {self.principal_name!r} may not serve space {name!r}; ask for a token that may"
                return Rejected.because(ErrorCode.FORBIDDEN, message)
            if isinstance(unknown := find_space(self.relay, self.principal, name), Rejected):
                return unknown
        if self.relay.draining.is_set() and not register.running:  # running attempts may still end
            return Rejected.because(
                ErrorCode.SHUTTING_DOWN,
                "the relay is shutting down; try again when it has restarted",
                retry_after_s=1.0,
            )
        try:
            check_schema(register.params)
        except ValueError as fault:
            return Rejected.because(ErrorCode.INVALID_PARAMS, f"register: {fault}")
        return None

    def _input_ack(self, ack: InputAck, _data: bytes) -> None:
        self._inputs.on_ack(self, ack)

    def _draining(self, _draining: Draining, _data: bytes) -> None:
        self.relay.workers.drain(self.worker_id)

    def _report(self, report: Report, _data: bytes) -> None:
        """Take it as long as the worker holds the attempt: one that the relay itself has ended is stopped only then."""
        request = self.relay.requests.get(report.request_id)
        held = self.relay.scheduler.state.workers[self.worker_id].held
        if request is not None and held.get(report.request_id) == report.attempt:
            self.relay.add_report(request, f"attempt {report.attempt} on {self.worker_id}:\n{redacted(report.output)}")

    def _frame(self, frame: Frame, data: bytes) -> None:
        """Append a frame that is not the last to its log, or drop it if its attempt is over."""
        request = self._request_of(frame)
        if request is None:
            self._active.pop(audio_prefix(frame.request_id, frame.attempt), None)
            return
        if not self._is_next(request, frame):
            return
        pcm_bytes, is_output = 0, isinstance(frame, Audio | Video | Output)
        if isinstance(frame, Audio):
            pcm_bytes = len(frame.pcm)
            if request.format is None or pcm_bytes % request.format.sample_bytes:
                raise ProtocolError("audio before `started` with a format, or not of whole samples")
        elif isinstance(frame, Video):
            if request.video is None:
                raise ProtocolError("video before `started` with its format")
        elif isinstance(frame, Started):
            if request.format is not None or request.video is not None:
                raise ProtocolError("a second `started`; the formats of an attempt cannot change")
            self.relay.stats.count_restarted(request)
            request.format, request.video = frame.format, frame.video
        elif isinstance(frame, Progress):
            request.fraction = frame.fraction
            if self.usage is not None:
                self.usage.charge(PROGRESS_S, trio.current_time())
        elif isinstance(frame, Output) and frame.mark is None:
            request.has_outputs = True
        runs_alone = request.entry.alone
        if runs_alone and (frame.fraction > 0 if isinstance(frame, Progress) else is_output):
            self.relay.workers.note_begun(frame.request_id)
        active = ActiveAttempt.of(request)
        # From now on audio need not be decoded; this also holds after a worker has reconnected in mid-stream.
        known = active.sample_bytes and (is_output or not runs_alone)
        if known and (prefix := audio_prefix(frame.request_id, frame.attempt)):
            self._active[prefix] = active
        self._add(active, [data], len(data), pcm_bytes, is_output)

    def _add(
        self, active: ActiveAttempt, frames: list[bytes], size: int, pcm_bytes: int, is_output: bool = True
    ) -> bool:
        """Add the next frames to the log of their request, and update its counters.

        Args:
            active: the attempt of the frames.
            frames: the frames, none of which is the last.
            size: bytes of all frames.
            pcm_bytes: bytes of audio in them.
            is_output: whether they contain output, which is audio or data.

        Returns:
            False if the attempt no longer runs on this worker; the frames are then not added.
        """
        request, entry, frame_log = active.request, active.entry, active.log
        if entry.state is not _RUNNING or entry.attempt != active.attempt or entry.worker_id != self.worker_id:
            return False
        frame_log.extend(frames, size)  # first, so that readers need not wait for the counters
        request.audio_bytes += pcm_bytes
        request.last_frame_at = self.link.received_at
        if is_output and (request.first_frame_at is None or not entry.has_output):
            self.relay.on_first_output(request)
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

    def _last_frame(self, frame: Frame, data: bytes) -> None:
        """Handle the last frame of an attempt: end the request if it is current, and free the slot in any case."""
        self._active.pop(audio_prefix(frame.request_id, frame.attempt), None)
        request = self._request_of(frame)
        relay = self.relay
        is_next = request is not None and self._is_next(request, frame)
        innocent = self._innocence(frame)
        ack = Ack(request_id=frame.request_id, attempt=frame.attempt, seq=frame.seq)
        pending_ack = (self.worker_id, ack)
        if is_next and isinstance(frame, Completed):
            relay.scheduler.count_completed(self.worker_id)
        elif is_next and isinstance(frame, Failed) and frame.code in ENGINE_FAULTS and not innocent:
            relay.workers.count_engine_failure(self.worker_id)
        if request is None or not is_next:
            if not relay.has_pending_ack(frame.request_id, frame.attempt):
                self.send(ack)
        elif (
            isinstance(frame, Failed)
            and frame.code in ENGINE_FAULTS
            and (frame.retryable or request.submit.retry == "always")
        ):
            relay.workers.lose_attempt_of_live_worker(
                request, self, ack, ErrorCode(frame.code), frame.message, frame.details, innocent
            )
        elif isinstance(frame, Cancelled) and request.entry.cancel_reason is None:
            # The request was not cancelled: either the worker was asked to stop a lost attempt and was disconnected
            # before it had, or it stopped the attempt by itself.
            relay.workers.lose_attempt_of_live_worker(
                request, self, ack, ErrorCode.WORKER_LOST, f"its worker stopped it: {frame.reason}"
            )
        elif isinstance(frame, Completed):
            relay.finish_request(request, data, State.COMPLETED, result=frame.result, pending_ack=pending_ack)
        elif isinstance(frame, Failed):
            relay.finish_request(
                request,
                data,
                State.FAILED,
                code=frame.code,
                message=frame.message,
                details=frame.details,
                retryable=frame.retryable,
                pending_ack=pending_ack,
            )
        elif isinstance(frame, Cancelled):
            relay.finish_request(request, data, State.CANCELLED, message=frame.reason, pending_ack=pending_ack)
        relay.workers.release(self, frame.request_id, frame.attempt)

    def _innocence(self, frame: Frame) -> bool | None:
        """What the worker of a shared engine says of an attempt that ended with its process; None for any other."""
        innocent = frame.details.get("innocent") if self.shared and isinstance(frame, Failed) else None
        return innocent if isinstance(innocent, bool) else None

    def _request_of(self, frame: Frame) -> Request | None:
        request = self.relay.attempt_of(self, frame.request_id, frame.attempt)
        if request is None:
            self.relay.fenced_frames += 1
        return request

    def _is_next(self, request: Request, frame: Frame) -> bool:
        """Whether `frame` is the next one; an earlier one was sent again after the worker reconnected."""
        next_seq = request.log.next_seq
        if frame.seq > next_seq:
            raise ProtocolError(f"received frame {frame.seq} of request {frame.request_id}, expected frame {next_seq}")
        return frame.seq == next_seq


#: Functions of the class: bound methods would make reference cycles, which only a garbage collection frees.
HANDLERS: Mapping[type[Message], Callable[[WorkerHandler, Any, bytes], None]] = {
    Ping: WorkerHandler._ping,
    Pong: lambda _worker, _pong, _data: None,
    Register: WorkerHandler._register,
    Draining: WorkerHandler._draining,
    Report: WorkerHandler._report,
    InputAck: WorkerHandler._input_ack,
    Started: WorkerHandler._frame,
    Progress: WorkerHandler._frame,
    Audio: WorkerHandler._frame,
    Video: WorkerHandler._frame,
    Output: WorkerHandler._frame,
    Completed: WorkerHandler._last_frame,
    Failed: WorkerHandler._last_frame,
    Cancelled: WorkerHandler._last_frame,
}
