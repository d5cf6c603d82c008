"""mp3 as a stream, by LAME (the package lameenc, of the extra `[relay]`)."""

from typing import Any

from protocol.wire.structs import AudioFormat

#: Below 16 kHz, mp3 is "MPEG-2.5", which is in no standard, and a frame lasts 70 ms.
RATES_HZ = (16_000, 22_050, 24_000, 32_000, 44_100, 48_000)


class Mp3Encoder:
    """An encoder of 64 kbit/s a channel, 96 from 32 kHz on; constant, and without a Xing head, which is written last.

    Args:
        source: what is fed. A rate that mp3 does not have becomes its next higher one.

    Raises:
        ImportError: lameenc is not installed.
    """

    def __init__(self, source: AudioFormat) -> None:
        import lameenc

        rate_hz = min((rate for rate in RATES_HZ if rate >= source.sample_rate), default=max(RATES_HZ))
        self._lame: Any = lameenc.Encoder()
        self._lame.silence()
        self._lame.set_channels(source.channels)
        self._lame.set_in_sample_rate(source.sample_rate)
        self._lame.set_out_sample_rate(rate_hz)
        self._lame.set_bit_rate((64 if rate_hz < 32_000 else 96) * source.channels)
        self._lame.set_quality(5)  # takes a third of the CPU of 2
        self._fed = False

    def feed(self, data: bytes) -> bytes:
        """The frames that `data`, whole samples, made ready."""
        self._fed = self._fed or bool(data)
        return bytes(self._lame.encode(data)) if data else b""

    def finish(self) -> bytes:
        """The last frames; nothing may follow."""
        return bytes(self._lame.flush()) if self._fed else b""
