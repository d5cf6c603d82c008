"""Engine `face`: what it draws, and that its video is that of its speech alone."""

import io
import math
import wave
from array import array
from collections.abc import Iterable
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from numpy.typing import NDArray

from gpuworker.engines.base import (
    Chunk,
    Engine,
    EngineInput,
    FormatChunk,
    LiveInput,
    OptionError,
    VideoChunk,
)
from gpuworker.engines.catalog import parse_options
from gpuworker.engines.face.drawing import LOOKS, Face, Shape
from gpuworker.engines.face.engine import FaceEngine
from gpuworker.engines.face.lips import Lips
from gpuworker.engines.face.motion import LOOP_S, Motion
from gpuworker.slots.run_engine import RunResult, run_engine
from protocol.wire.ivf import PTS_HZ, ivf_header, ivf_picture
from protocol.wire.params_schema import check_params, check_schema
from protocol.wire.structs import VideoFormat
from protocol.wire.validators import Value

RATE = 16_000
PCM = f"audio/L16;rate={RATE};channels=1"
SIDE = 128
Picture = NDArray[np.uint8]


def made(*options: str) -> FaceEngine:
    engine = FaceEngine(parse_options(FaceEngine.OPTIONS, [f"size={SIDE}", *options]))
    engine.load()
    return engine


@pytest.fixture(scope="module")
def face() -> FaceEngine:
    return made()


def tone(*hz: float, seconds: float = 0.4, loud: float = 0.5, rate: int = RATE) -> bytes:
    """Tones, one after another; 0 Hz is silence."""
    samples = array("h")
    for each in hz:
        for at in range(round(seconds * rate)):
            samples.append(round(32_767 * loud * math.sin(2 * math.pi * each * at / rate)))
    return samples.tobytes()


def run(engine: Engine, given: EngineInput | LiveInput | None = None, **params: Value) -> tuple[RunResult, list[Chunk]]:
    chunks: list[Chunk] = []
    inputs: dict[str, Any] = {} if given is None else {"audio": given}
    return run_engine(engine, params, inputs, lambda: False, chunks.append), chunks


def pictures_in(chunks: Iterable[Chunk]) -> list[VideoChunk]:
    return [chunk for chunk in chunks if isinstance(chunk, VideoChunk)]


def seen(chunks: list[Chunk]) -> list[Picture]:
    """The pictures that a player shows."""
    head = chunks[0]
    assert isinstance(head, FormatChunk)
    assert head.video is not None
    ivf = ivf_header(head.video) + b"".join(ivf_picture(each.data, each.pts) for each in pictures_in(chunks))
    with av.open(io.BytesIO(ivf), "r") as file:
        return [np.asarray(frame.to_ndarray(format="rgb24"), np.uint8) for frame in file.decode(video=0)]


def far(first: Picture, second: Picture) -> float:
    """How far two pictures are apart: the mean of what their values differ by."""
    return float(np.abs(first.astype(np.int16) - second).mean())


# -- video ---------------------------------------------------------------------------------------------------------


