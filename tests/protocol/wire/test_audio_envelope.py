"""Audio envelopes: the short way and the codec's long one say the same of any bytes."""

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol.wire.audio_envelope import (
    PREFIX_BYTES,
    audio_prefix,
    match_audio,
    match_audio_run,
    pack_audio,
    read_audio,
)
from protocol.wire.codec import encode, unpack
from protocol.wire.errors import ProtocolError
from protocol.wire.frames import MAX_PCM_BYTES, Audio
from protocol.wire.messages import FROM_WORKER

ID = "0123456789abcdef0123456789abcdef"
SEQS = [0, 1, 127, 128, 255, 256, 8191, 8192, 65_535, 65_536, 2**31]
SIZES = [0, 2, 254, 255, 256, 7_680, 65_535, 65_536, MAX_PCM_BYTES]


@pytest.mark.parametrize("seq", SEQS)
@pytest.mark.parametrize("size", SIZES)
def test_it_writes_what_the_codec_writes_and_reads_it_back(seq: int, size: int) -> None:
    pcm = bytes(size)
    data = pack_audio(audio_prefix(ID, 3), seq, pcm)
    assert data == encode(Audio(request_id=ID, attempt=3, seq=seq, pcm=pcm))
    assert data[:PREFIX_BYTES] == audio_prefix(ID, 3)
    assert match_audio(data, seq) == size
    assert match_audio(data, seq + 1) == -1
    assert read_audio(data) == (ID, 3, seq, pcm)


def test_attempts_and_chunks_that_do_not_fit_are_left_to_the_codec() -> None:
    assert audio_prefix(ID, 127)
    assert not audio_prefix(ID, 128)
    assert read_audio(encode(Audio(request_id=ID, attempt=128, seq=1, pcm=b"12"))) is None
    with pytest.raises(ValueError, match="limit"):
        pack_audio(audio_prefix(ID, 1), 1, bytes(MAX_PCM_BYTES + 1))


_audio = st.builds(
    lambda attempt, seq, pcm: pack_audio(audio_prefix(ID, attempt), seq, pcm),
    st.integers(0, 127),
    st.sampled_from(SEQS),
    st.binary(max_size=300),
)


def _damage(data: bytes, at: int, new: bytes, cut: int) -> bytes:
    at %= len(data) + 1
    return data[:at] + new + data[at + cut :]


@given(st.builds(_damage, _audio, st.integers(0, 2**16), st.binary(max_size=3), st.integers(0, 3)))
def test_what_it_takes_the_codec_takes_for_the_same(data: bytes) -> None:
    told = read_audio(data)
    if told is None:
        return
    request_id, attempt, seq, pcm = told
    wire = {"type": "audio", "request_id": request_id, "attempt": attempt, "seq": seq, "pcm": pcm}
    assert unpack(data) == wire
    assert msgpack.packb(wire) == data
    for due in {seq, 0, 1, 127, 128}:
        assert match_audio_run([data], due, 1) == match_audio(data, due)
        assert (match_audio(data, due) == len(pcm)) is (due == seq)


def test_a_run_of_frames_counts_while_each_is_the_one_due_and_of_whole_samples() -> None:
    prefix = audio_prefix(ID, 2)
    sizes = [7_680, 254, 256, 2, 0, 65_536, 7_680]
    frames = [pack_audio(prefix, 126 + number, bytes(size)) for number, size in enumerate(sizes)]
    assert match_audio_run(frames, 126, 2) == sum(sizes)
    assert match_audio_run([], 5, 2) == 0
    assert match_audio_run(frames, 125, 2) == -1
    assert match_audio_run([*frames[:3], *frames[4:]], 126, 2) == -1, "one is missing"
    assert match_audio_run([frames[0], frames[0]], 126, 2) == -1, "one comes twice"
    assert match_audio_run([pack_audio(prefix, 1, bytes(255)), pack_audio(prefix, 2, bytes(257))], 1, 2) == -1, (
        "half samples"
    )


@given(
    st.sampled_from([0, 120, 250, 8_185]),
    st.lists(st.sampled_from([0, 2, 254, 256, 7_680]), min_size=1, max_size=12),
    st.integers(0, 11),
    st.sampled_from(["seq", "length", "type", "tail"]),
    st.booleans(),
)
def test_a_run_is_what_its_frames_are_one_by_one(
    first: int, sizes: list[int], at: int, damage: str, alike: bool
) -> None:
    prefix = audio_prefix(ID, 1)
    sizes = [7_680] * len(sizes) if alike else sizes
    frames = [pack_audio(prefix, first + number, bytes(size)) for number, size in enumerate(sizes)]
    assert match_audio_run(frames, first, 2) == sum(sizes)
    bad = bytearray(frames[at % len(frames)])
    place = {"seq": PREFIX_BYTES + 1, "length": len(bad) - sizes[at % len(frames)] - 1, "type": PREFIX_BYTES + 8}.get(
        damage
    )
    if place is None:
        bad.append(0)
    else:
        bad[place] ^= 1
    frames[at % len(frames)] = bytes(bad)
    one_by_one = [match_audio(data, first + number) for number, data in enumerate(frames)]
    whole = -1 not in one_by_one and not any(size % 2 for size in one_by_one)
    assert match_audio_run(frames, first, 2) == (sum(one_by_one) if whole else -1)


def test_a_frame_of_any_other_shape_is_not_taken_and_not_wrong() -> None:
    wire = {"type": "audio", "request_id": ID, "attempt": 1, "seq": 5, "pcm": b"1234"}
    others = [
        dict(reversed(wire.items())),
        {**wire, "more": 1},
        {key: wire[key] for key in ("type", "request_id", "attempt", "seq")},
        {**wire, "pcm": "1234"},
        {**wire, "seq": -1},
    ]
    for other in others:
        assert read_audio(msgpack.packb(other)) is None
    assert Audio.from_map(unpack(msgpack.packb(others[0]))).seq == 5
    assert "audio" in FROM_WORKER
    whole = pack_audio(audio_prefix(ID, 1), 1, b"1234")
    for size in range(len(whole)):
        assert read_audio(whole[:size]) is None
        with pytest.raises(ProtocolError):
            unpack(whole[:size])
