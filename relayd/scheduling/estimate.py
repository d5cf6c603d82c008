"""Estimates how long queued requests will wait, from the recent run times of their space. Pure."""

import heapq
from statistics import fmean

from relayd.scheduling.model import SpaceState


def estimate_waits_s(space: SpaceState, slots: int, count: int, now: float) -> list[float] | None:
    """Estimate the seconds until each of the first `count` queued requests starts.

    Each running request is assumed to take the mean of the recent run times; each queued request then gets the slot
    that is free first.

    Args:
        space: the space, with its running requests and recent run times.
        slots: number of slots of the workers that accept requests.
        count: number of queued requests to estimate for.
        now: monotonic seconds.

    Returns:
        The waits in seconds, in queue order; None if the space is paused, has no slots, or no run time is known.
    """
    if not space.recent_runs_s or not slots or space.paused:
        return None
    run_s = fmean(space.recent_runs_s)
    busy = sorted(max(0.0, run_s - (now - entry.started_at)) for entry in space.running.values())
    free_at = busy[:slots] + [0.0] * (slots - len(busy))
    heapq.heapify(free_at)
    return [round(heapq.heappushpop(free_at, free_at[0] + run_s), 1) for _ in range(count)]


def estimate_retry_s(space: SpaceState, slots: int) -> float | None:
    """Estimate the seconds between two starts, after which a refused client may try again; None if unknown."""
    return round(fmean(space.recent_runs_s) / max(1, slots), 1) if space.recent_runs_s else None
