"""Estimates how long queued requests will wait, from the recent run times of their space. Pure."""

from collections.abc import Callable
from statistics import fmean

from relayd.scheduling.model import SpaceState


def estimate_wait_s(space: SpaceState, slots: int, now: float) -> Callable[[int], float | None]:
    """Return a function: place in the queue, from 0 -> seconds until that request starts, None where unknown.

    A slot is free when what runs in it has taken the mean run time, and then takes the next request each time. No
    slot is busy for longer than one run, so the slots take their turns in the order in which they become free.

    Args:
        space: with its running requests and its recent run times.
        slots: of the workers that accept requests.
        now: monotonic seconds.

    Returns:
        The waits in seconds, in queue order; None if the space is paused, has no slots, or no run time is known.
    """
    if not space.recent_runs_s or not slots or space.paused:
        return lambda _place: None
    run_s = fmean(space.recent_runs_s)
    busy = sorted(max(0.0, run_s - (now - entry.started_at)) for entry in space.running.values())[:slots]
    free_at = [0.0] * (slots - len(busy)) + busy
    return lambda place: round(free_at[place % slots] + place // slots * run_s, 1)


def estimate_retry_s(space: SpaceState, slots: int) -> float | None:
    """Estimate the seconds between two starts, after which a refused client may try again; None if unknown."""
    return round(fmean(space.recent_runs_s) / max(1, slots), 1) if space.recent_runs_s else None
