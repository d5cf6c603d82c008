"""Draws a face, or a mouth over a picture, with numpy alone: what does not move once, the rest for each frame.

Coordinates and lengths are fractions of the picture's side, y downwards. Edges are smooth: a pixel is covered by how
deep it lies in a shape.
"""

import contextlib
import hashlib
from collections.abc import Iterator

import attrs
import numpy as np
from numpy.typing import NDArray

Picture = NDArray[np.uint8]
_Floats = NDArray[np.float32]
_Colour = tuple[float, float, float]

#: How far the head moves up and down with its breath, and the steps in which it is drawn beforehand.
SWAY = 1 / 360
SWAY_STEPS = 17

_WHITE = (252, 250, 248)
_DARK = (38, 28, 34)
_CAVITY = (92, 26, 36)
_TEETH = (250, 247, 242)
_TONGUE = (206, 98, 104)
#: Where the eyes are, and their half axes.
_EYES_X, _EYES_Y = (0.396, 0.604), 0.472
_EYE = (0.05, 0.04)


@attrs.frozen
class Look:
    """The colours of a drawn face."""

    skin: _Colour
    shade: _Colour
    hair: _Colour
    iris: _Colour
    lips: _Colour
    shirt: _Colour
    backdrop: _Colour


LOOKS = (
    Look(
        skin=(244, 205, 178),
        shade=(226, 178, 150),
        hair=(74, 50, 40),
        iris=(88, 118, 92),
        lips=(202, 104, 104),
        shirt=(64, 110, 142),
        backdrop=(222, 233, 238),
    ),
    Look(
        skin=(198, 146, 112),
        shade=(174, 122, 92),
        hair=(36, 28, 30),
        iris=(84, 56, 40),
        lips=(164, 82, 80),
        shirt=(206, 122, 76),
        backdrop=(238, 230, 216),
    ),
    Look(
        skin=(250, 220, 200),
        shade=(234, 192, 170),
        hair=(196, 138, 74),
        iris=(84, 130, 170),
        lips=(212, 116, 116),
        shirt=(94, 130, 96),
        backdrop=(232, 228, 240),
    ),
    Look(
        skin=(136, 92, 68),
        shade=(114, 74, 54),
        hair=(28, 22, 24),
        iris=(58, 38, 28),
        lips=(140, 68, 68),
        shirt=(226, 182, 76),
        backdrop=(220, 236, 230),
    ),
    Look(
        skin=(236, 196, 160),
        shade=(214, 168, 132),
        hair=(34, 30, 36),
        iris=(66, 48, 38),
        lips=(192, 98, 98),
        shirt=(150, 94, 140),
        backdrop=(240, 232, 228),
    ),
)


def look_of(avatar: str) -> Look:
    """The look of an avatar, which its name decides."""
    return LOOKS[hashlib.sha256(avatar.encode()).digest()[0] % len(LOOKS)]


@attrs.frozen
class Shape:
    """How a face stands.

    Attributes:
        opening: of the mouth, 0 (closed) to 1.
        width: of the mouth, 0 (rounded, as in "oo") to 1 (spread, as in "ee"); 0.5 at rest.
        blink: of the eyes, 0 (open) to 1 (closed).
        sway: of the head, -1 (up) to 1 (down).
    """

    opening: float = 0.0
    width: float = 0.5
    blink: float = 0.0
    sway: float = 0.0


@attrs.frozen
class Box:
    """A rectangle of a picture: its left upper corner and its size."""

    x: float
    y: float
    width: float
    height: float


@attrs.frozen(eq=False)
class Backdrop:
    """A picture that is shown instead of a drawn face, and where its mouth is when it is wide open."""

    picture: Picture
    mouth: Box


#: Where the mouth of a drawn face is when it is wide open.
MOUTH = Box(0.385, 0.648, 0.23, 0.165)


