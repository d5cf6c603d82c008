"""Plays audio while it is made: through `RELAY_PLAYER`, the package sounddevice, or a player that is installed."""

import os
import queue
import shlex
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, Any, Protocol

from protocol.commands.wav_writer import MAX_DATA_BYTES, wav_header
from protocol.install_hint import install_command
from protocol.wire.structs import AudioFormat

#: Programs that play the WAV on their standard input, the first that is installed.
PROGRAMS: tuple[tuple[str, ...], ...] = (
    ("aplay", "-q", "-"),
    ("ffplay", "-loglevel", "error", "-nodisp", "-autoexit", "-i", "-"),
)
#: A program that plays only files, so that it begins when the audio is whole.
FILE_PROGRAM = "afplay"
#: Length at which the last words of a player are cut.
MAX_WORDS_CHARS = 200


class PlayerFailed(Exception):
    """The player could not be started, or has ended; says why."""


class Output(Protocol):
    """Where a player writes; each method may block, and raises OSError or PlayerFailed."""

    def write(self, data: bytes) -> None:
        """Play samples."""

    def finish(self) -> None:
        """Return when everything was heard."""

    def stop(self) -> None:
        """End at once; may be called by another thread while it writes."""

    def close(self) -> None:
        """Close what is open, after everything else."""


OpenOutput = Callable[[AudioFormat], Output]


class Player:
    """Plays audio as fast as it can be heard, in a thread; whoever makes it is never held up.

    Args:
        open_output: as `find_player` returns it.
    """

    def __init__(self, open_output: OpenOutput) -> None:
        self._open = open_output
        self._output: Output | None = None
        self._queue: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self.format: AudioFormat | None = None
        self.fed_bytes = 0
        #: Why it plays nothing any more; empty while it does.
        self.fault = ""

    @property
    def seconds(self) -> float:
        """Seconds of audio that it was given since it began."""
        return 0.0 if self.format is None else self.fed_bytes / self.format.sample_bytes / self.format.sample_rate

    def begin(self, audio_format: AudioFormat) -> None:
        """Begin the audio, or begin it again."""
        self.stop()
        self.format, self.fed_bytes, self.fault = audio_format, 0, ""
        self._queue = queue.SimpleQueue()
        try:
            self._output = self._open(audio_format)
        except (OSError, PlayerFailed) as fault:
            self.fault = str(fault)
            return
        self._thread = threading.Thread(target=self._play, args=(self._output, self._queue), daemon=True)
        self._thread.start()

    def write(self, pcm: bytes) -> None:
        """Add samples."""
        self.fed_bytes += len(pcm)
        self._queue.put(pcm)

    def finish(self) -> None:
        """Return when everything was heard, or the player has ended."""
        self._queue.put(None)
        if self._thread is not None:
            self._thread.join()

    def stop(self) -> None:
        """Fall silent at once."""
        if self._output is not None:
            self._output.stop()
        self.finish()
        self._output = self._thread = None

    def _play(self, output: Output, pieces: "queue.SimpleQueue[bytes | None]") -> None:
        try:
            while (pcm := pieces.get()) is not None:
                output.write(pcm)
            output.finish()
        except (OSError, PlayerFailed) as fault:
            self.fault = str(fault) or type(fault).__name__
        finally:
            output.close()


