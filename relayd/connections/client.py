"""A client's connection: its messages in, its requests' frames out."""

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import attrs
import trio

from protocol.link.base import Link
from protocol.wire.codec import decode
from protocol.wire.errors import ErrorCode, LinkError, UnknownType
from protocol.wire.messages import (
    FROM_CLIENT,
    Accepted,
    Attach,
    Cancel,
    Error,
    Input,
    Leave,
    Ping,
    Pong,
    Queued,
    Rejected,
    Spaces,
    SpacesReply,
    Status,
    StatusReply,
    Submit,
    Table,
)
from protocol.wire.validators import Message
from relayd.auth.tokens import Principal
from relayd.core.access import find_request
from relayd.core.admission import Admission
from relayd.core.relay import Relay
from relayd.frames.frame_log import HIGH_WATER_BYTES, LOW_WATER_BYTES, FrameReader
from relayd.requests.request import Request
from relayd.scheduling.model import QueuePosition, State
from relayd.views.rows import pages, space_row

#: Called with a handler object and a message of the type that it stands for.
Handler = Callable[[Any, Any], None]


@attrs.define(eq=False)
class ClientHandler:
    """One connection of a client; `OperatorHandler` adds what an operator can do.

    It is the sink of its requests' frames: `send_frames` never raises, because a client that is gone must not trouble
    the worker whose frame it was to get.
    """

    #: The messages that the connection may send, and their handlers; a subclass has its own.
    takes: ClassVar[Table] = FROM_CLIENT
    handlers: ClassVar[Mapping[type[Message], Handler]]

    connection_id: str
    link: Link
    principal: Principal
    relay: Relay
    admission: Admission
    readers: dict[str, FrameReader] = attrs.field(factory=dict)
    held_requests: dict[str, Request] = attrs.field(factory=dict)
    #: Places to tell once the link has drained; the latest of each request.
    _deferred_positions: dict[str, QueuePosition] = attrs.field(factory=dict)
    frames_sent: int = 0
    bytes_sent: int = 0
    #: What that was when rates were last made of it.
    sampled_bytes: int = 0

    # -- as a sink and a holder

    @property
    def backlog_bytes(self) -> int:
        """What the connection has not taken yet."""
        return self.link.backlog_bytes

    def send_frames(self, frames: list[bytes], size: int) -> None:
        """Send frames; without effect on a link that is gone."""
        try:
            self.link.send_frames(frames)
        except LinkError:
            return
        self.frames_sent += len(frames)
        self.bytes_sent += size

    def send(self, message: Message) -> None:
        """Send a message of the relay's own, which counts as no frame; without effect on a link that is gone."""
        try:
            self.link.send(message)
        except LinkError:
            return

    def on_all_sent(self, reader: FrameReader) -> None:
        """All of a request's frames are sent."""
        if self.readers.get(reader.key) is reader:
            del self.readers[reader.key]
            self.relay.mark_busy("requests", reader.key)

    def on_read_error(self, reader: FrameReader) -> None:
        """The rest of a result that was being sent is lost."""
        if self.readers.get(reader.key) is reader:
            del self.readers[reader.key]
            message = "the relay cannot read the result back from its disk; see its log, and submit it again"
            self.send(Rejected.because(ErrorCode.INTERNAL, message, request_id=reader.key))

    def on_ended(self, request: Request) -> None:
        """The request needs no holder any more."""
        self.held_requests.pop(request.request_id, None)

    def on_accepted(self, request: Request) -> None:
        """The request is safe in the store."""
        self.send(Accepted(request_id=request.request_id))

    def on_rejected(self, request: Request, refusal: Rejected) -> None:
        """The request was not taken after all."""
        self._release(request)
        self.send(refusal)

    def on_position(self, request: Request, place: QueuePosition) -> None:
        """The request's place in the queue; a link that is behind hears of it later, and only of the last."""
        if self.backlog_bytes >= HIGH_WATER_BYTES:
            self._deferred_positions[request.request_id] = place
            return
        self._deferred_positions.pop(request.request_id, None)
        self.send(Queued(request_id=request.request_id, position=place.position, of=place.of, eta_s=place.eta_s))

    # -- its life

    def begin(self) -> None:
        """Be there for others to see."""
        self.link.tolerate_stall = True  # frames wait for it, and it may only have been put to sleep
        self.link.on_drained(self._pump, LOW_WATER_BYTES)
        self.relay.clients[self.connection_id] = self
        self.relay.mark_changed("clients", self.connection_id)

    def on_messages(self, messages: list[bytes]) -> None:
        """Take its messages.

        Raises:
            ProtocolError: the client broke the rules.
        """
        for data in messages:
            if self.link.gone is not None:
                return
            try:
                message = decode(data, self.takes)
            except UnknownType as fault:
                self.send(Error(code=fault.code, message=str(fault)))
                continue
            self.handlers[type(message)](self, message)

    def close(self) -> None:
        """The link is gone: release all that the connection held."""
        for reader in self.readers.values():
            reader.close()
        self.readers.clear()
        for request in list(self.held_requests.values()):
            self._release(request)
        del self.relay.clients[self.connection_id]
        self.relay.stats.out_bytes += self.bytes_sent - self.sampled_bytes
        self.relay.mark_changed("clients", self.connection_id)

    def unsent_readers(self) -> list[FrameReader]:
        """Readers of ended requests that have not sent all yet."""
        return [reader for reader in self.readers.values() if reader.log.ended and not reader.done]

    def _pump(self) -> None:
        """The link has drained: what waited for it goes on."""
        untold, self._deferred_positions = self._deferred_positions, {}
        for request_id, place in untold.items():
            request = self.held_requests.get(request_id)
            if request is not None and request.entry.state is State.QUEUED:
                self.on_position(request, place)
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
        """Send the request's frames from `seq` on, in place of where an earlier reader here stood."""
        if old := self.readers.pop(request.request_id, None):
            old.close()
        reader = FrameReader(request.request_id, request.log, self, seq)
        self.readers[request.request_id] = reader
        self.relay.mark_busy("requests", request.request_id)
        reader.open()

    # -- messages

    def _ping(self, ping: Ping) -> None:
        self.send(Pong(timestamp=ping.timestamp, server_time=self.relay.now_unix()))

    def _submit(self, submit: Submit) -> None:
        if self.principal.readonly:
            self.send(_only_looks(submit.request_id))
            return
        request = self.admission.submit(submit, self.principal, self)
        if isinstance(request, Rejected):
            self.send(request)
        elif not request.has_result:
            self.send(_result_gone(request))
        else:
            if request.accepted:
                self.on_accepted(request)
            if request.live:
                self._hold(request)
                self._send_position(request)
            self._start_reader(request, 0)

    def _input(self, piece: Input) -> None:
        request = self.held_requests.get(piece.request_id)
        if request is not None:  # else it was refused while the piece was on its way
            self.admission.add_input(request, piece)

    def _cancel(self, cancel: Cancel) -> None:
        if self.principal.readonly:
            self.send(_only_looks(cancel.request_id))
            return
        request = find_request(self.relay, self.principal, cancel.request_id)
        if isinstance(request, Rejected):
            self.send(request)
        elif request.live:
            self.relay.cancel(request, cancel.reason or f"cancelled by {self.principal.name}")

    def _attach(self, attach: Attach) -> None:
        request = find_request(self.relay, self.principal, attach.request_id)
        if isinstance(request, Rejected):
            self.send(request)
        elif not request.has_result:
            self.send(_result_gone(request))
        else:
            if request.accepted:
                self.on_accepted(request)
            if request.live and self._may_hold(request):
                self._hold(request)
                if attach.attempt > request.entry.attempt:
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
        if request.entry.state is State.QUEUED:
            space = request.submit.space
            if place := self.relay.scheduler.positions(space, trio.current_time()).get(request.request_id):
                self.on_position(request, place)

    def _status(self, status: Status) -> None:
        request = find_request(self.relay, self.principal, status.request_id)
        if isinstance(request, Rejected):
            self.send(request)
            return
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
        )
        if entry.state is State.QUEUED:
            place = self.relay.scheduler.positions(entry.space, now)[request.request_id]
            reply = attrs.evolve(reply, position=place.position, of=place.of, eta_s=place.eta_s)
        self.send(reply)

    def _spaces(self, _spaces: Spaces) -> None:
        names = sorted(name for name in self.relay.spaces if self.principal.may_use(name))
        rows = [space_row(self.relay, name, with_params=True) for name in names]
        for page, more in pages([row for row in rows if row is not None]):
            self.send(SpacesReply(spaces=page, more=more))


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
}


def _only_looks(request_id: str) -> Rejected:
    message = "this connection is read-only; connect without --readonly"
    return Rejected.because(ErrorCode.FORBIDDEN, message, request_id=request_id)


def _result_gone(request: Request) -> Rejected:
    return Rejected.because(
        ErrorCode.REQUEST_NOT_FOUND,
        f"request {request.request_id} has {request.entry.state}, and its result is not kept any more; "
        "submit it again with a new id",
        request_id=request.request_id,
    )
