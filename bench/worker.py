"""Measures what 200 real-time streams cost the worker that sends them: frame logs, sender, masking and link."""

import os
import subprocess
import sys
import time
from functools import partial

import trio

from bench.figures import Row
from bench.relay.frames import SPEECH_BYTES
from gpuworker.attempt import Attempt
from gpuworker.engines.base import AudioChunk
from gpuworker.frame_sender import FrameSender
from protocol.link.dial import serve_link
from protocol.wire.messages import Assign

STREAMS = 200
#: A chunk of 7,680 bytes is 80 ms of 48 kHz speech.
INTERVAL_S = 0.08
SECONDS = 5.0
#: Limit in percent of one core: the worker must be able to send them.
LIMIT_PERCENT = 100.0
#: The relay's end, a process that reads everything.
_DRAIN = "import os\nwhile os.read(0, 1 << 20): pass"


def measure() -> list[Row]:
    """Measure the share of a core, and the CPU time per frame."""
    share, frame_us = trio.run(_feed)
    what = f"{STREAMS} real-time streams of 48 kHz speech on one link"
    return [
        Row(figure="worker", name=f"{what}: CPU of the sending side", unit="%", value=100 * share, limit=LIMIT_PERCENT),
        Row(figure="worker", name=f"{what}: CPU of a frame", unit="µs", value=frame_us),
    ]


async def _feed() -> tuple[float, float]:
    (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
    async with listener:
        stream = await trio.open_tcp_stream(*listener.socket.getsockname()[:2])
        drained = await listener.accept()
    os.set_blocking(drained.socket.fileno(), True)
    drain = partial(subprocess.Popen, [sys.executable, "-c", _DRAIN], stdin=drained.socket.fileno())
    with drain() as process:
        drained.socket.close()
        async with serve_link(stream, peer="relay", is_client=True) as link, trio.open_nursery() as nursery:
            feeder = FrameSender(link)
            attempts = [Attempt(_assign(number), reproducible=True, on_frames=feeder.add) for number in range(STREAMS)]
            nursery.start_soon(feeder.run)
            figures = await _speak(attempts)
            nursery.cancel_scope.cancel()
            link.abort("measured")
        process.wait()
    return figures


async def _speak(attempts: list[Attempt]) -> tuple[float, float]:
    """Send a chunk of each attempt per interval, evenly spaced."""
    chunk = AudioChunk(bytes(SPEECH_BYTES))
    frames = 0
    cpu_s, began = time.process_time(), trio.current_time()
    while (now := trio.current_time()) - began < SECONDS:
        due = int((now - began) / INTERVAL_S * len(attempts))
        while frames < due:
            attempts[frames % len(attempts)].add_chunk(chunk)
            frames += 1
        await trio.sleep(INTERVAL_S / len(attempts))
    used_s = time.process_time() - cpu_s
    return used_s / (trio.current_time() - began), 1e6 * used_s / frames


def _assign(number: int) -> Assign:
    return Assign(request_id=f"{number:032x}", attempt=1, space="bench", principal="bench", run_timeout_s=60.0)
