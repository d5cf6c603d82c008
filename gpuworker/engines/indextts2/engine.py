"""Engine `indextts2`: speech by IndexTTS2 in the voice of an uploaded recording, with control over its emotion.

Written from upstream's source, https://github.com/index-tts/index-tts: `indextts/infer_v2.py` (commit 096d668) and
`indextts/infer_v2_5.py` (commit 071a247), both of which call their class `IndexTTS2`. Tested only against classes with
the same signatures and behaviour: the package is on no registry, and its weights were not available. Therefore it does
not declare itself reproducible, though it is seeded.

Facts about upstream:

- `infer(..., stream_return=True)` yields each segment of the text, a tensor (1, n) of floats within ±32,767 at
  22,050 Hz, and between segments a silence, or a list if the silence is empty. Only tensors are used here, and the
  silence is ours. A release without `stream_return` returns (rate, int16 array (n, 1)).
- It caches the last speaker by the *path* of the recording, so a path here is derived from the file's content.
- It prints on stdout and stderr, which in a slot's process go to the worker's log.
- It cannot stop within a segment. Forward hooks on its token model and on its mel decoder check for a cancel.
"""

import contextlib
import hashlib
import importlib
import importlib.util
import inspect
import random
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar, Protocol

from gpuworker.engines.base import (
    AudioChunk,
    Capabilities,
    Chunk,
    Engine,
    EngineError,
    EngineInput,
    InvalidParams,
    Missing,
    Option,
    OptionValue,
    ProgressChunk,
)
from gpuworker.engines.indextts2.params import SAMPLING, faults, input_rules, params_schema
from protocol.wire.errors import ErrorCode
from protocol.wire.structs import AudioFormat
from protocol.wire.validators import Value

SAMPLE_RATE = 22_050
#: Longest recording accepted; upstream uses its first 15 s.
MAX_RECORDING_S = 60.0
#: The rates that upstream resamples to: for the speaker's recording and for the emotion's.
SPEAKER_HZ = 22_050
EMOTION_HZ = 16_000
#: A segment may be 30 s long, which is more than one message can hold.
CHUNK_BYTES = 2 * SAMPLE_RATE
#: Steps of the token model between two signs of life: 1 to 5 s. The relay ends a silent request after 30 s.
STEPS_A_REPORT = 50
LOCK_LOOK_S = 0.1
LOCK_REPORT_S = 5.0
INSTALL = (
    "git clone https://github.com/index-tts/index-tts && cd index-tts && uv sync --all-extras, "
    "then install relayd into its .venv (docs/indextts2.md)"
)
#: Version -> its module, and its name for half precision.
_VERSIONS = {"2": ("indextts.infer_v2", "use_fp16"), "2.5": ("indextts.infer_v2_5", "use_bf16")}
#: Modules of the model that are called at each step, and at each step of the mel decoder.
_STEPPED = (("gpt", "inference_model"), ("s2mel", "models", "cfm", "estimator"))


class Lock(Protocol):
    """The part of `threading.Lock` and `RLock` that is used here."""

    def acquire(self, blocking: bool = True, timeout: float = -1) -> bool:
        """Acquire the lock, like `threading.Lock.acquire`."""

    def release(self) -> None:
        """Release the lock."""


class _Stopped(Exception):
    """The run was cancelled; raised by a hook, within a segment."""


