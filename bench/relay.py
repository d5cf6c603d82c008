"""What a frame costs on its way through the relay, against a relay of a few lines on the same library."""

from collections.abc import Sequence
from contextlib import ExitStack, closing
from statistics import median

from bench.figures import Row, alternate, paired
from bench.load import PlainFleet, RelaydFleet, Round
from bench.servers import open_plain, open_relayd

WORKERS, STREAMS = 4, 50
#: 5,000 frames: a second or so.
SATURATED_EACH, SATURATED_ROUNDS = 100, 7
#: 600 frames a second over all streams: 50 listeners of live speech in chunks of 80 ms.
PACED_EACH, PACED_INTERVAL_S, PACED_ROUNDS = 30, 1 / 12, 5


def measure() -> list[Row]:
    """Saturated, then paced; both relays run all the time, and only one has work."""
    with ExitStack() as stack:
        ours = stack.enter_context(closing(RelaydFleet(stack.enter_context(open_relayd()), WORKERS, STREAMS)))
        plain = stack.enter_context(closing(PlainFleet(stack.enter_context(open_plain()), WORKERS, STREAMS)))
        for fleet in (ours, plain):  # imports, caches and buffers grow to their size
            fleet.saturated(20)
        full = alternate(
            SATURATED_ROUNDS, lambda: ours.saturated(SATURATED_EACH), lambda: plain.saturated(SATURATED_EACH)
        )
        paced = alternate(
            PACED_ROUNDS,
            lambda: ours.paced(PACED_EACH, PACED_INTERVAL_S),
            lambda: plain.paced(PACED_EACH, PACED_INTERVAL_S),
        )
    load = f"{STREAMS} streams of {WORKERS} workers"
    return [
        *_rows(f"saturated, {load}", *full, latency=False),
        *_rows(f"paced 600 frames/s, {load}", *paced, latency=True),
        _bottleneck(full[0]),
    ]


def _rows(name: str, ours: Sequence[Round], plain: Sequence[Round], *, latency: bool) -> list[Row]:
    def row(what: str, unit: str, of: Sequence[float], against: Sequence[float]) -> Row:
        return paired("relay", f"{name}: {what}", unit, of, against, "plain trio-websocket")

    rows = [row("CPU of the relay", "µs/frame", *([r.cpu_us_a_frame for r in rounds] for rounds in (ours, plain)))]
    if not latency:  # a queue that is kept full has the latency of its length
        rows.insert(0, row("throughput", "frames/s", *([r.frames_a_second for r in rs] for rs in (ours, plain))))
        return rows
    for words, quantile in (("p50", 0.5), ("p99", 0.99)):
        figures = ([r.latency_us(quantile) for r in rounds] for rounds in (ours, plain))
        rows.append(row(f"worker to client, {words}", "µs", *figures))
    return rows


def _bottleneck(rounds: Sequence[Round]) -> Row:
    share = median(r.load_cpu_s / r.wall_s for r in rounds)
    return Row(
        figure="relay",
        name="the load generator's share of its core while relayd is saturated (near 100 it would be what is measured)",
        unit="%",
        value=100 * share,
    )
