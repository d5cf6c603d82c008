"""A client's connection: handles its messages and sends the frames of its requests."""

import time
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import attrs
import structlog
import trio

from protocol.link.base import Link
from protocol.wire.codec import decode, encode, repair
from protocol.wire.errors import BadText, ErrorCode, LinkError, UnknownType
from protocol.wire.frames import Output, Video
from protocol.wire.messages import (
    FRAMES,
    FROM_CLIENT,
    Accepted,
    Attach,
    Cancel,
    Error,
    Find,
    Found,
    Input,
    InputAck,
    Leave,
    Ping,
    Pong,
    Rejected,
    Spaces,
    SpacesReply,
    Status,
    StatusReply,
    Submit,
    Table,
)
from protocol.wire.structs import ID_PATTERN
from protocol.wire.validators import Message, Value
from relayd.auth.tokens import Principal, reject_readonly
from relayd.core.access import find_request, find_requests
from relayd.core.admission import Admission
from relayd.core.principals import RETRY_S, PrincipalUsage, limits_of, too_fast
from relayd.core.relay import Relay
from relayd.frames.frame_log import HIGH_WATER_BYTES, LOW_WATER_BYTES, FrameReader
from relayd.requests.live_input import PipedInput
from relayd.requests.request import Request
from relayd.scheduling.model import QueuePosition, State
from relayd.views.rows import fed_inputs, found_row, pages, space_row

log = structlog.get_logger("relayd")

#: Called with a handler object and a message of the type that it is registered for.
Handler = Callable[[Any, Any], None]


