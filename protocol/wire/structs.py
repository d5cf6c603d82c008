"""The maps with fields of their own that messages contain, and the rules for names and numbers in them."""

import re

import attrs

from protocol.wire.validators import (
    Struct,
    Value,
    array_field,
    boolean,
    choice,
    field,
    integer,
    map_field,
    map_of,
    number,
    optional,
    text,
)

KIB = 1024
ID_PATTERN = re.compile(r"[0-9a-f]{32}")
SHA256_OR_EMPTY = re.compile(r"([0-9a-f]{64})?")
NAME_PATTERN = re.compile(r"[a-z][a-z0-9_]{0,31}")

request_id_rule = text(32, ID_PATTERN, "a request id (32 lower-case hex digits)")
input_name_rule = text(32, NAME_PATTERN, "an input name ([a-z][a-z0-9_]{0,31})")
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
class VideoFormat(Struct):
    """The format of the pictures in `video` frames.

    Args:
        codec: `vp8`, the only one (RFC 6386).
        width: pixels, 1..16,383.
        height: as `width`.
        fps: pictures a second that are meant; the `pts` of each says when it is shown.
    """

    codec: str = field(choice("vp8"), "vp8")
    width: int = field(integer(1, 16_383))
    height: int = field(integer(1, 16_383))
    fps: float = field(number(1, 240))


@attrs.frozen(kw_only=True)
class InputInfo(Struct):
    """An input that a `submit` announces: whole, live, or piped from another request.

    Args:
        media_type: like HTTP's, e.g. `audio/wav`; a piped input may leave it to the relay.
        size: in bytes; of a whole input.
        sha256: of a whole input, 64 lower-case hex digits.
        live: its bytes are sent while the request waits and runs; the last `input` says so.
        from_: the request whose output it is: strings as UTF-8, audio as PCM, or video as IVF. The relay sends it.
    """

    media_type: str = field(text(128), "")
    size: int = field(integer(0), 0)
    sha256: str = field(text(64, SHA256_OR_EMPTY, "a SHA-256 (64 lower-case hex digits)"), "")
    live: bool = field(boolean, False)
    from_: str | None = field(optional(request_id_rule), None)

    def __attrs_post_init__(self) -> None:
        if self.live and self.from_ is not None:
            raise ValueError("is either live or from another request")
        if self.is_fed and (self.size or self.sha256):
            raise ValueError("has a size or sha256, which nobody knows before its end")
        if not self.is_fed and not self.sha256:
            raise ValueError("lacks sha256")

    @property
    def is_fed(self) -> bool:
        """Whether its bytes come while the request runs: it is live or piped."""
        return self.live or self.from_ is not None

    @classmethod
    def missing(cls, wire: dict[str, Value]) -> str:
        """See `Struct.missing`; what is required depends on the kind of input."""
        if wire.get("from") is not None:
            return ""
        required = ("media_type",) if wire.get("live") else ("media_type", "size", "sha256")
        return ", ".join(name for name in required if name not in wire)

    def to_map(self) -> dict[str, Value]:
        """See `Struct.to_map`; without what its kind of input does not have."""
        wire = super().to_map()
        unused = [] if self.live else ["live"]
        unused += ["size", "sha256"] if self.is_fed else []
        unused += ["media_type"] if self.from_ is not None and not self.media_type else []
        return {name: value for name, value in wire.items() if name not in unused}


@attrs.frozen(kw_only=True)
class InputRule(Struct):
    """What an engine accepts under one input name.

    Args:
        media_types: the accepted ones; empty accepts any.
        max_bytes: largest size.
        required: whether a request without it is rejected.
        live: whether it may be live or piped; otherwise it must be whole.
        patient: whether a client that holds the request may be silent for as long as it likes, where it is live.
    """

    media_types: list[str] = array_field(text(128))
    max_bytes: int = field(integer(1), 16 * 1024 * KIB)
    required: bool = field(boolean, False)
    live: bool = field(boolean, False)
    patient: bool = field(boolean, False)


@attrs.frozen(kw_only=True)
class Running(Struct):
    """The progress of an attempt: `next_seq` is the first frame not yet made (worker) or not yet received (relay).

    `inputs`: how many bytes of each live or piped input the worker has received.
    """

    request_id: str = field(request_id_rule)
    attempt: int = field(attempt_rule)
    next_seq: int = field(seq_rule)
    inputs: dict[str, int] = map_field(map_of(input_name_rule, integer(0)))
