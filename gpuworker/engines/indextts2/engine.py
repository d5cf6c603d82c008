"""Engine `indextts2`: speech by IndexTTS2, in the voice of an uploaded recording, with its emotion steered.

Written from upstream's source, https://github.com/index-tts/index-tts: `indextts/infer_v2.py` (commit 096d668) and
`indextts/infer_v2_5.py` (commit 071a247), both of which call their class `IndexTTS2`. Tested against classes of the
same signatures and habits only: the package is on no registry and its weights were not at hand. So it is not announced
as reproducible, though it is seeded.

What there is to know about upstream:

- `infer(..., stream_return=True)` yields each segment of the text, a tensor (1, n) of floats within ±32,767 at
  22,050 Hz, and between segments a silence, or a list where the silence is nothing. Only tensors are taken here,
  and the silence is ours. A release without `stream_return` returns (rate, int16 array (n, 1)).
- It remembers the last speaker by the *path* of the recording: a path here is named by what is in the file.
- It prints on stdout and stderr, which in a slot's process go to the worker's log.
- It has no way to stop within a segment. Forward hooks on its token model and on its mel decoder look for a cancel.
"""

import contextlib
import hashlib
import importlib
import importlib.util
import inspect
import random
import shutil
import tempfile
from collections.abc import Iterator, Mapping
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
#: Upstream hears the first 15 s of a recording; this much is taken.
MAX_RECORDING_S = 60.0
#: What upstream resamples to: the speaker's recording, the emotion's.
SPEAKER_HZ = 22_050
EMOTION_HZ = 16_000
#: A segment may be 30 s long, more than a message holds.
CHUNK_BYTES = 2 * SAMPLE_RATE
#: Of the token model, between two signs of life: 1 to 5 s. The relay gives a silent request up after 30 s.
STEPS_A_REPORT = 50
LOCK_LOOK_S = 0.1
LOCK_REPORT_S = 5.0
INSTALL = (
    "git clone https://github.com/index-tts/index-tts && cd index-tts && uv sync --all-extras, "
    "then install relayd into its .venv (docs/indextts2.md)"
)
#: Version -> its module, and what it calls half precision.
_VERSIONS = {"2": ("indextts.infer_v2", "use_fp16"), "2.5": ("indextts.infer_v2_5", "use_bf16")}
#: Modules of the model that are called once a step, and once a step of the mel decoder.
_STEPPED = (("gpt", "inference_model"), ("s2mel", "models", "cfm", "estimator"))


class Lock(Protocol):
    """A `threading.Lock` or `RLock`, as far as it is used here."""

    def acquire(self, blocking: bool = True, timeout: float = -1) -> bool:
        """As the lock's own."""

    def release(self) -> None:
        """As the lock's own."""


class _Stopped(Exception):
    """The run was cancelled; raised by a hook, within a segment."""


