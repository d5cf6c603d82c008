"""IVF: what is written can be read, by this reader in any pieces and by ffmpeg, and what is none is told in words."""

import io
import random
from itertools import pairwise

import pytest

from protocol.wire.ivf import IvfReader, Picture, is_key, key_size
from protocol.wire.media_types import recognize, suffix_of
from protocol.wire.structs import VideoFormat
from tests.support.pictures import KEY_PICTURE, NEXT_PICTURE, PICTURES, VIDEO, ivf


def read(data: bytes, cuts: list[int]) -> list[Picture]:
    reader = IvfReader()
    pictures = [picture for a, b in pairwise([0, *cuts, len(data)]) for picture in reader.feed(data[a:b])]
    reader.end()
    assert reader.size == (VIDEO.width, VIDEO.height)
    return pictures


def test_pictures_are_the_same_however_the_stream_is_cut() -> None:
    data, dice = ivf(PICTURES), random.Random(1)
    for cuts in [[], list(range(len(data))), *([dice.randrange(len(data)) for _ in range(5)] for _ in range(50))]:
        assert [(picture.data, picture.pts) for picture in read(data, sorted(cuts))] == PICTURES


def test_ffmpeg_reads_a_stream_with_its_times() -> None:
    av = pytest.importorskip("av")
    data = ivf(PICTURES)
    assert recognize(data) == "video/x-ivf"
    assert suffix_of("video/x-ivf") == ".ivf"
    with av.open(io.BytesIO(data)) as container:
        assert container.streams.video[0].codec_context.name == "vp8"
        shown = [(frame.width, frame.height, frame.time) for frame in container.decode(video=0)]
    assert shown == [(16, 16, pts / 90_000) for _, pts in PICTURES]


def test_a_stream_of_another_timebase_is_read_in_the_units_of_the_wire() -> None:
    data = bytearray(ivf([(KEY_PICTURE, 0), (NEXT_PICTURE, 3)]))
    data[16:24] = (30).to_bytes(4, "little") + (1).to_bytes(4, "little")  # as most encoders write it: 30 a second
    assert [picture.pts for picture in read(bytes(data), [])] == [0, 9_000]


def test_a_picture_says_whether_it_is_a_key_frame_and_how_large() -> None:
    assert [picture.key for picture in read(ivf(PICTURES), [])] == [True, False, False, False, False]
    assert key_size(KEY_PICTURE) == (16, 16)
    assert [key_size(data) for data in (NEXT_PICTURE, KEY_PICTURE[:9], b"", bytes(20))] == [None] * 4
    assert not is_key(b"")


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"RIFF", "does not begin with DKIF"),
        (b"DX", "does not begin with DKIF"),
        (ivf([])[:8] + b"AV01" + ivf([])[12:], "'AV01'; send VP80"),
        (ivf([])[:12] + bytes(2) + ivf([])[14:], "header of the video is broken"),
        (ivf([])[:16] + bytes(4) + ivf([])[20:], "header of the video is broken"),
        (ivf([])[:6] + b"\x21" + ivf([])[7:], "header of the video is broken"),
        (ivf([]) + b"\xff" * 12, "a picture of 4294967295 bytes"),
        (ivf(PICTURES)[:-1], "cut short within a picture"),
        (ivf([])[:-1], "cut short within its header"),
        (b"", "cut short within its header"),
    ],
)
def test_what_is_no_such_stream_is_told_in_words(data: bytes, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        read(data, [])


def test_a_stream_of_no_pictures_is_one() -> None:
    assert read(ivf([], VideoFormat(width=16, height=16, fps=1)), []) == []
