"""Formats numbers, times and names for people, and fits text to a width in terminal cells."""

import re
import time
from collections.abc import Sequence
from typing import Literal

from rich.cells import cell_len, set_cell_size

from protocol.printable import printable
from tui.model.state_glyphs import BAR_EMPTY, BAR_FULL, BAR_HALF, BLOCKS, CUT

Align = Literal["left", "right"]

MINUTE_S = 60
HOUR_S = 60 * MINUTE_S
DAY_S = 24 * HOUR_S
#: Characters of a request id that tell it apart from others on a screen.
SHORT_ID_CHARS = 8

#: Zero-width joiner, variation selectors, skin tones, keycap: terminals disagree on the width of the joined glyph, so
#: its parts are shown side by side. Combining marks stay: every terminal draws them on the letter before.
_JOINERS = re.compile("[\u200b-\u200f\u2060\ufe00-\ufe0f\ufeff\u20e3\U0001f3fb-\U0001f3ff\U000e0100-\U000e01ef]")
#: A flag consists of two of these and is one or two cells wide; as letters they are one cell each everywhere.
_FIRST_REGIONAL, _LAST_REGIONAL = 0x1F1E6, 0x1F1FF


def plain(text: str) -> str:
    """`text` without control characters, and with only characters that are equally wide in every terminal."""
    if text.isascii() and text.isprintable():
        return text
    text = _JOINERS.sub("", text)
    text = "".join(
        chr(ord("A") + ord(c) - _FIRST_REGIONAL) if _FIRST_REGIONAL <= ord(c) <= _LAST_REGIONAL else c for c in text
    )
    # The width of a tab, and of the wide CJK space, depends on the terminal.
    return printable(re.sub(r"\s", " ", text))


def fit(text: str, width: int, align: Align = "left") -> str:
    """`text` in exactly `width` cells: cut with an ellipsis, or padded."""
    have = cell_len(text)
    if have > width:
        # A wide character that is cut in half leaves a blank; the ellipsis follows the text directly.
        kept = set_cell_size(text, width - 1).rstrip() if width > 1 else ""
        text = kept + CUT if width else ""
        have = cell_len(text)
    blank = " " * (width - have)
    return blank + text if align == "right" else text + blank


def seconds(value_s: float) -> str:
    """A duration: `0.3 ms`, `34 ms`, `1.24 s`, `12.3 s`, and from a minute on as in `age`."""
    if 0 < value_s < 0.00095:
        return f"{value_s * 1000:.1f} ms"
    if value_s < 0.9995:
        return f"{value_s * 1000:.0f} ms"
    if value_s < 9.995:
        return f"{value_s:.2f} s"
    if value_s < MINUTE_S - 0.05:
        return f"{value_s:.1f} s"
    return age(value_s)


def age(value_s: float) -> str:
    """A time span in whole seconds, with its two largest units: `12 s`, `2m05s`, `1h02m`, `3d04h`."""
    whole = max(0, int(value_s))
    if whole < MINUTE_S:
        return f"{whole} s"
    if whole < HOUR_S:
        return f"{whole // MINUTE_S}m{whole % MINUTE_S:02}s"
    if whole < DAY_S:
        return f"{whole // HOUR_S}h{whole % HOUR_S // MINUTE_S:02}m"
    return f"{whole // DAY_S}d{whole % DAY_S // HOUR_S:02}h"


def size(value_bytes: float) -> str:
    """A number of bytes: `0 B`, `512 B`, `1.2 kB`, `34 kB`, `1.2 MB` (powers of ten)."""
    value = float(value_bytes)
    if value < 999.5:
        return f"{value:.0f} B"
    for unit in ("kB", "MB", "GB", "TB"):
        value /= 1000
        if value < 999.5 or unit == "TB":
            break
    return f"{value:.1f} {unit}" if value < 9.95 else f"{value:.0f} {unit}"


def rate(value_bytes_s: float) -> str:
    """A number of bytes a second."""
    return f"{size(value_bytes_s)}/s"


def count(value: float) -> str:
    """A number with thousands separators; below ten, a fraction keeps one decimal."""
    return f"{value:,.0f}" if value >= 9.95 or value == int(value) else f"{value:.1f}"


def percent(value: float) -> str:
    """A percentage: `0 %`, `0.4 %`, `12 %`."""
    return f"{value:.0f} %" if value >= 9.95 or value == int(value) else f"{value:.1f} %"


def ratio(value: float) -> str:
    """A real-time factor with two significant digits: `0.04`, `0.85`, `12`."""
    return f"{value:.2f}" if value < 9.95 else f"{value:.0f}"


def short_id(text: str) -> str:
    """The beginning of an id, long enough to tell it apart."""
    return text[:SHORT_ID_CHARS]


def bar(fraction: float, width: int) -> str:
    """A progress bar of `width` cells, drawn in half cells where the terminal can."""
    fraction = min(1.0, max(0.0, fraction))
    halves = int(fraction * width * 2)
    full, half = divmod(halves, 2)
    return BAR_FULL * full + BAR_HALF * half + BAR_EMPTY * (width - full - half)


def spark(values: Sequence[float], width: int) -> str:
    """A sparkline of the last `width` values: the highest is full, zero is low, and unknown is blank."""
    shown = values[-width:] if width > 0 else []
    most = max(shown, default=0.0)
    steps = len(BLOCKS) - 1
    drawn = "".join(BLOCKS[0 if value <= 0 or most <= 0 else max(1, round(value / most * steps))] for value in shown)
    return drawn.rjust(width)


def clock(unix_s: float, offset_s: float = 0.0) -> str:
    """The time of day, `03:14:15`, `offset_s` east of Greenwich."""
    whole = int(unix_s + offset_s) % DAY_S
    return f"{whole // HOUR_S:02}:{whole % HOUR_S // MINUTE_S:02}:{whole % MINUTE_S:02}"


def utc_offset_s(unix_s: float) -> float:
    """The offset of the local time zone at that time, including daylight saving."""
    return float(time.localtime(unix_s).tm_gmtoff)