@attrs.define(eq=False)
class ClientHandler:
    """One connection of a client; `OperatorHandler` adds what an operator can do.

    It is the sink for the frames of its requests: `send_frames` never raises, because a disconnected client must not
    affect the worker whose frames are being delivered.
    """

    #: The messages that the connection may send, and their handlers; a subclass has its own.
    accepted_types: ClassVar[Table] = FROM_CLIENT
    handlers: ClassVar[Mapping[type[Message], Handler]]

    connection_id: str
    link: Link
    principal: Principal
    relay: Relay
    admission: Admission
    #: What its principal uses; None for one that is not limited.
    usage: PrincipalUsage | None = None
    #: Whether it knows `video` frames; otherwise it gets others in their place.
    knows_video: bool = False
    readers: dict[str, FrameReader] = attrs.field(factory=dict)
    held_requests: dict[str, Request] = attrs.field(factory=dict)
    #: The latest position of each request that is sent once the link has drained.
    _deferred_positions: dict[str, QueuePosition] = attrs.field(factory=dict)
    #: Requests whose end is not safe yet, and how often the client has asked how they stand.
    _deferred_statuses: Counter[str] = attrs.field(factory=Counter)
    frames_sent: int = 0
    bytes_sent: int = 0
    #: The value of `bytes_sent` when rates were last computed.
    sampled_bytes: int = 0

    # -- as a sink and a holder

    @property
    def backlog_bytes(self) -> int:
        """Bytes that were sent and that the transport has not accepted yet."""
        return self.link.backlog_bytes

    def send_frames(self, frames: list[bytes], size: int) -> None:
        """Send frames; no effect on a link that has ended."""
        if not self.knows_video:
            frames = [_without_video(data) if b"video" in data else data for data in frames]
            size = sum(map(len, frames))
        try:
            self.link.send_frames(frames)
        except LinkError:
            return
        self.frames_sent += len(frames)
        self.bytes_sent += size

    def send(self, message: Message) -> None:
        """Send a message that the relay itself makes, which is not counted as a frame; no effect on an ended link."""
        try:
            self.link.send(message)
        except LinkError:
            return

    def on_all_sent(self, reader: FrameReader) -> None:
        """Remove a reader that has sent all frames of its request."""
        if self.readers.get(reader.key) is reader:
            del self.readers[reader.key]
            self.relay.mark_busy("requests", reader.key)

    def on_read_error(self, reader: FrameReader) -> None:
        """Reject a request whose result cannot be read back while it is being sent."""
        if self.readers.get(reader.key) is reader:
            del self.readers[reader.key]
            message = "the relay cannot read the result back from its disk; see its log, and submit the request again"
            self.send(Rejected.because(ErrorCode.INTERNAL, message, request_id=reader.key))

    def on_ended(self, request: Request) -> None:
        """Forget a request that has ended and no longer needs a holder."""
        self.held_requests.pop(request.request_id, None)

    def on_accepted(self, request: Request) -> None:
        """Send `accepted`: the request is in the store. Before that, a feeder is told from where on to feed."""
        if request.live and request.request_id in self.held_requests:
            for name in request.fed:
                self.on_input_stored(request, name)
        self.send(Accepted(request_id=request.request_id, cached=request.entry.copied or None))

    def on_rejected(self, request: Request, refusal: Rejected) -> None:
        """Send `rejected`, and release the request."""
        self._release(request)
        self.send(refusal)

    def on_input_stored(self, request: Request, name: str, *, again: bool = False) -> None:
        """Send `input_ack`."""
        fed = request.fed[name]
        if not isinstance(fed, PipedInput):
            last, repeat = fed.ended or None, again or None
            self.send(InputAck(request_id=request.request_id, name=name, offset=fed.size, last=last, again=repeat))

    def on_position(self, request: Request, position: QueuePosition) -> None:
        """Send the request's position in the queue; if the link is behind, only the latest, once it has drained."""
        if self.backlog_bytes >= HIGH_WATER_BYTES:
            self._deferred_positions[request.request_id] = position
            return
        self._deferred_positions.pop(request.request_id, None)
        self.send(request.queued_message(position))

    def on_worker(self, request: Request) -> None:
        """Tell the client whether the request's worker is away."""
        self.send(request.worker_message())

    # -- life cycle

    def begin(self) -> None:
        """Register the connection with the relay."""
        self.link.tolerate_stall = True  # its backlog may only mean that the client's machine is asleep
        self.link.on_drained(self._pump, LOW_WATER_BYTES)
        self.relay.clients[self.connection_id] = self
        self.relay.mark_changed("clients", self.connection_id)

    def on_messages(self, messages: list[bytes]) -> int:
        """See `RoleHandler.on_messages`.

        Raises:
            ProtocolError: the client broke the rules.
        """
        usage = self.usage
        if usage is None:
            for data in messages:
                self._handle_message(data)
            return len(messages)
        if not usage.charge(0.0, trio.current_time()):
            return 0
        began = time.thread_time()
        for number, data in enumerate(messages, 1):
            self._handle_message(data)
            ended = time.thread_time()
            if not usage.charge(ended - began, trio.current_time()):
                return number
            began = ended
        return len(messages)

    def _handle_message(self, data: bytes) -> None:
        if self.link.closed_here:
            return
        try:
            try:
                message = decode(data, self.accepted_types)
            except BadText as fault:  # it costs that request, and no other of this connection
                if (refusal := _refuse_text(fault)) is not None:
                    self.relay.stats.count_rejected(None, refusal.code)
                    self.send(refusal)
                    return
                message = decode(repair(fault), self.accepted_types)
        except UnknownType as fault:
            self.send(Error(code=fault.code, message=str(fault)))
            return
        self.handlers[type(message)](self, message)

    def close(self) -> None:
        """Release everything that the connection holds, after its link has ended."""
        for reader in self.readers.values():
            reader.close()
        self.readers.clear()
        for request in list(self.held_requests.values()):
            self._release(request)
        del self.relay.clients[self.connection_id]
        self.relay.stats.out_bytes += self.bytes_sent - self.sampled_bytes
        self.relay.mark_changed("clients", self.connection_id)

    def unsent_readers(self) -> list[FrameReader]:
        """Return the readers of ended requests that have not sent all frames yet."""
        return [reader for reader in self.readers.values() if reader.log.ended and not reader.done]

    def _pump(self) -> None:
        """Continue after the link has drained: send deferred positions, and let the readers send."""
        deferred, self._deferred_positions = self._deferred_positions, {}
        for request_id, position in deferred.items():
            request = self.held_requests.get(request_id)
            if request is not None and request.entry.state is State.QUEUED:
                self.on_position(request, position)
        for reader in list(self.readers.values()):
            reader.pump()

    def _may_hold(self, request: Request) -> bool:
        """Whether this client keeps the request alive; operators and read-only clients can only read it."""
        return request.principal == self.principal.name and not self.principal.readonly

    def _hold(self, request: Request) -> None:
        self.held_requests[request.request_id] = request
        request.hold(self)

    def _release(self, request: Request) -> None:
        if reader := self.readers.pop(request.request_id, None):
            reader.close()
            self.relay.mark_busy("requests", request.request_id)
        if self.held_requests.pop(request.request_id, None) is not None:
            request.release(self, trio.current_time())

    def _start_reader(self, request: Request, seq: int) -> None:
        """Send the request's frames from `seq` on, with a new reader that replaces an earlier one."""
        if earlier := self.readers.pop(request.request_id, None):
            earlier.close()
        reader = FrameReader(request.request_id, request.log, self, seq)
        self.readers[request.request_id] = reader
        self.relay.mark_busy("requests", request.request_id)
        reader.open()

    # -- messages

    def _ping(self, ping: Ping) -> None:
        self.send(Pong(timestamp=ping.timestamp, server_time=self.relay.now_unix()))

    def _submit(self, submit: Submit) -> None:
        if refused := self._refuse_submit(submit.request_id) or self._refuse_reader(submit.request_id):
            self.send(refused)
            return
        request = self.admission.submit(submit, self.principal, self)
        if isinstance(request, Rejected):
            self.send(request)
        elif not request.has_result:
            self.send(_reject_without_result(request))
        else:
            if request.live:
                self._hold(request)
            if request.accepted:
                self.on_accepted(request)
            if request.live:
                self._send_position(request)
            self._start_reader(request, 0)

    def _refuse_submit(self, request_id: str) -> Rejected | None:
        if request_id in self.relay.requests:
            return None  # sent again, after a cut
        wait_s = self.relay.principals.request_wait_s(self.principal, self.relay.config.limits.principal)
        return _rate_limited(request_id, too_fast(self.principal.name), wait_s) if wait_s else None

    def _refuse_reader(self, request_id: str) -> Rejected | None:
        most = limits_of(self.principal, self.relay.config.limits.principal).max_readers
        name, clients = self.principal.name, self.relay.clients.values()
        if request_id in self.readers:
            return None
        # After a cut, the connection before may still be there with its readers: each request counts once.
        read = {key for client in clients if client.principal.name == name for key in client.readers}
        if request_id in read or len(read) < most:
            return None
        return _rate_limited(request_id, f"{name!r} may read {most} requests at once; leave one first", RETRY_S)

    def _input(self, piece: Input) -> None:
        request = self.held_requests.get(piece.request_id)
        if request is not None:  # otherwise it was rejected while the piece was in transit
            self.admission.add_input(request, piece, self)

    def _cancel(self, cancel: Cancel) -> None:
        if self.principal.readonly:
            self.send(reject_readonly(cancel.request_id))
            return
        request = find_request(self.relay, self.principal, cancel.request_id)
        if isinstance(request, Rejected):
            self.send(request)
        else:
            self.relay.cancel_group(request, cancel.reason or f"cancelled by {self.principal.name}")

    def _attach(self, attach: Attach) -> None:
        request = find_request(self.relay, self.principal, attach.request_id)
        if isinstance(request, Rejected):
            self.send(request)
        elif not request.has_result:
            self.send(_reject_without_result(request))
        elif refused := self._refuse_reader(attach.request_id):
            self.send(refused)
        else:
            if request.live and self._may_hold(request):
                self._hold(request)
            if request.accepted:
                self.on_accepted(request)
            if request.request_id in self.held_requests and attach.attempt > request.entry.attempt:
                self.relay.workers.adopt_later_attempt(request, attach.attempt)
            self._send_position(request)
            self._start_reader(request, request.log.resume_seq(attach.attempt, attach.after_seq))

    def _leave(self, leave: Leave) -> None:
        if request := self.held_requests.get(leave.request_id):
            self._release(request)
        elif reader := self.readers.pop(leave.request_id, None):
            reader.close()
            self.relay.mark_busy("requests", leave.request_id)

    def _send_position(self, request: Request) -> None:
        if place := self.relay.scheduler.position(request.entry, trio.current_time()):
            self.on_position(request, place)
        elif request.entry.worker_lost_at is not None:
            self.on_worker(request)

    def _status(self, status: Status) -> None:
        request = find_request(self.relay, self.principal, status.request_id)
        if isinstance(request, Rejected):
            self.send(request)
        elif request not in self.relay.finalizer.unfinalized:
            self._send_status(request)
        else:
            self._deferred_statuses[request.request_id] += 1
            if self._deferred_statuses[request.request_id] == 1:
                self.relay.nursery.start_soon(self._send_deferred_statuses, request)

    async def _send_deferred_statuses(self, request: Request) -> None:
        """Send the status of a request once it is stored: a relay that is killed must not forget what it reported."""
        try:
            refusal = await self.relay.finalizer.wait_safe(request)
            for _ in range(self._deferred_statuses.pop(request.request_id)):
                if refusal is not None:
                    self.send(refusal)
                else:
                    self._send_status(request)
        except Exception:  # this task lives in the relay's nursery
            log.exception("internal error in request", request_id=request.request_id)

    def _send_status(self, request: Request) -> None:
        entry, now = request.entry, trio.current_time()
        reply = StatusReply(
            request_id=request.request_id,
            space=entry.space,
            state=entry.state,
            attempt=entry.attempt,
            next_seq=request.log.next_seq,
            age_s=round(max(0.0, now - request.created_at), 3),
            code=request.code,
            message=request.message,
            details={} if request.live else request.details,
            retryable=request.outcome.retryable,
            inputs=fed_inputs(request),
        )
        if place := self.relay.scheduler.position(entry, now):
            reply = attrs.evolve(reply, position=place.position, of=place.of, eta_s=place.eta_s)
        self.send(reply)

    def _spaces(self, _spaces: Spaces) -> None:
        names = sorted(name for name in self.relay.spaces if self.principal.may_use(name))
        rows = [space_row(self.relay, name, with_params=True) for name in names]
        for page, more in pages([row for row in rows if row is not None]):
            self.send(SpacesReply(spaces=page, more=more))

    def _find(self, find: Find) -> None:
        found = find_requests(self.relay, self.principal, find)
        rows = [found_row(request) for request in found[: find.limit]]
        for page, more in pages(rows):
            self.send(Found(requests=page, total=len(found), more=more))


