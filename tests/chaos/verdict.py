"""The rules of a verdict: which ends a request may have, given what happened to it. Pure functions.

A fault alone never excuses an end: the excuses are listed here, and come from docs/design.md §6 and docs/protocol.md,
sections 5.6, 5.7 and 7.
"""

import hashlib
from enum import StrEnum

import attrs

from tests.chaos.workload import FRAIL, FRAIL_ATTEMPTS, SAMPLE_BYTES, Plan


class Cause(StrEnum):
    """What can happen to a live request."""

    WORKER_KILLED = "a worker that ran it was killed"
    SLOT_KILLED = "its slot was killed"
    WORKER_AWAY = "a worker that ran it stayed away for longer than the grace of an attempt without output"
    WORKER_LONG_AWAY = "a worker that ran it stayed away for longer than worker_grace_s"
    RELAY_RESTARTED = "the relay was restarted"
    UNHELD = "no connection held it for longer than the resume window"
    PAUSED = "its space was paused for longer than queue_timeout_s"
    RELAY_AWAY = "the relay was away for a third of queue_timeout_s, which counts all the same"
    CANCELLED = "its client cancelled it"
    SOURCE_ENDED = "its source failed or was cancelled"
    SOURCE_LOST = "an attempt of its source was lost"
    SOURCE_ANEW = "its source began anew"


LOSSES = frozenset({Cause.WORKER_KILLED, Cause.SLOT_KILLED, Cause.WORKER_AWAY, Cause.WORKER_LONG_AWAY})


@attrs.define(eq=False)
class Reception:
    """What one listener received of a request: its audio by `seq`, without voided frames, and how it ended.

    A listener that continues after the frames of another one starts with the pieces of that one.

    Attributes:
        name: the name of the listener.
        after_seq: the last `seq` that it already had; -1 for none.
        end: `completed`, `cancelled`, `failed CODE`, or another outcome; empty while it continues.
        voided: samples that restarts made void.
    """

    name: str
    after_seq: int = -1
    end: str = ""
    message: str = ""
    restarts: int = 0
    voided: int = 0
    attempt: int = 0
    last_seq: int = -1
    began_at: float = 0.0
    ended_at: float = 0.0
    pieces: list[tuple[int, bytes]] = attrs.field(factory=list)
    #: Whether another listener continues it, so that it has no end of its own.
    left: bool = False

    @property
    def pcm(self) -> bytes:
        """All samples, in order."""
        return b"".join(data for _seq, data in self.pieces)

    def void(self, seq: int) -> int:
        """Remove what was received from `seq` on; returns the number of samples."""
        kept = [piece for piece in self.pieces if piece[0] < seq]
        gone = sum(len(data) for _seq, data in self.pieces[len(kept) :]) // SAMPLE_BYTES
        self.pieces = kept
        self.restarts += 1
        self.voided += gone
        return gone


def judge(plan: Plan, reception: Reception, causes: frozenset[Cause]) -> list[str]:
    """What is wrong with what a listener received; empty if the promises were kept.

    Args:
        plan: the plan of the request.
        reception: what it received, to its end.
        causes: what happened to the request, as far as the harness knows.
    """
    complaints = _judge_samples(plan, reception)
    lost = _losses(causes, had_output=bool(reception.pcm or reception.voided))
    both_lost = (lost or plan.fail) and Cause.RELAY_RESTARTED in causes
    if reception.voided and plan.reproducible and not (both_lost or Cause.SOURCE_ANEW in causes):
        complaints.append("audio of a reproducible engine started again, though relay and worker were not both lost")
    may_void = (plan.retry == "always" and lost) or (plan.retry != "never" and Cause.SOURCE_LOST in causes)
    if reception.voided and not plan.reproducible and not may_void:
        complaints.append(f"audio started again with retry {plan.retry!r} and causes {_listed(causes)}")
    if (complaint := _judge_end(plan, reception, causes)) is not None:
        complaints.append(complaint)
    return complaints


def _judge_samples(plan: Plan, reception: Reception) -> list[str]:
    got, expected = reception.pcm, plan.expected()
    if reception.end == "completed":
        if hashlib.sha256(got).digest() == hashlib.sha256(expected).digest():
            return []
        return [f"{len(got) // 2} samples differ from the {len(expected) // 2} expected: {_where(got, expected)}"]
    if not expected.startswith(got):
        return [f"the samples before the end differ from those expected: {_where(got, expected)}"]
    return []


