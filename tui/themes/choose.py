"""Chooses a theme from the environment. It imports nothing heavy, because the command line uses it."""

from collections.abc import Mapping

#: The values of --theme; `auto` lets `choose_theme` decide.
NAMES = ("auto", "dark", "light", "ansi", "mono")


def choose_theme(environ: Mapping[str, str], wanted: str = "auto") -> str:
    """Choose the theme: any of `NAMES` except `auto`.

    A NO_COLOR that is not empty takes precedence (https://no-color.org). By default, a terminal with more than 16
    colours gets dark, or light if COLORFGBG reports a light background; any other terminal gets its own 16 colours.
    """
    if environ.get("NO_COLOR"):
        return "mono"
    if wanted != "auto":
        return wanted
    many = environ.get("COLORTERM", "") in ("truecolor", "24bit") or "256color" in environ.get("TERM", "")
    if not many:
        return "ansi"
    background = environ.get("COLORFGBG", "").rpartition(";")[2]
    return "light" if background in ("7", "15") else "dark"
