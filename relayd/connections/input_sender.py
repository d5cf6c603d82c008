"""Sends the inputs of a worker's attempts: first the whole ones, then those that are fed, as their bytes come."""

from collections.abc import Mapping

import attrs
import structlog
import trio

from protocol.link.base import Link
from protocol.wire.errors import LinkError, ProtocolError
from protocol.wire.messages import MAX_INPUT_CHUNK_BYTES, MAX_UNACKED_BYTES, Input, InputAck
from protocol.wire.structs import Running
from relayd.core.interfaces import WorkerPort
from relayd.core.relay import Relay
from relayd.requests.live_input import LiveInput
from relayd.requests.request import Request
from relayd.store.base import StoreError

log = structlog.get_logger("relayd.worker")

#: Input bytes in the backlog of a worker's link, limited so that assignments and cancels do not wait behind an upload.
FEED_BYTES = 1024 * 1024
#: Requests of one worker whose whole inputs are in memory at once, so that one that reads slowly does not fill it.
MAX_UPLOADS = 4


@attrs.define(eq=False)
class AttemptFeeding:
    """How much of the fed inputs of one attempt was sent over this link."""

    attempt: int
    #: Input name -> bytes sent; and those whose end was sent.
    sent: dict[str, int]
    done: set[str] = attrs.field(factory=set)
    changed: trio.Event = attrs.field(factory=trio.Event)

    def wake(self) -> None:
        """See `Feeding.wake`."""
        self.changed.set()

    def due(self, name: str, fed: LiveInput) -> int | None:
        """Return how many bytes may be sent now, 0 for the end alone; None if nothing is to be sent."""
        sent = self.sent[name]
        size = min(fed.size - sent, MAX_UNACKED_BYTES - (sent - fed.taken), MAX_INPUT_CHUNK_BYTES)
        if size > 0:
            return size
        return 0 if fed.ended and sent == fed.size and name not in self.done else None


@attrs.define(eq=False)
class InputSender:
    """Sends inputs over one worker's link; its tasks run in `nursery`, which ends with the link.

    The worker's connection, `port`, owns it, and is an argument, so that the two make no reference cycle.
    """

    link: Link
    relay: Relay
    nursery: trio.Nursery
    _uploads: trio.Semaphore = attrs.field(factory=lambda: trio.Semaphore(MAX_UPLOADS))
    #: Held for one piece of a fed input, so that many together do not fill the link's backlog.
    _turn: trio.Lock = attrs.field(factory=trio.Lock)

    def begin(self, port: WorkerPort, request: Request) -> None:
        """Send the inputs of a new attempt."""
        self._start(port, request, {}, whole=True)

    def resume(self, port: WorkerPort, request: Request, received: Mapping[str, int]) -> None:
        """Go on with the fed inputs of an attempt that this worker runs, and of which it has received so much."""
        if request.fed:
            self._start(port, request, received, whole=False)

    def is_possible(self, running: Running) -> bool:
        """Whether a worker may have received what it says of the fed inputs of an attempt."""
        request = self.relay.requests.get(running.request_id)
        if request is None or not request.live:
            return True  # the attempt is over, whatever was received
        sizes = {name: fed.size for name, fed in request.fed.items()}
        return all(received <= sizes.get(name, -1) for name, received in running.inputs.items())

    def on_ack(self, port: WorkerPort, ack: InputAck) -> None:
        """Note that the engine of an attempt has taken more of an input.

        Raises:
            ProtocolError: the input is none of the attempt's, or so much of it was not sent.
        """
        request = self.relay.attempt_of(port, ack.request_id, ack.attempt)
        if request is None:
            return
        sent = request.feeding.sent.get(ack.name) if isinstance(request.feeding, AttemptFeeding) else None
        if sent is None or ack.offset > sent:
            raise ProtocolError(f"input_ack of {ack.offset} bytes of input {ack.name!r}; {sent or 0} were sent")
        fed = request.fed[ack.name]
        was_starving = fed.is_starving
        fed.on_taken(ack.offset, trio.current_time())
        if fed.is_starving is not was_starving:
            request.wake()
        elif request.feeding is not None:
            request.feeding.wake()

    def _start(self, port: WorkerPort, request: Request, received: Mapping[str, int], *, whole: bool) -> None:
        feeding = AttemptFeeding(request.entry.attempt, {name: received.get(name, 0) for name in request.fed})
        if request.feeding is not None:
            request.feeding.wake()  # the attempt before is over
        request.feeding = feeding if request.fed else None
        if request.submit.inputs and self.link.gone is None:  # otherwise the nursery may be closed
            self.nursery.start_soon(self._send, port, request, feeding, whole)

    def _is_current(self, port: WorkerPort, request: Request, feeding: AttemptFeeding) -> bool:
        current = self.relay.attempt_of(port, request.request_id, feeding.attempt) is request
        return current and request.feeding in (feeding, None)

    async def _send(self, port: WorkerPort, request: Request, feeding: AttemptFeeding, whole: bool) -> None:
        """Send the inputs of an attempt, as long as this worker runs it."""
        try:
            if not whole or await self._send_whole(port, request, feeding):
                await self._feed(port, request, feeding)
        except LinkError:
            return
        except Exception:  # must not end the other tasks in the nursery
            log.exception("internal error in request", request_id=request.request_id)
            self.relay.fail_internal(request)

    async def _send_whole(self, port: WorkerPort, request: Request, feeding: AttemptFeeding) -> bool:
        """Send the whole inputs; False if the attempt is over."""
        names = [name for name, info in request.submit.inputs.items() if not info.is_fed]
        if not names:
            return True
        async with self._uploads:
            for name in names:
                data = await self.relay.read_input(request, name)
                if data is None:
                    return False
                for offset in range(0, len(data), MAX_INPUT_CHUNK_BYTES):
                    await self.link.drained(FEED_BYTES)
                    if not self._is_current(port, request, feeding):
                        return False
                    piece = bytes(data[offset : offset + MAX_INPUT_CHUNK_BYTES])
                    self.link.send(Input(request_id=request.request_id, name=name, offset=offset, data=piece))
        return True

    async def _feed(self, port: WorkerPort, request: Request, feeding: AttemptFeeding) -> None:
        """Send the fed inputs as they are stored and taken, until their ends are sent."""
        while feeding.done != feeding.sent.keys() and self._is_current(port, request, feeding):
            feeding.changed = trio.Event()
            for name, fed in request.fed.items():
                try:
                    while (size := feeding.due(name, fed)) is not None:
                        if not await self._send_piece(port, request, feeding, name, size):
                            return
                except StoreError as fault:
                    if self._is_current(port, request, feeding):  # a piped input that begins anew has been emptied
                        self.relay.feeds.fail(request, name, fault)
                    return
            await feeding.changed.wait()

    async def _send_piece(
        self, port: WorkerPort, request: Request, feeding: AttemptFeeding, name: str, size: int
    ) -> bool:
        """Send the next bytes of a fed input, or its end; False if the attempt is over."""
        async with self._turn:
            await self.link.drained(FEED_BYTES)
            if not self._is_current(port, request, feeding):
                return False
            fed, offset = request.fed[name], feeding.sent[name]
            data = await self.relay.feeds.read(request, name, offset, size) if size else b""
            if not self._is_current(port, request, feeding):
                return False
            feeding.sent[name] = offset + len(data)
            last = fed.ended and feeding.sent[name] == fed.size
            self.link.send(Input(request_id=request.request_id, name=name, offset=offset, data=data, last=last or None))
            if last:
                feeding.done.add(name)
        return True
