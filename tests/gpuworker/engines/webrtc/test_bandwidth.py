"""Key frames only where a browser's path does not carry the video, and not where its report merely lags behind."""

from gpuworker.engines.webrtc.bandwidth import PAUSE_S, WINDOW_S, Bandwidth


def sent(bandwidth: Bandwidth, kbit_s: float, begin: float = 0.0) -> float:
    """Send for some seconds; returns when it ended."""
    for number in range(100):
        bandwidth.on_pictures(begin + number * 0.04, round(kbit_s * 1000 / 8 * 0.04))
    return begin + 4.0


def test_the_rate_is_that_of_the_last_seconds() -> None:
    bandwidth = Bandwidth(1e9)
    now = sent(bandwidth, 400)
    assert 380_000 < bandwidth.rate_bits_s(now) < 420_000
    assert bandwidth.rate_bits_s(now + WINDOW_S + 0.1) == 0


def test_a_first_report_below_the_rate_leaves_key_frames_only() -> None:
    bandwidth = Bandwidth(1e9)
    now = sent(bandwidth, 400)
    bandwidth.on_remb(now, 100_000)
    assert bandwidth.keys_only(now)


def test_a_report_that_lags_behind_a_video_that_has_just_begun_changes_nothing() -> None:
    bandwidth = Bandwidth(1e9)
    now = sent(bandwidth, 100)
    bandwidth.on_remb(now, 150_000)
    now = sent(bandwidth, 500, now)
    for report in (160_000, 170_000, 180_000):
        bandwidth.on_remb(now, report)
        assert not bandwidth.keys_only(now)


def test_a_report_that_falls_below_the_rate_leaves_key_frames_only_until_it_is_enough() -> None:
    bandwidth = Bandwidth(1e9)
    now = sent(bandwidth, 400)
    bandwidth.on_remb(now, 600_000)
    bandwidth.on_remb(now, 200_000)
    assert bandwidth.keys_only(now)
    bandwidth.on_remb(now, 390_000)
    assert bandwidth.keys_only(now)
    bandwidth.on_remb(now, 410_000)
    assert not bandwidth.keys_only(now)


def test_the_whole_video_is_tried_again_after_a_while() -> None:
    bandwidth = Bandwidth(1e9)
    now = sent(bandwidth, 400)
    bandwidth.on_remb(now, 100_000)
    assert bandwidth.keys_only(now + PAUSE_S - 0.1)
    assert not bandwidth.keys_only(now + PAUSE_S)
    again = sent(bandwidth, 400, now + PAUSE_S)
    bandwidth.on_remb(again, 90_000)
    assert bandwidth.keys_only(again)


def test_no_peer_gets_more_than_the_owner_allows() -> None:
    bandwidth = Bandwidth(300_000)
    now = sent(bandwidth, 400)
    assert bandwidth.keys_only(now)
    assert not bandwidth.keys_only(now + 1.5)
