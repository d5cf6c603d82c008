"""Decides whether a link's peer is alive and accepts what is sent, from known facts and without I/O."""

from collections.abc import Callable

import attrs

from protocol.link.limits import LinkLimits

#: How often in `send_timeout_s` a link checks whether its peer accepts data.
CHECKS = 8
#: Time until the next check of a silent peer whose machine still answers.
RECHECK_S = 1.0
#: A check that runs this much later than scheduled means that the process was suspended: data from peers waits unread.
LATE_S = 1.0


@attrs.frozen(kw_only=True)
class LinkFacts:
    """What a link knows at `now`; every time is Trio time.

    Args:
        now: the time of the check.
        received_at: when anything was last received from the peer.
        taken_at: when sending last made progress.
        ping_due: when the next ping is due.
        reading_paused: whether this side has stopped reading, so that silence means nothing.
        sending: whether data waits to be sent.
        machine_answers: whether the peer's machine still acknowledges data although its program is silent; called only
            if the peer would otherwise count as dead.
    """

    now: float
    received_at: float
    taken_at: float
    ping_due: float
    reading_paused: bool
    sending: bool
    machine_answers: Callable[[], bool]


@attrs.frozen
class Alive:
    """The link is healthy: check again at `check_at` (Trio time), and send a ping now if `ping` is set."""

    check_at: float
    ping: bool


@attrs.frozen
class Dead:
    """Nothing was received from the peer for `silent_s` seconds."""

    silent_s: float


@attrs.frozen
class Stalled:
    """The peer accepted nothing of what was sent for `send_timeout_s`."""


def assess(facts: LinkFacts, limits: LinkLimits) -> Alive | Dead | Stalled:
    """Judge a link by the known facts."""
    now = facts.now
    dead_at = facts.received_at + limits.dead_after_s
    if facts.reading_paused:
        dead_at = now + limits.dead_after_s
    elif now >= dead_at:
        if not (facts.sending and facts.machine_answers()):
            return Dead(now - facts.received_at)
        dead_at = now + RECHECK_S
    check_at = min(dead_at, now + limits.send_timeout_s / CHECKS)
    if facts.sending:
        stalls_at = facts.taken_at + limits.send_timeout_s
        if now >= stalls_at:
            return Stalled()
        check_at = min(check_at, stalls_at)
    ping = now >= facts.ping_due
    ping_due = now + limits.ping_interval_s if ping else facts.ping_due
    return Alive(min(check_at, ping_due), ping)
