"""Engine `voxcpm`: its options, its capabilities, and how it loads. Nothing heavy is imported before `load`."""

import copy
import hashlib
import importlib.metadata
import importlib.util
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from gpuworker.engines.base import (
    Capabilities,
    Chunk,
    Engine,
    EngineError,
    EngineInput,
    Missing,
    Option,
    OptionError,
    OptionValue,
    ProgressChunk,
)
from gpuworker.engines.voxcpm.lora import lora_files
from gpuworker.engines.voxcpm.memory import lacking_memory, memory_outlook, need_of
from gpuworker.engines.voxcpm.model_files import fault_of
from gpuworker.engines.voxcpm.schema import DEFAULT_TIMESTEPS, MAX_TIMESTEPS, Abilities, input_rules, params_schema
from gpuworker.engines.voxcpm.url_policy import parse_hosts
from protocol.install_hint import install_command
from protocol.wire.structs import AudioFormat
from protocol.wire.validators import Value

if TYPE_CHECKING:
    from gpuworker.engines.voxcpm.model import Model
    from gpuworker.engines.voxcpm.speech_model import SpeechModel
    from gpuworker.engines.voxcpm.synthesis import Speaker
    from gpuworker.engines.voxcpm.voices import Voice

#: Modules that voxcpm needs, by their import names; the extra `voxcpm` contains them all.
NEEDS = (
    "torch",
    "transformers",
    "einops",
    "pydantic",
    "librosa",
    "soundfile",
    "soxr",
    "safetensors",
    "huggingface_hub",
    "tqdm",
    "numpy",
    "regex",
)
VOXCPM = "voxcpm==2.0.3"
#: With half of this, a piece of a long text still has its sentence (`MIN_PIECE_TOKENS`) and the speech of that.
MIN_CONTEXT = 512
DEFAULT_VOICES = Path("voices")
#: Size of the cache of encoded prompts; one minute of prompt audio for VoxCPM2 has 375 patches of 1 KiB.
MAX_CACHE_BYTES = 256 * 1024 * 1024
#: One GPU of today makes some 500 times real time with as many rows.
MAX_ROWS = 64
#: Most timesteps that one request may ask for in a batch, unless told: all rows wait for the one with the most.
MAX_TIMESTEPS_IN_BATCH = 16
#: Runs of the self-check on devices that choose kernels by timing them, which a CPU does not.
CHECK_RUNS = 3


def _installed_version() -> str:
    try:
        return importlib.metadata.version("voxcpm")
    except importlib.metadata.PackageNotFoundError:  # a copy of the package without its metadata
        return "unknown"


