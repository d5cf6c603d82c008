"""Reads a worker's named voices from a folder: NAME.wav (or .flac .mp3 .ogg), and its transcript NAME.txt.

Also contains the cache of prompts made from them. Nothing heavy is imported: audio is decoded elsewhere.
"""

import hashlib
import os
import stat
import threading
from collections import OrderedDict
from collections.abc import Hashable
from pathlib import Path
from typing import Generic, TypeVar

import attrs

from gpuworker.engines.base import EngineError, wire_text
from protocol.wire.messages import SPACE_PATTERN

#: In order of preference, if one name has several.
AUDIO_SUFFIXES = (".wav", ".flac", ".mp3", ".ogg")
TEXT_SUFFIX = ".txt"
#: Their names, of up to 64 characters each, are listed in the params schema as an `enum`, and a relay lists no schema
#: of more than 24 KiB.
MAX_VOICES = 200
#: Most files read in a folder; a voice has two.
MAX_ENTRIES = 10_000
#: Largest audio file of a voice. A minute of 48 kHz stereo at 24 bits has 17 MB.
MAX_AUDIO_BYTES = 32 * 2**20
#: A fast speaker speaks 25 characters a second.
MAX_TEXT_CHARS = 2_000
MAX_TEXT_BYTES = 4 * MAX_TEXT_CHARS + 1_024
#: Most left-out files that are listed individually.
MAX_LISTED = 50

ValueT = TypeVar("ValueT")


@attrs.frozen
class Voice:
    """One voice of the folder.

    Args:
        name: the name by which a request selects it.
        audio: its file, with links resolved.
        text: its transcript, without surrounding white space; None if there is none.
        digest: SHA-256, hexadecimal, of the audio and the transcript.
    """

    name: str
    audio: Path
    text: str | None
    digest: str

    def read(self) -> bytes:
        """Read its audio file.

        Raises:
            EngineError: it cannot be read, or has changed since the worker announced it.
        """
        try:
            data = _read(self.audio, MAX_AUDIO_BYTES)
        except (OSError, _LeftOut) as fault:
            raise EngineError(f"voice {self.name!r} cannot be read: {_reason(fault)}; restart the worker") from None
        if _digest(hashlib.sha256(data), self.text) != self.digest:
            raise EngineError(f"voice {self.name!r} has changed since the worker started; restart the worker")
        return data


class _LeftOut(Exception):
    """Why a file is not used."""


def find_voices(folder: Path, *, need_text: bool = False) -> tuple[dict[str, Voice], list[str]]:
    """Find the voices in a folder, and the files that are not usable voices.

    Args:
        folder: searched without its subfolders. Hidden files are ignored.
        need_text: leave out voices without a transcript (VoxCPM 1.x requires one).

    Returns:
        name -> voice, sorted, at most `MAX_VOICES`; and a sentence for each file that was left out.

    Raises:
        EngineError: the folder cannot be read.
    """
    try:
        root = folder.resolve(strict=True)
        with os.scandir(root) as entries:
            names = [entry.name for entry, _ in zip(entries, range(MAX_ENTRIES + 1), strict=False)]
    except (OSError, RuntimeError) as fault:  # RuntimeError: links that form a loop
        raise EngineError(
            f"the folder of voices {str(folder)!r} cannot be read: {_reason(fault)}; "
            "create it, or give another one with -o voices=FOLDER"
        ) from None
    left_out = _LeftOutLog()
    if len(names) > MAX_ENTRIES:
        left_out.add(f"{str(folder)!r} has more than {MAX_ENTRIES} files; the rest was not read")
    audio, texts = _sort_files(sorted(names[:MAX_ENTRIES]), left_out)
    voices: dict[str, Voice] = {}
    for name, file in sorted(audio.items()):
        if len(voices) == MAX_VOICES:
            left_out.add(f"voice {name!r} and those after it: a worker has at most {MAX_VOICES} voices")
            break
        try:
            voices[name] = _voice(root, name, file, texts.pop(name, None), need_text)
        except (OSError, _LeftOut) as fault:
            left_out.add(f"voice {name!r}: {_reason(fault)}")
    for name, file in sorted(texts.items()):
        if name not in audio:
            left_out.add(f"{file!r}: there is no {name}.wav (or {' '.join(AUDIO_SUFFIXES[1:])}) beside it")
    return voices, left_out.summary()


@attrs.define
class _LeftOutLog:
    lines: list[str] = attrs.field(factory=list)
    more: int = 0

    def add(self, reason: str) -> None:
        if len(self.lines) < MAX_LISTED:
            self.lines.append("left out: " + wire_text(reason))
        else:
            self.more += 1

    def summary(self) -> list[str]:
        return [*self.lines, f"left out: {self.more} more"] if self.more else self.lines