class ProgramOutput:
    """A program that plays a WAV: from its standard input, or a file once it is whole.

    Args:
        command: the program and its arguments.
        audio_format: of what it plays.
        as_file: append the name of a file to the arguments, and begin when the audio is whole.
    """

    def __init__(self, command: Sequence[str], audio_format: AudioFormat, *, as_file: bool = False) -> None:
        self._command = command
        self._format = audio_format
        self._words: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115  closed by `close`
        self._file: IO[bytes] | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._data_bytes = 0
        self._stopped = False
        if as_file:
            self._file = tempfile.NamedTemporaryFile(suffix=".wav")  # noqa: SIM115  closed by `close`
            self._file.write(wav_header(audio_format, 0))
        else:
            self._start(command)
            # A WAV that goes into a pipe has the largest size; players read to its end.
            self._send(wav_header(audio_format, MAX_DATA_BYTES - MAX_DATA_BYTES % audio_format.sample_bytes))

    def write(self, data: bytes) -> None:
        """See `Output`."""
        self._data_bytes += len(data)
        self._send(data)

    def finish(self) -> None:
        """See `Output`."""
        if self._stopped:
            return
        if self._file is not None:
            self._file.seek(0)
            self._file.write(wav_header(self._format, self._data_bytes))
            self._file.flush()
            self._start([*self._command, self._file.name])
        assert self._process is not None
        if self._process.stdin is not None:
            with suppress(BrokenPipeError):
                self._process.stdin.close()
        self._check_end(self._process.wait())

    def stop(self) -> None:
        """See `Output`."""
        self._stopped = True
        if self._process is not None:
            self._process.kill()

    def _start(self, command: Sequence[str]) -> None:
        try:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL if self._file is not None else subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=self._words,
                bufsize=0,
            )
        except OSError as fault:
            self.close()
            raise PlayerFailed(f"{command[0]} cannot be started: {fault.strerror}") from None

    def _send(self, data: bytes) -> None:
        if self._file is not None:
            self._file.write(data)
            return
        assert self._process is not None
        assert self._process.stdin is not None
        view = memoryview(data)
        try:
            while view:
                view = view[self._process.stdin.write(view) or 0 :]
        except BrokenPipeError:
            self._check_end(self._process.wait() or None)

    def _check_end(self, code: int | None) -> None:
        """Raise if it ended otherwise than as it was told; `code` is None if it ended well, but too early."""
        if code == 0 or self._stopped:
            return
        self._words.seek(0)
        lines = self._words.read().decode(errors="replace").strip().splitlines()
        words = f": {lines[-1].strip()[:MAX_WORDS_CHARS]}" if lines else ""
        how = "ended before the audio did" if code is None else f"ended with exit code {code}"
        raise PlayerFailed(f"{self._command[0]} {how}{words}")

    def close(self) -> None:
        """See `Output`."""
        if self._process is not None:
            if self._process.stdin is not None:
                self._process.stdin.close()
            self._process.wait()
        if self._file is not None:
            self._file.close()
        self._words.close()


class DeviceOutput:
    """The sound card, by the package sounddevice (PortAudio)."""

    def __init__(self, sounddevice: Any, audio_format: AudioFormat) -> None:
        try:
            self._stream = sounddevice.RawOutputStream(
                samplerate=audio_format.sample_rate, channels=audio_format.channels, dtype="int16"
            )
            self._stream.start()
        except Exception as fault:
            raise PlayerFailed(f"sounddevice cannot play: {fault}") from fault

    def write(self, data: bytes) -> None:
        """See `Output`."""
        try:
            self._stream.write(data)
        except Exception as fault:
            raise PlayerFailed(f"sounddevice cannot play on: {fault}") from fault

    def finish(self) -> None:
        """See `Output`."""
        self._stream.stop()

    def stop(self) -> None:
        """See `Output`."""
        with suppress(Exception):
            self._stream.abort()

    def close(self) -> None:
        """See `Output`."""
        with suppress(Exception):
            self._stream.close()


def find_player(environ: Mapping[str, str] | None = None) -> OpenOutput:
    """Find what plays audio.

    Raises:
        PlayerFailed: there is nothing; says what to install.
    """
    environ = os.environ if environ is None else environ
    if line := environ.get("RELAY_PLAYER", "").strip():
        try:
            command = shlex.split(line)
        except ValueError as fault:
            raise PlayerFailed(f"RELAY_PLAYER is not a command line: {fault}") from None
        return lambda audio_format: ProgramOutput(command, audio_format)
    try:
        import sounddevice
    except (ImportError, OSError):  # OSError: without PortAudio
        pass
    else:
        return lambda audio_format: DeviceOutput(sounddevice, audio_format)
    path = environ.get("PATH")
    for program in PROGRAMS:
        if shutil.which(program[0], path=path):
            return lambda audio_format: ProgramOutput(program, audio_format)
    if shutil.which(FILE_PROGRAM, path=path):
        return lambda audio_format: ProgramOutput([FILE_PROGRAM], audio_format, as_file=True)
    names = ", ".join(program[0] for program in PROGRAMS)
    raise PlayerFailed(
        f"nothing here plays audio: install one of {names}, or the extra [play] ({install_command('play')}), "
        "or name a program that plays a WAV on its standard input in RELAY_PLAYER"
    )


def has_sound(environ: Mapping[str, str] | None = None) -> bool:
    """Whether something can probably be heard here: a sound card, a sound server, or a player that was named."""
    environ = os.environ if environ is None else environ
    if environ.get("RELAY_PLAYER") or environ.get("PULSE_SERVER"):
        return True
    runtime = environ.get("XDG_RUNTIME_DIR")
    if runtime and any((Path(runtime) / name).exists() for name in ("pulse/native", "pipewire-0")):
        return True
    with suppress(OSError):
        return "[" in Path("/proc/asound/cards").read_text()
    return shutil.which(FILE_PROGRAM, path=environ.get("PATH")) is not None