def lost_and_doubled(plan: Plan, reception: Reception) -> tuple[int, int]:
    """The number of samples of a completed request that were lost, and of those that were wrong or duplicated.

    Wrong samples are counted by the pieces that the worker sent. A tune that repeats itself can make both numbers too
    large, but never zero.
    """
    expected = plan.expected()
    lost = doubled = at = 0
    for _seq, data in reception.pieces:
        found = at if expected.startswith(data, at) else expected.find(data, at)
        if found < 0:
            doubled += len(data)
        else:
            lost += found - at
            at = found + len(data)
    return (lost + len(expected) - at) // SAMPLE_BYTES, doubled // SAMPLE_BYTES


def _where(got: bytes, expected: bytes) -> str:
    same = next(
        (at for at, (a, b) in enumerate(zip(got, expected, strict=False)) if a != b), min(len(got), len(expected))
    )
    return f"the same up to sample {same // SAMPLE_BYTES}"


def _judge_end(plan: Plan, reception: Reception, causes: frozenset[Cause]) -> str | None:
    end, lost = reception.end, _losses(causes, had_output=bool(reception.pcm))
    if end == "completed":
        if plan.fail:
            return "it completed, although its engine fails"
        # The source may have ended well, and that end be forgotten with the relay and its worker.
        if Cause.SOURCE_ENDED in causes and not {Cause.SOURCE_LOST, Cause.RELAY_RESTARTED} <= causes:
            return "it completed, although its source did not"
        return "it completed despite its cancel" if Cause.CANCELLED in causes else None
    if end == "cancelled":
        if causes & {Cause.CANCELLED, Cause.UNHELD}:
            return None
        return f"nobody cancelled it, and it was held ({reception.message})"
    allowed: set[str] = set()
    if plan.queue_timeout_s is not None and reception.ended_at - reception.began_at >= plan.queue_timeout_s:
        allowed.add("queue_timeout")
    if causes & {Cause.PAUSED, Cause.RELAY_AWAY}:
        allowed.add("queue_timeout")
    if Cause.SOURCE_ENDED in causes or (plan.retry == "never" and Cause.SOURCE_LOST in causes):
        allowed.add("source_failed")
    if plan.tells and plan.fail:
        allowed.add("engine_failed")
    if plan.space == FRAIL:
        # Given up after too many losses, or not tried again at all. The request itself causes the loss of its attempts.
        allowed |= {"engine_failed", "idle_timeout"}
    if plan.retry == "never" or (plan.retry == "before_output" and not plan.reproducible):
        if lost - {Cause.SLOT_KILLED}:
            allowed.add("worker_lost")
        if Cause.SLOT_KILLED in lost:
            allowed.add("engine_failed")
    if plan.space == FRAIL and lost - {Cause.SLOT_KILLED}:
        allowed.add("worker_lost")  # the last of its three losses may be a fault of the harness
    if end.removeprefix("failed ") in allowed:
        return None
    return f"it ended as {end!r} ({reception.message}), with retry {plan.retry!r} and causes {_listed(causes)}"


def judge_attempts(plan: Plan, begun: list[int], requeued: int, relay_starts: int) -> list[str]:
    """What is wrong with how often a request ran.

    Args:
        plan: the plan of the request.
        begun: numbers of the attempts that workers began, in order.
        requeued: losses after which the relay queued it again, according to its log.
        relay_starts: how often the relay was started in its lifetime; the relay may have noticed a loss only there.
    """
    complaints = []
    if len(set(begun)) != len(begun):
        complaints.append(f"an attempt ran twice: {begun}")
    if len(begun) > 1 + requeued + relay_starts:
        complaints.append(f"it ran {len(begun)} times, and the relay noticed {requeued} losses: {begun}")
    if plan.retry == "never" and len(begun) > 1:
        complaints.append(f"it must not be tried again, but ran as {begun}")
    if plan.space == FRAIL and len(begun) > FRAIL_ATTEMPTS + relay_starts:
        complaints.append(f"it ended more than {FRAIL_ATTEMPTS} slots: {begun}")
    return complaints


def _losses(causes: frozenset[Cause], *, had_output: bool) -> frozenset[Cause]:
    """The causes that can lose an attempt: one with output has a longer grace."""
    return causes & LOSSES - ({Cause.WORKER_AWAY} if had_output else frozenset())


def _listed(causes: frozenset[Cause]) -> str:
    return ", ".join(sorted(causes)) or "none"
