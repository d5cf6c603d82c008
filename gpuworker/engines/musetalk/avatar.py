"""The pictures of an avatar: prepared by upstream's script, or from a single picture."""

import importlib
import pickle
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import attrs
import av
import numpy as np
from numpy.typing import NDArray

from gpuworker.engines.base import EngineError

Picture = NDArray[np.uint8]
#: Side of the faces that the model sees and makes.
FACE_SIDE = 256
#: How far upstream's face goes below the chin, pixels, and the width of the cheeks that it leaves alone.
EXTRA_MARGIN, CHEEK_WIDTH = 10, 90


@attrs.frozen(eq=False)
class Avatar:
    """What upstream calls the cycles of an avatar: an entry for each of its pictures.

    Attributes:
        frames: the whole pictures; blue, green and red.
        boxes: where the face is in each: left, top, right, bottom.
        masks: how much of a made face shows, and of which part of the picture.
        latents: what the model needs to know of each.
    """

    frames: Sequence[Picture]
    boxes: Sequence[tuple[int, int, int, int]]
    masks: Sequence[tuple[Picture, Any]]
    latents: Sequence[Any]

    def square(self) -> tuple[slice, slice]:
        """The largest square of the pictures, as near to the first face as it can be: its rows and columns."""
        left, top, right, bottom = self.boxes[0]
        height, width = self.frames[0].shape[:2]
        side = min(height, width)
        y, x = (
            max(0, min(middle - side // 2, length - side))
            for middle, length in (((top + bottom) // 2, height), ((left + right) // 2, width))
        )
        return slice(y, y + side), slice(x, x + side)


def scaled(picture: Picture, width: int, height: int) -> Picture:
    """A picture in another size."""
    frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="bgr24")
    return np.asarray(frame.reformat(width, height, "bgr24", interpolation="LANCZOS").to_ndarray(), np.uint8)


def read_avatar(folder: Path, load: Callable[[Path], Any]) -> Avatar:
    """Read what upstream's `scripts.realtime_inference` has prepared. Its files are pickles: they can run code.

    Args:
        folder: of the avatar, such as `results/v15/avatars/NAME`.
        load: reads a file of tensors.

    Raises:
        EngineError: it is not there, or not complete.
    """
    again = "prepare it with upstream's scripts.realtime_inference (preparation: True), see docs/faces.md"
    try:
        boxes, crops = (pickle.loads((folder / name).read_bytes()) for name in ("coords.pkl", "mask_coords.pkl"))
        frames, masks = (list(_pictures(folder / name)) for name in ("full_imgs", "mask"))
        latents = load(folder / "latents.pt")
    except OSError as fault:
        raise EngineError(f"-o avatar: {fault.filename or folder}: {fault.strerror or fault}; {again}") from None
    except Exception as fault:
        raise EngineError(f"-o avatar: {folder} cannot be read: {type(fault).__name__}: {fault}; {again}") from fault
    counts = {len(each) for each in (boxes, crops, frames, masks, latents)}
    if len(counts) != 1 or counts == {0} or not all(any(box) for box in boxes):
        raise EngineError(
            f"-o avatar: {folder} is not complete, or a picture of it shows no face; choose another video, and {again}"
        )
    whole = [(int(box[0]), int(box[1]), int(box[2]), int(box[3])) for box in boxes]
    return Avatar(frames, whole, list(zip(masks, crops, strict=True)), latents)


def _pictures(folder: Path) -> Iterator[Picture]:
    for path in sorted(folder.glob("*.png"), key=lambda path: int(path.stem)):
        with av.open(str(path)) as file:
            yield np.asarray(next(file.decode(video=0)).to_ndarray(format="bgr24"), np.uint8)


def prepare_avatar(path: Path, latents_of: Callable[[Picture], Any]) -> Avatar:
    """Make an avatar of one picture, with upstream's detectors; the working directory is upstream's repository.

    Args:
        path: of the picture.
        latents_of: the latents of a face.

    Raises:
        EngineError: it cannot be read, or shows no face.
    """
    try:
        with av.open(str(path)) as file:
            next(file.decode(video=0))
    except (OSError, StopIteration, IndexError, ValueError) as fault:
        raise EngineError(f"-o image={path}: cannot be read: {fault}; give a PNG or JPEG") from None
    preprocessing, blending, parsing = (
        importlib.import_module(f"musetalk.utils.{name}") for name in ("preprocessing", "blending", "face_parsing")
    )
    [box], [frame] = preprocessing.get_landmark_and_bbox([str(path)], 0)
    left, top, right, bottom = (int(at) for at in box)
    bottom = min(bottom + EXTRA_MARGIN, len(frame))
    if not any(box) or top < 0 or left < 0:
        raise EngineError(f"-o image={path}: shows no whole face; give a picture of one person from the front")
    face = scaled(frame[top:bottom, left:right], FACE_SIDE, FACE_SIDE)
    segments = parsing.FaceParsing(left_cheek_width=CHEEK_WIDTH, right_cheek_width=CHEEK_WIDTH)
    whole = (left, top, right, bottom)
    mask = blending.get_image_prepare_material(frame, whole, fp=segments, mode="jaw")
    return Avatar([frame], [whole], [mask], [latents_of(face)])
