"""Whether the peer of a link lives and takes what it is sent: facts in, a verdict out. Pure."""

from collections.abc import Callable

import attrs

from protocol.link.limits import LinkLimits

#: How often in `send_timeout_s` a link looks whether its peer takes what is sent.
LOOKS = 8
#: How long a silent peer whose machine still answers is given at a time.
PATIENCE_S = 1.0
#: A process that is called so much later than it asked for stood still: what its peers sent waits unread.
LATE_S = 1.0


@attrs.frozen(kw_only=True)
class LinkFacts:
    """What a link knows at `now`; every time is Trio time.

    Args:
        now: the time of the check.
        received_at: when anything last came from the peer.
        taken_at: when some of what is sent last got further.
        ping_due: when the next ping is due.
        reading_paused: whether this side does not read, so that silence means nothing.
        sending: whether anything waits to be sent.
        machine_answers: whether the peer's machine still acknowledges what it is sent, though its program is silent;
            asked only where the peer would count as dead otherwise.
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
    """Nothing is wrong: check again at `check_at` (Trio time), and send a ping now if `ping` says so."""

    check_at: float
    ping: bool


@attrs.frozen
class Dead:
    """Nothing came from the peer for `silent_s` seconds."""

    silent_s: float


@attrs.frozen
class Stalled:
    """The peer took nothing of what is sent for all of `send_timeout_s`."""


def assess(facts: LinkFacts, limits: LinkLimits) -> Alive | Dead | Stalled:
    """Judge a link by what is known of it."""
    now = facts.now
    dead_at = facts.received_at + limits.dead_after_s
    if facts.reading_paused:
        dead_at = now + limits.dead_after_s
    elif now >= dead_at:
        if not (facts.sending and facts.machine_answers()):
            return Dead(now - facts.received_at)
        dead_at = now + PATIENCE_S
    check_at = min(dead_at, now + limits.send_timeout_s / LOOKS)
    if facts.sending:
        stalls_at = facts.taken_at + limits.send_timeout_s
        if now >= stalls_at:
            return Stalled()
        check_at = min(check_at, stalls_at)
    ping = now >= facts.ping_due
    ping_due = now + limits.ping_interval_s if ping else facts.ping_due
    return Alive(min(check_at, ping_due), ping)
