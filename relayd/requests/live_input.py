"""Inputs that are fed while their request waits and runs: what is known, stored and taken of one. Pure.

The pieces of a live input are known as soon as they come, and stored soon afterwards; only what is stored is sent to a
worker and acknowledged to the feeder. Pieces may come again, cut in another way: what is known is compared, not added.
"""

import math
from enum import Enum

import attrs

from protocol.wire.messages import MAX_INPUT_CHUNK_BYTES, MAX_UNACKED_BYTES
from protocol.wire.structs import KIB

#: Of what is stored, so much is kept in memory: a running attempt gets it without a look into the store.
KEPT_BYTES = 64 * KIB
#: What a stored piece takes on disk besides its bytes; its rate counts that, too.
ROW_BYTES = 150
#: Seconds of its rate that may come at once.
BURST_S = 4.0
#: Seconds over which the rate that is shown is measured, in steps of one.
RATE_S = 5


class Fault(Enum):
    """What is wrong with a piece."""

    GAP = "bytes before it are missing"
    CONFLICT = "other bytes are known"
    TOO_FAST = "too much is not acknowledged yet"
    TOO_LARGE = "the input becomes too large"


@attrs.frozen
class NeedsStored:
    """To check a piece, the `size` bytes from `offset` on have to be read from the store."""

    offset: int
    size: int


@attrs.frozen
class Piece:
    """The next bytes to store; `last` says that the input ends with them."""

    offset: int
    data: bytes
    last: bool


