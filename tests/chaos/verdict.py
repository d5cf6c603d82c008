"""The promises, as a judge: which ends a request may have, given what was done to it. Pure.

A fault of ours never excuses an end by itself: what excuses it is named here, and comes from docs/design.md §6 and
docs/protocol.md, sections 5.6, 5.7 and 7.
"""

import hashlib
from enum import StrEnum

import attrs

from tests.chaos.workload import FRAIL, FRAIL_ATTEMPTS, SAMPLE_BYTES, Plan


class Cause(StrEnum):
    """What befell a request while it lived."""

    WORKER_KILLED = "a worker that ran it was killed"
    SLOT_KILLED = "its slot was killed"
    WORKER_AWAY = "a worker that ran it stayed away for longer than one without output is awaited"
    WORKER_LONG_AWAY = "a worker that ran it stayed away for longer than worker_grace_s"
    RELAY_RESTARTED = "the relay was started anew"
    UNHELD = "no connection held it for longer than the resume window"
    CANCELLED = "its client cancelled it"


LOSSES = frozenset({Cause.WORKER_KILLED, Cause.SLOT_KILLED, Cause.WORKER_AWAY, Cause.WORKER_LONG_AWAY})


@attrs.define(eq=False)
class Hearing:
    """What one listener got of a request: its audio by `seq`, what was void taken out, and how it ended.

    One that goes on after another's frames begins with the pieces of that one.

    Attributes:
        name: of the listener.
        after_seq: what it had before; -1 for nothing.
        end: `completed`, `cancelled`, `failed CODE`, or what else it came to; empty while it goes on.
        voided: samples that a restart took back.
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
    #: Whether another listener takes it from here: it has no end of its own.
    left: bool = False

    @property
    def pcm(self) -> bytes:
        """All samples, in order."""
        return b"".join(data for _seq, data in self.pieces)

    def void(self, seq: int) -> int:
        """Take back what came from `seq` on; how many samples that were."""
        kept = [piece for piece in self.pieces if piece[0] < seq]
        gone = sum(len(data) for _seq, data in self.pieces[len(kept) :]) // SAMPLE_BYTES
        self.pieces = kept
        self.restarts += 1
        self.voided += gone
        return gone


def judge(plan: Plan, hearing: Hearing, causes: frozenset[Cause]) -> list[str]:
    """What is wrong with what a listener got; empty if the promises were kept.

    Args:
        plan: of the request.
        hearing: what it got, to its end.
        causes: what befell the request, as far as the harness knows.
    """
    complaints = _judge_samples(plan, hearing)
    lost = _losses(causes, had_output=bool(hearing.pieces or hearing.voided))
    if hearing.voided and plan.reproducible and not ((lost or plan.fail) and Cause.RELAY_RESTARTED in causes):
        complaints.append("audio of a reproducible engine began anew, though relay and worker were not both lost")
    if hearing.voided and not plan.reproducible and not (plan.retry == "always" and lost):
        complaints.append(f"audio began anew with retry {plan.retry!r} and causes {_words(causes)}")
    if (complaint := _judge_end(plan, hearing, causes)) is not None:
        complaints.append(complaint)
    return complaints


def _judge_samples(plan: Plan, hearing: Hearing) -> list[str]:
    got, expected = hearing.pcm, plan.expected()
    if hearing.end == "completed":
        if hashlib.sha256(got).digest() == hashlib.sha256(expected).digest():
            return []
        return [
            f"{len(got) // 2} samples came that differ from the {len(expected) // 2} expected: {_where(got, expected)}"
        ]
    if not expected.startswith(got):
        return [f"the samples before the end differ from those expected: {_where(got, expected)}"]
    return []


def lost_and_doubled(plan: Plan, hearing: Hearing) -> tuple[int, int]:
    """How many samples of a completed request did not come, and how many came that should not have, or once too often.

    Where the samples are wrong this is told piece by piece, as the worker cut them; a tune that repeats itself may make
    the two numbers too large, and never zero.
    """
    expected = plan.expected()
    lost = doubled = at = 0
    for _seq, data in hearing.pieces:
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


def _judge_end(plan: Plan, hearing: Hearing, causes: frozenset[Cause]) -> str | None:
    end, lost = hearing.end, _losses(causes, had_output=bool(hearing.pieces))
    if end == "completed":
        if plan.fail:
            return "it completed, though its engine fails"
        return "it completed in spite of its cancel" if Cause.CANCELLED in causes else None
    if end == "cancelled":
        if causes & {Cause.CANCELLED, Cause.UNHELD}:
            return None
        return f"nobody cancelled it, and it was held ({hearing.message})"
    allowed: set[str] = set()
    if plan.space == FRAIL:
        # Given up after so many losses; or not tried again at all. Each of its attempts is lost by its own doing.
        allowed |= {"engine_failed", "idle_timeout"}
    if plan.retry == "never" or (plan.retry == "before_output" and not plan.reproducible):
        if lost - {Cause.SLOT_KILLED}:
            allowed.add("worker_lost")
        if Cause.SLOT_KILLED in lost:
            allowed.add("engine_failed")
    if plan.space == FRAIL and lost - {Cause.SLOT_KILLED}:
        allowed.add("worker_lost")  # the last of its three losses may be ours
    if end.removeprefix("failed ") in allowed:
        return None
    return f"it ended as {end!r} ({hearing.message}), with retry {plan.retry!r} and causes {_words(causes)}"


def judge_attempts(plan: Plan, begun: list[int], requeued: int, relay_starts: int) -> list[str]:
    """What is wrong with how often a request ran.

    Args:
        plan: of the request.
        begun: numbers of the attempts that workers began, in order.
        requeued: losses after which the relay queued it again, by its log.
        relay_starts: how often the relay was started during its life: it may have noticed a loss only by that.
    """
    complaints = []
    if len(set(begun)) != len(begun):
        complaints.append(f"an attempt ran twice: {begun}")
    if len(begun) > 1 + requeued + relay_starts:
        complaints.append(f"it ran {len(begun)} times, and the relay noticed {requeued} losses: {begun}")
    if plan.retry == "never" and len(begun) > 1:
        complaints.append(f"it was not to be tried again, and ran as {begun}")
    if plan.space == FRAIL and len(begun) > FRAIL_ATTEMPTS + relay_starts:
        complaints.append(f"it took more than {FRAIL_ATTEMPTS} slots down: {begun}")
    return complaints


def _losses(causes: frozenset[Cause], *, had_output: bool) -> frozenset[Cause]:
    """The causes that can lose an attempt: one that has put out something is awaited for longer."""
    return causes & LOSSES - ({Cause.WORKER_AWAY} if had_output else frozenset())


def _words(causes: frozenset[Cause]) -> str:
    return ", ".join(sorted(causes)) or "none"
