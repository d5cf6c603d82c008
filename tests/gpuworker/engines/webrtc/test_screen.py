"""Which pictures are shown when: entered at key frames only, late ones dropped, or else the idle loop."""

import threading

from gpuworker.engines.webrtc.play import FIRST_PICTURE_S, READY_PACKETS, SLOT_S, SLOT_TICKS, Play
from gpuworker.engines.webrtc.screen import Screen
from protocol.wire.ivf import PTS_HZ, Picture
from protocol.wire.structs import AudioFormat

FRAME = PTS_HZ // 25


def pictures(name: str, count: int, keys: int = 25) -> list[Picture]:
    """Pictures whose first byte says, as VP8's does, whether they are key frames."""
    return [
        Picture(bytes([number % keys != 0]) + f"{name}{number}".encode(), number * FRAME) for number in range(count)
    ]


IDLE = pictures("idle", 5, keys=100)


class Scene:
    """A peer's clock, its screen, and perhaps a play."""

    def __init__(self) -> None:
        self.screen = Screen()
        self.screen.set_idle(IDLE)
        self.play: Play | None = None
        self.slot = 0
        self.times: list[int] = []
        self.sounds = 0

    def begin(self, seconds: float, video: list[Picture] | None = None) -> Play:
        self.play = Play(AudioFormat(sample_rate=48_000), has_video=video is not None)
        for picture in video or ():
            self.play.add_picture(picture)
        count = round(seconds / SLOT_S)
        self.play.add_packets([b"sound"] * count)
        self.play.end_audio(count * 960)
        return self.play

    def run(self, seconds: float, *, keys_only: bool = False) -> list[str]:
        """What is shown in so many seconds."""
        shown = []
        for _ in range(round(seconds / SLOT_S)):
            now = self.slot * SLOT_S
            packet = None if self.play is None else self.play.starts_slot(now)
            for at, picture in self.screen.pictures(self.slot * SLOT_TICKS, self.play, keys_only=keys_only):
                self.times.append(at)
                shown.append(picture.data[1:].decode())
            if self.play is not None and packet is not None:
                self.play.ends_slot()
                self.sounds += 1
            if self.play is not None and self.play.finished:
                self.play = None
            self.slot += 1
        return shown


def test_the_idle_loop_goes_round_and_begins_at_its_key_frame() -> None:
    scene = Scene()
    assert scene.run(0.4) == ["idle0", "idle1", "idle2", "idle3", "idle4", "idle0", "idle1", "idle2", "idle3", "idle4"]
    assert scene.times == [number * FRAME for number in range(10)]


def test_a_play_is_shown_from_its_key_frame_and_the_idle_loop_restarts_after_it() -> None:
    scene = Scene()
    assert scene.run(0.08) == ["idle0", "idle1"]
    scene.begin(0.2, pictures("talk", 5))
    assert scene.run(0.2) == [f"talk{number}" for number in range(5)]
    assert scene.run(0.08) == ["idle0", "idle1"]


def test_pictures_and_sound_are_on_one_clock() -> None:
    scene = Scene()
    scene.run(0.1)
    scene.times.clear()
    scene.begin(0.4, pictures("talk", 10))
    began = scene.slot
    scene.run(0.4)
    assert scene.times == [began * SLOT_TICKS + number * FRAME for number in range(10)]


def test_video_that_comes_late_is_dropped_to_the_next_key_frame() -> None:
    scene = Scene()
    play = scene.begin(2, pictures("talk", 5))
    assert scene.run(0.5)[-1] == "talk4"
    for picture in pictures("talk", 50)[5:]:  # at 0.5 s, the one of 0.2 s comes
        play.add_picture(picture)
    shown = scene.run(1.5)
    assert shown[0] == "talk25", "what is on time refers to what was dropped, until the key frame"
    assert shown == [f"talk{number}" for number in range(25, 50)]
    assert scene.screen.dropped == 20


def test_audio_never_waits_for_video() -> None:
    scene = Scene()
    play = scene.begin(2, [])
    scene.run(FIRST_PICTURE_S - SLOT_S)
    assert scene.sounds == 0, "it waits a moment for its first picture"
    scene.run(3 * SLOT_S)
    before = scene.sounds
    scene.run(0.5)
    assert scene.sounds - before == round(0.5 / SLOT_S), "and there is no gap"
    play.add_picture(pictures("talk", 1)[0])
    assert not [name for name in scene.run(0.5) if name.startswith("talk")], "it is late"
    assert scene.sounds - before == round(1 / SLOT_S)


def test_a_play_whose_video_stops_goes_on_with_the_idle_loop() -> None:
    scene = Scene()
    scene.begin(3, pictures("talk", 5))
    shown = scene.run(1)
    assert shown[:5] == [f"talk{number}" for number in range(5)]
    assert shown[5] == "idle0"


def test_a_play_whose_first_picture_is_no_key_frame_is_shown_from_the_first_that_is() -> None:
    scene = Scene()
    scene.begin(2, pictures("talk", 50)[3:])
    shown = [name for name in scene.run(2) if name.startswith("talk")]
    assert shown[0] == "talk25"