@attrs.define(eq=False, kw_only=True)
class LiveInput:
    """An input whose bytes come while its request runs, and what the engine of the current attempt has taken of it.

    Times are monotonic seconds. `rate` is how many of its bytes are stored a second.
    """

    rate: float
    #: Bytes that may be sent to a worker, and whether that is all.
    size: int = 0
    ended: bool = False
    #: Whether its feeder may be silent while it holds the request.
    patient: bool = False
    #: What the engine has taken, and when it last took some.
    taken: int = 0
    taken_at: float = -math.inf
    #: When the engine had last waited for bytes that then came.
    starved_until: float = -math.inf
    #: When the latest piece came.
    received_at: float = -math.inf
    #: The feeders for whose pieces there was no room. What they send beyond what is known is dropped until they have
    #: gone back to that; and whether they still have to be told.
    held_back: set[object] = attrs.field(factory=set, init=False)
    waits_for_room: bool = attrs.field(default=False, init=False)
    #: Time and size at the beginning of each of the last seconds in which it grew.
    _seconds: list[tuple[float, int]] = attrs.field(factory=list, init=False)
    #: Where it ends, once that is known.
    end: int | None = attrs.field(init=False)
    #: The bytes from `_kept_from` on, down to those that have come and are not stored.
    _kept: bytearray = attrs.field(factory=bytearray, init=False)
    _kept_from: int = attrs.field(init=False)
    #: Bytes that may be stored now, at the time of `_refilled_at`; below 0 after a large piece.
    _allowed: float = attrs.field(default=math.inf, init=False)
    _refilled_at: float = attrs.field(default=-math.inf, init=False)

    def __attrs_post_init__(self) -> None:
        self.end = self.size if self.ended else None
        self._kept_from = self.size

    @property
    def is_starving(self) -> bool:
        """Whether the engine has taken all there is, and more is to come."""
        return not self.ended and self.taken >= self.size

    @property
    def awaits_feeder(self) -> bool:
        """Whether the engine can go on only when a client has sent more."""
        return self.is_starving and not self.is_pending and not self.waits_for_room

    def hold_back(self, feeder: object) -> None:
        """Note that there was no room for what this feeder sent."""
        self.held_back.add(feeder)
        self.waits_for_room = True

    def let_go_on(self, now: float) -> None:
        """Note that the feeders that were held back are told to send it again."""
        self.waits_for_room, self.received_at = False, now

    def begin_attempt(self, *, patient: bool = False) -> None:
        """Note that the next attempt gets it from the beginning, by an engine that waits for it so."""
        self.taken, self.patient = 0, patient

    def on_taken(self, offset: int, now: float) -> None:
        """Note that the engine has taken the bytes below `offset`."""
        if offset > self.taken:
            self.taken, self.taken_at = offset, now

    def grow(self, size: int, now: float, *, ended: bool) -> None:
        """Note that the bytes below `size` may be sent to a worker, and whether that is all."""
        if self.is_starving:
            self.starved_until = now
        if not self._seconds or now >= self._seconds[-1][0] + 1.0:
            self._seconds = [*self._seconds[-RATE_S:], (now, self.size)]
        self.size, self.ended, self.received_at = size, ended, now

    def bytes_s(self, now: float) -> int:
        """Return its rate over the last seconds."""
        recent = [each for each in self._seconds if each[0] > now - RATE_S]
        if not recent:
            return 0
        since, size = recent[0]
        return round((self.size - size) / max(1.0, now - since))

    @property
    def known(self) -> int:
        """Number of bytes that have come, those that are not stored yet among them."""
        return self._kept_from + len(self._kept)

    @property
    def pending_bytes(self) -> int:
        """Number of bytes that have come and are not stored."""
        return self.known - self.size

    @property
    def is_pending(self) -> bool:
        """Whether something has come that is not stored: bytes, or the end."""
        return self.pending_bytes > 0 or (self.end is not None and not self.ended)

    def add(
        self, offset: int, data: bytes, *, last: bool, most: int, now: float, stored: bytes | None = None
    ) -> int | Fault | NeedsStored:
        """Add a piece: the bytes that are known are compared, the others added.

        Args:
            offset: the place of its first byte.
            data: its bytes.
            last: whether the input ends with them.
            most: the largest size that the input may have.
            now: monotonic seconds.
            stored: what the store has where an earlier call returned `NeedsStored`.

        Returns:
            the number of new bytes; or why nothing was added; or what has to be read first.
        """
        known, end = self.known, offset + len(data)
        if offset > known:
            return Fault.GAP
        if (self.end is not None and end > self.end) or (last and end < known):
            return Fault.CONFLICT
        if end > most:
            return Fault.TOO_LARGE
        if end - self.size > MAX_UNACKED_BYTES:
            return Fault.TOO_FAST
        if (older := min(end, self._kept_from) - offset) > 0:
            if stored is None or len(stored) < older:
                return NeedsStored(offset, older)
            if data[:older] != stored[:older]:
                return Fault.CONFLICT
        begin = max(offset, self._kept_from)
        overlap = data[begin - offset : known - offset]
        if overlap != self._kept[begin - self._kept_from : begin - self._kept_from + len(overlap)]:
            return Fault.CONFLICT
        self.received_at = now
        fresh = data[known - offset :]
        self._kept += fresh
        if last:
            self.end = end
        return len(fresh)

    def wait_s(self, now: float) -> float:
        """Return how long to wait until the next piece may be stored."""
        self._allowed = min(self.rate * BURST_S, self._allowed + (now - self._refilled_at) * self.rate)
        self._refilled_at = now
        return max(0.0, -self._allowed / self.rate)

    def next_piece(self) -> Piece:
        """Return the next bytes to store; `on_stored` follows."""
        begin = self.size - self._kept_from
        data = bytes(self._kept[begin : begin + MAX_INPUT_CHUNK_BYTES])
        self._allowed -= len(data) + ROW_BYTES
        return Piece(self.size, data, last=self.end == self.size + len(data))

    def on_stored(self, piece: Piece, now: float) -> None:
        """Note that a piece is stored."""
        self.grow(piece.offset + len(piece.data), now, ended=piece.last)
        self.forget_below(self.size - KEPT_BYTES)

    def forget_below(self, offset: int) -> None:
        """Drop bytes from memory that are stored."""
        count = max(0, min(offset, self.size) - self._kept_from)
        del self._kept[:count]
        self._kept_from += count

    def kept(self, offset: int, most: int) -> bytes | None:
        """Return up to `most` stored bytes from `offset` on, if they are in memory."""
        if offset < self._kept_from:
            return None
        return bytes(self._kept[offset - self._kept_from : min(offset + most, self.size) - self._kept_from])


@attrs.define(eq=False, kw_only=True)
class PipedInput(LiveInput):
    """An input that the relay feeds with the output of the request `source_id`; nobody is to hurry it."""

    source_id: str

    @property
    def awaits_feeder(self) -> bool:
        """See `LiveInput.awaits_feeder`; a source has deadlines of its own."""
        return False

    def clear(self) -> None:
        """Forget all that came: the source begins anew."""
        self._kept.clear()
        self.size = self.taken = self._kept_from = 0
        self.ended, self.end = False, None
