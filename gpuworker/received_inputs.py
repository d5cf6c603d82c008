"""Collects the inputs of a request, which arrive after its `assign`, until they are complete."""

import hashlib
from collections.abc import Mapping

import trio

from gpuworker.engines.base import EngineInput
from gpuworker.slots.run_engine import RunResult
from protocol.wire.errors import ErrorCode
from protocol.wire.media_types import accepts
from protocol.wire.messages import Input
from protocol.wire.structs import InputInfo, InputRule


class ReceivedInputs:
    """Collects pieces of inputs, in order and without gaps, and checks them against the announcement in `assign`.

    Its memory is bounded by the announced sizes, which the relay has checked against its limits.

    Args:
        infos: name -> the announced input.
    """

    def __init__(self, infos: Mapping[str, InputInfo]) -> None:
        self._infos = dict(infos)
        self._held = {name: bytearray() for name in infos}
        self.fault: RunResult | None = None
        self.settled = trio.Event()
        self._settle()

    def refuse_by(self, rules: Mapping[str, InputRule]) -> None:
        """Check the announced inputs against an engine's rules; a violation sets `fault`."""
        for name, rule in rules.items():
            if rule.required and name not in self._infos:
                self._fail(ErrorCode.INPUT_MISSING, f"input {name!r} is required; submit it with the request")
        for name, info in self._infos.items():
            allowed = rules.get(name)
            if allowed is None:
                accepted = ", ".join(sorted(rules)) or "none"
                self._fail(ErrorCode.INVALID_PARAMS, f"input {name!r} is unknown; this engine accepts: {accepted}")
            elif info.size > allowed.max_bytes:
                self._fail(ErrorCode.INPUT_TOO_LARGE, f"input {name!r} has {info.size} bytes, over {allowed.max_bytes}")
            elif not accepts(allowed.media_types, info.media_type):
                accepted = ", ".join(allowed.media_types)
                self._fail(ErrorCode.INVALID_PARAMS, f"input {name!r} is {info.media_type!r}; it must be {accepted}")

    def add(self, piece: Input) -> None:
        """Add a piece; one that does not fit sets `fault`."""
        if self.settled.is_set():
            return
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
        """The complete inputs; they can be taken only once."""
        inputs = {name: EngineInput(bytes(self._held.pop(name)), info.media_type) for name, info in self._infos.items()}
        self._infos = {}
        return inputs
