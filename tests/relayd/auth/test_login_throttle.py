"""Failed logins: how many, for how long, of how many addresses."""

import pytest

from relayd.auth.login_throttle import MAX_ADDRESSES, MAX_FAILURES, WINDOW_S, LoginThrottle, network_of


def failed(throttle: LoginThrottle, address: str, now: float, times: int = MAX_FAILURES) -> None:
    for _ in range(times):
        assert throttle.add(address, now) is None


def test_ten_failures_a_minute_are_answered_and_a_minute_later_one_more() -> None:
    assert (MAX_FAILURES, WINDOW_S) == (10, 60.0)
    throttle = LoginThrottle()
    failed(throttle, "192.0.2.1", 100.0, 9)
    assert not throttle.is_throttled("192.0.2.1", 100.0)
    failed(throttle, "192.0.2.1", 110.0, 1)
    assert throttle.is_throttled("192.0.2.1", 159.9)
    assert throttle.add("192.0.2.1", 130.0) == 30.0
    assert not throttle.is_throttled("192.0.2.2", 130.0)
    assert not throttle.is_throttled("192.0.2.1", 160.0)
    failed(throttle, "192.0.2.1", 160.0, 9)
    assert throttle.add("192.0.2.1", 165.0) == 5.0, "the one at 110 still counts"


def test_of_too_many_addresses_the_one_that_failed_longest_ago_is_forgotten() -> None:
    assert MAX_ADDRESSES == 4096
    throttle = LoginThrottle()
    for address in ("first", "second"):
        failed(throttle, address, 0.0)
    for number in range(MAX_ADDRESSES - 2):
        failed(throttle, f"host{number}", 1.0, 1)
    assert throttle.add("first", 2.0) == 58.0
    assert throttle.is_throttled("second", 2.0), "there is room for all of them"
    failed(throttle, "one more", 3.0, 1)
    assert throttle.is_throttled("first", 3.0)
    assert not throttle.is_throttled("second", 3.0)


@pytest.mark.parametrize(
    ("peer", "network"),
    [
        ("192.0.2.1:80", "192.0.2.1"),
        ("192.0.2.1", "192.0.2.1"),
        ("[2001:db8::1]:80", "2001:db8::/64"),
        ("2001:db8::ffff:1", "2001:db8::/64"),
        ("[fe80::1%eth0]:80", "fe80::/64"),
        ("2001:db8:0:1::1", "2001:db8:0:1::/64"),
        ("unknown", "unknown"),
    ],
)
def test_an_ipv6_customer_has_one_network(peer: str, network: str) -> None:
    assert network_of(peer) == network
