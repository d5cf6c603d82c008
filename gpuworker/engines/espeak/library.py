"""Calls libespeak-ng through ctypes: one synthesis at a time, streamed by its callback.

The library is a singleton in the process, so this is one too (`libespeak`). Version 1.52.0 was measured to make about
1,000 seconds of audio a second, the first within 1 ms once warm (110 ms for the first text of a process).
"""

import ctypes
import importlib
import os
import queue
import threading
from collections.abc import Generator
from functools import cache
from typing import Any

import attrs

from gpuworker.engines.base import EngineError
from protocol.install_hint import install_command

#: Audio in one chunk, ms: half of what a listener notices as a delay, giving ten frames a second on the wire.
CHUNK_MS = 100
#: Chunks that the library may be ahead of the reader; then it waits in its callback.
AHEAD_CHUNKS = 16
#: The library stores its data path in 160 bytes (N_PATH_HOME) and truncates a longer one.
MAX_DATA_PATH_BYTES = 140

_AUDIO_OUTPUT_SYNCHRONOUS = 2
_DONT_EXIT = 0x8000
_PHONEME_EVENTS, _PHONEME_IPA = 0x0001, 0x0002
_EVENT_END, _EVENT_PHONEME = 0, 7
_CHARS_UTF8 = 1
_END_PAUSE = 0x1000
_RATE, _VOLUME, _PITCH = 1, 2, 3
_GO_ON, _ABORT = 0, 1


class _Voice(ctypes.Structure):
    _fields_ = (
        ("name", ctypes.c_char_p),
        ("languages", ctypes.c_void_p),  # a priority byte, the name of the first language, then more pairs
        ("identifier", ctypes.c_char_p),
        ("gender", ctypes.c_ubyte),
        ("age", ctypes.c_ubyte),
        ("variant", ctypes.c_ubyte),
        ("xx1", ctypes.c_ubyte),
        ("score", ctypes.c_int),
        ("spare", ctypes.c_void_p),
    )


class _EventId(ctypes.Union):
    _fields_ = (("number", ctypes.c_int), ("name", ctypes.c_char_p), ("string", ctypes.c_char * 8))


class _Event(ctypes.Structure):
    _fields_ = (
        ("type", ctypes.c_int),
        ("unique_identifier", ctypes.c_uint),
        ("text_position", ctypes.c_int),
        ("length", ctypes.c_int),
        ("audio_position", ctypes.c_int),  # ms
        ("sample", ctypes.c_int),
        ("user_data", ctypes.c_void_p),
        ("id", _EventId),
    )


_CALLBACK = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_int, ctypes.POINTER(_Event))


@attrs.frozen
class Sound:
    """A piece of speech.

    Attributes:
        pcm: its samples.
        phonemes: those that begin in it or soon after it, in IPA ("" is a pause), each with the sample of the speech at
            which it begins.
    """

    pcm: bytes
    phonemes: list[tuple[int, str]]


