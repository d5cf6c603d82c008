"""Measures requests that are answered from the cache, beside the same requests that are run."""

import statistics
from functools import partial

import attrs
import trio

from bench.figures import Row, in_turns, paired
from bench.stage import Stage, open_stage
from protocol.client.client import RelayClient, open_relay
from protocol.wire.validators import Value

_SETTINGS = "cache_s = 3600\n"
#: 2 s of audio in 20 frames, made at once: an engine that takes any time makes the ratios better.
SPEECH: dict[str, Value] = {"text": "Press one for opening hours.", "duration_s": 2, "speed": 0}
ROUNDS = 9
#: Requests of a round: one after another, and so many at once.
ALONE, AT_ONCE = 20, 64


@attrs.frozen
class Round:
    """What a client saw of one round, and what it cost the relay."""

    first_ms: float
    each_ms: float
    cpu_ms: float


def measure() -> list[Row]:
    """Measure both in turns; about half a minute."""
    with open_stage(_SETTINGS) as stage:
        token = stage.token("client", "reader")
        trio.run(_warm_up, stage, token)
        hit, run = partial(_round, stage, token, True), partial(_round, stage, token, False)
        ours, theirs = in_turns(ROUNDS, {"hit": hit, "run": run}).values()
    figures = {
        "first audio": ("ms", "first_ms"),
        f"time of each of {AT_ONCE} requests at once": ("ms", "each_ms"),
        "CPU of the relay for a request": ("ms", "cpu_ms"),
    }
    return [
        paired(
            "cached",
            f"{name}, from the cache",
            unit,
            [getattr(each, field) for each in ours],
            [getattr(each, field) for each in theirs],
            "run by a worker that takes no time",
        )
        for name, (unit, field) in figures.items()
    ]


async def _warm_up(stage: Stage, token: str) -> None:
    """Wait for the worker, and leave a result in the cache."""
    async with open_relay(stage.url, token=token) as client:
        await _ask(client, True)


def _round(stage: Stage, token: str, cache: bool) -> Round:
    return trio.run(_measure_round, stage, token, cache)


async def _measure_round(stage: Stage, token: str, cache: bool) -> Round:
    async with open_relay(stage.url, token=token) as client:
        firsts = [await _ask(client, cache) for _ in range(ALONE)]
        began, cpu_s = trio.current_time(), stage.server.cpu_s()
        async with trio.open_nursery() as nursery:
            for _ in range(AT_ONCE):
                nursery.start_soon(_ask, client, cache)
        took_s, cpu_s = trio.current_time() - began, stage.server.cpu_s() - cpu_s
        return Round(1e3 * statistics.median(firsts), 1e3 * took_s / AT_ONCE, 1e3 * cpu_s / AT_ONCE)


async def _ask(client: RelayClient, cache: bool) -> float:
    """Ask and listen to the end; returns the seconds to the first audio."""
    began, first_s = trio.current_time(), 0.0
    async with client.submit("bench", SPEECH, cache=cache) as stream:
        async for _ in stream.audio():
            first_s = first_s or trio.current_time() - began
    return first_s
