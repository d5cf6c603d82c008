"""Writes audio to a file as it arrives: a WAV that is valid at every moment, encoded, or raw PCM if it cannot seek."""

import os
import stat
import struct
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from protocol.install_hint import install_command
from protocol.wire.structs import AudioFormat

if TYPE_CHECKING:
    from protocol.audio.encoder import Encoder

#: RIFF stores sizes in 32 bits; its own size includes 36 bytes of header.
MAX_DATA_BYTES = 0xFFFF_FFFF - 36
HEADER_BYTES = 44
#: Names of files that get the samples alone.
RAW_SUFFIXES = frozenset({".pcm", ".raw", ".s16", ".s16le"})
#: Names of files that are encoded, and the coding (`protocol.audio.encoder.CODINGS`) of each.
ENCODED = {".mp3": "mp3", ".opus": "opus", ".ogg": "opus", ".oga": "opus", ".flac": "flac", ".aac": "aac"}
#: Names that promise a kind of audio that is not made here; any other name gets a WAV.
_OTHER = """.3gp .ac3 .aif .aiff .amr .ape .au .caf .m4a .m4b .mka .mkv .mov .mp2 .mp4 .mpga
.snd .spx .weba .webm .wma .wv"""
OTHER_SUFFIXES = frozenset(_OTHER.split())


def wav_header(audio_format: AudioFormat, data_bytes: int) -> bytes:
    """The 44 bytes before `data_bytes` of PCM (RIFF/WAVE, Microsoft's WAVEFORMAT with tag 1)."""
    return struct.pack(
        "<4sI4s4sIHHIIHH4sI",
        b"RIFF",
        36 + data_bytes,
        b"WAVE",
        b"fmt ",
        16,
        1,
        audio_format.channels,
        audio_format.sample_rate,
        audio_format.sample_rate * audio_format.sample_bytes,
        audio_format.sample_bytes,
        16,
        b"data",
        data_bytes,
    )


def check_audio_name(path: str | Path) -> None:
    """Find out whether audio can be written under a name, which says of what kind it is to be.

    Raises:
        ValueError: not here; says which names can.
    """
    suffix = Path(path).suffix.lower()
    if suffix in OTHER_SUFFIXES:
        raise ValueError(
            f"{path}: audio is written as .wav, .mp3, .opus, .flac, .aac or .pcm; give such a name, "
            f"then make {suffix} of it: ffmpeg -i FILE.wav FILE{suffix}"
        )
    if suffix in ENCODED:
        # A rate that every coding but mp3 and FLAC has to convert, so that what converts is looked for, too.
        _open_encoder(path, AudioFormat(sample_rate=22_051))


def _open_encoder(path: str | Path, audio_format: AudioFormat) -> "Encoder":
    from protocol.audio.encoder import AudioExtraMissing, open_encoder  # a WAV goes without

    suffix = Path(path).suffix.lower()
    try:
        return open_encoder(ENCODED[suffix], audio_format)
    except AudioExtraMissing:
        if suffix == ".mp3":
            what = "mp3 takes the package lameenc (pip install lameenc)"
        else:
            what = f"{suffix} takes the packages of the extra [audio] ({install_command('audio')})"
        raise ValueError(f"{path}: {what}; a name that ends in .wav goes without") from None


