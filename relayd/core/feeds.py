"""Live inputs: takes the pieces that clients feed, stores them, and tells the feeders and the worker.

What has come of an input is stored by a task of its own, which ends when nothing is left to store; the store combines
the pieces of all inputs that wait into one transaction.
"""

from collections import deque
from collections.abc import Mapping
from typing import Any, Protocol
from weakref import WeakKeyDictionary

import attrs
import structlog
import trio

from protocol.wire.errors import ErrorCode
from protocol.wire.messages import MAX_INPUT_CHUNK_BYTES, Input, Rejected
from relayd.auth.tokens import Principal
from relayd.core.interfaces import FeedingRelay
from relayd.core.principals import RETRY_S, limits_of
from relayd.requests.live_input import KEPT_BYTES, Fault, LiveInput, NeedsStored, PipedInput
from relayd.requests.request import Holder, Request
from relayd.store.base import StoreError
from relayd.store.records import AppendInput, StoredInput

log = structlog.get_logger("relayd")

#: Limit for what has come of all live inputs together and is not stored yet.
MAX_PENDING_BYTES = 64 * 1024 * 1024
#: Limit for the pieces of one input that wait for a look into the store; each counts with its bytes and this many more.
MAX_UNCHECKED_BYTES = 1024 * 1024
PIECE_BYTES = 512
#: Limit for the last bytes of all live inputs together, in equal shares; what a worker needs besides is read back.
MAX_KEPT_BYTES = 32 * 1024 * 1024

CODES = {
    Fault.GAP: ErrorCode.INPUT_MISMATCH,
    Fault.CONFLICT: ErrorCode.ID_CONFLICT,
    Fault.TOO_FAST: ErrorCode.RATE_LIMITED,
}


class Feeder(Holder, Protocol):
    """A holder that feeds a live input."""

    @property
    def principal(self) -> Principal:
        """Who it is."""


@attrs.define(eq=False)
class _Unchecked:
    """Pieces of one input, in order, of which the first can only be compared with the help of the store."""

    pieces: deque["_UncheckedPiece"] = attrs.field(factory=deque)
    size: int = 0


@attrs.define(eq=False)
class _UncheckedPiece:
    """What a feeder sent in one or several messages."""

    feeder: Feeder
    offset: int
    data: bytearray
    last: bool

    def takes(self, piece: Input, feeder: Feeder) -> bool:
        """Whether a piece goes on with it, so that one look into the store is enough for both."""
        goes_on = feeder is self.feeder and piece.offset == self.offset + len(self.data) and not self.last
        return goes_on and len(self.data) + len(piece.data) <= MAX_INPUT_CHUNK_BYTES


