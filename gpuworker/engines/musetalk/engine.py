"""Engine `musetalk`: the mouth of a filmed or pictured face, moved by MuseTalk 1.5 as its speech sounds.

Written from upstream's source, https://github.com/TMElyralab/MuseTalk, and from programs that use its version 1.5.
Tested only against a repository with the same signatures: upstream is on no registry, and its weights were not
available. Therefore it does not declare itself reproducible.

Facts about upstream:

- It finds its weights, and a part of its modules, from the working directory.
- `AudioProcessor.get_whisper_chunk` makes, for each picture, ten features of 20 ms: from 80 ms before the picture to
  80 ms after it, at 25 pictures a second. It counts whole seconds of sound, so it is given whole seconds: the last two.
- `musetalk.utils.preprocessing` loads mmpose and its weights when it is imported, so only a picture needs it.
"""

import contextlib
import importlib
import importlib.util
import math
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from gpuworker.engines.base import (
    Capabilities,
    Chunk,
    Engine,
    EngineError,
    EngineInput,
    LiveInput,
    Missing,
    Option,
    OptionError,
    OptionValue,
    ProgressChunk,
    VideoChunk,
)
from gpuworker.engines.face.engine import AUDIO, MAX_AUDIO_BYTES, PARAMS
from gpuworker.hearing.sound import RAW, WAV, Sound, read_sound
from protocol.install_hint import install_command
from protocol.wire.errors import ErrorCode
from protocol.wire.structs import InputRule, VideoFormat
from protocol.wire.validators import Value

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from gpuworker.engines.musetalk.avatar import Avatar, Picture

MODEL_HZ = 16_000
#: How much sound the model hears for a picture, whole seconds.
CONTEXT_S = 2
UPSTREAM = "https://github.com/TMElyralab/MuseTalk"
UNET, UNET_CONFIG = Path("models/musetalkV15/unet.pth"), Path("models/musetalkV15/musetalk.json")
WHISPER, VAE = Path("models/whisper"), Path("models/sd-vae")
#: Needed for -o image alone.
DETECTORS = (Path("models/dwpose/dw-ll_ucoco_384.pth"), Path("models/face-parse-bisent/79999_iter.pth"))
_ABOUT = {
    "avatar": "accepted as engine face does; this engine shows the face of its options",
    "idle": "make the silent face, once from its beginning to where it begins again",
}


