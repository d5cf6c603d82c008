"""Engine `face`: a face that is drawn, and talks as its speech sounds. It needs no weights and no GPU.

Its clock is that of the speech: picture `n` shows what is heard from `n / fps` seconds on. The video depends on params,
options and samples alone, and not on the pieces in which they come.
"""

import copy
import hashlib
import importlib.util
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

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
    VideoChunk,
)
from gpuworker.engines.face.motion import LOOP_S, Motion
from gpuworker.hearing.sound import RAW, WAV, Sound, read_sound
from protocol.install_hint import install_command
from protocol.wire.errors import ErrorCode
from protocol.wire.structs import InputRule, VideoFormat
from protocol.wire.validators import Value

if TYPE_CHECKING:
    from gpuworker.engines.face.drawing import Backdrop, Face, Look

AUDIO = "audio"
#: An hour of speech at 48 kHz.
MAX_AUDIO_BYTES = 2 * 48_000 * 3_600
#: Opening and width of a mouth that says nothing.
REST = (0.0, 0.5)
PARAMS: dict[str, Value] = {
    "type": "object",
    "properties": {
        "avatar": {
            "type": "string",
            "maxLength": 200,
            "default": "default",
            "description": "whose face it is: decides its colours, and when it blinks and breathes",
        },
        "idle": {
            "type": "boolean",
            "default": False,
            "description": "make 4 s of a silent face, which end where they begin",
        },
        "start_frame": {
            "type": "integer",
            "minimum": 0,
            "maximum": 2**31,
            "default": 0,
            "description": "go on from this picture of the idle face",
        },
    },
    "additionalProperties": False,
}


