"""What a play promises to the threads that fill it, and to who plays."""

import threading
from collections.abc import Callable

import pytest

from gpuworker.engines.base import EngineError, RunStopped
from gpuworker.engines.webrtc.play import AHEAD_PACKETS, AHEAD_PICTURES, SLOT_S, TELL_PACKETS, Play, SpeechEncoder
from protocol.wire.ivf import Picture
from protocol.wire.structs import AudioFormat

PATIENCE_S = 20.0


def a_play(*, has_video: bool = False) -> Play:
    return Play(AudioFormat(sample_rate=48_000), has_video=has_video)


def blocked(work: Callable[[], None]) -> tuple[threading.Thread, list[BaseException]]:
    """A thread in which something waits; what it raises."""
    raised: list[BaseException] = []

    def run() -> None:
        try:
            work()
        except RunStopped as fault:
            raised.append(fault)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join(0.05)
    assert thread.is_alive(), "it waits"
    return thread, raised


def test_whoever_fills_a_play_is_stopped_when_it_ends() -> None:
    play = a_play(has_video=True)
    play.add_packets([b"sound"] * AHEAD_PACKETS)
    for number in range(AHEAD_PICTURES):
        play.add_picture(Picture(b"\0", number))
    sound, sound_raised = blocked(lambda: play.add_packets([b"sound"]))
    picture, picture_raised = blocked(lambda: play.add_picture(Picture(b"\0", 0)))
    play.close()
    for thread in (sound, picture):
        thread.join(PATIENCE_S)
        assert not thread.is_alive()
    assert len(sound_raised) == len(picture_raised) == 1
    with pytest.raises(RunStopped):
        play.add_packets([])
    with pytest.raises(RunStopped):
        play.add_picture(Picture(b"\0", 0))


def test_a_picture_that_is_shown_makes_room_for_another() -> None:
    play = a_play(has_video=True)
    play.add_packets([b"sound"] * AHEAD_PACKETS)
    for number in range(AHEAD_PICTURES):
        play.add_picture(Picture(b"\0", number))
    thread, raised = blocked(lambda: play.add_picture(Picture(b"\0", 10_000)))
    assert play.starts_slot(0.0)
    assert len(list(play.pop_pictures(1))) == 1
    thread.join(PATIENCE_S)
    assert not thread.is_alive()
    assert not raised


def test_an_ended_play_sounds_no_more() -> None:
    play = a_play()
    play.add_packets([b"sound"] * 10)
    assert play.starts_slot(0.0) == b"sound"
    play.close()
    assert play.closed
    assert play.starts_slot(SLOT_S) is None


def test_the_end_is_told_once_with_its_error() -> None:
    play = a_play()
    fault = EngineError("the call has ended")
    play.close(fault)
    play.close()
    assert play.events.get() is fault
    assert play.events.empty()


def test_how_much_was_played_is_told_five_times_a_second() -> None:
    play = a_play()
    play.add_packets([b"sound"] * 25)
    for slot in range(25):
        play.starts_slot(slot * SLOT_S)
        play.ends_slot()
    assert [play.events.get() for _ in range(play.events.qsize())] == [9_600, 19_200]
    assert pytest.approx(0.2) == TELL_PACKETS * SLOT_S


def test_no_picture_is_taken_while_nothing_sounds() -> None:
    play = a_play(has_video=True)
    play.add_picture(Picture(b"\0", 0))
    assert list(play.pop_pictures(10_000)) == []
    play.add_packets([b"sound"] * 10)
    play.starts_slot(0.0)
    assert list(play.pop_pictures(0)) == [], "nor one that is due later"
    assert len(list(play.pop_pictures(1))) == 1


def test_a_play_whose_video_has_ended_waits_for_no_picture() -> None:
    play = a_play(has_video=True)
    play.add_packets([b"sound"] * 10)
    assert play.starts_slot(0.0) is None
    play.end_video()
    assert play.starts_slot(SLOT_S) == b"sound"


def test_a_short_sound_is_heard_at_once() -> None:
    play = a_play()
    play.add_packets([b"sound"])
    assert play.starts_slot(0.0) is None
    play.end_audio(960)
    assert play.starts_slot(SLOT_S) == b"sound"


@pytest.mark.parametrize(
    ("rate", "channels"), [(8_000, 1), (16_000, 1), (22_050, 1), (24_000, 2), (48_000, 1), (96_000, 2)]
)
def test_sound_of_any_rate_becomes_packets_of_20_ms_whatever_its_portions(rate: int, channels: int) -> None:
    encoder = SpeechEncoder(AudioFormat(sample_rate=rate, channels=channels))
    pcm = bytes(2 * channels * rate)  # a second
    packets = [packet for at in range(0, len(pcm), 777) for packet in encoder.encode(pcm[at : at + 777])]
    packets += encoder.finish()
    assert encoder.samples == rate
    assert 50 <= len(packets) <= 52


def test_no_sound_at_all_is_no_packet() -> None:
    encoder = SpeechEncoder(AudioFormat(sample_rate=24_000))
    assert encoder.encode(b"\0") == encoder.finish() == []
    assert encoder.samples == 0


def test_sound_that_goes_on_after_a_pause_waits_for_no_picture() -> None:
    play = a_play(has_video=True)
    play.add_picture(Picture(b"\0", 0))
    play.add_packets([b"sound"] * 5)
    for slot in range(5):
        assert play.starts_slot(slot * SLOT_S)
        list(play.pop_pictures(10_000))
        play.ends_slot()
    assert play.starts_slot(5 * SLOT_S) is None
    play.add_packets([b"more"] * 10)
    assert play.starts_slot(6 * SLOT_S) == b"more"