class AudioWriter:
    """Writes the audio of one request to a path or an open file.

    The name of a file says what it becomes: those in `ENCODED` are encoded, `.pcm` and `.raw` are the samples alone,
    and any other is a WAV, but for those of kinds that are not made here. Of a WAV, a write appends the samples
    first and updates the header after, so a program killed between the two leaves a WAV that is shorter by one write,
    never one that claims more than it contains. An output that cannot seek (a pipe, a terminal) gets raw PCM.

    An existing file keeps its content until `begin`; a file created here is removed if `begin` was never called.

    Args:
        target: a path, or a binary file, which is not closed.

    Raises:
        OSError: the path cannot be written.
    """

    def __init__(self, target: str | Path | BinaryIO) -> None:
        self.format: AudioFormat | None = None
        self.data_bytes = 0
        self._is_binary = False
        self._made: Path | None = None
        if isinstance(target, str | Path):
            path = Path(target)
            try:
                fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
                self._made = path
            except FileExistsError:
                fd = _open_existing(path)
            self._fd = fd
            self._owned = True
            self._path: Path | None = path
        else:
            target.flush()
            self._fd = target.fileno()
            self._owned, self._path = False, None
        # A file opened by somebody else may contain more than ours (`>> log`): only a path becomes a WAV.
        self.is_file = self._owned and stat.S_ISREG(os.fstat(self._fd).st_mode)
        self._suffix = self._path.suffix.lower() if self._path is not None and self.is_file else ""
        self.is_wav = self.is_file and self._suffix not in {*ENCODED, *RAW_SUFFIXES}
        self._encoder: Encoder | None = None

    @property
    def seconds(self) -> float:
        """Seconds of audio written since it began."""
        return 0.0 if self.format is None else self.data_bytes / self.format.sample_bytes / self.format.sample_rate

    def begin(self, audio_format: AudioFormat) -> None:
        """Begin the audio, or begin it again: earlier audio is dropped if the output can seek.

        Raises:
            ValueError: the file's name promises a kind of audio that cannot be made here.
        """
        if self.is_file and self._path is not None:
            check_audio_name(self._path)
        self.format, self.data_bytes = audio_format, 0
        self._made = None
        if self.is_file:
            os.ftruncate(self._fd, 0)
            os.lseek(self._fd, 0, os.SEEK_SET)
        if self.is_wav:
            self._write_all(wav_header(audio_format, 0))
        if self._path is not None and self._suffix in ENCODED:
            self._encoder = _open_encoder(self._path, audio_format)

    def write(self, pcm: bytes) -> None:
        """Append whole samples.

        Raises:
            RuntimeError: the audio has not begun.
            ValueError: the file would exceed the 4 GiB of a WAV; it stays as it is.
            OSError: the disk is full, or the pipe is closed. What is there stays valid.
        """
        if self.format is None:
            raise RuntimeError("write() before begin()")
        if not pcm:
            return
        if self.is_wav and self.data_bytes + len(pcm) > MAX_DATA_BYTES:
            raise ValueError("a WAV file holds at most 4 GiB")
        self._write_all(pcm if self._encoder is None else self._encoder.feed(pcm))
        self.data_bytes += len(pcm)
        if self.is_wav:
            os.pwrite(self._fd, wav_header(self.format, self.data_bytes), 0)

    def begin_binary(self, head: bytes) -> None:
        """Begin bytes that are not audio, or begin them again; see `write_binary`."""
        self._is_binary = False
        self.write_binary(head)

    def write_binary(self, data: bytes) -> None:
        """Append bytes that are not audio; then no header is written, and `begin` must not follow.

        Raises:
            RuntimeError: the audio has begun.
            OSError: as for `write`.
        """
        if self.format is not None:
            raise RuntimeError("write_binary() after begin()")
        if self.is_file and not self._is_binary:
            os.ftruncate(self._fd, 0)
            os.lseek(self._fd, 0, os.SEEK_SET)
            self.is_wav = False
        self._is_binary = True
        self._made = None
        self._write_all(data)

    def close(self) -> None:
        """Close the file; does nothing if it is closed."""
        if not self._owned or self._fd < 0:
            return
        if self._encoder is not None:
            with suppress(OSError):  # the write before has already reported a full disk
                self._write_all(self._encoder.finish())
                for at, data in self._encoder.patches:
                    os.pwrite(self._fd, data, at)
        if self.is_wav and self.format is not None and os.fstat(self._fd).st_size > HEADER_BYTES + self.data_bytes:
            os.ftruncate(self._fd, HEADER_BYTES + self.data_bytes)  # drop the rest of a write that failed halfway
        os.close(self._fd)
        self._fd = -1
        if self._made is not None:
            self._made.unlink(missing_ok=True)

    def _write_all(self, data: bytes) -> None:
        view = memoryview(data)
        while view:
            view = view[os.write(self._fd, view) :]


def _open_existing(path: Path) -> int:
    # Wait for the reader of a pipe, so no O_NONBLOCK; if we opened it for reading too, it would never break.
    access = os.O_WRONLY if not path.is_file() else os.O_RDWR
    return os.open(path, access | os.O_CLOEXEC)