class MuseTalkEngine(Engine):
    """Makes faces with upstream's models, and encodes them as VP8; see the module's docstring."""

    SUMMARY: ClassVar[str] = "a filmed or pictured face that talks, by MuseTalk 1.5, as video; needs a GPU"
    OPTIONS: ClassVar[Mapping[str, Option]] = {
        "repo": Option(required=True, help="folder of upstream's repository, with its weights in models/"),
        "avatar": Option(help="an avatar that upstream has prepared: its name, or its folder"),
        "image": Option(help="a picture (PNG, JPEG) of a face from the front, instead of an avatar"),
        "size": Option(kind=int, default=360, help="width and height of the video, pixels: even, 64 to 1080"),
        "fps": Option(kind=int, default=25, help="pictures a second, 10 to 30; upstream was trained with 25"),
        "bitrate": Option(kind=int, default=800_000, help="bits a second that the video aims at"),
        "batch": Option(kind=int, default=4, help="pictures made at once, 1 to 10: more are faster, and come later"),
        "device": Option(help="cuda:0, cpu, …; a GPU if there is one, in half precision"),
    }

    def __init__(self, options: Mapping[str, OptionValue] | None = None) -> None:
        super().__init__(options)
        numbers = (int(self.options[name] or 0) for name in ("size", "fps", "bitrate", "batch"))
        self._side, self._fps, self._bitrate, self._batch = numbers
        self._capabilities = Capabilities()
        self._torch: Any = None
        self._device: Any = None
        self._dtype: Any = None
        self._models: Any = None
        self._whisper: Any = None
        self._processor: Any = None
        self._blend: Any = None
        self._avatar: Avatar | None = None

    @classmethod
    def missing(cls) -> list[Missing]:
        """The packages that read pictures and encode; what upstream needs is known once `repo` is."""
        lacking = [name for name in ("av", "numpy") if importlib.util.find_spec(name) is None]
        return [Missing(f"the {' and '.join(lacking)} package(s)", install_command("face"))] if lacking else []

    @property
    def capabilities(self) -> Capabilities:
        """VP8 video; its speech is a live input."""
        return self._capabilities

    # -- loading

    def load(self) -> None:
        """Load upstream's models and the avatar, and make a few pictures of silence.

        Raises:
            OptionError: an option is out of range.
            EngineError: the repository, its weights or the avatar are missing, or cannot be loaded.
        """
        for name, low, high in (("size", 64, 1080), ("fps", 10, 30), ("bitrate", 50_000, 20_000_000), ("batch", 1, 10)):
            if not low <= int(self.options[name] or 0) <= high:
                raise OptionError(f"-o {name}={self.options[name]}: must lie in {low}..{high}")
        if self._side % 2:
            raise OptionError(f"-o size={self._side}: must be even; write {self._side + 1}")
        if bool(self.options["avatar"]) == bool(self.options["image"]):
            raise OptionError("give either -o avatar=NAME, which upstream has prepared, or -o image=FILE")
        image = Path(str(self.options["image"])).expanduser().resolve() if self.options["image"] else None
        repo = self._repo(image is not None)
        try:
            with contextlib.chdir(repo):
                self._load_models()
                self._avatar = self._load_avatar(repo, image)
            self._show(self._avatar, self._faces(self._avatar, 0, _resampled(b"", MODEL_HZ), 1)[0], 0)
        except (EngineError, OSError):
            raise
        except ImportError as fault:
            what = f"install what {repo / 'requirements.txt'} and upstream's README name"
            raise EngineError(f"MuseTalk cannot be imported: {fault}; {what}, into this environment") from fault
        except Exception as fault:
            raise EngineError(f"MuseTalk cannot be loaded from {repo}: {type(fault).__name__}: {fault}") from fault
        known = PARAMS["properties"]
        self._capabilities = Capabilities(
            video=VideoFormat(width=self._side, height=self._side, fps=self._fps),
            streams=True,
            params={
                **PARAMS,
                "properties": {**known, **{name: known[name] | {"description": _ABOUT[name]} for name in _ABOUT}},
            },
            inputs={AUDIO: InputRule(media_types=[*RAW, *WAV], max_bytes=MAX_AUDIO_BYTES, live=True)},
        )

    def _repo(self, with_detectors: bool) -> Path:
        """The repository, which can be imported from then on."""
        repo = Path(str(self.options["repo"])).expanduser().resolve()
        if not (repo / "musetalk/utils/audio_processor.py").is_file():
            raise EngineError(f"-o repo={repo}: is not MuseTalk 1.5; git clone {UPSTREAM} {repo}")
        needed = (UNET, UNET_CONFIG, WHISPER, VAE, *(DETECTORS if with_detectors else ()))
        if lacking := [str(path) for path in needed if not (repo / path).exists()]:
            raise EngineError(f"{repo} lacks {', '.join(lacking)}: cd {repo} && sh download_weights.sh")
        if str(repo) not in sys.path:
            sys.path.append(str(repo))
        return repo

    def _load_models(self) -> None:
        self.report(ProgressChunk("loading", 0.0, "torch"))
        self._torch = torch = importlib.import_module("torch")
        self._device = torch.device(str(self.options["device"] or ("cuda:0" if torch.cuda.is_available() else "cpu")))
        self._dtype = torch.float16 if self._device.type == "cuda" else torch.float32
        self.report(ProgressChunk("loading", 0.2, "MuseTalk"))
        load_all = importlib.import_module("musetalk.utils.utils").load_all_model
        self._models = vae, unet, positions = load_all(
            unet_model_path=str(UNET), vae_type=VAE.name, unet_config=str(UNET_CONFIG), device=self._device
        )
        for model in (vae.vae, unet.model, positions):
            model.to(device=self._device, dtype=self._dtype)
        self.report(ProgressChunk("loading", 0.6, "Whisper"))
        audio = importlib.import_module("musetalk.utils.audio_processor")
        self._processor = audio.AudioProcessor(feature_extractor_path=str(WHISPER))
        whisper = importlib.import_module("transformers").WhisperModel.from_pretrained(str(WHISPER))
        self._whisper = whisper.to(device=self._device, dtype=self._dtype).eval()

    def _load_avatar(self, repo: Path, image: Path | None) -> "Avatar":
        from gpuworker.engines.musetalk.avatar import prepare_avatar, read_avatar

        self.report(ProgressChunk("loading", 0.8, "the avatar"))
        self._blend = importlib.import_module("musetalk.utils.blending").get_image_blending
        if image is not None:
            return prepare_avatar(image, self._models[0].get_latents_for_unet)
        given = Path(str(self.options["avatar"])).expanduser()
        folder = given if given.is_absolute() else repo / "results/v15/avatars" / given
        return read_avatar(folder, lambda path: self._torch.load(path, map_location=self._device, weights_only=True))

    # -- a run

    def generate(self, params: dict[str, Value], inputs: Mapping[str, EngineInput | LiveInput]) -> Iterator[Chunk]:
        """Yield the pictures of a speech, each batch as soon as its sound has come; or those of the idle loop."""
        from gpuworker.engines.face.vp8 import Vp8Encoder

        assert self._avatar is not None
        is_idle = params.get("idle", False)
        if not is_idle and AUDIO not in inputs:
            reason = "is required: the speech, as audio/L16 or audio/wav; or give the param idle"
            raise EngineError(f"{AUDIO} {reason}", code=ErrorCode.INPUT_MISSING, details={AUDIO: reason})
        start = 0 if is_idle else int(params.get("start_frame", 0))
        made = self._idle(self._avatar) if is_idle else self._talk(self._avatar, start, read_sound(inputs[AUDIO]))
        encoder = Vp8Encoder(self._side, self._fps, self._bitrate)
        for picture in made:
            for data, pts, key in encoder.encode(picture):
                yield VideoChunk(data, pts, key)

    def _idle(self, avatar: "Avatar") -> Iterator["Picture"]:
        """The avatar's own pictures, for a second or more, up to where they begin again."""
        length = len(avatar.frames)
        for number in range(length * math.ceil(self._fps / length)):
            yield self._cut(avatar, avatar.frames[number % length])

    def _talk(self, avatar: "Avatar", start: int, sounds: Iterable[Sound]) -> Iterator["Picture"]:
        for number, count, context in self._batches(sounds):
            for at, face in enumerate(self._faces(avatar, start + number, context, count), start + number):
                yield self._show(avatar, face, at)

    @property
    def _ahead(self) -> int:
        """How many pictures' sound the model hears after that of a picture."""
        return max(0, math.ceil((10 - 2 * (50 // self._fps)) * self._fps / 50) - 1)

    def _batches(self, sounds: Iterable[Sound]) -> Iterator[tuple[int, int, "NDArray[np.float32]"]]:
        """For each batch: its first picture, how many it has, and the sound that ends `_ahead` pictures after it."""
        held, rate, left_out, number = bytearray(), MODEL_HZ, 0, 0

        def context(count: int) -> "NDArray[np.float32]":
            nonlocal left_out
            end = (number + count + self._ahead) * rate // self._fps
            begin = max(left_out, end - CONTEXT_S * rate)
            del held[: 2 * (begin - left_out)]
            left_out = begin
            return _resampled(bytes(held[: 2 * (end - begin)]).ljust(2 * (end - begin), b"\0"), rate)

        for sound in sounds:
            rate = sound.sample_rate
            held += sound.pcm
            while left_out + len(held) // 2 >= (number + self._batch + self._ahead) * rate // self._fps:
                yield number, self._batch, context(self._batch)
                number += self._batch
        pictures = math.ceil((left_out + len(held) // 2) * self._fps / rate)
        while count := min(self._batch, pictures - number):
            yield number, count, context(count)
            number += count

    def _faces(self, avatar: "Avatar", start: int, context: "NDArray[np.float32]", count: int) -> "NDArray[np.uint8]":
        """The faces of `count` pictures, as the model makes them."""
        torch, (vae, unet, positions) = self._torch, self._models
        with torch.no_grad():
            features = self._processor.feature_extractor(context, return_tensors="pt", sampling_rate=MODEL_HZ)
            features = features.input_features.to(dtype=self._dtype)
            prompts = self._processor.get_whisper_chunk(
                [features], self._device, self._dtype, self._whisper, len(context), fps=self._fps
            )
            first = CONTEXT_S * self._fps - self._ahead - count
            prompts = positions(prompts[first : first + count].to(device=self._device, dtype=self._dtype))
            latents = torch.cat([avatar.latents[(start + at) % len(avatar.latents)] for at in range(count)])
            latents = latents.to(device=self._device, dtype=self._dtype)
            timesteps = torch.tensor([0], device=self._device)
            made = unet.model(latents, timesteps, encoder_hidden_states=prompts).sample
            faces: NDArray[np.uint8] = vae.decode_latents(made.to(dtype=self._dtype)).astype("uint8")
            return faces

    def _show(self, avatar: "Avatar", face: "Picture", number: int) -> "Picture":
        """A picture of the avatar with the face that was made for it."""
        from gpuworker.engines.musetalk.avatar import scaled

        at = number % len(avatar.frames)
        (left, top, right, bottom), (mask, crop) = avatar.boxes[at], avatar.masks[at]
        fitting = scaled(face, right - left, bottom - top)
        return self._cut(avatar, self._blend(avatar.frames[at].copy(), fitting, [left, top, right, bottom], mask, crop))

    def _cut(self, avatar: "Avatar", picture: "Picture") -> "Picture":
        """The square that is shown; red, green and blue."""
        from gpuworker.engines.musetalk.avatar import scaled

        return scaled(picture[avatar.square()], self._side, self._side)[:, :, ::-1]


def _resampled(pcm: bytes, rate: int) -> "NDArray[np.float32]":
    """`CONTEXT_S` of sound as the model hears it; what is less begins with silence."""
    import numpy as np

    samples = np.frombuffer(pcm, "<i2") / np.float32(32_768)
    if rate != MODEL_HZ:
        samples = importlib.import_module("soxr").resample(samples, rate, MODEL_HZ)
    heard = np.zeros(CONTEXT_S * MODEL_HZ, np.float32)
    samples = samples[-len(heard) :]
    heard[len(heard) - len(samples) :] = samples
    return heard
