"""Themes: read by everyone, whatever they see, and none where none is wanted."""

import itertools

import pytest
from rich.segment import Segment
from rich.style import Style
from textual.color import Color
from textual.filter import Monochrome, NoColor

from tui.themes.choose import NAMES, choose_theme, draws_ascii
from tui.themes.themes import THEMES, TOKENS, AsciiOnly, filters

#: Machado, Oliveira, Fernandes, "A Physiologically-based Model for Simulation of Color Vision Deficiency" (2009),
#: severity 1.0; on linear RGB.
DEFICIENCIES = {
    "protan": ((0.152286, 1.052583, -0.204868), (0.114503, 0.786281, 0.099216), (-0.003882, -0.048116, 1.051998)),
    "deutan": ((0.367322, 0.860646, -0.227968), (0.280085, 0.672501, 0.047413), (-0.011820, 0.042940, 0.968881)),
    "tritan": ((1.255528, -0.076749, -0.178779), (-0.078411, 0.930809, 0.147602), (0.004733, 0.691367, 0.303900)),
}
#: WCAG 2.2, 1.4.3: text of normal size.
CONTRAST = 4.5


def linear(color: Color) -> tuple[float, float, float]:
    def one(value: int) -> float:
        share = value / 255
        return share / 12.92 if share <= 0.04045 else ((share + 0.055) / 1.055) ** 2.4

    return one(color.r), one(color.g), one(color.b)


def luminance(rgb: tuple[float, float, float]) -> float:
    return 0.2126 * rgb[0] + 0.7152 * rgb[1] + 0.0722 * rgb[2]


