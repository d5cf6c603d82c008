r"""Engine `mock`: a tune instead of speech, with the pace and the faults that its params ask for.

It is made for tests and load tests. The samples are a pure function of `text`, `seed` and the sample rate: notes of
200 ms, chosen by SHA-256, so that a lost, doubled or moved piece of audio shows. `duration_s`, `chunk_ms` and `speed`
cut and pace the same tune. It needs no numpy; chunks are sliced from notes computed at load, so hundreds of streams
are cheap.

Params (all but `text` optional):

| name | is |
| --- | --- |
| text | the text it pretends to speak; may be empty |
| seed | selects the tune (0) |
| duration_s | seconds of audio; by default 2..5 by the text's length, full at 200 characters |
| chunk_ms | audio in one chunk (option `chunk_ms`, 100) |
| speed | seconds of audio made in a second of work; 0: as fast as possible (option `speed`, 1) |
| delay_s | wait before the first chunk (option `delay_s`, 0) |
| progress | a `progress` chunk before each this many chunks; 0: none |
| output | `audio`; or instead of it `text`: one word in each chunk, with the blanks behind it, as `output`; or \
`video`: a grey picture in each chunk, of 16 x 16, with a key frame each second |
| fail | {how: raise, hang, exit, freeze or slow; at: the chunk before which, from 0; seconds: of `slow` (1); \
code: of `exit` (3); retryable and restart: of `raise`} |

`hang` stops its own thread, `freeze` the whole process. With option `shared` all slots are seats of one process, as
with an engine that batches on a GPU.

With option `transcripts`, texts with `|` between them, it hears instead: what is loud is speech, and the first
utterance has the first text as its transcript, a word in each piece, the next one the next, and after the last comes
the first again.

The inputs `audio`, `video` and `file` are optional, and may be live: an `output` before all else tells type, size and
SHA-256 of each, so it waits for their ends.
"""

import copy
import hashlib
import itertools
import math
import os
import re
import secrets
import signal
import sys
import threading
import time
from array import array
from collections.abc import Iterator, Mapping, Sequence
from typing import ClassVar

from gpuworker.engines.base import (
    AudioChunk,
    Capabilities,
    Chunk,
    Engine,
    EngineError,
    EngineInput,
    LiveInput,
    Option,
    OptionError,
    OptionValue,
    OutputChunk,
    ProgressChunk,
    VideoChunk,
)
from gpuworker.hearing.hearing import Recognize, Segment, capabilities, transcribe
from gpuworker.hearing.utterances import Utterance, loudness
from protocol.wire.ivf import PTS_HZ
from protocol.wire.structs import AudioFormat, InputRule, VideoFormat
from protocol.wire.validators import Value

NOTE_MS = 200
#: Sample rates; multiples of 5, so that a note consists of whole cycles and notes join without a click.
NOTES_HZ = (220, 245, 260, 295, 330, 350, 390, 440, 495, 525, 585, 660, 700, 785, 880, 990)
AMPLITUDE = 8_000
#: VP8, as libvpx encodes them: a grey picture, and one that says that nothing has changed.
KEY_PICTURE = bytes.fromhex("1002009d012a100010000047088585888584880202000619680000")
NEXT_PICTURE = bytes.fromhex("b101000510ac00180018582ff400080000")
#: Longest sleep between two checks of `cancelled`, seconds.
NAP_S = 0.05
FULL_LENGTH_CHARS = 200

PARAMS: dict[str, Value] = {
    "type": "object",
    "properties": {
        "text": {"type": "string", "maxLength": 20_000},
        "seed": {"type": "integer", "minimum": 0, "maximum": 2**32 - 1, "default": 0},
        "duration_s": {"type": "number", "minimum": 0, "maximum": 3_600},
        "chunk_ms": {"type": "integer", "minimum": 1, "maximum": 5_000},
        "speed": {"type": "number", "minimum": 0, "maximum": 100_000},
        "delay_s": {"type": "number", "minimum": 0, "maximum": 3_600},
        "progress": {"type": "integer", "minimum": 0, "maximum": 1_000, "default": 0},
        "output": {"enum": ["audio", "text", "video"], "default": "audio"},
        "fail": {
            "type": "object",
            "properties": {
                "how": {"enum": ["raise", "hang", "exit", "freeze", "slow"]},
                "at": {"type": "integer", "minimum": 0, "default": 0},
                "seconds": {"type": "number", "minimum": 0, "maximum": 3_600, "default": 1},
                "code": {"type": "integer", "minimum": 0, "maximum": 255, "default": 3},
                "retryable": {"type": "boolean", "default": False},
                "restart": {"type": "boolean", "default": False},
            },
            "required": ["how"],
            "additionalProperties": False,
        },
    },
    "required": ["text"],
    "additionalProperties": False,
}

INPUTS = {name: InputRule(live=True) for name in ("audio", "video", "file")}


