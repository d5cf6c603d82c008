"""Media types: what a list accepts, and what the first bytes of a file say."""

import pytest

from protocol.wire.media_types import MEDIA_TYPE_PATTERN, accepts, recognize, suffix_of


@pytest.mark.parametrize(
    ("accepted", "given", "is_accepted"),
    [
        ([], "anything/at-all", True),
        (["image/png"], "image/png", True),
        (["image/png"], "Image/PNG", True),
        (["image/png"], "image/jpeg", False),
        (["image/*"], "image/jpeg", True),
        (["image/*"], "imagery/jpeg", False),
        (["*/*"], "video/mp4", True),
        (["audio/webm"], "audio/webm;codecs=opus", True),
        (["audio/webm;codecs=opus"], "audio/webm", True),
        (["audio/wav", "video/*"], "", False),
    ],
)
def test_a_list_accepts_a_type_whatever_its_case_and_parameters(
    accepted: list[str], given: str, is_accepted: bool
) -> None:
    assert accepts(accepted, given) is is_accepted


@pytest.mark.parametrize(
    ("data", "media_type"),
    [
        (b"\x89PNG\r\n\x1a\n\0", "image/png"),
        (b"\xff\xd8\xff\xe0", "image/jpeg"),
        (b"GIF89a", "image/gif"),
        (b"RIFF\0\0\0\0WAVEfmt ", "audio/wav"),
        (b"RIFF\0\0\0\0WEBPVP8 ", "image/webp"),
        (b"RIFF\0\0\0\0????", None),
        (b"\0\0\0\x20ftypisom", "video/mp4"),
        (b"\0\0\0\x20ftypM4A ", "audio/mp4"),
        (b"\0\0\0\x20ftypavif", "image/avif"),
        (b"\x1a\x45\xdf\xa3\x01\0\0\0\x42\x82\x84webm", "video/webm"),
        (b"\x1a\x45\xdf\xa3\x01\0\0\0\x42\x82\x88matroska", "video/x-matroska"),
        (b"DKIF\0\0\x20\0VP80", "video/x-ivf"),
        (b"OggS" + bytes(24) + b"OpusHead", "audio/ogg"),
        (b"ID3\x04", "audio/mpeg"),
        (b"\xff\xfb\x90\x64", "audio/mpeg"),
        (b"\xff\xf1\x50\x80", "audio/aac"),
        (b"fLaC", "audio/flac"),
        (b"BM\x0a\0\0\0\0\0\0\0", "image/bmp"),
        (b"BM is the start of a sentence", None),
        (b'<?xml version="1.0"?>\n<svg xmlns="', "image/svg+xml"),
        (b"%PDF-1.7", "application/pdf"),
        (b"\xff\xff\xff\xff", None),
        (b"plain words", None),
        (b"", None),
    ],
)
def test_the_first_bytes_of_a_file_say_what_it_is(data: bytes, media_type: str | None) -> None:
    assert recognize(data) == media_type
    if media_type is not None:
        assert MEDIA_TYPE_PATTERN.fullmatch(media_type)
        assert suffix_of(media_type) != ".bin", media_type


def test_no_header_can_be_written_into_a_media_type() -> None:
    assert MEDIA_TYPE_PATTERN.fullmatch('text/plain; charset=utf-8; x="a b"')
    for bad in (
        "text",
        "text/",
        "/plain",
        "text/plain\r\nset-cookie: a=b",
        "text/plain; é=1",
        "text/plain ",
        'a/b; x="',
    ):
        assert not MEDIA_TYPE_PATTERN.fullmatch(bad), bad
