"""The maps with fields of their own that messages contain, and the rules for names and numbers in them."""

import re

import attrs

from protocol.wire.validators import Struct, array_field, boolean, choice, field, integer, text

KIB = 1024
ID_PATTERN = re.compile(r"[0-9a-f]{32}")
SHA256_PATTERN = re.compile(r"[0-9a-f]{64}")

request_id_rule = text(32, ID_PATTERN, "a request id (32 lower-case hex digits)")
seq_rule = integer(0, 2**31)
attempt_rule = integer(0, 1_000_000)


@attrs.frozen(kw_only=True)
class AudioFormat(Struct):
    """The format of `pcm`.

    Args:
        encoding: `pcm_s16le`, the only one: signed 16-bit, little-endian, channels interleaved.
        sample_rate: Hz, 8,000..192,000.
        channels: 1 or 2.
    """

    encoding: str = field(choice("pcm_s16le"), "pcm_s16le")
    sample_rate: int = field(integer(8_000, 192_000))
    channels: int = field(integer(1, 2), 1)

    @property
    def sample_bytes(self) -> int:
        """Bytes of one sample over all channels."""
        return 2 * self.channels


@attrs.frozen(kw_only=True)
class InputInfo(Struct):
    """An input that a `submit` announces.

    Args:
        media_type: like HTTP's, e.g. `audio/wav`.
        size: in bytes.
        sha256: of the whole input, 64 lower-case hex digits.
    """

    media_type: str = field(text(128))
    size: int = field(integer(0))
    sha256: str = field(text(64, SHA256_PATTERN, "a SHA-256 (64 lower-case hex digits)"))


@attrs.frozen(kw_only=True)
class InputRule(Struct):
    """What an engine accepts under one input name.

    Args:
        media_types: the accepted ones; empty accepts any.
        max_bytes: largest size.
        required: whether a request without it is rejected.
    """

    media_types: list[str] = array_field(text(128))
    max_bytes: int = field(integer(1), 16 * 1024 * KIB)
    required: bool = field(boolean, False)


@attrs.frozen(kw_only=True)
class Running(Struct):
    """The progress of an attempt: `next_seq` is the first frame not yet made (worker) or not yet received (relay)."""

    request_id: str = field(request_id_rule)
    attempt: int = field(attempt_rule)
    next_seq: int = field(seq_rule)