def test_a_speech_has_a_picture_every_40_ms_and_a_key_frame_every_second(face: FaceEngine) -> None:
    end, chunks = run(face, EngineInput(tone(300, 0, 300, 2_000, 300, 0) + bytes(20), PCM))
    assert end.outcome == "completed"
    assert chunks[0] == FormatChunk(None, VideoFormat(width=SIDE, height=SIDE, fps=25))
    made = pictures_in(chunks)
    assert len(made) == 61  # 2.4 s, and a picture for the rest
    assert [each.pts for each in made] == [PTS_HZ * number // 25 for number in range(61)]
    assert [number for number, each in enumerate(made) if each.key] == [0, 25, 50]
    assert [picture.shape for picture in seen(chunks)] == [(SIDE, SIDE, 3)] * 61


@pytest.mark.parametrize("rate", [8_000, 16_000, 22_050, 24_000, 44_100, 48_000])
def test_its_clock_is_that_of_the_samples_at_any_rate(face: FaceEngine, rate: int) -> None:
    _, chunks = run(face, EngineInput(tone(300, seconds=2.0, rate=rate), f"audio/L16;rate={rate};channels=1"))
    assert len(pictures_in(chunks)) == 50


def test_equal_sound_makes_equal_bytes_however_it_comes_and_in_any_process(face: FaceEngine) -> None:
    speech = tone(300, 0, 700, 2_000) + bytes(77)
    _, whole = run(face, EngineInput(speech, PCM))
    live = LiveInput(PCM)
    for start in range(0, len(speech), 777):  # also within a sample
        live.feed(speech[start : start + 777])
    live.feed(b"", last=True)
    _, pieces = run(face, live)
    assert pieces == whole
    container = io.BytesIO()
    with wave.open(container, "wb") as file:
        file.setparams((2, 2, RATE, 0, "NONE", ""))
        file.writeframes(np.repeat(np.frombuffer(speech[:-1], "<i2"), 2).tobytes())
    other = made()
    assert run(other, EngineInput(container.getvalue(), "audio/wav"))[1][:-1] == whole[:-1]
    assert face.capabilities.reproducible
    assert face.capabilities.fingerprint == other.capabilities.fingerprint
    assert face.capabilities.fingerprint != made("bitrate=300000").capabilities.fingerprint
    first, second = face.seats(2)
    assert run(first, EngineInput(speech, PCM))[1] == run(second, EngineInput(speech, PCM))[1] == whole
    assert run(face, EngineInput(speech, PCM), avatar="ann")[1] != whole


def test_pictures_come_as_soon_as_their_sound_has(face: FaceEngine) -> None:
    live = LiveInput(PCM)
    chunks = face.generate({}, {"audio": live})
    for _ in range(3):
        live.feed(tone(300, seconds=0.04))
        assert isinstance(next(chunks), VideoChunk)
    chunks.close()  # type: ignore[attr-defined]  # a generator
    assert run(face, EngineInput(b"", PCM))[0].outcome == "completed"


def test_the_idle_loop_ends_where_it_begins_and_speech_goes_on_from_any_of_its_pictures(face: FaceEngine) -> None:
    end, chunks = run(face, idle=True, avatar="ann")
    assert end.outcome == "completed"
    loop = seen(chunks)
    assert len(loop) == LOOP_S * 25
    step = max(far(one, other) for one, other in pairwise(loop[:11]))
    assert far(loop[-1], loop[0]) <= 1.5 * step
    motion = Motion("ann", 25)
    closed = max(range(100), key=motion.blink)
    assert far(loop[closed], loop[0]) > 1.5 * step
    silent = EngineInput(tone(0), PCM)
    assert far(seen(run(face, silent, avatar="ann", start_frame=closed)[1])[0], loop[closed]) < 1.5
    assert far(seen(run(face, silent, avatar="ann", start_frame=100 + 7)[1])[0], loop[7]) < 1.5


# -- what moves ----------------------------------------------------------------------------------------------------


def test_each_avatar_blinks_every_3_to_5_s_at_times_of_its_own() -> None:
    def blinks(avatar: str) -> list[int]:
        motion = Motion(avatar, 25)
        closed = [motion.blink(frame) > 0 for frame in range(25 * 60)]
        return [at for at in range(1, len(closed)) if closed[at] and not closed[at - 1]]

    ann = blinks("ann")
    assert all(3 * 25 - 1 <= later - earlier <= 5 * 25 + 1 for earlier, later in pairwise(ann))
    assert len(ann) == 15
    assert ann == blinks("ann") != blinks("bob")
    assert len({later - earlier for earlier, later in pairwise(ann)}) > 3
    motion = Motion("ann", 25)
    assert motion.sway(0) == pytest.approx(motion.sway(100))
    assert max(motion.sway(frame) for frame in range(100)) == pytest.approx(1, abs=0.01)


def test_the_mouth_opens_by_loudness_closes_in_silence_and_widens_by_the_second_formant() -> None:
    def follow(*hz: float, loud: float = 0.5) -> list[tuple[float, float]]:
        lips = Lips(RATE // 25, RATE)
        pcm = np.frombuffer(tone(*hz, loud=loud), "<i2")
        return [lips.follow(pcm[at : at + RATE // 25]) for at in range(0, len(pcm), RATE // 25)]

    opened, closed = follow(500, 0)[9], follow(500, 0)[-1]
    assert opened[0] > 0.8
    assert closed[0] < 0.02
    assert closed[1] == pytest.approx(0.5, abs=0.02)
    assert follow(500)[-1][1] < 0.2 < 0.8 < follow(2_000)[-1][1]
    assert follow(6_000)[-1][0] < 0.2 * follow(500)[-1][0]  # a hiss
    assert follow(500, loud=0.05)[-1][0] > 0.6  # a soft voice opens its mouth too
    assert follow(500, loud=0.001)[-1][0] == 0  # noise
    assert follow(500, 0)[:10] == follow(500)  # what comes later changes nothing


def test_a_mouth_that_opens_and_eyes_that_close_are_seen_and_nothing_else_moves() -> None:
    drawn = Face(SIDE, LOOKS[0])
    rest = drawn.draw(Shape())

    def changed(shape: Shape) -> tuple[int, int, int, int]:
        rows, columns = np.nonzero((drawn.draw(shape) != rest).any(axis=2))
        return tuple(round(100 * at / SIDE) for at in (rows.min(), rows.max(), columns.min(), columns.max()))

    top, bottom, left, right = changed(Shape(opening=1.0, width=1.0))
    assert 60 < top < bottom < 85
    assert left + right == pytest.approx(100, abs=2)
    top, bottom, left, right = changed(Shape(blink=1.0))
    assert 40 < top < bottom < 55
    assert far(drawn.draw(Shape(sway=1.0)), rest) > 0
    assert far(Face(SIDE, LOOKS[1]).draw(Shape()), rest) > 5
    assert (drawn.draw(Shape()) == rest).all()


# -- a picture of one's own ----------------------------------------------------------------------------------------


def a_picture(path: Path, width: int, height: int) -> Path:
    """Blue, with a green square in the middle, as PNG."""
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[:, :, 2] = 200
    pixels[height // 2 - 40 : height // 2 + 40, width // 2 - 40 : width // 2 + 40] = (0, 200, 0)
    codec: Any = av.CodecContext.create("png", "w")
    codec.width, codec.height, codec.pix_fmt, codec.time_base = width, height, "rgb24", Fraction(1)
    frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
    path.write_bytes(b"".join(bytes(packet) for packet in [*codec.encode(frame), *codec.encode(None)]))
    return path


def test_a_picture_speaks_with_a_mouth_where_one_says_and_is_itself_while_it_is_silent(tmp_path: Path) -> None:
    path = a_picture(tmp_path / "me.png", 400, 256)
    engine = made(f"image={path}", "mouth=180,138,40,24")
    _, chunks = run(engine, EngineInput(tone(0, 500, 0), PCM))
    shown = seen(chunks)
    middle = SIDE // 2
    assert np.abs(shown[0][middle, middle].astype(int) - (0, 200, 0)).max() < 30
    assert shown[0][5, 5][2] > 150
    moved = np.abs(shown[18].astype(int) - shown[0]).max(axis=2) > 60
    rows, columns = np.nonzero(moved)
    assert 138 / 2 - 2 <= rows.min() < rows.max() <= 162 / 2 + 2  # the square of 256 is shown at half its size
    assert (180 - 72) / 2 - 2 <= columns.min() < columns.max() <= (220 - 72) / 2 + 2
    assert far(shown[-1], shown[0]) < 3
    assert engine.capabilities.fingerprint != made().capabilities.fingerprint


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["size=63"], "64..1080"),
        (["size=101"], "even; write 102"),
        (["fps=0"], "5..60"),
        (["bitrate=1"], "50000.."),
        (["image=me.png"], "belong together"),
        (["mouth=1,2,3,4"], "belong together"),
        (["image=nowhere.png", "mouth=1,2,30,40"], "No such file"),
        (["image=text", "mouth=1,2,30,40"], "PNG or JPEG"),
        (["image=me.png", "mouth=1,2,30"], "x,y,width,height"),
        (["image=me.png", "mouth=a,b,c,d"], "x,y,width,height"),
        (["image=me.png", "mouth=10,10,40,40"], "the middle of the picture"),
        (["image=me.png", "mouth=200,100,nan,40"], "the middle of the picture"),
        (["image=me.png", "mouth=200,100,1,1"], "too small"),
    ],
)
def test_an_option_that_cannot_be_used_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: list[str], words: str
) -> None:
    monkeypatch.chdir(tmp_path)
    a_picture(tmp_path / "me.png", 400, 256)
    (tmp_path / "text").write_text("no picture at all")
    with pytest.raises(OptionError) as caught:
        made(*options)
    assert words in str(caught.value)


# -- what is refused -----------------------------------------------------------------------------------------------


def test_what_is_no_speech_is_refused_with_what_to_send(face: FaceEngine) -> None:
    end, _ = run(face)
    assert (end.code, list(end.details)) == ("input_missing", ["audio"])
    end, _ = run(face, EngineInput(b"abc", "audio/L16"))
    assert end.code == "input_mismatch"
    assert "rate" in end.message
    end, _ = run(face, EngineInput(b"no wav at all, but some words", "audio/wav"))
    assert end.code == "input_mismatch"
    schema = face.capabilities.params
    check_schema(schema)
    assert check_params(schema, {"avatar": "ann", "idle": True, "start_frame": 99}) == {}
    faults = check_params(schema, {"avatar": "x" * 201, "idle": 1, "start_frame": -1, "size": 3})
    assert set(faults) == {"avatar", "idle", "start_frame", "size"}
    assert run(face, EngineInput(tone(300), PCM))[0].outcome == "completed"
