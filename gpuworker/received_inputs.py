"""The inputs of a request, which arrive after its `assign`: whole ones are collected, fed ones go on to the engine."""

import hashlib
from collections.abc import Callable, Mapping
from functools import partial

import trio

from gpuworker.engines.base import EngineInput
from gpuworker.slots.feed import Feed
from gpuworker.slots.run_engine import RunResult
from protocol.wire.errors import ErrorCode
from protocol.wire.media_types import accepts
from protocol.wire.messages import MAX_UNACKED_BYTES, Input
from protocol.wire.structs import InputInfo, InputRule


class ReceivedInputs:
    """Takes pieces of inputs, in order and without gaps.

    Whole inputs are checked against the announcement in `assign`. Their memory is bounded by the announced sizes, which
    the relay has checked against its limits; that of fed ones (`InputInfo.is_fed`) by what may be sent before the
    engine has taken it.

    Args:
        infos: name -> the announced input.
        on_taken: called with the name of a fed input, and how many bytes of it the engine has taken.

    Attributes:
        fault: why the attempt fails.
        settled: the whole inputs have arrived, or there is a fault.
        feeds: the fed inputs, by name.
    """

    def __init__(
        self, infos: Mapping[str, InputInfo], on_taken: Callable[[str, int], None] = lambda _name, _taken: None
    ) -> None:
        self._infos = {name: info for name, info in infos.items() if not info.is_fed}
        self._held = {name: bytearray() for name in self._infos}
        self._most: dict[str, int] = {}
        self.feeds = {
            name: Feed(info.media_type, partial(on_taken, name)) for name, info in infos.items() if info.is_fed
        }
        self.fault: RunResult | None = None
        self.settled = trio.Event()
        self._settle()

    def refuse_by(self, rules: Mapping[str, InputRule]) -> None:
        """Check the announced inputs against an engine's rules; a violation sets `fault`."""
        announced = {name: (info.media_type, info.size) for name, info in self._infos.items()}
        announced |= {name: (feed.media_type, 0) for name, feed in self.feeds.items()}
        for name, rule in rules.items():
            if rule.required and name not in announced:
                self._fail(ErrorCode.INPUT_MISSING, f"input {name!r} is required; submit it with the request")
        for name, (media_type, size) in announced.items():
            allowed = rules.get(name)
            if allowed is None:
                accepted = ", ".join(sorted(rules)) or "none"
                self._fail(ErrorCode.INVALID_PARAMS, f"input {name!r} is unknown; this engine accepts: {accepted}")
            elif name in self.feeds and not allowed.live:
                self._fail(ErrorCode.INVALID_PARAMS, f"input {name!r} cannot be live; send it whole")
            elif size > allowed.max_bytes:
                self._fail(ErrorCode.INPUT_TOO_LARGE, f"input {name!r} has {size} bytes, over {allowed.max_bytes}")
            elif media_type and not accepts(allowed.media_types, media_type):
                accepted = ", ".join(allowed.media_types)
                self._fail(ErrorCode.INVALID_PARAMS, f"input {name!r} is {media_type!r}; it must be {accepted}")
            else:
                self._most[name] = allowed.max_bytes

    def add(self, piece: Input) -> None:
        """Add a piece; one that does not fit sets `fault`."""
        if self.fault is not None:
            return
        if (feed := self.feeds.get(piece.name)) is not None:
            self._feed(feed, piece)
        elif not self.settled.is_set():
            self._collect(piece)

    def _collect(self, piece: Input) -> None:
        held = self._held.get(piece.name)
        if held is None:
            self._fail(ErrorCode.INPUT_MISMATCH, f"input {piece.name!r} was not announced")
            return
        if piece.offset != len(held) or piece.offset + len(piece.data) > self._infos[piece.name].size:
            self._fail(
                ErrorCode.INPUT_MISMATCH,
                f"input {piece.name!r}: received {len(piece.data)} bytes at {piece.offset}, but {len(held)} of "
                f"{self._infos[piece.name].size} had arrived",
            )
            return
        held += piece.data
        self._settle()

    def _feed(self, feed: Feed, piece: Input) -> None:
        """Pass on what is new in a piece; a relay that has lost a link may send some bytes again."""
        name, end = piece.name, piece.offset + len(piece.data)
        if piece.offset > feed.received:
            what = f"received bytes at {piece.offset}, but only {feed.received} had arrived"
            self._fail(ErrorCode.INPUT_MISMATCH, f"input {name!r}: {what}")
        elif feed.ended and (end > feed.received or (piece.last and end < feed.received)):
            self._fail(ErrorCode.INPUT_MISMATCH, f"input {name!r}: its end was at {feed.received}, not at {end}")
        elif end > self._most.get(name, end):
            message = f"input {name!r} has more than {self._most[name]} bytes; send less in one request"
            self._fail(ErrorCode.INPUT_TOO_LARGE, message)
        elif end > feed.taken + MAX_UNACKED_BYTES:
            what = f"{end} bytes were sent, but the engine has taken only {feed.taken}"
            self._fail(ErrorCode.INPUT_MISMATCH, f"input {name!r}: {what}")
        elif not feed.ended and (end > feed.received or piece.last):
            feed.add(piece.data[feed.received - piece.offset :], last=bool(piece.last))

    def _settle(self) -> None:
        if any(len(self._held[name]) < info.size for name, info in self._infos.items()):
            return
        for name, info in self._infos.items():
            if hashlib.sha256(self._held[name]).hexdigest() != info.sha256:
                self._fail(
                    ErrorCode.INPUT_MISMATCH, f"input {name!r} does not have the SHA-256 announced; send it again"
                )
        self.settled.set()

    def _fail(self, code: ErrorCode, message: str) -> None:
        if self.fault is None:
            self.fault = RunResult.failed(code, message, retryable=code is ErrorCode.INPUT_MISMATCH)
        self.settled.set()

    def pop_all(self) -> dict[str, EngineInput]:
        """The complete whole inputs; they can be taken only once."""
        inputs = {name: EngineInput(bytes(self._held.pop(name)), info.media_type) for name, info in self._infos.items()}
        self._infos = {}
        return inputs
