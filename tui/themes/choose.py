"""Chooses a theme from the environment. It imports nothing heavy, because the command line uses it."""

from collections.abc import Mapping

#: The values of --theme; `auto` lets `choose_theme` decide.
NAMES = ("auto", "dark", "light", "ansi", "mono")


#: Consoles whose fonts lack our glyphs.
_PLAIN_TERMINALS = ("", "dumb", "linux", "vt100", "vt220")


def draws_ascii(environ: Mapping[str, str]) -> bool:
    """Whether locale or terminal leave nothing but ASCII to draw with.

    Where the locale is C, Python sets LC_CTYPE to C.UTF-8 by itself (PEP 538), which says nothing of the terminal.
    """
    if environ.get("TERM", "") in _PLAIN_TERMINALS:
        return True
    said, lang = environ.get("LC_ALL") or environ.get("LC_CTYPE") or "", environ.get("LANG", "")
    locale = lang if said in ("", "C.UTF-8") and not environ.get("LC_ALL") else said
    return "utf8" not in locale.lower().replace("-", "")


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