def _described(given: EngineInput | LiveInput) -> Value:
    size, digest = 0, hashlib.sha256()
    for data in given:
        size += len(data)
        digest.update(data)
    return {"media_type": given.media_type, "size": size, "sha256": digest.hexdigest()}


class Tune:
    """Samples by position; the same for equal text and seed."""

    def __init__(self, sample_rate: int) -> None:
        self.note_samples = sample_rate * NOTE_MS // 1000
        self._notes = [self._note(hz, sample_rate) for hz in NOTES_HZ]

    def _note(self, hz: int, sample_rate: int) -> bytes:
        step = 2 * math.pi * hz / sample_rate
        samples = array("h", (round(AMPLITUDE * math.sin(step * i)) for i in range(self.note_samples)))
        if sys.byteorder == "big":
            samples.byteswap()
        return samples.tobytes()

    def pcm(self, key: bytes, start: int, samples: int) -> bytes:
        """`samples` samples, from `start`, of the tune that `key` selects."""
        pieces = []
        while samples > 0:
            number, offset = divmod(start, self.note_samples)
            taken = min(samples, self.note_samples - offset)
            pieces.append(self._notes[self._pick(key, number)][2 * offset : 2 * (offset + taken)])
            start += taken
            samples -= taken
        return b"".join(pieces)

    @staticmethod
    def _pick(key: bytes, number: int) -> int:
        block, place = divmod(number, 32)
        return hashlib.sha256(key + block.to_bytes(4, "big")).digest()[place] & 15


def tune_key(text: str, seed: int) -> bytes:
    """The key that selects the notes for a text."""
    return hashlib.sha256(f"{seed}\0{text}".encode()).digest()


def default_duration_s(text: str) -> float:
    """The default seconds of audio for a text, and of work at speed 1: 2..5."""
    return 2.0 + 3.0 * min(len(text), FULL_LENGTH_CHARS) / FULL_LENGTH_CHARS