class IndexTTS2Engine(Engine):
    """Speaks with an `IndexTTS2`: one that it loads itself, or one that a program has loaded; see the module.

    A program that serves its own model (docs/indextts2.md) makes a subclass with `MODEL` and `LOCK`.
    """

    SUMMARY: ClassVar[str] = "speech by IndexTTS2: any voice from a recording, emotion steered; needs a GPU"
    OPTIONS: ClassVar[Mapping[str, Option]] = {
        "model_dir": Option(default="checkpoints", help="folder with config.yaml and the weights"),
        "version": Option(default="2", choices=tuple(_VERSIONS), help="of IndexTTS that the weights are for"),
        "half": Option(kind=bool, default=False, help="half precision: half the memory, hardly a difference"),
        "device": Option(help="cuda:0, cpu, …; upstream chooses where it is not given"),
        "cuda_kernel": Option(kind=bool, help="upstream's CUDA kernel for the vocoder; upstream chooses"),
        "deepspeed": Option(kind=bool, default=False, help="DeepSpeed, where it is installed"),
        "emo_text": Option(kind=bool, default=True, help="load what reads emotion from text (2.5 can do without)"),
        "voices": Option(help="folder of named voices, NAME.wav or .flac .mp3 .ogg"),
    }
    #: A model that is loaded already, in place of one of its own.
    MODEL: ClassVar[Any] = None
    #: Held for each run, where others use `MODEL` as well: it is good for one call at a time.
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
        """Audio at 22,050 Hz; params by the version and limits of the model; named voices as an enum."""
        return self._capabilities

    # -- loading

    def load(self) -> None:
        """Load the model and find the voices.

        Raises:
            EngineError: the package or the weights are not there, or cannot be loaded.
        """
        if self.missing():
            raise EngineError(f"the indextts package is not installed: {INSTALL}")
        if self.options["voices"]:
            self._voices = _find_voices(Path(str(self.options["voices"])))
        self._model = self.MODEL if self.MODEL is not None else self._load_model()
        self._torch = importlib.import_module("torch")
        self._taken = frozenset(inspect.signature(self._model.infer).parameters)
        if "spk_audio_prompt" not in self._taken:
            raise EngineError("this model's infer takes no spk_audio_prompt: wrap it with functools.wraps, if at all")
        self._folder = Path(tempfile.mkdtemp(prefix="gpuworker-indextts2-"))
        self._capabilities = Capabilities(
            format=AudioFormat(sample_rate=SAMPLE_RATE),
            params=params_schema(self._model, self._taken, self._voices),
            inputs=input_rules(self._voices),
        )

    def _load_model(self) -> Any:
        module, half = _VERSIONS[str(self.options["version"])]
        folder = Path(str(self.options["model_dir"]))
        if not (folder / "config.yaml").is_file():
            name = f"IndexTeam/IndexTTS-{self.options['version']}"
            raise EngineError(f"-o model_dir={folder}: holds no config.yaml; hf download {name} --local-dir={folder}")
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
        """Let go of the model and of the folder for recordings."""
        self._model = None
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)

    # -- a run

    def generate(self, params: dict[str, Value], inputs: Mapping[str, EngineInput]) -> Iterator[Chunk]:
        """Speech in chunks of a second, as soon as its segment is made."""
        assert self._folder is not None
        if found := faults(params, inputs):
            raise InvalidParams(found)
        speaker, emotion = self._recordings(params, inputs)
        yield from self._wait_for_model()
        try:
            with contextlib.ExitStack() as stack:
                if self.LOCK is not None:
                    stack.callback(self.LOCK.release)
                given = self._arguments(params)
                came_by = "spk_audio_prompt" if params.get("voice") is None else "voice"
                path = stack.enter_context(self._file(came_by, speaker, SPEAKER_HZ))
                given["spk_audio_prompt"] = str(path)
                if emotion is not None:
                    path = stack.enter_context(self._file("emo_audio_prompt", emotion, EMOTION_HZ))
                    given["emo_audio_prompt"] = str(path)
                stack.enter_context(self._watched())
                for pcm in self._speech(params, given):
                    for start in range(0, len(pcm), CHUNK_BYTES):
                        yield AudioChunk(pcm[start : start + CHUNK_BYTES])
        except _Stopped:
            return
        except EngineError:
            raise
        except Exception as fault:
            raise self._mapped(fault) from fault

    def _wait_for_model(self) -> Iterator[Chunk]:
        """Take `LOCK`. Cancellation: a closed generator does not hold it."""
        waited_s = 0.0
        while self.LOCK is not None and not self.LOCK.acquire(timeout=LOCK_LOOK_S):
            waited_s += LOCK_LOOK_S
            if self.cancelled() or waited_s > LOCK_REPORT_S:
                waited_s = 0.0
                yield ProgressChunk("loading", 0.0, "the model is in use")

    def _recordings(self, params: dict[str, Value], inputs: Mapping[str, EngineInput]) -> tuple[bytes, bytes | None]:
        """The bytes of the speaker's recording and of the emotion's."""
        emotion = inputs.get("emo_audio_prompt")
        voice = params.get("voice")
        if voice is not None:
            speaker = self._voices[str(voice)].read()
        elif "spk_audio_prompt" in inputs:
            speaker = inputs["spk_audio_prompt"].data
        else:
            words = "is required: a recording of the voice to speak with" + (", or a voice" if self._voices else "")
            raise EngineError(
                f"spk_audio_prompt {words}", code=ErrorCode.INPUT_MISSING, details={"spk_audio_prompt": words}
            )
        return speaker, None if emotion is None else emotion.data

    @contextlib.contextmanager
    def _file(self, name: str, data: bytes, rate: int) -> Iterator[Path]:
        """A WAV of the recording at `rate` Hz, named by what is in it; gone at the end of the block.

        Raises:
            InvalidParams: it is no audio, too long, too short or silent.
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
        """Its steps are told as progress, and a cancel stops it between two of them."""
        told = ProgressChunk("generating", 0.0)
        steps = 0

        def look(*_: Any) -> None:
            nonlocal steps
            if self.cancelled():
                raise _Stopped
            steps += 1
            if steps % STEPS_A_REPORT == 0:
                self.report(told)

        def progress(fraction: float, desc: str = "") -> None:
            nonlocal told
            if self.cancelled():
                raise _Stopped
            told = ProgressChunk("generating", float(fraction), str(desc))
            self.report(told)

        hooks = [module.register_forward_pre_hook(look) for module in _stepped(self._model)]
        before = getattr(self._model, "gr_progress", None)
        self._model.gr_progress = progress
        try:
            yield
        finally:
            if self._model.gr_progress is progress:  # a page may have set its own meanwhile
                self._model.gr_progress = before
            for hook in hooks:
                hook.remove()

    def _speech(self, params: dict[str, Value], given: dict[str, Value]) -> Iterator[bytes]:
        """PCM of each segment, and of the silences between them."""
        silence_ms = int(params.get("interval_silence", 200))
        streams = "stream_return" in self._taken
        if streams:
            given |= {"stream_return": True, "interval_silence": 0}
        seed = int(params.get("seed", 0))
        self._torch.manual_seed(seed)
        random.seed(seed)
        made = self._model.infer(**given)
        if not streams:
            if made is None or made[0] != SAMPLE_RATE:
                what = "nothing" if made is None else f"audio at {made[0]} Hz, not {SAMPLE_RATE},"
                raise EngineError(f"IndexTTS2 made {what} of the text")
            yield _pcm(made[1])
            return
        silence = bytes(2 * (SAMPLE_RATE * silence_ms // 1000))
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
        """What `infer` is called with, the recordings aside."""
        given: dict[str, Value] = {"text": params["text"], "output_path": None, "verbose": False}
        for name, rule in self._capabilities.params["properties"].items():
            if name in self._taken or name in SAMPLING or name == "max_mel_tokens":
                given[name] = params.get(name, rule.get("default"))
        given["top_k"] = given["top_k"] or None
        vector = params.get("emo_vector")
        if vector is not None and hasattr(self._model, "normalize_emo_vec"):
            given["emo_vector"] = self._model.normalize_emo_vec(list(vector), apply_bias=True)
        return given

    def _mapped(self, fault: Exception) -> EngineError:
        words = f"{type(fault).__name__}: {fault}"
        # By name: it is torch's, in a process that may have none.
        if type(fault).__name__ == "OutOfMemoryError":
            return EngineError(
                f"the GPU's memory is full: give it fewer --slots, -o half=true, or shorter texts ({words})",
                retryable=True,
                restart=True,
            )
        if "CUDA error" in words:  # nothing runs in a process after one
            return EngineError(words, retryable=True, restart=True)
        return EngineError(words)


def _find_voices(folder: Path) -> Mapping[str, Any]:
    found: Mapping[str, Any]
    found, left_out = importlib.import_module("gpuworker.engines.voxcpm.voices").find_voices(folder)
    for words in left_out:
        print(words)  # to the worker's log
    if not found:
        raise EngineError(f"-o voices={folder}: holds no voice; put NAME.wav there")
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
    """An attribute, or an entry of a dict or a `ModuleDict`; None where there is neither."""
    if hasattr(holder, name):
        return getattr(holder, name)
    try:
        return holder[name]
    except (TypeError, KeyError, IndexError):
        return None


def _pcm(samples: Any) -> bytes:
    """Upstream's samples as s16le: within ±32,767 already, and cut off at the point as upstream does.

    Args:
        samples: tensor (1, n) of floats, or array (n, 1) of int16.
    """
    numpy = importlib.import_module("numpy")
    if hasattr(samples, "detach"):
        samples = samples.detach().cpu().float().numpy()
    flat = numpy.nan_to_num(numpy.asarray(samples).reshape(-1))
    pcm: bytes = numpy.clip(flat, -32_768, 32_767).astype("<i2").tobytes()
    return pcm
