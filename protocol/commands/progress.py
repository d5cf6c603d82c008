"""The output for a person at a terminal: the progress of a request, and tables."""

import shutil
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, TextIO

from protocol.arguments import fault_line
from protocol.printable import printable

if TYPE_CHECKING:
    from protocol.wire.messages import Queued

#: Seconds between updates on a terminal: as fast as the eye follows.
REDRAW_S = 0.1
#: Seconds between lines in a log.
PLAIN_S = 5.0
#: Width of the bar of a batch.
BAR_CELLS = 30


class Progress:
    """Shows the progress of a request.

    Args:
        out: where to write.
        quiet: write only errors.
        as_json: write errors as JSON.
        clock: seconds, monotonic.
    """

    def __init__(
        self,
        out: TextIO,
        *,
        quiet: bool = False,
        as_json: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._out = out
        self._quiet = quiet
        self._as_json = as_json
        self._clock = clock
        self._live = out.isatty()
        self._drawn = False
        self._status_at = float("-inf")
        self._began_at = clock()
        self._started_at: float | None = None
        self._first_audio_s: float | None = None

    def queued(self, place: "Queued") -> None:
        """Show the place in the queue."""
        eta = "" if place.eta_s is None else f", starts in about {_seconds(place.eta_s)}"
        why = f", again because {place.message}" if place.message else ""
        self._status(f"queued: position {place.position} of {place.of}{eta}{why}", urgent=True)

    def worker_away(self, wait_s: float) -> None:
        """Show that the worker was lost."""
        self._status(f"its worker is not connected; waiting up to {_seconds(wait_s)} for it", urgent=True)

    def started(self) -> None:
        """Show that the request runs."""
        self._started_at = self._clock()
        self._status("running", urgent=False)

    def progress(self, state: str, fraction: float, message: str) -> None:
        """Show progress reported by the engine."""
        self._status(f"{state} {fraction:.0%}" + (f": {message}" if message else ""), urgent=False)

    def audio(self, seconds: float) -> None:
        """Show how many seconds of audio have arrived."""
        if self._first_audio_s is None:
            self._first_audio_s = self._clock() - self._began_at
        self._status(f"{seconds:.1f} s of audio{self._speed(seconds)}", urgent=False)

    def pictures(self, count: int) -> None:
        """Show how many pictures of a video have arrived."""
        self._status(f"{count} pictures", urgent=False)

    def batch(self, done: int, of: int, failed: int, left_s: float) -> None:
        """Show how many lines of a batch have ended, as a bar on a terminal."""
        filled = BAR_CELLS * done // of
        bar = f"[{'#' * filled}{'.' * (BAR_CELLS - filled)}] " if self._live else ""
        told = f", {failed} failed" if failed else ""
        self._status(f"{bar}{done}/{of}{told}, about {_seconds(left_s)} left", urgent=False)

    def completed(self, seconds: float, where: str, *, cached: bool = False, pictures: int = 0) -> None:
        """Show the successful end; `seconds` of audio or `pictures`, 0 if there were none.

        With `cached` they are those of an equal request.
        """
        took_s = self._clock() - self._began_at
        if pictures:
            text = f"{pictures} pictures in {took_s:.1f} s"
        elif seconds:
            first = "" if self._first_audio_s is None else f", first audio after {self._first_audio_s:.2f} s"
            text = f"{seconds:.1f} s of audio in {took_s:.1f} s{self._speed(seconds)}{first}"
        else:
            text = f"done in {took_s:.1f} s"
        self.note(text + (", from the relay's cache" if cached else "") + (f" -> {where}" if where else ""))

    def note(self, text: str) -> None:
        """Write a permanent line."""
        if not self._quiet:
            self._wipe()
            self._write(f"{printable(text)}\n")

    def error(self, text: str, code: str = "failed", details: Mapping[str, object] | None = None) -> None:
        """Write an error, even if quiet: a line, and one for each field of `details`; or one line of JSON."""
        self._wipe()
        if self._as_json:
            self._write(f"{fault_line('relay', text, code, details, as_json=True)}\n")
            return
        self._write(f"relay: {printable(text)}\n")
        for field, what in (details or {}).items():
            self._write("relay:   " + printable(f"{field or 'params'}: {what}") + "\n")

    def close(self) -> None:
        """Remove the live status line."""
        self._wipe()

    def _speed(self, seconds: float) -> str:
        since_s = self._clock() - (self._started_at if self._started_at is not None else self._began_at)
        return f", {seconds / since_s:.1f}x real time" if since_s > 0.01 else ""

    def _status(self, text: str, *, urgent: bool) -> None:
        now = self._clock()
        if self._quiet or (not urgent and now - self._status_at < (REDRAW_S if self._live else PLAIN_S)):
            return
        self._status_at = now
        text = printable(text)
        if self._live:
            # Carriage return, the text, then clear the rest of a longer previous line.
            # A wrapped line could not be overwritten.
            self._write(f"\r{text[: shutil.get_terminal_size().columns - 1]}\x1b[K")
            self._drawn = True
        else:
            self._write(f"{text}\n")

    def _wipe(self) -> None:
        if self._drawn:
            self._write("\r\x1b[K")
            self._drawn = False

    def _write(self, text: str) -> None:
        try:
            self._out.write(text)
            self._out.flush()
        except (OSError, ValueError):  # a closed terminal must not stop the audio
            self._quiet = True


def _seconds(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min"


def table(rows: list[list[str]]) -> str:
    """Format rows in columns; the first row holds the headings, and each cell is made `printable`."""
    rows = [[printable(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows)
    return "\n".join(lines)
