"""The load generator's templates, with their holes filled as `load.c` fills them."""

import pytest

from bench.relay.frames import NATS, ROUTE, SOCKETIO, SPEECH_BYTES, TCP, WEBSOCKET, Variant, Wrapping, variants
from protocol.wire.codec import decode, encode
from protocol.wire.frames import Audio
from protocol.wire.messages import FROM_WORKER

NAME = "fedcba9876543210" * 2
STAMP = 0x0123456789ABCDEF


def variant_for(seq: int, wrapping: Wrapping, pcm_bytes: int = SPEECH_BYTES) -> Variant:
    made = variants(NAME, pcm_bytes, 0, 100_000, wrapping)
    return [each for each in made if each.first_seq <= seq][-1]


def filled(data: bytes, variant: Variant, seq: int, at: int, mask: int) -> bytes:
    whole = bytearray(data)
    for place, value in (
        (variant.seq_at + at, seq.to_bytes(variant.seq_bytes)),
        (variant.stamp_at + at, STAMP.to_bytes(8)),
    ):
        whole[place : place + len(value)] = bytes(byte ^ mask for byte in value)
    return bytes(whole)


@pytest.mark.parametrize("seq", [0, 1, 127, 128, 255, 256, 65_535, 65_536, 99_999])
def test_a_frame_is_the_audio_message_of_its_number_as_a_worker_encodes_it(seq: int) -> None:
    variant = variant_for(seq, TCP)
    data = filled(variant.read, variant, seq, 0, 0)
    audio = decode(data, FROM_WORKER)
    assert isinstance(audio, Audio)
    assert (audio.request_id, audio.seq, len(audio.pcm)) == (NAME, seq, SPEECH_BYTES)
    assert audio.pcm[:8] == STAMP.to_bytes(8)
    assert data == encode(audio)
    assert data[ROUTE] == NAME.encode()


@pytest.mark.parametrize("wrapping", [WEBSOCKET, TCP, NATS, SOCKETIO])
@pytest.mark.parametrize("pcm_bytes", [100, 1_024, 65_536])
@pytest.mark.parametrize("seq", [5, 70_000])
def test_the_holes_of_what_is_sent_lie_where_those_of_what_is_received_do(
    wrapping: Wrapping, pcm_bytes: int, seq: int
) -> None:
    variant = variant_for(seq, wrapping, pcm_bytes)
    sent = filled(variant.wire, variant, seq, variant.wrapped, variant.mask)
    payload = sent[variant.wrapped : variant.wrapped + len(variant.read)]
    assert bytes(byte ^ variant.mask for byte in payload) == filled(variant.read, variant, seq, 0, 0)


def test_only_the_widths_that_a_stream_needs_are_made() -> None:
    assert [each.first_seq for each in variants(NAME, 100, 1, 100, TCP)] == [0]
    assert [each.first_seq for each in variants(NAME, 100, 1, 400, TCP)] == [0, 128, 256]
    assert [each.first_seq for each in variants(NAME, 100, 300, 100, TCP)] == [256]
