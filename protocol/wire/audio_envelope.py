"""Writes and reads `audio` frames without building a map, because most of a relay's traffic consists of them.

`docs/protocol.md` allows a map's keys in any order. A frame with `type`, `request_id`, `attempt`, `seq`, `pcm` in this
order, each number in its shortest form, is read here in half a microsecond; `encode` writes such frames, and so do
msgpack libraries for a map in that order. Any other goes through `protocol.wire.codec`, which takes twenty. Pure.
"""

from protocol.wire.frames import MAX_PCM_BYTES

_HEAD = b"\x85\xa4type\xa5audio\xaarequest_id\xd9\x20"
_ATTEMPT = b"\xa7attempt"
_ID_END = len(_HEAD) + 32
_ATTEMPT_AT = _ID_END + len(_ATTEMPT)
#: Attempt numbers that fit in one byte; there are seldom more than three.
MAX_ATTEMPT = 0x7F
#: The part that frames of one attempt have in common: everything before `seq`.
PREFIX_BYTES = _ATTEMPT_AT + 1
#: Sequence numbers whose encoding is cached; eleven minutes at 80 ms a frame.
_KEPT = 8192
_BIN8, _BIN16, _BIN32 = 0xC4, 0xC5, 0xC6


def audio_prefix(request_id: str, attempt: int) -> bytes:
    """The first `PREFIX_BYTES` of every `audio` frame of an attempt; b"" if the attempt is over 127."""
    if attempt > MAX_ATTEMPT:
        return b""
    return _HEAD + request_id.encode() + _ATTEMPT + bytes((attempt,))


def _pack_seq(seq: int) -> bytes:
    if seq < 0x80:
        number = bytes((seq,))
    elif seq < 0x100:
        number = b"\xcc" + bytes((seq,))
    elif seq < 0x1_0000:
        number = b"\xcd" + seq.to_bytes(2, "big")
    else:
        number = b"\xce" + seq.to_bytes(4, "big")
    return b"\xa3seq" + number + b"\xa3pcm"


_seqs = tuple(_pack_seq(seq) for seq in range(_KEPT))


def match_audio(data: bytes, seq: int) -> int:
    """The bytes of `pcm` in a frame that begins with an audio prefix, if it has number `seq` and the layout above.

    Args:
        data: one message, whose first `PREFIX_BYTES` are known to be an audio prefix.
        seq: the expected number.

    Returns:
        -1 for anything else, which need not be an error.
    """
    numbered = _seqs[seq] if seq < _KEPT else _pack_seq(seq)
    if not data.startswith(numbered, PREFIX_BYTES):
        return -1
    at = PREFIX_BYTES + len(numbered)
    size = len(data) - at - 3
    if size >= 0x100 and data[at] == _BIN16 and data[at + 1] << 8 | data[at + 2] == size:  # most of them
        return size
    kind = data[at : at + 1]
    if kind == b"\xc6":
        size -= 2
        if size < 0x1_0000 or size > MAX_PCM_BYTES or int.from_bytes(data[at + 1 : at + 5], "big") != size:
            return -1
    elif kind == b"\xc4":
        size += 1
        if size < 0 or data[at + 1] != size:
            return -1
    else:
        return -1
    return size


def match_audio_run(frames: list[bytes], seq: int, sample_bytes: int) -> int:
    """The bytes of `pcm` in frames of one attempt, if they are the expected ones from `seq` on; see `match_audio`.

    Args:
        frames: messages whose first `PREFIX_BYTES` are known to be the same prefix.
        seq: the number of the first.
        sample_bytes: size of one sample over all channels; each frame must contain whole samples.

    Returns:
        -1 if one of them is anything else.
    """
    count, size = len(frames), len(frames[0]) if frames else 0
    if count > 1 and seq + count <= _KEPT:
        # Usually all have the same length: then the bytes before their audio are known, and are compared at once.
        numbers = _seqs[seq : seq + count]
        at = PREFIX_BYTES + len(numbers[0]) + 3
        size -= at
        if 0x100 <= size < 0x1_0000 and not size % sample_bytes and len({*map(len, frames)}) == 1:
            head = bytes((_BIN16, size >> 8, size & 0xFF))
            if b"".join([data[PREFIX_BYTES:at] for data in frames]) == head.join(numbers) + head:
                return size * count
    total = 0
    for number, data in enumerate(frames, seq):
        size = match_audio(data, number)
        if size < 0 or size % sample_bytes:
            return -1
        total += size
    return total


def read_audio(data: bytes) -> tuple[str, int, int, bytes] | None:
    """Request id, attempt, seq and pcm of a frame with the layout above; None for any other message.

    The id is returned unchecked.
    """
    if not data.startswith(_HEAD) or data[_ID_END:_ATTEMPT_AT] != _ATTEMPT or len(data) < PREFIX_BYTES + 10:
        return None
    attempt, first = data[_ATTEMPT_AT], data[PREFIX_BYTES + 4]
    if attempt > MAX_ATTEMPT:
        return None
    width = {0xCC: 1, 0xCD: 2, 0xCE: 4}.get(first, 0)
    at = PREFIX_BYTES + 5
    seq = int.from_bytes(data[at : at + width], "big") if width else first
    size = match_audio(data, seq)
    if size < 0:
        return None
    try:
        return data[len(_HEAD) : _ID_END].decode("ascii"), attempt, seq, data[-size:] if size else b""
    except UnicodeDecodeError:
        return None


def pack_audio(prefix: bytes, seq: int, pcm: bytes) -> bytes:
    """Encode an `audio` frame: the same bytes as `encode` makes.

    Args:
        prefix: the prefix of its attempt; not empty.
        seq: its number.
        pcm: whole samples, at most `MAX_PCM_BYTES`.
    """
    if not isinstance(pcm, bytes):  # a mutable buffer could change while it waits to be sent
        raise TypeError(f"audio must be bytes, not {type(pcm).__name__}")
    size = len(pcm)
    if size > MAX_PCM_BYTES:
        raise ValueError(f"{size} bytes of audio in a frame; the limit is {MAX_PCM_BYTES}")
    if size < 0x100:
        head = bytes((_BIN8, size))
    elif size < 0x1_0000:
        head = bytes((_BIN16,)) + size.to_bytes(2, "big")
    else:
        head = bytes((_BIN32,)) + size.to_bytes(4, "big")
    return b"".join((prefix, _seqs[seq] if seq < _KEPT else _pack_seq(seq), head, pcm))