class IndexTTS2Engine(Engine):
    """Speaks with an `IndexTTS2` that it loads, or that a program has loaded; see the module's docstring.

    A program that serves its own model (docs/indextts2.md) defines a subclass with `MODEL` and `LOCK`.
    """

    SUMMARY: ClassVar[str] = "speech by IndexTTS2: any voice from a recording, emotion steered; needs a GPU"
    LIVE_INPUTS: ClassVar[tuple[str, ...]] = ("text",)
    OPTIONS: ClassVar[Mapping[str, Option]] = {
        "model_dir": Option(default="checkpoints", help="folder with config.yaml and the weights"),
        "version": Option(default="2", choices=tuple(_VERSIONS), help="the IndexTTS version of the weights"),
        "half": Option(kind=bool, default=False, help="half precision: half the memory, hardly a difference"),
        "device": Option(help="cuda:0, cpu, …; chosen by upstream if not given"),
        "cuda_kernel": Option(
            kind=bool, help="upstream's CUDA kernel for the vocoder; chosen by upstream if not given"
        ),
        "deepspeed": Option(kind=bool, default=False, help="use DeepSpeed, if it is installed"),
        "emo_text": Option(
            kind=bool, default=True, help="load the model that reads emotion from text (2.5 can do without)"
        ),
        "voices": Option(help="folder of named voices, NAME.wav or .flac .mp3 .ogg"),
    }
    #: A model that is loaded already, used instead of loading one.
    MODEL: ClassVar[Any] = None
    #: Held during each run if others use `MODEL` too, because it can only serve one call at a time.
    LOCK: ClassVar[Lock | None] = None

    def __init__(self, options: Mapping[str, OptionValue] | None = None) -> None:
        super().__init__(options)
        self._model: Any = None
        self._torch: Any = None
        self._folder: Path | None = None
        self._voices: Mapping[str, Any] = {}
        self._taken: frozenset[str] = frozenset()
        self._capabilities = Capabilities()

    @classmethod
    def missing(cls) -> list[Missing]:
        """The indextts package, unless a model is given."""
        if cls.MODEL is not None or importlib.util.find_spec("indextts"):
            return []
        return [Missing("the indextts package (IndexTTS2), which is on no registry", INSTALL)]

    @property
    def capabilities(self) -> Capabilities:
        """Audio at 22,050 Hz; params by the model's version and limits; named voices as an enum."""
        return self._capabilities

    # -- loading

    def load(self) -> None:
        """Load the model and find the voices.

        Raises:
            EngineError: the package or the weights are missing, or cannot be loaded.
        """
        if self.missing():
            raise EngineError(f"the indextts package is not installed: {INSTALL}")
        if self.options["voices"]:
            self._voices = _find_voices(Path(str(self.options["voices"])))
        self._model = self.MODEL if self.MODEL is not None else self._load_model()
        self._torch = importlib.import_module("torch")
        self._taken = frozenset(inspect.signature(self._model.infer).parameters)
        if "spk_audio_prompt" not in self._taken:
            raise EngineError("this model's infer has no parameter spk_audio_prompt: wrap it with functools.wraps")
        self._folder = Path(tempfile.mkdtemp(prefix="gpuworker-indextts2-"))
        self._capabilities = Capabilities(
            format=AudioFormat(sample_rate=SAMPLE_RATE),
            streams=True,
            params=params_schema(self._model, self._taken, self._voices),
            inputs=input_rules(self._voices),
        )

    def _load_model(self) -> Any:
        module, half = _VERSIONS[str(self.options["version"])]
        folder = Path(str(self.options["model_dir"]))
        if not (folder / "config.yaml").is_file():
            name = f"IndexTeam/IndexTTS-{self.options['version']}"
            raise EngineError(
                f"-o model_dir={folder}: contains no config.yaml; hf download {name} --local-dir={folder}"
            )
        wanted: dict[str, Value] = {
            "cfg_path": str(folder / "config.yaml"),
            "model_dir": str(folder),
            "device": self.options["device"],
            "use_cuda_kernel": self.options["cuda_kernel"],
            "use_deepspeed": self.options["deepspeed"],
            "use_qwen_emo": self.options["emo_text"],
            half: self.options["half"],
        }
        try:
            make = importlib.import_module(module).IndexTTS2
            taken = inspect.signature(make).parameters
            return make(**{name: value for name, value in wanted.items() if name in taken})
        except ImportError as fault:
            raise EngineError(f"{module} cannot be imported: {fault}; {INSTALL}") from fault
        except Exception as fault:
            raise self._mapped(fault) from fault

    def close(self) -> None:
        """Release the model and the folder for recordings."""
        self._model = None
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)

    # -- a run

    def generate(self, params: dict[str, Value], inputs: Mapping[str, EngineInput]) -> Iterator[Chunk]:
        """Yield the speech in chunks of a second, each as soon as its segment is made."""
        assert self._folder is not None
        if found := faults(params, inputs):
            raise InvalidParams(found)
        speaker, emotion = self._recordings(params, inputs)
        yield from self._wait_for_model()
        try:
            with contextlib.ExitStack() as stack:
                if self.LOCK is not None:
                    stack.callback(self.LOCK.release)
                arguments = self._arguments(params)
                came_by = "spk_audio_prompt" if params.get("voice") is None else "voice"
                path = stack.enter_context(self._file(came_by, speaker, SPEAKER_HZ))
                arguments["spk_audio_prompt"] = str(path)
                if emotion is not None:
                    path = stack.enter_context(self._file("emo_audio_prompt", emotion, EMOTION_HZ))
                    arguments["emo_audio_prompt"] = str(path)
                stack.enter_context(self._watched())
                for pcm in self._speech(params, arguments):
                    for start in range(0, len(pcm), CHUNK_BYTES):
                        yield AudioChunk(pcm[start : start + CHUNK_BYTES])
        except _Stopped:
            return
        except EngineError:
            raise
        except Exception as fault:
            raise self._mapped(fault) from fault

    def piecewise(
        self, params: dict[str, Value], inputs: Mapping[str, EngineInput], **context: Any
    ) -> Callable[[str], Iterator[Chunk]]:
        """Speak a text piece by piece, with the silence between them that is also between segments."""
        say = super().piecewise(params, inputs, **context)
        silence: list[Chunk] = []

        def say_next(text: str) -> Iterator[Chunk]:
            yield from silence
            silence[:] = [AudioChunk(_silence(params))]
            yield from say(text)

        return say_next

    def _wait_for_model(self) -> Iterator[Chunk]:
        """Acquire `LOCK`. Cancellation: a generator that is closed does not hold it."""
        waited_s = 0.0
        while self.LOCK is not None and not self.LOCK.acquire(timeout=LOCK_LOOK_S):
            waited_s += LOCK_LOOK_S
            if self.cancelled() or waited_s > LOCK_REPORT_S:
                waited_s = 0.0
                yield ProgressChunk("loading", 0.0, "the model is in use")

    def _recordings(self, params: dict[str, Value], inputs: Mapping[str, EngineInput]) -> tuple[bytes, bytes | None]:
        """The bytes of the recordings of speaker and emotion."""
        emotion = inputs.get("emo_audio_prompt")
        voice = params.get("voice")
        if voice is not None:
            speaker = self._voices[str(voice)].read()
        elif "spk_audio_prompt" in inputs:
            speaker = inputs["spk_audio_prompt"].data
        else:
            reason = "is required: a recording of the voice to speak with" + (", or a voice" if self._voices else "")
            raise EngineError(
                f"spk_audio_prompt {reason}", code=ErrorCode.INPUT_MISSING, details={"spk_audio_prompt": reason}
            )
        return speaker, None if emotion is None else emotion.data

    @contextlib.contextmanager
    def _file(self, name: str, data: bytes, rate: int) -> Iterator[Path]:
        """A WAV of the recording at `rate` Hz, named after its content and deleted at the end of the block.

        Raises:
            InvalidParams: the recording is not audio, too long, too short or silent.
        """
        assert self._folder is not None
        soundfile = importlib.import_module("soundfile")
        reference = importlib.import_module("gpuworker.engines.voxcpm.audio_decode")
        try:
            samples = reference.decode(data, rate=rate, max_seconds=MAX_RECORDING_S)
        except reference.AudioFault as fault:
            raise InvalidParams({name: str(fault)}) from None
        path = self._folder / f"{hashlib.sha256(data).hexdigest()}-{rate}.wav"
        try:
            soundfile.write(path, samples, rate, subtype="FLOAT")
            yield path
        finally:
            path.unlink(missing_ok=True)

    @contextlib.contextmanager
    def _watched(self) -> Iterator[None]:
        """Report the model's steps as progress, and let a cancel stop it between two of them."""
        last_report = ProgressChunk("generating", 0.0)
        steps = 0

        def look(*_: Any) -> None:
            nonlocal steps
            if self.cancelled():
                raise _Stopped
            steps += 1
            if steps % STEPS_A_REPORT == 0:
                self.report(last_report)

        def progress(fraction: float, desc: str = "") -> None:
            nonlocal last_report
            if self.cancelled():
                raise _Stopped
            last_report = ProgressChunk("generating", float(fraction), str(desc))
            self.report(last_report)

        hooks = [module.register_forward_pre_hook(look) for module in _stepped(self._model)]
        before = getattr(self._model, "gr_progress", None)
        self._model.gr_progress = progress
        try:
            yield
        finally:
            if self._model.gr_progress is progress:  # a web page may have set its own in the meantime
                self._model.gr_progress = before
            for hook in hooks:
                hook.remove()

    def _speech(self, params: dict[str, Value], arguments: dict[str, Value]) -> Iterator[bytes]:
        """The PCM of each segment and of the silences between them."""
        streams = "stream_return" in self._taken
        if streams:
            arguments |= {"stream_return": True, "interval_silence": 0}
        seed = int(params.get("seed", 0))
        self._torch.manual_seed(seed)
        random.seed(seed)
        made = self._model.infer(**arguments)
        if not streams:
            if made is None or made[0] != SAMPLE_RATE:
                what = "nothing" if made is None else f"audio at {made[0]} Hz, not {SAMPLE_RATE},"
                raise EngineError(f"IndexTTS2 made {what} of the text")
            yield _pcm(made[1])
            return
        silence = _silence(params)
        first = True
        with contextlib.closing(made):
            for item in made:
                if hasattr(item, "detach"):
                    if not first:
                        yield silence
                    first = False
                    yield _pcm(item)
        if first:
            raise EngineError("IndexTTS2 made nothing of the text")

    def _arguments(self, params: dict[str, Value]) -> dict[str, Value]:
        """The arguments for `infer`, except the recordings."""
        arguments: dict[str, Value] = {"text": params["text"], "output_path": None, "verbose": False}
        for name, rule in self._capabilities.params["properties"].items():
            if name in self._taken or name in SAMPLING or name == "max_mel_tokens":
                arguments[name] = params.get(name, rule.get("default"))
        arguments["top_k"] = arguments["top_k"] or None
        vector = params.get("emo_vector")
        if vector is not None and hasattr(self._model, "normalize_emo_vec"):
            arguments["emo_vector"] = self._model.normalize_emo_vec(list(vector), apply_bias=True)
        return arguments

    def _mapped(self, fault: Exception) -> EngineError:
        message = f"{type(fault).__name__}: {fault}"
        # Compare by name: it is torch's class, in a process that may not have torch.
        if type(fault).__name__ == "OutOfMemoryError":
            return EngineError(
                f"the GPU's memory is full: give it fewer --slots, -o half=true, or shorter texts ({message})",
                retryable=True,
                restart=True,
            )
        if "CUDA error" in message:  # no call succeeds in a process after such an error
            return EngineError(message, retryable=True, restart=True)
        return EngineError(message)


