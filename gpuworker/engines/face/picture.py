"""Reads the picture of a face, and where its mouth is."""

from pathlib import Path

import av
import numpy as np

from gpuworker.engines.base import OptionError
from gpuworker.engines.face.drawing import Backdrop, Box, Picture

#: Smallest mouth that can be seen to move, as a part of the video's side.
LEAST_MOUTH = 0.02


def read_picture(path: Path, mouth: str, side: int) -> Backdrop:
    """Read a picture and cut the largest square from its middle.

    Args:
        path: of a PNG, JPEG, WebP or anything else that FFmpeg reads; of a video its first picture counts.
        mouth: `x,y,width,height` in its pixels.
        side: of the square that is returned, pixels.

    Raises:
        OptionError: it cannot be read, or the mouth is not in that square.
    """
    try:
        with av.open(str(path)) as file:
            frame = next(file.decode(video=0))
    except OSError as fault:  # FFmpeg's errors are such too
        raise OptionError(f"-o image={path}: cannot be read: {fault.strerror}; give a PNG or JPEG") from None
    except (StopIteration, IndexError, ValueError):
        raise OptionError(f"-o image={path}: is no picture; give a PNG or JPEG") from None
    scale = side / min(frame.width, frame.height)
    width, height = max(side, round(frame.width * scale)), max(side, round(frame.height * scale))
    pixels: Picture = frame.reformat(width, height, "rgb24").to_ndarray().astype(np.uint8, copy=False)
    left, top = (width - side) // 2, (height - side) // 2
    square = np.ascontiguousarray(pixels[top : top + side, left : left + side])
    return Backdrop(square, _box(mouth, scale, left, top, side))


def _box(mouth: str, scale: float, left: int, top: int, side: int) -> Box:
    try:
        x, y, width, height = (float(part) * scale for part in mouth.split(","))
    except ValueError:
        raise OptionError(f"-o mouth={mouth}: write it as x,y,width,height in pixels, such as 150,220,90,60") from None
    box = Box((x - left) / side, (y - top) / side, width / side, height / side)
    is_within = min(box.x, box.y) >= 0 and max(box.x + box.width, box.y + box.height) <= 1
    if not is_within or min(box.width, box.height) < LEAST_MOUTH:
        raise OptionError(
            f"-o mouth={mouth}: is not within the square in the middle of the picture that is shown, or too small"
        )
    return box