class _Canvas:
    """A part of a picture while it is drawn on.

    Args:
        pixels: float32 (height, width, 3), changed in place.
        left, top: where it lies in the picture, pixels.
        side: of the picture, pixels.
    """

    def __init__(self, pixels: _Floats, left: int, top: int, side: int) -> None:
        height, width = pixels.shape[:2]
        self._pixels = pixels
        self._side = side
        self.x: _Floats = ((np.arange(left, left + width) + 0.5) / side).astype(np.float32)[None, :]
        self.y: _Floats = ((np.arange(top, top + height) + 0.5) / side).astype(np.float32)[:, None]

    def ellipse(self, x: float, y: float, across: float, down: float) -> _Floats:
        """How deep each pixel lies in an ellipse; `across` and `down` are its half axes."""
        away = np.sqrt(((self.x - x) / across) ** 2 + ((self.y - y) / down) ** 2)
        deep: _Floats = (1 - away) * np.float32(min(across, down))
        return deep

    def paint(self, deep: _Floats, colour: _Colour, strength: float = 1.0, soft: float = 0.0) -> None:
        """Lay a colour over a shape.

        Args:
            deep: how deep each pixel lies in the shape; below 0 outside.
            colour: red, green, blue.
            strength: 0..1.
            soft: width of its edge; 0 makes that a pixel wide.
        """
        mask = np.clip(deep / soft if soft else deep * self._side + 0.5, 0, 1) * np.float32(strength)
        self._pixels += (np.array(colour, np.float32) - self._pixels) * mask[..., None]