ClientHandler.handlers = {
    Ping: ClientHandler._ping,
    Pong: lambda _client, _pong: None,
    Submit: ClientHandler._submit,
    Input: ClientHandler._input,
    Cancel: ClientHandler._cancel,
    Attach: ClientHandler._attach,
    Leave: ClientHandler._leave,
    Status: ClientHandler._status,
    Spaces: ClientHandler._spaces,
    Find: ClientHandler._find,
}


def _without_video(data: bytes) -> bytes:
    """A frame for a client that ignores `video`, and would miss its number: an `output` in its place, of no value."""
    if not isinstance(frame := decode(data, FRAMES), Video):
        return data
    return encode(Output(request_id=frame.request_id, attempt=frame.attempt, seq=frame.seq, mark={}))


def _rate_limited(request_id: str, message: str, retry_after_s: float) -> Rejected:
    return Rejected.because(
        ErrorCode.RATE_LIMITED, message, request_id=request_id, retry_after_s=round(retry_after_s, 3)
    )


def _reject_without_result(request: Request) -> Rejected:
    return Rejected.because(
        ErrorCode.REQUEST_NOT_FOUND,
        f"request {request.request_id} has {request.entry.state}, and its result is no longer kept; "
        "submit it again with a new id",
        request_id=request.request_id,
    )


def _refuse_text(fault: BadText) -> Rejected | None:
    """The refusal of a `submit` that holds text which is not UTF-8; None for any other message."""
    request_id = fault.wire.get("request_id")
    if fault.wire.get("type") != Submit.TYPE or not isinstance(request_id, str) or not ID_PATTERN.fullmatch(request_id):
        return None
    details: dict[str, Value] = {name.removeprefix("params."): text for name, text in fault.fields.items()}
    faults = "; ".join(f"{name} {text}" for name, text in details.items())
    message = f"{faults}; send text as UTF-8, and do not cut it inside a character"
    return Rejected.because(ErrorCode.INVALID_PARAMS, message, request_id=request_id, details=details)
