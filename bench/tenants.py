"""Measures what a victim notices of strangers and of hostile tenants: connecting, and the time to first audio."""

import statistics
import sys
from collections.abc import Iterator

import trio

from bench.attackers import ATTACKS
from bench.figures import Row
from bench.stage import open_quietly, open_stage
from protocol.client.address import parse_address
from protocol.client.client import open_relay
from protocol.link.dial import log_in, open_link
from protocol.wire.errors import ConnectError, LinkError
from protocol.wire.messages import Hello
from protocol.wire.validators import Value

#: Time for an attack to build up, and time to measure.
WARM_UP_S, SECONDS = 3.0, 8.0
#: What the victim asks for: audio that is made at once, so that nothing but the relay takes time.
SPEECH: dict[str, Value] = {"text": "hello", "speed": 0}
#: An attacker has a machine of its own: here it must not take the victim's CPU time.
ATTACKER_NICENESS = "19"
#: Limit of the victim's p95 beside its quiet p95, and of its connecting, in milliseconds.
LIMIT_RATIO, CONNECT_LIMIT_MS = 2.0, 1_000.0


def measure() -> list[Row]:
    """Measure every attack beside a quiet relay; about five minutes."""
    return trio.run(_measure)


async def _measure() -> list[Row]:
    rows: list[Row] = []
    with open_stage("[spaces.empty]\n") as stage:
        port = stage.server.port
        tokens = {who: stage.token("client", who) for who in ("victim", "hostile")}
        tokens["hostile-worker"] = stage.token("worker", "hostile-worker")
        async with (
            open_relay(stage.url, token=tokens["victim"]) as client,
            client.submit("bench", SPEECH) as stream,
        ):
            await stream.result()  # the worker is there
        for kind in ATTACKS:
            quiet = await _watch(port, tokens["victim"])
            role = "hostile-worker" if kind == "registrations" else "hostile"
            attack = [sys.executable, "-m", "bench.attackers", kind, str(port), tokens[role]]
            command = ["nice", "-n", ATTACKER_NICENESS, *attack]
            with open_quietly(command):
                await trio.sleep(WARM_UP_S)
                loud = await _watch(port, tokens["victim"])
            rows += _rows(kind, quiet, loud)
            await trio.sleep(1.0)
    return rows


def _rows(kind: str, quiet: "Watched", loud: "Watched") -> Iterator[Row]:
    figure = "tenants"
    p95, before = _percentile(loud.first_ms, 95), _percentile(quiet.first_ms, 95)
    yield Row(
        figure=figure,
        name=f"under {kind}: victim's first audio, p95",
        unit="ms",
        value=p95,
        against=before,
        peer="quiet",
        ratios=(p95 / before,),
        limit_ratio=LIMIT_RATIO,
    )
    yield Row(
        figure=figure,
        name=f"under {kind}: connecting, p99 of {len(loud.connect_ms)}",
        unit="ms",
        value=_percentile(loud.connect_ms, 99),
        limit=CONNECT_LIMIT_MS,
    )
    yield Row(figure=figure, name=f"under {kind}: connections refused", unit="", value=loud.refused, limit=0)


def _percentile(values: list[float], percent: int) -> float:
    return statistics.quantiles(values, n=100, method="inclusive")[percent - 1] if len(values) > 1 else float("inf")


class Watched:
    """What the victim saw."""

    def __init__(self) -> None:
        self.first_ms: list[float] = []
        self.connect_ms: list[float] = []
        self.refused = 0


async def _watch(port: int, token: str) -> Watched:
    seen, url = Watched(), f"ws://127.0.0.1:{port}"

    async def speak() -> None:
        async with open_relay(url, token=token) as client:
            while True:
                began = trio.current_time()
                async with client.submit("bench", SPEECH) as stream:
                    async for _ in stream.audio():
                        break
                seen.first_ms.append(1_000 * (trio.current_time() - began))
                await trio.sleep(0.01)

    async def connect() -> None:
        while True:
            began = trio.current_time()
            try:
                with trio.fail_after(10):
                    async with open_link(parse_address(url)) as link:
                        await log_in(link, Hello(version=1, role="client", token=token))
                        seen.connect_ms.append(1_000 * (trio.current_time() - began))
            except (ConnectError, LinkError, OSError, trio.TooSlowError):
                seen.refused += 1
            await trio.sleep(0.05)

    with trio.move_on_after(SECONDS):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(speak)
            nursery.start_soon(connect)
    return seen