class MockEngine(Engine):
    """Plays a tune at a scripted pace, with scripted faults; see the module's docstring."""

    SUMMARY: ClassVar[str] = "a deterministic tune with scripted delays and faults, for tests and load"
    LIVE_INPUTS: ClassVar[tuple[str, ...]] = ("audio", "file", "text", "video")
    OPTIONS: ClassVar[Mapping[str, Option]] = {
        "sample_rate": Option(kind=int, default=24_000, help="Hz"),
        "chunk_ms": Option(kind=int, default=100, help="audio in one chunk, unless the request sets it"),
        "speed": Option(kind=float, default=1.0, help="seconds of audio made in a second, unless the request sets it"),
        "delay_s": Option(kind=float, default=0.0, help="wait before the first chunk, unless the request sets it"),
        "reproducible": Option(kind=bool, default=True, help="false: the same tune, cut differently each time"),
        "load_s": Option(kind=float, default=0.0, help="seconds that loading takes"),
        "load_fails": Option(kind=bool, default=False, help="loading fails"),
        "shared": Option(kind=bool, default=False, help="one process for all slots"),
        "transcripts": Option(help="texts with | between them: hears these, instead of playing a tune"),
    }

    def __init__(self, options: Mapping[str, OptionValue] | None = None) -> None:
        super().__init__(options)
        try:
            self._format = AudioFormat(sample_rate=int(self.options["sample_rate"] or 0))
        except ValueError as fault:
            raise OptionError(f"-o {fault}") from None
        self._tune: Tune | None = None
        self._transcripts = str(self.options["transcripts"] or "").split("|")
        self.SHARED = bool(self.options["shared"])

    @property
    def capabilities(self) -> Capabilities:
        """Audio at the option's rate; by default reproducible by any mock that cuts it equally."""
        if self._is_transcriber:
            return capabilities(decodes=False, reproducible=True, fingerprint=str(self.options["transcripts"])[:200])
        cut = f"chunks of {self.options['chunk_ms']} ms"
        return Capabilities(
            format=self._format,
            streams=True,
            reproducible=bool(self.options["reproducible"]),
            fingerprint=cut,
            params=PARAMS,
            inputs=INPUTS,
        )

    def load(self) -> None:
        """Compute the notes."""
        time.sleep(float(self.options["load_s"] or 0))
        if self.options["load_fails"]:
            raise EngineError("loading fails, as -o load_fails=true asks")
        self._tune = Tune(self._format.sample_rate)

    def seats(self, count: int) -> Sequence[Engine]:
        """Engines that share the notes."""
        return [copy.copy(self) for _ in range(count)]

    def format_for(self, params: dict[str, Value]) -> AudioFormat | None:
        """The format of the tune; None for another `output`."""
        return self._format if not self._is_transcriber and params.get("output", "audio") == "audio" else None

    def video_for(self, params: dict[str, Value]) -> VideoFormat | None:
        """The format of the pictures of `output: video`."""
        if params.get("output") != "video":
            return None
        fps = 1 / max(0.005, self._figure(params, "chunk_ms") / 1000)
        return VideoFormat(width=16, height=16, fps=max(1.0, fps))

    @property
    def _is_transcriber(self) -> bool:
        return self.options["transcripts"] is not None

    def _transcribe(self) -> Recognize:
        """A function that recognizes the next of its texts in each utterance, however that sounds."""
        texts = itertools.cycle(self._transcripts)

        def recognize(utterance: Utterance, _params: Mapping[str, Value]) -> Iterator[Segment]:
            self._sleep_until(time.monotonic() + float(self.options["delay_s"] or 0))
            words = re.findall(r"\s*\S+", next(texts))
            word_s = len(utterance.pcm) / 2 / utterance.sample_rate / max(1, len(words))
            for number, word in enumerate(words):
                yield Segment(word, number * word_s, (number + 1) * word_s, "en")

        return recognize

    def generate(self, params: dict[str, Value], inputs: Mapping[str, EngineInput | LiveInput]) -> Iterator[Chunk]:
        """Yield what came as inputs, then the tune, or the words, at the requested pace."""
        if self._is_transcriber:
            yield from transcribe(self._transcribe(), lambda _rate: loudness, params, inputs, cancelled=self.cancelled)
            return
        if inputs:
            yield OutputChunk({name: _described(each) for name, each in inputs.items()})
        chunk_s = self._figure(params, "chunk_ms") / 1000
        speed = self._figure(params, "speed")
        progress = params.get("progress", 0)
        fail = params.get("fail", {})
        make = {"text": self._words, "video": self._pictures}.get(params.get("output", "audio"), self._audio)
        pieces = make(params, chunk_s)
        due = time.monotonic()
        self._sleep_until(due := due + self._figure(params, "delay_s"))
        number = 0
        for number, (piece, fraction) in enumerate(pieces):
            if progress and number % progress == 0:
                yield ProgressChunk("generating", fraction)
            if number == fail.get("at", 0):
                self._fail(fail)
            if speed:
                self._sleep_until(due := due + chunk_s / speed)
            yield piece
        if fail and fail.get("at", 0) > number:
            self._fail(fail)

    def _figure(self, params: dict[str, Value], name: str) -> float:
        return float(params.get(name, self.options[name]) or 0)

    @staticmethod
    def _duration_s(params: dict[str, Value]) -> float:
        return float(params.get("duration_s", default_duration_s(params["text"])))

    def _audio(self, params: dict[str, Value], chunk_s: float) -> Iterator[tuple[Chunk, float]]:
        assert self._tune is not None
        rate = self._format.sample_rate
        key = tune_key(params["text"], params.get("seed", 0))
        total = round(self._duration_s(params) * rate)
        step = max(1, round(chunk_s * rate))
        start = 0
        while start < total:
            length = min(total - start, step if self.options["reproducible"] else self._odd_length(step))
            yield AudioChunk(self._tune.pcm(key, start, length)), start / total
            start += length

    @staticmethod
    def _odd_length(step: int) -> int:
        """A number of samples that no second attempt would choose; half a step to one and a half."""
        return max(1, step // 2 + secrets.randbelow(step + 1))

    @staticmethod
    def _words(params: dict[str, Value], _chunk_s: float) -> Iterator[tuple[Chunk, float]]:
        words = re.findall(r"\s*\S+\s*", params["text"]) or [""]
        for number, word in enumerate(words):
            yield OutputChunk(word), number / len(words)

    def _pictures(self, params: dict[str, Value], chunk_s: float) -> Iterator[tuple[Chunk, float]]:
        chunk_s = max(0.001, chunk_s)
        total = math.ceil(self._duration_s(params) / chunk_s)
        for number in range(total):
            key = not number or math.floor(number * chunk_s) > math.floor((number - 1) * chunk_s)
            pts = round(number * chunk_s * PTS_HZ)
            yield VideoChunk(KEY_PICTURE if key else NEXT_PICTURE, pts, key), number / total

    def _sleep_until(self, due: float) -> None:
        while (left := due - time.monotonic()) > 0 and not self.cancelled():
            time.sleep(min(left, NAP_S))

    @staticmethod
    def _fail(fail: dict[str, Value]) -> None:
        how = fail.get("how")
        if how == "raise":
            raise EngineError(
                "the request asked for this failure",
                retryable=fail.get("retryable", False),
                restart=fail.get("restart", False),
            )
        if how == "exit":
            print(f"exiting with code {fail.get('code', 3)}, as the request asked", file=sys.stderr, flush=True)
            os._exit(fail.get("code", 3))
        if how == "freeze":
            # To this thread: sent to the process, another thread may take it, and this one goes on for a moment.
            signal.pthread_kill(threading.get_ident(), signal.SIGSTOP)
        if how == "hang":
            print("hanging, as the request asked", file=sys.stderr, flush=True)
        while how == "hang":  # ignores `cancelled`: only a kill ends it
            time.sleep(3600)
        if how == "slow":
            print("slow, as the request asked", file=sys.stderr, flush=True)
            time.sleep(fail.get("seconds", 1))
