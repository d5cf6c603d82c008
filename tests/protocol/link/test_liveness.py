"""The verdict on a link's peer, from facts alone."""

from typing import Any

import attrs

from protocol.link.limits import LinkLimits
from protocol.link.liveness import CHECKS, RECHECK_S, Alive, Dead, LinkFacts, Stalled, assess

LIMITS = LinkLimits(ping_interval_s=5.0, dead_after_s=15.0, send_timeout_s=60.0)


def facts(**known: Any) -> LinkFacts:
    plain: dict[str, Any] = {
        "now": 100.0,
        "received_at": 100.0,
        "taken_at": 100.0,
        "ping_due": 104.0,
        "reading_paused": False,
        "sending": False,
        "machine_answers": lambda: False,
    }
    return LinkFacts(**(plain | known))


def test_a_peer_that_was_heard_just_now_lives_and_is_checked_when_its_ping_is_due() -> None:
    assert assess(facts(), LIMITS) == Alive(104.0, ping=False)


def test_a_ping_that_is_due_is_sent_and_the_next_is_an_interval_later() -> None:
    assert assess(facts(ping_due=100.0), LIMITS) == Alive(105.0, ping=True)


def test_a_peer_that_is_silent_for_too_long_is_dead() -> None:
    assert assess(facts(received_at=85.0), LIMITS) == Dead(15.0)
    assert assess(facts(received_at=85.5), LIMITS) == Alive(100.5, ping=False)


def test_silence_means_nothing_while_this_side_does_not_read() -> None:
    assert assess(facts(received_at=0.0, reading_paused=True), LIMITS) == Alive(104.0, ping=False)


def test_a_silent_peer_with_something_on_its_way_is_given_time_while_its_machine_answers() -> None:
    silent = facts(received_at=80.0, sending=True, taken_at=99.0, machine_answers=lambda: True)
    assert assess(silent, LIMITS) == Alive(100.0 + RECHECK_S, ping=False)
    assert assess(attrs.evolve(silent, machine_answers=lambda: False), LIMITS) == Dead(20.0)


def test_the_machine_is_asked_only_where_the_peer_would_count_as_dead() -> None:
    def must_not_be_asked() -> bool:
        raise AssertionError

    assess(facts(received_at=90.0, sending=True, machine_answers=must_not_be_asked), LIMITS)
    assert assess(facts(received_at=0.0, machine_answers=must_not_be_asked), LIMITS) == Dead(100.0)


def test_a_peer_that_takes_nothing_for_all_of_the_timeout_has_stalled() -> None:
    assert assess(facts(sending=True, taken_at=40.0), LIMITS) == Stalled()
    assert assess(facts(sending=True, taken_at=43.0), LIMITS) == Alive(103.0, ping=False)


def test_a_slow_peer_is_looked_at_several_times_within_the_timeout() -> None:
    often = LinkLimits(ping_interval_s=500.0, dead_after_s=500.0, send_timeout_s=8.0)
    assert assess(facts(sending=True, ping_due=600.0), often) == Alive(100.0 + 8.0 / CHECKS, ping=False)
