"""Engine `webrtc` in this process: its seats, and the runs in them, each in a thread."""

import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from gpuworker.engines.base import AudioChunk, Chunk, LiveInput, OutputChunk, RequestContext
from gpuworker.engines.webrtc.engine import WebRtcEngine
from gpuworker.slots.run_engine import RunResult, run_engine
from tests.support.caller import PATIENCE_S, Caller

PORTS = "20400-20499"


class Run:
    """One run in a seat."""

    def __init__(
        self, engine: WebRtcEngine, params: Mapping[str, Any], inputs: Mapping[str, Any], name: str, who: str = ""
    ) -> None:
        self.chunks: list[Chunk] = []
        self.end: RunResult | None = None
        self._inputs = inputs
        self._cancelled = threading.Event()
        context = RequestContext(request_id=name, principal=who)

        def run() -> None:
            emit = self.chunks.append
            self.end = run_engine(engine, dict(params), inputs, self._cancelled.is_set, emit, context)

        self._thread = threading.Thread(target=run, daemon=True)
        self._thread.start()

    @property
    def outputs(self) -> list[Any]:
        return [chunk.data for chunk in list(self.chunks) if isinstance(chunk, OutputChunk)]

    @property
    def pcm(self) -> bytes:
        return b"".join(chunk.pcm for chunk in list(self.chunks) if isinstance(chunk, AudioChunk))

    def told(self, key: str) -> list[Any]:
        return [data[key] for data in self.outputs if key in data]

    def until(self, key: str, value: Any = None) -> Any:
        """Wait until it has told something of this name."""

        def found() -> list[Any]:
            return [each for each in self.told(key) if value in (None, each)]

        return wait(lambda: found() or self.end, self)[0] if not found() else found()[0]

    def cancel(self) -> None:
        self._cancelled.set()
        for each in self._inputs.values():
            if isinstance(each, LiveInput):
                each.stop()

    def ended(self) -> RunResult:
        self._thread.join(PATIENCE_S)
        assert self.end is not None, f"it goes on; it told {self.outputs}"
        return self.end


def wait(wanted: Callable[[], Any], run: Run | None = None) -> Any:
    """Wait for a true value."""
    until = time.monotonic() + PATIENCE_S
    while not (value := wanted()):
        assert time.monotonic() < until, f"in vain; it told {run.outputs if run else ''}"
        time.sleep(0.01)
    assert not isinstance(value, RunResult), f"it ended: {value}"
    return value


class Seats:
    """A loaded engine."""

    def __init__(self, engine: WebRtcEngine, count: int) -> None:
        engine.load()
        self.engine = engine
        self._free = list(engine.seats(count))
        self._runs: list[Run] = []

    def run(self, params: Mapping[str, Any], name: str = "", who: str = "anna", **inputs: Any) -> Run:
        seat = self._free.pop()
        assert isinstance(seat, WebRtcEngine)
        run = Run(seat, params, inputs, name, who)
        self._runs.append(run)
        return run

    def call(self, caller: Caller, name: str = "call", **inputs: Any) -> Run:
        """A call that stands; its commands are `commands`."""
        run = self.run({"offer": caller.offer()}, name, **inputs)
        caller.accept(run.until("answer"))
        run.until("state", "connected")
        return run

    def close(self) -> None:
        for run in self._runs:
            run.cancel()
        for run in self._runs:
            run.ended()
        self.engine.close()


@contextmanager
def the_seats(count: int = 8, **options: Any) -> Iterator[Seats]:
    """An engine with seats on loopback."""
    given = {name: option.default for name, option in WebRtcEngine.OPTIONS.items()}
    seats = Seats(WebRtcEngine({**given, "host": "127.0.0.1", "ports": PORTS, **options}), count)
    try:
        yield seats
    finally:
        seats.close()


def live(media_type: str = "application/x-ndjson") -> LiveInput:
    return LiveInput(media_type)