def _find_voices(folder: Path) -> Mapping[str, Any]:
    found: Mapping[str, Any]
    found, left_out = importlib.import_module("gpuworker.engines.voxcpm.voices").find_voices(folder)
    for message in left_out:
        print(message)  # to the worker's log
    if not found:
        raise EngineError(f"-o voices={folder}: contains no voice; put NAME.wav there")
    return found


def _stepped(model: Any) -> Iterator[Any]:
    """The modules of `_STEPPED` that this model has."""
    for path in _STEPPED:
        found = model
        for name in path:
            found = _part(found, name)
        if hasattr(found, "register_forward_pre_hook"):
            yield found


def _part(holder: Any, name: str) -> Any:
    """An attribute, or an entry of a dict or a `ModuleDict`; None if there is neither."""
    if hasattr(holder, name):
        return getattr(holder, name)
    try:
        return holder[name]
    except (TypeError, KeyError, IndexError):
        return None


def _silence(params: Mapping[str, Value]) -> bytes:
    """The silence between two segments."""
    return bytes(2 * (SAMPLE_RATE * int(params.get("interval_silence", 200)) // 1000))


def _pcm(samples: Any) -> bytes:
    """Upstream's samples as s16le; they lie within ±32,767 already, and are truncated as upstream does.

    Args:
        samples: tensor (1, n) of floats, or array (n, 1) of int16.
    """
    numpy = importlib.import_module("numpy")
    if hasattr(samples, "detach"):
        samples = samples.detach().cpu().float().numpy()
    flat = numpy.nan_to_num(numpy.asarray(samples).reshape(-1))
    pcm: bytes = numpy.clip(flat, -32_768, 32_767).astype("<i2").tobytes()
    return pcm