def test_who_asks_for_a_key_frame_gets_the_next_one() -> None:
    scene = Scene()
    scene.screen.set_idle(pictures("idle", 250, keys=1000))
    scene.run(2)
    scene.screen.want_key()
    assert scene.run(0.04) == ["idle0"]
    scene.screen.want_key()
    assert "idle0" not in scene.run(0.9), "not more than one a second, however often it asks"
    assert "idle0" in scene.run(0.2)


def test_who_asks_during_a_play_gets_its_next_key_frame() -> None:
    scene = Scene()
    scene.begin(2, pictures("talk", 50))
    scene.run(0.5)
    scene.screen.want_key()
    assert scene.run(1.5) == [f"talk{number}" for number in range(13, 50)]
    assert "idle0" not in scene.run(0.0)


def test_with_key_frames_only_a_play_is_one_picture_a_second_and_whole_again_afterwards() -> None:
    scene = Scene()
    scene.begin(4, pictures("talk", 100))
    assert scene.run(2.5, keys_only=True) == ["talk0", "talk25", "talk50"]
    assert scene.run(1.5) == [f"talk{number}" for number in range(75, 100)]


def test_a_play_without_video_leaves_the_idle_loop_alone() -> None:
    scene = Scene()
    scene.run(0.08)
    scene.begin(0.2)
    assert scene.run(0.2) == ["idle2", "idle3", "idle4", "idle0", "idle1"]
    assert scene.sounds == round(0.2 / SLOT_S)


def test_without_an_idle_loop_nothing_is_shown_between_plays() -> None:
    scene = Scene()
    scene.screen = Screen()
    assert scene.run(1) == []


def test_sound_that_pauses_goes_on_when_more_has_gathered_than_the_time_before() -> None:
    scene = Scene()
    play = scene.play = Play(AudioFormat(sample_rate=48_000), has_video=False)
    play.add_packets([b"sound"] * READY_PACKETS)
    scene.run(0.5)
    assert scene.sounds == READY_PACKETS
    play.add_packets([b"sound"] * (2 * READY_PACKETS - 1))
    scene.run(0.5)
    assert scene.sounds == READY_PACKETS
    play.add_packets([b"sound"])
    scene.run(0.5)
    assert scene.sounds == 3 * READY_PACKETS
    play.add_packets([b"sound"] * 4 * READY_PACKETS)
    scene.run(0.5)
    assert scene.sounds == 7 * READY_PACKETS


def test_a_play_reads_ahead_a_little_and_no_more() -> None:
    play = Play(AudioFormat(sample_rate=48_000), has_video=False)
    play.add_packets([b"sound"] * 1_000)
    added = threading.Event()

    def add() -> None:
        play.add_packets([b"more"])
        added.set()

    thread = threading.Thread(target=add)
    thread.start()
    for slot in range(950):
        assert not added.is_set()
        play.starts_slot(slot * SLOT_S)
        play.ends_slot()
    assert added.wait(5)
    thread.join()


def test_what_was_played_is_exact_in_samples_of_the_input() -> None:
    play = Play(AudioFormat(sample_rate=22_050), has_video=False)
    play.add_packets([b"sound"] * 20)
    play.end_audio(8_500)
    told = []
    for slot in range(20):
        assert play.starts_slot(slot * SLOT_S) == b"sound"
        play.ends_slot()
        told.append(play.samples_played)
    assert told[9] == 4_410
    assert told == sorted(told)
    assert told[-1] == 8_500
    assert play.finished


def test_pictures_between_two_slots_keep_their_own_times() -> None:
    scene = Scene()
    third = PTS_HZ // 30
    scene.begin(0.4, [Picture(bytes([number != 0]) + b"talk", number * third) for number in range(12)])
    scene.run(0.4)
    assert scene.times == [number * third for number in range(12)]


def test_an_idle_loop_keeps_its_own_times_and_may_begin_at_any() -> None:
    scene = Scene()
    third = PTS_HZ // 30
    scene.screen.set_idle([Picture(bytes([number != 0]) + b"idle", 77_777 + number * third) for number in range(3)])
    scene.run(0.2)
    assert scene.times == [number * third for number in range(6)]


def test_another_idle_loop_begins_at_once() -> None:
    scene = Scene()
    scene.run(0.1)
    scene.screen.set_idle(pictures("other", 5, keys=100))
    assert scene.run(0.08) == ["other0", "other1"]


def test_the_idle_loop_restarts_only_if_it_is_asked_to() -> None:
    scene = Scene()
    scene.screen.set_idle(pictures("idle", 100, keys=1000))
    assert scene.run(4) == [f"idle{number}" for number in range(100)]


def test_the_idle_loop_goes_on_until_a_play_has_its_first_key_frame() -> None:
    scene = Scene()
    scene.begin(0.4, pictures("talk", 10)[3:])
    assert scene.run(0.16) == ["idle0", "idle1", "idle2", "idle3"]


def test_what_is_shown_and_left_out_is_counted() -> None:
    scene = Scene()
    scene.begin(1, pictures("talk", 25))
    size = sum(len(each.data) for each in pictures("talk", 25))
    scene.run(1, keys_only=True)
    assert (scene.screen.shown, scene.screen.dropped, scene.screen.due_bytes) == (1, 24, size)