class Face:
    """A face that is ready to be drawn.

    Args:
        side: of the square picture, pixels.
        look: its colours.
        backdrop: shown instead of a drawn face; its eyes do not blink.
    """

    def __init__(self, side: int, look: Look, backdrop: Backdrop | None = None) -> None:
        self._side = side
        self._look = look
        self._is_drawn = backdrop is None
        self._mouth = MOUTH if backdrop is None else backdrop.mouth
        self._sways = np.linspace(-SWAY, SWAY, SWAY_STEPS)
        #: What does not move by itself, at each step of the sway.
        still = self._head() if backdrop is None else backdrop.picture
        self._bases = [_moved(still, down) for down in self._sways]

    def draw(self, shape: Shape) -> Picture:
        """The picture, uint8 (side, side, 3): red, green and blue."""
        step = round((shape.sway + 1) / 2 * (SWAY_STEPS - 1))
        picture, down = self._bases[step].copy(), float(self._sways[step])
        if self._is_drawn:
            for x in _EYES_X:
                box = Box(x - _EYE[0] - 0.02, _EYES_Y - _EYE[1] - 0.02 + down, 2 * _EYE[0] + 0.04, 2 * _EYE[1] + 0.04)
                with self._part(picture, box) as canvas:
                    self._draw_eye(canvas, x, _EYES_Y + down, shape.blink)
        # A closed mouth is the picture's own.
        if strength := 1.0 if self._is_drawn else min(1.0, 6 * shape.opening):
            box = attrs.evolve(self._mouth, y=self._mouth.y + down)
            with self._part(picture, box) as canvas:
                self._draw_mouth(canvas, box, shape, strength)
        return picture

    @contextlib.contextmanager
    def _part(self, picture: Picture, box: Box) -> Iterator[_Canvas]:
        """A part of the picture to draw on, a little larger than the box."""
        left, top = (max(0, int(at * self._side) - 1) for at in (box.x, box.y))
        right, bottom = (min(self._side, int(end * self._side) + 2) for end in (box.x + box.width, box.y + box.height))
        pixels = picture[top:bottom, left:right].astype(np.float32)
        yield _Canvas(pixels, left, top, self._side)
        picture[top:bottom, left:right] = np.rint(pixels)

    def _head(self) -> Picture:
        """Backdrop and head without eyes and mouth."""
        look, side = self._look, self._side
        pixels = np.empty((side, side, 3), np.float32)
        pixels[:] = look.backdrop
        canvas = _Canvas(pixels, 0, 0, side)
        canvas.paint(canvas.ellipse(0.5, 0.45, 0.75, 0.75), _WHITE, 0.55, soft=0.6)
        paint, ellipse, x, y = canvas.paint, canvas.ellipse, canvas.x, canvas.y
        hair = ellipse(0.5, 0.4, 0.292, 0.302)
        paint(hair, look.hair)
        paint(ellipse(0.5, 1.115, 0.43, 0.26), look.shirt)
        paint(ellipse(0.5, 0.845, 0.098, 0.115), look.shade)
        for ear in (0.243, 0.757):
            paint(ellipse(ear, 0.515, 0.036, 0.058), look.shade)
            paint(ellipse(ear, 0.512, 0.028, 0.048), look.skin)
        paint(ellipse(0.5, 0.515, 0.258, 0.318), look.skin)
        for cheek in (0.345, 0.655):
            paint(ellipse(cheek, 0.605, 0.07, 0.055), look.lips, 0.28, soft=0.055)
        fringe = 0.255 + 0.9 * np.abs(x - 0.6) ** 1.5
        paint(np.minimum(hair, fringe - y), look.hair)
        paint(ellipse(0.5, 0.59, 0.03, 0.016), look.shade)
        paint(ellipse(0.5, 0.579, 0.026, 0.016), look.skin)
        for eye in _EYES_X:
            brow = 0.392 + 5.5 * (x - eye) ** 2
            paint(np.minimum(0.0085 - np.abs(y - brow), 0.05 - np.abs(x - eye)), look.hair)
        picture: Picture = np.rint(pixels).astype(np.uint8)
        return picture

    def _draw_eye(self, canvas: _Canvas, x: float, y: float, blink: float) -> None:
        across, down = _EYE
        arch: _Floats = np.sqrt(np.maximum(0, 1 - ((canvas.x - x) / across) ** 2))
        lid = y + down * (-1 + 1.55 * blink) * arch
        open_ = np.minimum(canvas.y - lid, y + 0.8 * down * arch - canvas.y)
        canvas.paint(open_, _WHITE)
        canvas.paint(np.minimum(open_, canvas.ellipse(x, y, 0.0275, 0.0275)), self._look.iris)
        canvas.paint(np.minimum(open_, canvas.ellipse(x, y, 0.0145, 0.0145)), _DARK)
        canvas.paint(np.minimum(open_, canvas.ellipse(x + 0.009, y - 0.01, 0.0065, 0.0065)), _WHITE)
        lash = np.minimum(0.0045 - np.abs(canvas.y - lid), across + 0.002 - np.abs(canvas.x - x))
        canvas.paint(lash, _DARK)

    def _draw_mouth(self, canvas: _Canvas, box: Box, shape: Shape, strength: float) -> None:
        opening, high = shape.opening, box.height
        half = box.width / 2 * (0.44 + 0.56 * shape.width)
        along = (canvas.x - box.x - box.width / 2) / half
        arch = np.sqrt(np.maximum(0, 1 - along**2))
        within = (1 - np.abs(along)) * half
        # The corners of a mouth stand a little higher than its middle, the more so where it is spread.
        line = box.y + high * (0.26 + (0.03 + 0.14 * shape.width) * (1 - opening / 2) * arch**2)
        upper = line - high * (0.015 + 0.185 * opening) * arch
        lower = line + high * (0.015 + 0.455 * opening) * arch
        y = canvas.y

        def between(top: _Floats, bottom: _Floats) -> _Floats:
            deep: _Floats = np.minimum(np.minimum(y - top, bottom - y), within)
            return deep

        canvas.paint(between(upper - high * 0.1 * arch, lower + high * 0.13 * arch), self._look.lips, strength)
        inside = between(upper, lower)
        canvas.paint(inside, _CAVITY, strength)
        if opening > 0.05:
            canvas.paint(np.minimum(inside, y - lower + high * 0.16 * opening * arch), _TONGUE, strength)
            teeth = high * min(0.12, 0.4 * opening) * (0.4 + 0.6 * shape.width)
            canvas.paint(np.minimum(inside, upper + teeth * arch - y), _TEETH, strength)


def _moved(picture: Picture, down: float) -> Picture:
    """A picture moved down by a part of its side, its border repeated."""
    side = len(picture)
    rows = np.clip(np.arange(side) - down * side, 0, side - 1)
    above = np.floor(rows).astype(int)
    below = np.minimum(above + 1, side - 1)
    part = (rows - above).astype(np.float32)[:, None, None]
    moved: Picture = np.rint(picture[above] * (1 - part) + picture[below] * part).astype(np.uint8)
    return moved
