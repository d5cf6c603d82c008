"""A face that talks, through real processes: as a file, and piped from the speech while that is made."""

from pathlib import Path

import pytest
import trio

from protocol import From, open_relay
from protocol.wire.frames import Audio, Output, Started, Video
from protocol.wire.ivf import PTS_HZ, IvfReader
from protocol.wire.structs import VideoFormat
from tests.support.processes import a_place, a_relay, a_worker

TEXT = "Hello there, how are you today?"
PATIENCE_S = 90


@pytest.mark.trio
async def test_a_face_talks_as_long_as_its_speech(tmp_path: Path) -> None:
    place = a_place(tmp_path, "[spaces.tts]\n[spaces.face]\n")
    with trio.fail_after(PATIENCE_S):
        async with (
            a_relay(place) as relay,
            a_worker(place, relay, "--engine", "espeak", "--space", "tts"),
            a_worker(place, relay, "--engine", "face", "--space", "face", "-o", "size=128"),
            open_relay(f"unix:{tmp_path}/state/relayd.sock") as client,
        ):
            await place.run("relay", "say", TEXT, "--space", "tts", "-o", "hello.wav")
            await place.run(
                "relay", "submit", "--space", "face", "-p", "avatar=ann", "-i", "audio=hello.wav", "-o", "ann.ivf"
            )
            reader = IvfReader()
            pictures = reader.feed((place.folder / "ann.ivf").read_bytes())
            reader.end()
            assert reader.size == (128, 128)
            samples, shown, visemes = 0, [], 0
            async with (
                client.submit("tts", {"text": TEXT, "visemes": True}) as speech,
                client.submit("face", {"avatar": "ann"}, inputs={"audio": From(speech.request_id)}) as face,
            ):
                async for frame in face:
                    if isinstance(frame, Started):
                        assert frame.video == VideoFormat(width=128, height=128, fps=25)
                    elif isinstance(frame, Video):
                        shown.append(frame)
                async for frame in speech:
                    samples += len(frame.pcm) // 2 if isinstance(frame, Audio) else 0
                    visemes += isinstance(frame, Output)
            assert visemes > 5  # which the pipe of the audio leaves out
            assert len(shown) == -(-25 * samples // 22_050)
            assert len(shown) == pytest.approx(len(pictures), abs=2)  # espeak is not reproducible
            assert [frame.pts for frame in shown] == [PTS_HZ * number // 25 for number in range(len(shown))]
            assert [number for number, frame in enumerate(shown) if frame.key][:3] == [0, 25, 50][
                : -(-len(shown) // 25)
            ]