class VoxcpmEngine(Engine):
    """Speech by a VoxCPM model, streamed step by step."""

    SUMMARY: ClassVar[str] = "speech by VoxCPM2, 1.5 and 0.5B: streaming, voices, cloning; a GPU is recommended"
    LIVE_INPUTS: ClassVar[tuple[str, ...]] = ("text",)
    OPTIONS: ClassVar[Mapping[str, Option]] = {
        "model": Option(default="openbmb/VoxCPM2", help="Hugging Face id, or a folder with the model's files"),
        "lora": Option(help="an adapter (LoRA) for the model: a folder with lora_weights.safetensors, or such a file"),
        "device": Option(default="auto", help="auto, cuda, cuda:1, cpu …"),
        "optimize": Option(
            kind=bool, default=True, help="compile the model (on device cuda only): slower start, faster speech"
        ),
        "context": Option(
            kind=int, default=0, help="positions for prompt, text and speech together; 0: as many as the model has"
        ),
        "batch": Option(
            kind=int, default=1, help="requests to speak at once with one model in one process; --slots is this then"
        ),
        "max_timesteps": Option(
            kind=int, default=0, help="most inference_timesteps a request may ask for; 0: 50, with batch 16"
        ),
        "denoiser": Option(kind=bool, default=False, help="load the denoiser too, for requests with denoise"),
        "offline": Option(kind=bool, default=False, help="load only from disk, without network access"),
        "voices": Option(help="folder of named voices, NAME.wav with NAME.txt (default: voices, if it exists)"),
        "url_hosts": Option(
            help="hosts from which prompt audio may be fetched, a.example,.b.example; makes runs not reproducible"
        ),
        "max_prompt_s": Option(kind=float, default=50.0, help="longest prompt and reference audio, in seconds"),
        "check_memory": Option(kind=bool, default=True, help="refuse to start more slots than fit into memory"),
        "voice_cache": Option(kind=int, default=32, help="number of encoded prompts to keep"),
    }

    def __init__(self, options: Mapping[str, OptionValue] | None = None) -> None:
        super().__init__(options)
        try:
            self._hosts = parse_hosts(str(self.options["url_hosts"] or ""))
        except OptionError as fault:
            raise OptionError(f"-o url_hosts={self.options['url_hosts']}: {fault}") from None
        self._max_prompt_s = float(self.options["max_prompt_s"] or 0)
        self._voice_cache = int(self.options["voice_cache"] or 0)
        self._context = int(self.options["context"] or 0)
        self._rows = int(self.options["batch"] or 0)
        self._max_timesteps = int(self.options["max_timesteps"] or 0)
        if not 1 <= self._max_prompt_s <= 300:
            raise OptionError(f"-o max_prompt_s={self._max_prompt_s:g}: must be 1 to 300 s")
        if not 0 <= self._voice_cache <= 10_000:
            raise OptionError(f"-o voice_cache={self._voice_cache}: must be 0 to 10000")
        if self._context and self._context < MIN_CONTEXT:
            raise OptionError(f"-o context={self._context}: must be {MIN_CONTEXT} or more, or 0 for the model's own")
        if not 1 <= self._rows <= MAX_ROWS:
            raise OptionError(f"-o batch={self._rows}: must be 1 to {MAX_ROWS}")
        if self._max_timesteps and not DEFAULT_TIMESTEPS <= self._max_timesteps <= MAX_TIMESTEPS:
            raise OptionError(
                f"-o max_timesteps={self._max_timesteps}: must be {DEFAULT_TIMESTEPS} to {MAX_TIMESTEPS}, or 0"
            )
        self.SHARED = self._rows > 1
        self.default_slots = self._rows
        self._capabilities = Capabilities()
        self.speakers: list[Speaker] = []
        self._close: Callable[[], None] = lambda: None

    @classmethod
    def missing(cls) -> list[Missing]:
        """The missing packages: two commands, because voxcpm requires many packages that speech does not need."""
        found = []
        lacks = [name for name in NEEDS if not importlib.util.find_spec(name)]
        if lacks:
            found.append(Missing(f"the packages of voxcpm ({', '.join(lacks)})", install_command("voxcpm")))
        if not importlib.util.find_spec("voxcpm"):
            found.append(Missing("the voxcpm package", f"pip install --no-deps {VOXCPM}"))
        elif (version := _installed_version()) != VOXCPM.partition("==")[2]:
            # The engine uses private parts of the package, which may differ in another version.
            found.append(Missing(f"{VOXCPM}; version {version} is installed", f"pip install --no-deps {VOXCPM}"))
        return found

    @classmethod
    def check(cls, options: Mapping[str, OptionValue], slots: int) -> list[Missing]:
        """What is missing: packages, valid options, and memory for this many models side by side, or rows of one."""
        found = cls.missing()
        try:
            options = cls(options).options
        except OptionError as fault:
            return [*found, Missing(str(fault), "")]
        if unusable := fault_of(str(options["model"])):
            found.append(Missing(f"a model: {unusable}"))
        if (lora := options["lora"]) is not None:
            try:
                lora_files(str(lora))
            except EngineError as fault:
                found.append(Missing(f"an adapter: {fault}"))
        if (voices := options["voices"]) is not None and not Path(str(voices)).is_dir():
            found.append(
                Missing(f"the folder of voices {str(voices)!r}, which does not exist; create it, or drop -o voices")
            )
        context, rows = int(options["context"] or 0), int(options["batch"] or 1)
        if rows > 1 and slots > rows:
            found.append(Missing(f"-o batch={slots} for --slots {slots}, or --slots {rows}"))
        own = need_of(str(options["model"]))
        if own is not None and context > own.places:
            found.append(Missing(f"-o context={own.places} or less, because {options['model']} has no more positions"))
        if not options["check_memory"]:
            return found
        return found + lacking_memory(str(options["model"]), str(options["device"]), slots, context, rows)

    @classmethod
    def outlook(cls, options: Mapping[str, OptionValue], slots: int) -> str:
        """The memory that this many models need side by side, or rows of one model."""
        context, rows = int(options["context"] or 0), int(options["batch"] or 1)
        return memory_outlook(str(options["model"]), str(options["device"]), slots, context, rows)

    @property
    def capabilities(self) -> Capabilities:
        """Audio at the model's rate; its voices are the enum of param `voice`."""
        return self._capabilities

    def load(self) -> None:
        """Read the model, find the voices, and warm the model up by speaking a few steps."""
        if lacks := self.missing():
            raise EngineError("engine voxcpm needs " + "; ".join(f"{lack.what}: {lack.install}" for lack in lacks))
        from gpuworker.engines.voxcpm.model import Model, PromptCache
        from gpuworker.engines.voxcpm.prompts import Prompts
        from gpuworker.engines.voxcpm.synthesis import Speaker
        from gpuworker.engines.voxcpm.voices import PromptCaches
        from gpuworker.engines.voxcpm.warmup import warm_up

        model = Model.load(
            str(self.options["model"]),
            device=str(self.options["device"]),
            optimize=bool(self.options["optimize"]) and not self.SHARED,  # a batch records its steps itself
            context=self._context,
            denoiser=bool(self.options["denoiser"]),
            offline=bool(self.options["offline"]),
            lora=None if self.options["lora"] is None else str(self.options["lora"]),
            fetched=self._fetched,
        )
        model.prepare_normalizer()
        voices = self._voices(model)
        speaking: Sequence[SpeechModel] = [model]
        independent, batch = True, ""
        if self.SHARED:
            from gpuworker.engines.voxcpm.batch.shared_model import SharedModel

            shared = SharedModel.of(model, self._rows, record=bool(self.options["optimize"]))
            speaking, independent, batch = shared.seats, shared.independent, f" {shared.name}"
            self._close = shared.steps.close
        on_cpu = model.device == "cpu"
        checked = warm_up(speaking[0], 1 if on_cpu else CHECK_RUNS)
        can = Abilities(
            clones=model.clones,
            normalizes=model.can_normalize,
            denoises=model.can_denoise,
            fetches=bool(self._hosts),
            voices=tuple(voices),
            max_timesteps=self._max_timesteps or (MAX_TIMESTEPS_IN_BATCH if self.SHARED else MAX_TIMESTEPS),
        )
        self._capabilities = Capabilities(
            format=AudioFormat(sample_rate=model.sample_rate),
            streams=True,
            # A fetched file may be different the next time, so the worker cannot promise reproducible output.
            reproducible=checked.repeats and independent and not self._hosts,
            fingerprint=_fingerprint(model.fingerprint, checked.digest, voices) + batch,
            params=params_schema(can),
            inputs=input_rules(can),
        )
        caches: PromptCaches[PromptCache] = PromptCaches(self._voice_cache, MAX_CACHE_BYTES)
        for each in speaking:
            prompts = Prompts(
                model=each, voices=voices, hosts=self._hosts, max_prompt_s=self._max_prompt_s, caches=caches
            )
            self.speakers.append(Speaker(model=each, prompts=prompts))
        _log(
            f"{self.options['model']} on {model.device}: {model.sample_rate} Hz, {len(voices)} voices,{batch} "
            + ("the same seed makes the same samples" if self._capabilities.reproducible else "not reproducible")
        )

    def seats(self, count: int) -> Sequence[Engine]:
        """Engines with one row of the batch each."""
        seats = []
        for speaker in self.speakers[:count]:
            seat = copy.copy(self)
            seat.speakers = [speaker]
            seats.append(seat)
        return seats

    def close(self) -> None:
        """End the thread of the batch."""
        self._close()

    def generate(self, params: dict[str, Value], inputs: Mapping[str, EngineInput]) -> Iterator[Chunk]:
        """Yield the speech of one request; see `Speaker.speak`."""
        return self.speakers[0].speak(params, inputs, cancelled=self.cancelled, report=self.report)

    def piecewise(
        self, params: dict[str, Value], inputs: Mapping[str, EngineInput], **context: Any
    ) -> Callable[[str], Iterator[Chunk]]:
        """Speak a text piece by piece in one voice; see `Speaker.piecewise`."""
        del context
        return self.speakers[0].piecewise(params, inputs, cancelled=self.cancelled, report=self.report)

    def _fetched(self, had_bytes: int, total_bytes: int) -> None:
        """Write a message to the log, and report that the load is alive."""
        text = f"fetching {self.options['model']}: {had_bytes / 1e9:.2f} of {total_bytes / 1e9:.2f} GB"
        _log(text)
        self.report(ProgressChunk("loading", had_bytes / total_bytes if total_bytes else 0.0, text))

    def _voices(self, model: "Model") -> dict[str, "Voice"]:
        from gpuworker.engines.voxcpm.audio_decode import AudioFault, decode
        from gpuworker.engines.voxcpm.voices import find_voices

        option = self.options["voices"]
        folder = DEFAULT_VOICES if option is None else Path(str(option))
        if option is None and not folder.is_dir():
            return {}
        found, left_out = find_voices(folder, need_text=not model.clones)
        voices = {}
        for name, voice in found.items():
            try:
                decode(voice.read(), rate=model.prompt_rate, max_seconds=self._max_prompt_s)
                voices[name] = voice
            except AudioFault as fault:
                left_out.append(f"left out: voice {name!r}: its audio {fault}")
        for line in left_out:
            _log(line)
        return voices


def _fingerprint(model: str, digest: str, voices: Mapping[str, "Voice"]) -> str:
    """Everything that the samples of a request depend on besides the request."""
    named = hashlib.sha256("\n".join(f"{name} {voice.digest}" for name, voice in voices.items()).encode()).hexdigest()
    return f"{model[:150]} {digest} {named[:16]}"


def _log(text: str) -> None:
    print(f"voxcpm: {text}", file=sys.stderr, flush=True)