def contrast(one: Color, other: Color) -> float:
    light, dark = sorted((luminance(linear(one)), luminance(linear(other))), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def lab(rgb: tuple[float, float, float]) -> tuple[float, float, float]:
    """CIE L*a*b*, D65."""
    r, g, b = (min(1.0, max(0.0, value)) for value in rgb)
    xyz = (
        (0.4124 * r + 0.3576 * g + 0.1805 * b) / 0.9505,
        0.2126 * r + 0.7152 * g + 0.0722 * b,
        (0.0193 * r + 0.1192 * g + 0.9505 * b) / 1.089,
    )
    fx, fy, fz = (value ** (1 / 3) if value > 0.008856 else 7.787 * value + 16 / 116 for value in xyz)
    return 116 * fy - 16, 500 * (fx - fy), 200 * (fy - fz)


def seen(color: Color, deficiency: str) -> tuple[float, float, float]:
    rgb = linear(color)
    rows = DEFICIENCIES[deficiency]
    return lab((
        sum(a * b for a, b in zip(rows[0], rgb, strict=True)),
        sum(a * b for a, b in zip(rows[1], rgb, strict=True)),
        sum(a * b for a, b in zip(rows[2], rgb, strict=True)),
    ))  # fmt: skip


@pytest.mark.parametrize("name", ["dark", "light"])
@pytest.mark.parametrize("token", [*TOKENS, "heading"])
def test_every_colour_can_be_read_on_the_ground_and_under_the_cursor(name: str, token: str) -> None:
    theme = THEMES[name]
    color = Color.parse(theme.variables[token])
    for ground in (theme.background, theme.variables["cursor"], theme.variables["bar"]):
        assert ground is not None
        assert contrast(color, Color.parse(ground)) >= CONTRAST


@pytest.mark.parametrize("deficiency", list(DEFICIENCIES))
@pytest.mark.parametrize("name", ["dark", "light"])
def test_good_warn_and_bad_stay_apart_for_the_colour_blind(name: str, deficiency: str) -> None:
    colours = [Color.parse(THEMES[name].variables[token]) for token in ("good", "warn", "bad")]
    for one, other in itertools.combinations(colours, 2):
        distance = sum((a - b) ** 2 for a, b in zip(seen(one, deficiency), seen(other, deficiency), strict=True)) ** 0.5
        assert distance >= 15  # some six times what side by side is just noticed (CIE76: 2.3)


@pytest.mark.parametrize(
    ("environ", "wanted", "theme"),
    [
        ({"TERM": "xterm-256color"}, "auto", "dark"),
        ({"TERM": "xterm", "COLORTERM": "truecolor"}, "auto", "dark"),
        ({"TERM": "xterm-256color", "COLORFGBG": "0;15"}, "auto", "light"),
        ({"TERM": "xterm-256color", "COLORFGBG": "15;0"}, "auto", "dark"),
        ({"TERM": "linux"}, "auto", "ansi"),
        ({}, "auto", "ansi"),
        ({"TERM": "linux"}, "light", "light"),
        ({"NO_COLOR": "1", "TERM": "xterm-256color"}, "dark", "mono"),
        ({"NO_COLOR": "", "TERM": "xterm-256color"}, "auto", "dark"),
    ],
)
def test_the_terminal_says_which_theme_it_can_show(environ: dict[str, str], wanted: str, theme: str) -> None:
    assert choose_theme(environ, wanted) == theme


def test_every_name_is_a_theme() -> None:
    assert set(NAMES) == {"auto", *THEMES}


def test_the_terminals_own_colours_are_all_that_ansi_uses() -> None:
    for name in ("ansi", "mono"):
        theme = THEMES[name]
        assert theme.ansi
        assert all(value.startswith("ansi_") for key, value in theme.variables.items() if not key.endswith("-style"))


def test_no_two_urgent_tokens_look_alike_without_colour() -> None:
    styles = [THEMES["mono"].variables[f"{token}-style"] for token in ("good", "warn", "bad", "busy", "dim")]
    assert len(set(styles)) == len(styles)


def test_without_colour_no_colour_is_sent_at_all() -> None:
    (only,) = filters([Monochrome(), NoColor()], "mono", ascii_only=False)
    (segment,) = only.apply([Segment("text", Style.parse("bold red on blue"))], Color(0, 0, 0))
    assert segment.style is not None
    assert segment.style.bold
    assert (segment.style.color, segment.style.bgcolor) == (Style.parse("default on default").color,) * 2


def test_in_ascii_the_whole_screen_is_ascii() -> None:
    line = [Segment("┌─● busy ━╸─ 50% ▁▅█ 王 │", None)]
    assert AsciiOnly().apply(line, Color(0, 0, 0))[0].text == "+-* busy #-- 50% _+# 王 |".replace("_+#", "_=#")


@pytest.mark.parametrize(
    ("environ", "ascii_only"),
    [
        ({"TERM": "xterm-256color", "LANG": "en_GB.UTF-8"}, False),
        ({"TERM": "xterm-256color", "LANG": "C.UTF-8"}, False),
        ({"TERM": "xterm-256color", "LANG": "C", "LC_ALL": "de_DE.utf8"}, False),
        ({"TERM": "xterm-256color", "LANG": "C", "LC_CTYPE": "en_US.UTF-8"}, False),
        ({"TERM": "xterm-256color", "LANG": "C", "LC_CTYPE": "C.UTF-8"}, True),
        ({"TERM": "xterm-256color", "LC_CTYPE": "C.UTF-8"}, True),
        ({"TERM": "xterm-256color", "LANG": "de_DE.ISO-8859-1"}, True),
        ({"TERM": "xterm-256color", "LANG": "en_GB.UTF-8", "LC_ALL": "C"}, True),
        ({"TERM": "linux", "LANG": "en_GB.UTF-8"}, True),
        ({"TERM": "dumb", "LANG": "en_GB.UTF-8"}, True),
        ({"LANG": "en_GB.UTF-8"}, True),
    ],
)
def test_ascii_is_drawn_where_locale_or_terminal_have_no_more(environ: dict[str, str], ascii_only: bool) -> None:
    assert draws_ascii(environ) is ascii_only
