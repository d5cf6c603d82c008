"""How long a queued request will wait, from its space's own recent run times. Pure."""

import heapq
from statistics import fmean

from relayd.scheduling.model import SpaceState


def estimate_waits_s(space: SpaceState, slots: int, count: int, now: float) -> list[float] | None:
    """Seconds until each of the first `count` queued requests starts; None where the space's pace is not known.

    Each slot is free when what runs in it is through; the queue then takes the earliest slot each time.

    Args:
        space: with its running requests and its recent run times.
        slots: of the workers that take requests.
        count: how many of its queue.
        now: monotonic seconds.
    """
    if not space.recent_runs_s or not slots or space.paused:
        return None
    run_s = fmean(space.recent_runs_s)
    busy = sorted(max(0.0, run_s - (now - entry.started_at)) for entry in space.running.values())
    free_at = busy[:slots] + [0.0] * (slots - len(busy))
    heapq.heapify(free_at)
    return [round(heapq.heappushpop(free_at, free_at[0] + run_s), 1) for _ in range(count)]


def estimate_retry_s(space: SpaceState, slots: int) -> float | None:
    """Seconds between two starts while the queue is full: when trying again may help."""
    return round(fmean(space.recent_runs_s) / max(1, slots), 1) if space.recent_runs_s else None