class LibEspeak:
    """The loaded library.

    Attributes:
        sample_rate: Hz.
        voices: the names that `speak` accepts, sorted.
    """

    def __init__(self, library_path: str, data_path: str) -> None:
        try:
            self._lib = ctypes.CDLL(library_path)
        except OSError as fault:
            raise EngineError(f"libespeak-ng cannot be loaded: {fault}") from fault
        number = ctypes.c_uint
        self._lib.espeak_Synth.argtypes = [
            *(ctypes.c_char_p, ctypes.c_size_t, number, ctypes.c_int),  # text, size, position and its type
            *(number, number, ctypes.c_void_p, ctypes.c_void_p),  # end, flags, identifier, user data
        ]
        self._lib.espeak_ListVoices.argtypes = [ctypes.c_void_p]
        self._lib.espeak_ListVoices.restype = ctypes.POINTER(ctypes.POINTER(_Voice))
        self.sample_rate: int = self._lib.espeak_Initialize(
            _AUDIO_OUTPUT_SYNCHRONOUS,
            CHUNK_MS,
            _short(data_path).encode(),
            _DONT_EXIT | _PHONEME_EVENTS | _PHONEME_IPA,
        )
        if self.sample_rate <= 0:
            raise EngineError(f"libespeak-ng cannot read its data in {data_path}")
        #: Name -> the library's identifier.
        self._voices = self._list_voices()
        self.voices = sorted(self._voices)
        self._lock = threading.Lock()
        self._sink: queue.SimpleQueue[Sound | None] = queue.SimpleQueue()
        #: Samples of the speech so far, and of those the runs that are spoken.
        self._samples = self._run_begin = 0
        self._room = threading.Semaphore(0)
        self._stop = threading.Event()
        self._callback = _CALLBACK(self._on_audio)  # keep a reference, as ctypes does not
        self._lib.espeak_SetSynthCallback(self._callback)

    def _list_voices(self) -> dict[str, bytes]:
        found = self._lib.espeak_ListVoices(None)
        names: dict[str, bytes] = {}
        place = 0
        while found[place]:
            voice = found[place].contents
            if not voice.identifier.startswith(b"mb/"):  # these need mbrola, which is not included
                names.setdefault(ctypes.string_at(voice.languages + 1).decode(), voice.identifier)
            place += 1
        return names

    def speak(
        self, runs: list[tuple[str, str]], *, rate_wpm: int, pitch: int, volume: int
    ) -> Generator[Sound, None, None]:
        """Speak (voice, text) runs one after another, yielding each piece as it is made.

        Closing the generator aborts the synthesis from inside its callback. A second caller waits for the first.

        Args:
            runs: voices from `voices`, with texts of any length.
            rate_wpm: words per minute, 80..450.
            pitch: 0..100.
            volume: 0..200; 100 is the library's default.

        Raises:
            EngineError: the library rejected a voice or a text.
        """
        with self._lock:
            self._sink = queue.SimpleQueue()
            self._room = threading.Semaphore(AHEAD_CHUNKS)
            self._stop.clear()
            self._samples = 0
            faults: list[EngineError] = []

            def work() -> None:
                try:
                    self._synthesise(runs, rate_wpm, pitch, volume)
                except EngineError as fault:
                    faults.append(fault)
                finally:
                    self._sink.put(None)

            # The library calls back during synthesis, so synthesis must run beside its reader.
            thread = threading.Thread(target=work, name="espeak", daemon=True)
            thread.start()
            try:
                while (sound := self._sink.get()) is not None:
                    self._room.release()
                    yield sound
            finally:
                self._stop.set()
                self._room.release()  # wakes a callback that waits for room, so that it sees the stop
                thread.join()
            if faults:
                raise faults[0]

    def _synthesise(self, runs: list[tuple[str, str]], rate_wpm: int, pitch: int, volume: int) -> None:
        for number, (voice, text) in enumerate(runs):
            if self._stop.is_set():
                return
            # It does not know some voices by the language that they have (en-gb, fr-fr).
            set_voice = self._lib.espeak_SetVoiceByName
            if set_voice(voice.encode()) and set_voice(self._voices[voice]):
                raise EngineError(f"libespeak-ng rejected the voice {voice!r}")
            for parameter, value in ((_RATE, rate_wpm), (_PITCH, pitch), (_VOLUME, volume)):
                self._lib.espeak_SetParameter(parameter, value, 0)
            self._run_begin = self._samples
            data = text.replace("\0", " ").encode()
            flags = _CHARS_UTF8 | (_END_PAUSE if number == len(runs) - 1 else 0)
            if result := self._lib.espeak_Synth(data, len(data) + 1, 0, 1, 0, flags, None, None):
                raise EngineError(f"libespeak-ng rejected the text (error {result})")

    def _on_audio(self, samples: int | None, count: int, events: Any) -> int:
        # Nothing may be raised here: ctypes would print it and carry on.
        if self._stop.is_set():
            return _ABORT
        if samples and count > 0:
            self._room.acquire()
            if self._stop.is_set():
                return _ABORT
            self._samples += count
            self._sink.put(Sound(ctypes.string_at(samples, 2 * count), self._phonemes(events)))
        return _GO_ON

    def _phonemes(self, events: Any) -> list[tuple[int, str]]:
        found = []
        place = 0
        while (event := events[place]).type != _EVENT_END:
            if event.type == _EVENT_PHONEME:  # a name of more than 8 bytes is cut, perhaps within a letter
                found.append((self._run_begin + event.sample, event.id.string.decode(errors="ignore")))
            place += 1
        return found


def _short(data_path: str) -> str:
    """A path to the directory that is short enough; it must stay, because the library reads data while it speaks."""
    if len(data_path.encode()) <= MAX_DATA_PATH_BYTES:
        return data_path
    return f"/proc/self/fd/{os.open(data_path, os.O_PATH | os.O_DIRECTORY)}"


@cache
def libespeak() -> LibEspeak:
    """The library from the `espeakng-loader` wheel, loaded once in the process.

    Raises:
        EngineError: it is not installed or does not work here.
    """
    try:
        loader = importlib.import_module("espeakng_loader")
    except ImportError as fault:
        message = f"engine espeak needs the espeakng-loader package: {install_command('espeak')}"
        raise EngineError(message) from fault
    return LibEspeak(str(loader.get_library_path()), str(loader.get_data_path()))
