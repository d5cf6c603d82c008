"""Sends fewer bytes for the same picture: only cells that changed, and a colour only where it differs.

Textual 8.2 sends each changed line from the left edge of its widget to the last changed cell, with a colour and a reset
around every piece of it: 4 to 6 KB for twelve rows whose ages have grown by one second. That makes a screen crawl over
a slow line, so updates are rendered here. Other versions of Textual, which render in another way, are left alone.
"""

from collections.abc import Sequence

from rich.color import ColorSystem
from rich.console import Console
from rich.control import Control
from rich.style import Style
from textual._compositor import ChopsUpdate, CompositorUpdate
from textual.strip import Strip

RESET = "\x1b[0m"


class MinimalUpdate(CompositorUpdate):
    """A partial update of the screen that is rendered in fewer bytes."""

    def __init__(self, update: ChopsUpdate) -> None:
        self._update = update

    def render_segments(self, console: Console) -> str:
        """Render the changed cells as ANSI sequences."""
        pen = AnsiWriter(console)
        update = self._update
        for y, x1, x2 in update.spans:
            for end, (x, strip) in zip(update.chop_ends[y], update.chops[y].items(), strict=False):
                if strip is not None and x < x2 and end > x1:
                    left, right = max(x, x1), min(end, x2)
                    pen.move(left, y)
                    pen.draw(strip.crop(left - x, right - x))
        return pen.finish()


class AnsiWriter:
    """Writes styled text, changing the colour only where it must."""

    def __init__(self, console: Console) -> None:
        self._console = console
        # Textual does the same where it knows nothing of the terminal.
        self._system = console._color_system or ColorSystem.TRUECOLOR
        self._out: list[str] = []
        self._ansi = ""
        self._at = (-1, -1)

    def move(self, x: int, y: int) -> None:
        """Move to a cell, unless the cursor is there already."""
        if self._at != (x, y):
            self._out.append(Control.move_to(x, y).segment.text)
            self._at = (x, y)

    def draw(self, strip: Strip) -> None:
        """Write a strip."""
        for text, style, control in strip:
            if control:
                self._out.append(text)
                continue
            self._change(self._ansi_of(style))
            self._out.append(text)
        self._at = (self._at[0] + strip.cell_length, self._at[1])

    def finish(self) -> str:
        """Reset the colour and return everything written."""
        self._change("")
        return "".join(self._out)

    def _ansi_of(self, style: Style | None) -> str:
        return Strip.render_ansi(style, self._system) if style else ""

    def _change(self, ansi: str) -> None:
        if ansi != self._ansi:
            self._out.append(f"\x1b[0;{ansi}m" if ansi and self._ansi else f"\x1b[{ansi}m" if ansi else RESET)
            self._ansi = ansi


def minimize_update(update: object) -> object:
    """Replace a partial update by a smaller one; return anything else as it is."""
    return MinimalUpdate(update) if isinstance(update, ChopsUpdate) and isinstance(update.chops, Sequence) else update
