"""Which theme to begin with, from what the terminal says of itself. Imports nothing heavy, for the command line."""

from collections.abc import Mapping

#: What --theme takes; `auto` is `pick`'s to decide.
NAMES = ("auto", "dark", "light", "ansi", "mono")


def choose_theme(environ: Mapping[str, str], wanted: str = "auto") -> str:
    """The theme to begin with: one of `NAMES` but `auto`.

    NO_COLOR, set and not empty, wins over all (https://no-color.org). Without a word, a terminal that says it has more
    than 16 colours gets dark, or light where COLORFGBG tells of a light background; any other its own 16.
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