class FaceEngine(Engine):
    """Draws a face, and encodes it as VP8."""

    SUMMARY: ClassVar[str] = "a drawn face that talks as its speech sounds, as video; no weights, no GPU"
    OPTIONS: ClassVar[Mapping[str, Option]] = {
        "size": Option(kind=int, default=360, help="width and height of the video, pixels: even, 64 to 1080"),
        "fps": Option(kind=int, default=25, help="pictures a second, 5 to 60"),
        "bitrate": Option(kind=int, default=400_000, help="bits a second that the video aims at"),
        "image": Option(help="a picture (PNG, JPEG, WebP) with a face, used instead of the drawn one; needs mouth"),
        "mouth": Option(help="where in the picture a wide-open mouth is: x,y,width,height in its pixels"),
    }
    SHARED = True
    default_slots = 8

    def __init__(self, options: Mapping[str, OptionValue] | None = None) -> None:
        super().__init__(options)
        self._side, self._fps, self._bitrate = (int(self.options[name] or 0) for name in ("size", "fps", "bitrate"))
        self._capabilities = Capabilities()
        self._picture: Backdrop | None = None
        self._faces: dict[Look, Face] = {}

    @classmethod
    def missing(cls) -> list[Missing]:
        """The packages that draw and encode."""
        lacking = [name for name in ("av", "numpy") if importlib.util.find_spec(name) is None]
        return [Missing(f"the {' and '.join(lacking)} package(s)", install_command("face"))] if lacking else []

    @property
    def capabilities(self) -> Capabilities:
        """VP8 video; its speech is a live input."""
        return self._capabilities

    def load(self) -> None:
        """Read the picture, if there is one, and make the video of a tone that only ever sounds the same.

        Raises:
            OptionError: an option is out of range, or the picture cannot be used.
        """
        for name, low, high in (("size", 64, 1080), ("fps", 5, 60), ("bitrate", 50_000, 20_000_000)):
            if not low <= int(self.options[name] or 0) <= high:
                raise OptionError(f"-o {name}={self.options[name]}: must lie in {low}..{high}")
        if self._side % 2:
            raise OptionError(f"-o size={self._side}: must be even; write {self._side + 1}")
        image, mouth = self.options["image"], self.options["mouth"]
        if bool(image) != bool(mouth):
            raise OptionError("-o image=FILE and -o mouth=X,Y,WIDTH,HEIGHT belong together: give both, or neither")
        if image:
            from gpuworker.engines.face.picture import read_picture

            self._picture = read_picture(Path(str(image)).expanduser(), str(mouth), self._side)
        self._capabilities = Capabilities(
            video=VideoFormat(width=self._side, height=self._side, fps=self._fps),
            streams=True,
            reproducible=True,
            fingerprint=self._fingerprint(),
            params=PARAMS,
            inputs={AUDIO: InputRule(media_types=[*RAW, *WAV], max_bytes=MAX_AUDIO_BYTES, live=True)},
        )

    def _fingerprint(self) -> str:
        """A digest of a video that this machine makes: of its pictures, numbers, packages and processor at once."""
        digest = hashlib.sha256(repr((self._side, self._fps, self._bitrate)).encode())
        if self._picture is not None:
            digest.update(self._picture.picture.tobytes() + repr(self._picture.mouth).encode())
        # Louder and softer noise, the same everywhere.
        noise = b"".join(hashlib.sha256(bytes([at // 50])).digest()[: 2 + at % 31] for at in range(2_000))
        sound = Sound(16_000, noise[: len(noise) // 2 * 2])
        for chunk in self._video("default", 0, self._shapes([sound])):
            digest.update(chunk.data)
        return digest.hexdigest()

    def seats(self, count: int) -> Sequence[Engine]:
        """Engines that share what is drawn; each run has an encoder of its own."""
        return [copy.copy(self) for _ in range(count)]

    def generate(self, params: dict[str, Value], inputs: Mapping[str, EngineInput | LiveInput]) -> Iterator[Chunk]:
        """Yield a picture for each 1/fps s of the speech, as soon as that has come; or those of the idle loop."""
        avatar = str(params.get("avatar", "default"))
        if params.get("idle", False):
            return self._video(avatar, 0, [REST] * (LOOP_S * self._fps))
        if AUDIO not in inputs:
            reason = "is required: the speech, as audio/L16 or audio/wav; or give the param idle"
            raise EngineError(f"{AUDIO} {reason}", code=ErrorCode.INPUT_MISSING, details={AUDIO: reason})
        return self._video(avatar, params.get("start_frame", 0), self._shapes(read_sound(inputs[AUDIO])))

    def _video(self, avatar: str, start: int, shapes: Iterable[tuple[float, float]]) -> Iterator[VideoChunk]:
        """Encode a face as its mouth stands in each picture; `start` is how long it has moved already."""
        from gpuworker.engines.face.drawing import Shape
        from gpuworker.engines.face.vp8 import Vp8Encoder

        face, motion = self._face(avatar), Motion(avatar, self._fps)
        encoder = Vp8Encoder(self._side, self._fps, self._bitrate)
        for number, (opening, width) in enumerate(shapes, start):
            shape = Shape(opening, width, motion.blink(number), motion.sway(number))
            for data, pts, key in encoder.encode(face.draw(shape)):
                yield VideoChunk(data, pts, key)

    def _face(self, avatar: str) -> "Face":
        from gpuworker.engines.face.drawing import LOOKS, Face, look_of

        look = look_of(avatar) if self._picture is None else LOOKS[0]
        if look not in self._faces:
            self._faces[look] = Face(self._side, look, self._picture)
        return self._faces[look]

    def _shapes(self, sounds: Iterable[Sound]) -> Iterator[tuple[float, float]]:
        """Opening and width of the mouth for each 1/fps s of a speech."""
        import numpy as np

        from gpuworker.engines.face.lips import Lips

        lips, held, rate, taken, number = None, bytearray(), 0, 0, 0
        for sound in sounds:
            rate = sound.sample_rate
            lips = lips or Lips(rate // self._fps, rate)
            held += sound.pcm
            while len(held) >= 2 * (wanted := (number + 1) * rate // self._fps - taken):
                yield lips.follow(np.frombuffer(held[: 2 * wanted], "<i2"))
                del held[: 2 * wanted]
                taken, number = taken + wanted, number + 1
        if lips is not None and held:
            yield lips.follow(np.frombuffer(held, "<i2"))
