"""A screen as a small SVG that looks the same in every viewer and is the same bytes each time.

Textual's own picture hangs on a web font and on how a viewer treats runs of blanks and wide characters. Here every word
stands at its cell, in whatever monospace font there is, and nothing is fetched.
"""

import html
import re
from collections.abc import Iterator
from itertools import groupby

from rich.cells import cell_len
from textual.app import App

#: Of Rich's export.
_RICH_W, _RICH_H = 12.2, 24.4
#: Whole numbers are shorter. A cell of 'DejaVu Sans Mono' at this size is 12.04 wide.
CELL_W, CELL_H, FONT_SIZE = 12, 24, 20
#: From the top of a cell to the line that letters stand on.
BASE = 18
#: Around the cells.
MARGIN = 10
FONTS = "'DejaVu Sans Mono','Cascadia Mono',Menlo,Consolas,'Noto Sans Mono CJK SC','WenQuanYi Zen Hei Mono',monospace"

_CLASS = re.compile(r"\.terminal-\d+-(r\d+) \{([^}]*)\}")
_RECT = re.compile(r'<rect fill="([^"]+)" x="([\d.]+)" y="([\d.]+)" width="([\d.]+)" height="([\d.]+)"')
_TEXT = re.compile(r'<text class="terminal-\d+-(r\d+)" x="([\d.]+)" y="([\d.]+)"[^>]*>([^<]*)</text>')
_FRAME = re.compile(r'<rect fill="([^"]+)" stroke=')
#: Words with single blanks between are one text.
_WORDS = re.compile(r"[^ ]+(?: [^ ]+)*")


def model(app: App[int]) -> str:
    """What the app shows, as SVG."""
    rich = app.export_screenshot(simplify=True)
    frame = _FRAME.search(rich)
    assert frame is not None
    theme = app.current_theme
    ground = frame[1] if theme.ansi or theme.background is None else theme.background
    width, height = app.size.width * CELL_W, app.size.height * CELL_H
    used: dict[str, str] = {}
    drawn = [*_rects(rich, ground), *_texts(rich, used)]
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width + 2 * MARGIN} {height + 2 * MARGIN}"',
            f'  font-family="{FONTS}" font-size="{FONT_SIZE}">',
            "<style>",
            "text{white-space:pre}",
            *(f".{name}{{{rule.strip().rstrip(';')}}}" for rule, name in used.items()),
            "</style>",
            f'<rect fill="{ground}" stroke="#7f8790" width="100%" height="100%" rx="8"/>',
            f'<g transform="translate({MARGIN},{MARGIN})" shape-rendering="crispEdges">',
            *drawn,
            "</g>",
            "</svg>",
            "",
        ]
    )


def _rects(rich: str, ground: str) -> Iterator[str]:
    """Backgrounds other than the ground's; neighbours in a line are one."""
    cells = [
        (round((float(y) - 1.5) / _RICH_H), fill, round(float(x) / _RICH_W), round(float(w) / _RICH_W))
        for fill, x, y, w, _ in _RECT.findall(rich)
        if fill.lower() != ground.lower()
    ]
    for (line, fill), found in groupby(cells, lambda one: one[:2]):
        spans = [(x, w) for _, _, x, w in found]
        while spans:
            x, w = spans.pop(0)
            while spans and spans[0][0] == x + w:
                w += spans.pop(0)[1]
            yield f'<rect fill="{fill}" x="{x * CELL_W}" y="{line * CELL_H}" width="{w * CELL_W}" height="{CELL_H}"/>'


def _texts(rich: str, used: dict[str, str]) -> Iterator[str]:
    styles = dict(_CLASS.findall(rich))
    for y, found in groupby(_TEXT.findall(rich), lambda one: one[2]):
        line = round((float(y) - 20) / _RICH_H)
        spans = []
        for style, x, _, escaped in found:
            # Rich ends some lines with a text of its own.
            text = html.unescape(escaped).replace("\xa0", " ").rstrip("\n")
            for begin, part in _parts(text):
                name = used.setdefault(styles[style], f"s{len(used)}")
                cells = cell_len(part)
                length = f' textLength="{cells * CELL_W}"' if len(part) > 1 else ""
                left = (round(float(x) / _RICH_W) + begin) * CELL_W
                spans.append(f'<tspan class="{name}" x="{left}"{length}>{html.escape(part, quote=False)}</tspan>')
        if spans:
            yield f'<text y="{line * CELL_H + BASE}">' + "\n".join(spans) + "</text>"


def _parts(text: str) -> Iterator[tuple[int, str]]:
    """Words and where they begin, in cells; each wide character by itself, as no font has it exactly two cells wide."""
    for words in _WORDS.finditer(text):
        begin = cell_len(text[: words.start()])
        for wide, chars in groupby(words[0], lambda char: cell_len(char) != 1):
            run = "".join(chars)
            for part in run if wide else [run]:
                yield begin, part
                begin += cell_len(part)
