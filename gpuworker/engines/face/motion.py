"""How a face moves by itself: it breathes and blinks, each avatar at times of its own.

Time runs in loops of `LOOP_S`. The first is the idle loop, which ends where it begins: whoever shows it again and again
can go over to speech at any of its frames.
"""

import hashlib
import math

#: One breath, seconds.
LOOP_S = 4
#: How long a blink takes, seconds.
BLINK_S = 0.24
#: When in its loop a blink begins: 3 to 5 s after the one before.
_FIRST_S, _LAST_S = 1.5, 2.5


class Motion:
    """The motion of an avatar.

    Args:
        avatar: its name.
        fps: frames a second.
    """

    def __init__(self, avatar: str, fps: int) -> None:
        self._avatar = avatar
        self._fps = fps
        self._phase = self._random("breath")

    @property
    def loop_frames(self) -> int:
        """How many frames a loop has."""
        return LOOP_S * self._fps

    def sway(self, frame: int) -> float:
        """How the head is moved by its breath in a frame, -1 (up) to 1 (down)."""
        return math.sin(2 * math.pi * (frame % self.loop_frames / self.loop_frames + self._phase))

    def blink(self, frame: int) -> float:
        """How far the eyes are closed in a frame, 0..1."""
        loop, at = divmod(frame, self.loop_frames)
        begin_s = _FIRST_S + (_LAST_S - _FIRST_S) * self._random(str(loop))
        part = (at / self._fps - begin_s) / BLINK_S
        return math.sin(math.pi * part) if 0 < part < 1 else 0.0

    def _random(self, what: str) -> float:
        """A number of 0..1, always the same for this avatar."""
        digest = hashlib.sha256(f"{self._avatar}\0{what}".encode()).digest()
        return int.from_bytes(digest[:4], "big") / 2**32