@attrs.define(eq=False)
class Feeds:
    """Takes and stores what is fed to the live inputs of requests."""

    relay: FeedingRelay
    #: Bytes that have come and are not stored yet.
    pending_bytes: int = 0
    #: The inputs that a task stores.
    _storing: set[LiveInput] = attrs.field(factory=set)
    _unchecked: dict[LiveInput, _Unchecked] = attrs.field(factory=dict)
    #: The inputs whose feeders are to be told as soon as there is room for them.
    _held_back: dict[LiveInput, tuple[Request, str]] = attrs.field(factory=dict)
    #: The inputs that have bytes in memory, as long as their requests live; the one that was looked at last comes last.
    _kept: WeakKeyDictionary[LiveInput, None] = attrs.field(factory=WeakKeyDictionary)

    def open(self, request: Request, stored: Mapping[str, StoredInput] | None = None) -> None:
        """Let a new or restored request have live and piped inputs; `stored` is what the store has of them."""
        rate, now = float(self.relay.config.limits.live_input_bytes_s), trio.current_time()
        for name, info in request.submit.inputs.items():
            if not info.is_fed:
                continue
            has = (stored or {}).get(name) or StoredInput(0, ended=False)
            fields: Any = {"rate": rate, "size": has.size, "ended": has.ended, "received_at": now}
            fields["patient"] = self.is_patient(request, name)
            source_id = info.from_
            request.fed[name] = LiveInput(**fields) if source_id is None else PipedInput(**fields, source_id=source_id)
            request.entry.fed_bytes += has.size

    def is_patient(self, request: Request, name: str) -> bool:
        """Whether the engine of its space lets the feeder of an input be silent."""
        rule = self.relay.spaces[request.submit.space].inputs.get(name)
        return rule is not None and rule.patient

    def add(self, request: Request, piece: Input, feeder: Feeder) -> None:
        """Add a piece that a holder sent; if it is not what it may be, the feeder holds the request no longer."""
        fed = request.fed[piece.name]
        if isinstance(fed, PipedInput):
            message = f"input {piece.name!r} is the output of another request; the relay feeds it, so send none of it"
            self._refuse(request, feeder, ErrorCode.INPUT_MISMATCH, message)
        elif feeder in fed.held_back and piece.offset > fed.known:
            pass  # it follows what was dropped; its feeder does not know that yet
        elif self.pending_bytes + len(piece.data) > MAX_PENDING_BYTES:
            fed.hold_back(feeder)
            self._held_back[fed] = request, piece.name
        else:
            fed.held_back.discard(feeder)
            if fed in self._unchecked or self._add_known(request, fed, piece, feeder) is not None:
                self._check_later(request, fed, piece, feeder)

    def _free(self, size: int) -> None:
        """Take bytes off those that wait; once half of the room is free, those that were held back go on."""
        self.pending_bytes -= size
        if self._held_back and self.pending_bytes <= MAX_PENDING_BYTES // 2:
            held_back, self._held_back = self._held_back, {}
            for fed, (request, name) in held_back.items():
                fed.let_go_on(trio.current_time())
                for feeder in request.holders & fed.held_back:
                    feeder.on_input_stored(request, name, again=True)

    async def feed(self, request: Request, name: str, offset: int, data: bytes, *, last: bool) -> Fault | None:
        """Add and store what the relay itself feeds; returns what is wrong with it if it does not fit what is known.

        Raises:
            StoreError: it cannot be stored, or not be compared.
        """
        fed, added = request.fed[name], None
        assert isinstance(fed, PipedInput)
        most, stored = self._most_bytes(request, name), None
        while added is None or isinstance(added, NeedsStored):
            if added is not None:
                stored = await self._read_stored(request, name, added.offset, added.size)
                if not request.live:
                    return None
            added = fed.add(offset, data, last=last, most=most, now=trio.current_time(), stored=stored)
        if added is Fault.TOO_LARGE:
            self._fail_too_large(request, name, most)
        elif isinstance(added, Fault):
            return added
        else:
            own_most = self.relay.principals.usage_of(request.principal).max_input_bytes
            self._count(request, added, own_most)
        try:
            while request.live and fed.is_pending:
                if wait_s := fed.wait_s(trio.current_time()):
                    with trio.move_on_after(wait_s):
                        await request.changed.wait()
                else:
                    await self._store_next(request, name, fed)
        finally:
            self._free(fed.pending_bytes)
        return None

    async def read(self, request: Request, name: str, offset: int, most: int) -> bytes:
        """Return the next stored bytes of a fed input, for a worker.

        Raises:
            StoreError: they cannot be read.
        """
        fed = request.fed[name]
        data = fed.kept(offset, most)
        return data if data is not None else await self._read_stored(request, name, offset, most)

    async def _read_stored(self, request: Request, name: str, offset: int, size: int) -> bytes:
        data = await self.relay.store.read_live_input(request.request_id, name, offset, size)
        if len(data) < size and request.live:
            raise StoreError(f"input {name!r} has {len(data)} bytes from {offset} on, and {size} were stored")
        return data

    def fail(self, request: Request, name: str, fault: StoreError) -> None:
        """End a request whose input cannot be stored or read back."""
        if not request.live:
            return
        log.error("live input lost", request_id=request.request_id, input=name, why=str(fault))
        what = "has no space left to store" if fault.code is ErrorCode.STORAGE_FULL else "could not store"
        self.relay.fail(request, fault.code, f"the relay {what} input {name!r}; send the request again with a new id")

    # -- what comes

    def _add_known(
        self, request: Request, fed: LiveInput, piece: Input, feeder: Feeder, stored: bytes | None = None
    ) -> NeedsStored | None:
        """Add or refuse a piece; returns what has to be read for that from the store, if anything."""
        most, now = self._most_bytes(request, piece.name), trio.current_time()
        added = fed.add(piece.offset, piece.data, last=bool(piece.last), most=most, now=now, stored=stored)
        if isinstance(added, NeedsStored):
            return added
        if added is Fault.TOO_LARGE:
            self._fail_too_large(request, piece.name, most)
        elif isinstance(added, Fault):
            message = f"input {piece.name!r} at offset {piece.offset}: {added.value}; {_known(fed)}"
            self._refuse(request, feeder, CODES[added], message)
        else:
            if added:
                self.relay.stats.count_input(request, added)
            self._begin_to_store(request, piece.name, fed)  # its task takes it off the count, also if it ends here
            self._count(request, added, limits_of(feeder.principal, self.relay.config.limits.principal).max_input_bytes)
        return None

    def _fail_too_large(self, request: Request, name: str, most: int) -> None:
        message = f"input {name!r} has more than {most} bytes, which is what the space or the relay accepts"
        self.relay.fail(request, ErrorCode.INPUT_TOO_LARGE, f"{message}; send less, or raise the limit")

    def _most_bytes(self, request: Request, name: str) -> int:
        """Return how large a live input may become, beside the others of its request; a piped one, as a result."""
        limits = self.relay.config.limits
        if isinstance(request.fed[name], PipedInput):
            most = limits.max_result_bytes
        else:
            others = sum(info.size for info in request.submit.inputs.values())
            lives = [fed for each, fed in request.fed.items() if each != name and not isinstance(fed, PipedInput)]
            most = max(0, limits.max_input_bytes - others - sum(fed.known for fed in lives))
        rule = self.relay.spaces[request.submit.space].inputs.get(name)
        return min(most, rule.max_bytes) if rule is not None else most

    def _count(self, request: Request, size: int, most: int | None) -> None:
        """Account for new bytes; `most` is what the inputs of its principal's live requests may have."""
        relay = self.relay
        if size:
            relay.scheduler.state.add_fed(request.entry, size)
            self.pending_bytes += size
            relay.mark_busy("requests", request.request_id)
            used = relay.scheduler.state.input_bytes[request.principal]
            if most is not None and used > most and used > request.entry.input_bytes + request.entry.fed_bytes:
                message = (
                    f"the inputs of the live requests of {request.principal!r} have {used} bytes, and it may have "
                    f"{most}; send the request again when others have ended"
                )
                relay.fail(request, ErrorCode.RATE_LIMITED, message)

    def _refuse(self, request: Request, feeder: Feeder, code: ErrorCode, message: str) -> None:
        if feeder in request.holders:
            self.relay.stats.count_rejected(request.submit.space, code)
            retry_after_s = RETRY_S if code is ErrorCode.RATE_LIMITED else None
            refusal = Rejected.because(code, message, request_id=request.request_id, retry_after_s=retry_after_s)
            feeder.on_rejected(request, refusal)

    def _check_later(self, request: Request, fed: LiveInput, piece: Input, feeder: Feeder) -> None:
        unchecked = self._unchecked.setdefault(fed, _Unchecked())
        pieces = unchecked.pieces
        goes_on = len(pieces) > 1 and pieces[-1].takes(piece, feeder)  # the first one is being compared
        size = len(piece.data) + (0 if goes_on else PIECE_BYTES)
        if unchecked.size + size > MAX_UNCHECKED_BYTES:
            message = f"input {piece.name!r}: {Fault.TOO_FAST.value}; wait for input_ack"
            self._refuse(request, feeder, ErrorCode.RATE_LIMITED, message)
            return
        if goes_on:
            pieces[-1].data += piece.data
            pieces[-1].last = bool(piece.last)
        else:
            pieces.append(_UncheckedPiece(feeder, piece.offset, bytearray(piece.data), bool(piece.last)))
        unchecked.size += size
        self.pending_bytes += size
        self._begin_to_store(request, piece.name, fed)

    # -- what is stored

    def _begin_to_store(self, request: Request, name: str, fed: LiveInput) -> None:
        if request.live and fed not in self._storing and (fed.is_pending or fed in self._unchecked):
            self._storing.add(fed)
            self.relay.nursery.start_soon(self._store, request, name, fed)

    async def _store(self, request: Request, name: str, fed: LiveInput) -> None:
        """Store what has come of an input, until nothing is left."""
        try:
            while request.live and not request.accepted:
                await request.changed.wait()
            while request.live and (fed.is_pending or fed in self._unchecked):
                if fed in self._unchecked:
                    await self._check_next(request, name, fed)
                elif wait_s := fed.wait_s(trio.current_time()):
                    with trio.move_on_after(wait_s):
                        await request.changed.wait()
                else:
                    await self._store_next(request, name, fed)
        except StoreError as fault:
            self.fail(request, name, fault)
        except Exception:
            log.exception("internal error in request", request_id=request.request_id)
            self.relay.fail_internal(request)
        finally:
            self._storing.discard(fed)
            self._free(fed.pending_bytes)
            if (unchecked := self._unchecked.pop(fed, None)) is not None:
                self._free(unchecked.size)

    async def _check_next(self, request: Request, name: str, fed: LiveInput) -> None:
        """Compare the first unchecked piece with the store, and add it."""
        unchecked = self._unchecked[fed]
        first = unchecked.pieces[0]
        piece = Input(
            request_id=request.request_id, name=name, offset=first.offset, data=bytes(first.data), last=first.last
        )
        stored: bytes | None = None
        while request.live and first.feeder in request.holders:
            needs = self._add_known(request, fed, piece, first.feeder, stored)
            if needs is None:
                break
            stored = await self._read_stored(request, name, needs.offset, needs.size)
        unchecked.pieces.popleft()
        unchecked.size -= len(piece.data) + PIECE_BYTES
        self._free(len(piece.data) + PIECE_BYTES)
        if not unchecked.pieces:
            del self._unchecked[fed]

    async def _store_next(self, request: Request, name: str, fed: LiveInput) -> None:
        piece = fed.next_piece()
        change = AppendInput(
            request_id=request.request_id, name=name, offset=piece.offset, data=piece.data, last=piece.last
        )
        await self.relay.store.commit(change)
        was_starving = fed.is_starving
        fed.on_stored(piece, trio.current_time())
        self._free(len(piece.data))
        self._keep(fed)
        if not request.live:
            return
        for holder in tuple(request.holders):
            holder.on_input_stored(request, name)
        if was_starving:
            request.wake()
        elif request.feeding is not None:
            request.feeding.wake()

    def _keep(self, fed: LiveInput) -> None:
        """Keep the last bytes of this input in memory: its share, which falls as there are more inputs."""
        self._kept.setdefault(fed, None)
        share = MAX_KEPT_BYTES // len(self._kept)
        if share < KEPT_BYTES:
            other = next(iter(self._kept))  # one at a time is enough, as each one came with a call
            self._kept[other] = self._kept.pop(other)
            for each in (fed, other):
                each.forget_below(each.size - share)


def _known(fed: LiveInput) -> str:
    """Say what there is of an input, for its feeder."""
    ends = f" and ends at {fed.end}" if fed.end is not None else ""
    return f"{fed.known} bytes are known{ends}, and {fed.size} of them acknowledged"
