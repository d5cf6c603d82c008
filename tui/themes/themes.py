"""The themes: dark, light, the terminal's own 16 colours, and no colours; `tui.themes.choose` picks the default.

Every state has a glyph and a word, so colours are never needed to understand the screen. Dark and light can be told
apart without seeing red or green: good leans to blue, bad to orange, and warn is lighter than both
(after Okabe and Ito, "Color Universal Design", 2008); tests/tui/themes/test_themes.py measures it.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from rich.segment import Segment
from textual.app import App
from textual.color import Color
from textual.filter import LineFilter, Monochrome, NoColor
from textual.theme import BUILTIN_THEMES, Theme

from tui.model.state_glyphs import to_ascii
from tui.themes.choose import NAMES as NAMES
from tui.themes.choose import choose_theme as choose_theme

TOKENS = ("good", "busy", "warn", "bad", "idle", "dim", "accent", "title")

_PREFIX = "relay-"
#: Styles other than the tokens: the row under the cursor, headings, and the bars at top and bottom.
_DARK = {
    "good": "#4fd6a5",
    "busy": "#6cb8ff",
    "warn": "#ffd166",
    "bad": "#ff8a65",
    "idle": "#9fb0c0",
    "dim": "#98a6b5",
    "accent": "#cdb0ff",
    "title": "#f2f5f8",
    "cursor": "#1d3a57",
    "heading": "#98a6b5",
    "bar": "#1a212b",
}
_LIGHT = {
    "good": "#00695c",
    "busy": "#0053a6",
    "warn": "#725a00",
    "bad": "#8f001f",
    "idle": "#4f5b66",
    "dim": "#4f5b66",
    "accent": "#6d3299",
    "title": "#10151a",
    "cursor": "#cfe4f8",
    "heading": "#4f5b66",
    "bar": "#e6e9ec",
}
#: The terminal's own colours; its owner decides how they look, background included.
_ANSI = {
    "good": "ansi_green",
    "busy": "ansi_cyan",
    "warn": "ansi_yellow",
    "bad": "ansi_red",
    "idle": "ansi_default",
    "dim": "ansi_default",
    "accent": "ansi_magenta",
    "title": "ansi_default",
    "cursor": "ansi_default",
    "heading": "ansi_default",
    "bar": "ansi_default",
}
_MONO = dict.fromkeys(_ANSI, "ansi_default")

_COLOUR_STYLES = {
    "good": "none",
    "busy": "none",
    "warn": "none",
    "bad": "bold",
    "idle": "none",
    "dim": "none",
    "accent": "none",
    "title": "bold",
    "cursor": "bold",
    "heading": "bold",
}
#: Without a background of our own, the row under the cursor is shown in reverse.
_ANSI_STYLES = {**_COLOUR_STYLES, "dim": "dim", "idle": "dim", "cursor": "reverse", "heading": "bold"}
_MONO_STYLES = {**_ANSI_STYLES, "busy": "bold", "warn": "underline", "bad": "bold underline", "heading": "bold"}


def _variables(colours: Mapping[str, str], styles: Mapping[str, str]) -> dict[str, str]:
    return {**colours, **{f"{name}-style": style for name, style in styles.items()}}


def _theme(
    name: str, colours: Mapping[str, str], styles: Mapping[str, str], *, foreground: str, grounds: Sequence[str]
) -> Theme:
    ansi = colours["good"].startswith("ansi")
    return Theme(
        name=_PREFIX + name,
        primary=colours["busy"],
        secondary=colours["accent"],
        success=colours["good"],
        warning=colours["warn"],
        error=colours["bad"],
        accent=colours["accent"],
        dark=name != "light",
        ansi=ansi,
        # Textual's style sheet asks for these where it uses the terminal's colours.
        variables={**(BUILTIN_THEMES["ansi-dark"].variables if ansi else {}), **_variables(colours, styles)},
        foreground=foreground,
        background=grounds[0],
        surface=grounds[1],
        panel=grounds[2],
        boost="ansi_default" if ansi else None,
    )


_DEFAULT = "ansi_default"
_DEFAULTS = (_DEFAULT,) * 3
THEMES: dict[str, Theme] = {
    "dark": _theme("dark", _DARK, _COLOUR_STYLES, foreground="#dde3ea", grounds=("#0f1419", "#151b23", "#1d2530")),
    "light": _theme("light", _LIGHT, _COLOUR_STYLES, foreground="#1b2127", grounds=("#fbfbf9", "#f1f2f3", "#e6e9ec")),
    "ansi": _theme("ansi", _ANSI, _ANSI_STYLES, foreground=_DEFAULT, grounds=_DEFAULTS),
    "mono": _theme("mono", _MONO, _MONO_STYLES, foreground=_DEFAULT, grounds=_DEFAULTS),
}


def install(app: App[Any], name: str) -> None:
    """Register the themes with the app, and apply one."""
    for theme in THEMES.values():
        app.register_theme(theme)
    app.theme = THEMES[name].name


def filters(of_textual: Sequence[LineFilter], name: str, *, ascii_only: bool) -> list[LineFilter]:
    """The filters that every line passes through before it is written.

    Under NO_COLOR Textual only turns colours to grey; we send none at all.
    """
    wanted = [one for one in of_textual if not isinstance(one, Monochrome | NoColor)]
    if name == "mono":
        wanted.append(NoColor())
    if ascii_only:
        wanted.append(AsciiOnly())
    return wanted


class AsciiOnly(LineFilter):
    """Replaces our glyphs by ASCII of the same width, for terminals and fonts without them."""

    def apply(self, segments: list[Segment], background: Color) -> list[Segment]:
        """Replace the glyphs in these segments."""
        return [Segment(to_ascii(text), style, control) for text, style, control in segments]
