"""Engine `espeak`: real speech from libespeak-ng, without weights or a GPU. An optional extra, as it is GPL-3.0.

It is not reproducible: its output depends a little on what the process spoke before (8.24 s, then 8.25 s).
"""

import importlib.util
from collections.abc import Callable, Iterator, Mapping
from typing import Any, ClassVar

from gpuworker.engines.base import (
    AudioChunk,
    Capabilities,
    Chunk,
    Engine,
    EngineInput,
    InvalidParams,
    Missing,
    Option,
    OptionError,
    OptionValue,
    OutputChunk,
)
from gpuworker.engines.espeak.library import libespeak
from gpuworker.engines.espeak.visemes import shapes
from protocol.install_hint import install_command
from protocol.speakable import speakable
from protocol.wire.structs import AudioFormat
from protocol.wire.validators import Value

AUTO = "auto"
#: English at the default rate: 20 minutes, 54 MB of PCM, just under the relay's `max_result_bytes`.
MAX_TEXT_CHARS = 20_000
#: Code points spoken with the Chinese voice: ideographs, their punctuation, and full-width forms.
_HAN = ((0x3400, 0x4DBF), (0x4E00, 0x9FFF), (0xF900, 0xFAFF), (0x20000, 0x3FFFF))
_HAN_PUNCTUATION = ((0x3000, 0x303F), (0xFF00, 0xFFEF))


def _within(char: str, ranges: tuple[tuple[int, int], ...]) -> bool:
    return any(low <= ord(char) <= high for low, high in ranges)


def script_runs(text: str, chinese_voice: str, other_voice: str) -> list[tuple[str, str]]:
    """Split `text` where its script changes, into pairs of voice and text.

    A run begins at an ideograph or at a letter of another script. Digits, signs and spaces belong to the run before
    them, and at the start of the text to the run after them.
    """
    runs: list[tuple[str, str]] = []
    begin, voice = 0, ""
    for place, char in enumerate(text):
        if _within(char, _HAN) or (not voice and _within(char, _HAN_PUNCTUATION)):
            wanted = chinese_voice
        elif char.isalpha() and not _within(char, _HAN_PUNCTUATION):
            wanted = other_voice
        else:
            continue
        if voice and wanted != voice:
            runs.append((voice, text[begin:place]))
            begin = place
        voice = wanted
    runs.append((voice or other_voice, text[begin:]))
    return runs


class EspeakEngine(Engine):
    """Speaks with libespeak-ng and streams the audio from its callback."""

    SUMMARY: ClassVar[str] = "real speech by libespeak-ng in 140 languages; no weights, no GPU"
    LIVE_INPUTS: ClassVar[tuple[str, ...]] = ("text",)
    OPTIONS: ClassVar[Mapping[str, Option]] = {
        "chinese_voice": Option(default="cmn", help="voice for Chinese characters if a request names none"),
        "voice": Option(default="en-us", help="voice for everything else if a request names none"),
    }

    def __init__(self, options: Mapping[str, OptionValue] | None = None) -> None:
        super().__init__(options)
        self._capabilities = Capabilities()

    @classmethod
    def missing(cls) -> list[Missing]:
        """The wheel that contains the library."""
        if importlib.util.find_spec("espeakng_loader"):
            return []
        return [Missing("the espeakng-loader package (libespeak-ng)", install_command("espeak"))]

    @property
    def capabilities(self) -> Capabilities:
        """Audio at the library's 22,050 Hz; its voices are the enum of param `voice`."""
        return self._capabilities

    def load(self) -> None:
        """Load the library, read its voices, and speak a word in both default voices."""
        library = libespeak()
        for name in ("chinese_voice", "voice"):
            if self.options[name] not in library.voices:
                raise OptionError(
                    f"-o {name}={self.options[name]} is not a voice; choose one of {', '.join(library.voices)}"
                )
        self._capabilities = Capabilities(
            format=AudioFormat(sample_rate=library.sample_rate),
            streams=True,
            params=_params([AUTO, *library.voices]),
        )
        for _ in self.generate({"text": "a 好"}, {}):
            pass

    def generate(self, params: dict[str, Value], inputs: Mapping[str, EngineInput]) -> Iterator[Chunk]:
        """Yield the speech in chunks of 100 ms, with param `visemes` those of each before it."""
        del inputs
        return self._speech(params, 0)

    def piecewise(
        self, params: dict[str, Value], inputs: Mapping[str, EngineInput], **context: Any
    ) -> Callable[[str], Iterator[Chunk]]:
        """Speak a text piece by piece; the times of visemes go on from one to the next."""
        del inputs, context
        begin = 0

        def say_next(text: str) -> Iterator[Chunk]:
            nonlocal begin
            for chunk in self._speech({**params, "text": text}, begin):
                if isinstance(chunk, AudioChunk):
                    begin += len(chunk.pcm) // 2
                yield chunk

        return say_next

    def _speech(self, params: dict[str, Value], begin: int) -> Iterator[Chunk]:
        """The speech of a text that begins at sample `begin` of its run."""
        text, voice = params["text"], params.get("voice", AUTO)
        if not speakable(text):
            raise InvalidParams({"text": "contains nothing to speak"})
        if voice == AUTO:
            runs = script_runs(text, str(self.options["chinese_voice"]), str(self.options["voice"]))
        else:
            runs = [(voice, text)]
        library = libespeak()
        speech = library.speak(
            runs,
            rate_wpm=params.get("rate", 175),
            pitch=params.get("pitch", 50),
            volume=params.get("volume", 100),
        )
        try:
            for sound in speech:
                if params.get("visemes") and (made := shapes(sound.phonemes, begin, library.sample_rate)):
                    yield OutputChunk({"visemes": made})
                yield AudioChunk(sound.pcm)
        finally:
            speech.close()


def _params(voices: list[str]) -> dict[str, Value]:
    return {
        "type": "object",
        "properties": {
            "text": {"type": "string", "minLength": 1, "maxLength": MAX_TEXT_CHARS},
            "voice": {"enum": voices, "default": AUTO, "description": "auto: by script, Chinese or other"},
            "rate": {"type": "integer", "minimum": 80, "maximum": 450, "default": 175, "description": "words a minute"},
            "pitch": {"type": "integer", "minimum": 0, "maximum": 100, "default": 50},
            "volume": {"type": "integer", "minimum": 0, "maximum": 200, "default": 100},
            "visemes": {
                "type": "boolean",
                "default": False,
                "description": "tell how the mouth stands, and when",
            },
        },
        "required": ["text"],
        "additionalProperties": False,
    }