def _sort_files(files: list[str], left_out: _LeftOutLog) -> tuple[dict[str, str], dict[str, str]]:
    """Sort files into name -> audio file and name -> transcript."""
    audio: dict[str, str] = {}
    texts: dict[str, str] = {}
    for file in files:
        name, suffix = os.path.splitext(file)  # noqa: PTH122 - names, not paths
        if file.startswith("."):
            continue
        if suffix.lower() not in (*AUDIO_SUFFIXES, TEXT_SUFFIX):
            left_out.add(f"{file!r}: a voice is NAME{' or NAME'.join(AUDIO_SUFFIXES)}, and NAME{TEXT_SUFFIX}")
        elif SPACE_PATTERN.fullmatch(name) is None:
            left_out.add(f"{file!r}: a voice's name has 1 to 64 of A-Z a-z 0-9 . _ - and begins with a letter or digit")
        else:
            found = texts if suffix.lower() == TEXT_SUFFIX else audio
            first, second = sorted((found.get(name, file), file), key=_preference)
            found[name] = first
            if first != second:
                left_out.add(f"{second!r}: {first!r} has the same name and is used instead")
    return audio, texts


def _preference(file: str) -> tuple[int, str]:
    suffix = os.path.splitext(file)[1].lower()  # noqa: PTH122 - as above
    return (AUDIO_SUFFIXES.index(suffix) if suffix in AUDIO_SUFFIXES else 0), file


def _voice(root: Path, name: str, audio: str, text_file: str | None, need_text: bool) -> Voice:
    path = _inside(root, audio)
    text = None
    if text_file is not None:
        text = _transcript(_read(_inside(root, text_file), MAX_TEXT_BYTES), text_file)
    if text is None and need_text:
        raise _LeftOut(f"this model needs its transcript in {name}{TEXT_SUFFIX}")
    data = _read(path, MAX_AUDIO_BYTES)
    if not data:
        raise _LeftOut(f"{audio!r} is empty")
    return Voice(name, path, text, _digest(hashlib.sha256(data), text))


def _inside(root: Path, file: str) -> Path:
    """The path of `file`, with all links resolved."""
    try:
        path = (root / file).resolve(strict=True)
    except RuntimeError:
        raise _LeftOut(f"{file!r} is a link that forms a loop") from None
    if not path.is_relative_to(root):
        raise _LeftOut(f"{file!r} is a link out of the folder; copy the file into it")
    return path


def _read(path: Path, at_most: int) -> bytes:
    # Without O_NONBLOCK, opening a pipe that nobody writes to would block.
    with open(path, "rb", opener=lambda file, flags: os.open(file, flags | os.O_NONBLOCK | os.O_NOFOLLOW)) as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise _LeftOut(f"{path.name!r} is not a regular file")
        data = file.read(at_most + 1)
    if len(data) > at_most:
        raise _LeftOut(f"{path.name!r} has more than {at_most:,} bytes; shorten it")
    return data


def _transcript(data: bytes, file: str) -> str | None:
    try:
        text = data.decode("utf-8-sig").strip()
    except UnicodeDecodeError:
        raise _LeftOut(f"{file!r} is not UTF-8; save it as UTF-8") from None
    if len(text) > MAX_TEXT_CHARS:
        raise _LeftOut(f"{file!r} has {len(text)} characters; the limit is {MAX_TEXT_CHARS}")
    return text or None


def _digest(audio: "hashlib._Hash", text: str | None) -> str:
    return hashlib.sha256(audio.digest() + (b"" if text is None else text.encode())).hexdigest()


def _reason(fault: Exception) -> str:
    return (fault.strerror or type(fault).__name__) if isinstance(fault, OSError) else str(fault)


class PromptCaches(Generic[ValueT]):
    """Keeps the values used most recently, as many as fit both limits; the runs of a batch share one.

    Args:
        at_most: the most values.
        max_bytes: their total size; a value that is larger by itself is not kept.
    """

    def __init__(self, at_most: int, max_bytes: int) -> None:
        self._at_most = at_most
        self._max_bytes = max_bytes
        self._kept: OrderedDict[Hashable, tuple[ValueT, int]] = OrderedDict()
        self._lock = threading.Lock()
        #: Total size of everything kept.
        self.nbytes = 0

    def __len__(self) -> int:
        return len(self._kept)

    def __contains__(self, key: Hashable) -> bool:
        return key in self._kept

    def get(self, key: Hashable) -> ValueT | None:
        """The value, or None if it is not in the cache."""
        with self._lock:
            if (kept := self._kept.get(key)) is None:
                return None
            self._kept.move_to_end(key)
            return kept[0]

    def put(self, key: Hashable, value: ValueT, nbytes: int) -> None:
        """Add `value`, and drop the values that have not been used for the longest time."""
        with self._lock:
            if (before := self._kept.pop(key, None)) is not None:
                self.nbytes -= before[1]
            if nbytes > self._max_bytes:
                return
            self._kept[key] = (value, nbytes)
            self.nbytes += nbytes
            while len(self._kept) > self._at_most or self.nbytes > self._max_bytes:
                _, (_, freed) = self._kept.popitem(last=False)
                self.nbytes -= freed
