"""How states are shown: a glyph, a word and a colour token, with ASCII stand-ins for terminals without the glyphs.

The word is always there; glyph and colour only make it quicker to find. All glyphs are one cell wide, and none has an
emoji form, which some terminals draw two cells wide.
"""

from typing import Literal

import attrs

#: What a piece of text stands for; `themes` gives each its style.
Token = Literal["", "good", "busy", "warn", "bad", "idle", "dim", "accent", "title"]
Kind = Literal["relay", "space", "worker", "request", "talk", "client", "level", "outcome"]


@attrs.frozen
class Glyph:
    """How one state is shown."""

    glyph: str
    token: Token
    #: States with a higher number need attention sooner; a sorted state column puts them first.
    urgency: int = 0


_UNKNOWN = Glyph("·", "dim")

GLYPHS: dict[Kind, dict[str, Glyph]] = {
    "relay": {
        "serving": Glyph("●", "good"),
        "draining": Glyph("▽", "warn", 1),
        "connecting": Glyph("○", "dim", 1),
        "lost": Glyph("✗", "bad", 2),
    },
    "space": {
        "no worker": Glyph("✗", "bad", 3),
        "failing": Glyph("▲", "bad", 3),
        "paused": Glyph("‖", "warn", 2),
        "ready": Glyph("●", "good", 1),
    },
    "worker": {
        "stale": Glyph("▲", "bad", 4),
        "away": Glyph("✗", "bad", 3),
        "draining": Glyph("▽", "warn", 2),
        "cordoned": Glyph("‖", "warn", 2),
        "resting": Glyph("‖", "bad", 2),
        "busy": Glyph("●", "busy", 1),
        "idle": Glyph("○", "idle"),
    },
    "request": {
        "failed": Glyph("✗", "bad", 1),
        "stopping": Glyph("▽", "warn", 5),
        "running": Glyph("▸", "busy", 4),
        "queued": Glyph("◌", "", 3),
        "uploading": Glyph("↑", "accent", 2),
        "cancelled": Glyph("⊘", "dim"),
        "completed": Glyph("✓", "good"),
    },
    "talk": {
        "speaking": Glyph("▸", "busy", 3),
        "thinking": Glyph("●", "busy", 2),
        "waiting": Glyph("◌", "", 1),
        "idle": Glyph("○", "idle"),
    },
    "client": {
        "slow": Glyph("▲", "bad", 1),
        "ok": Glyph("●", "good"),
    },
    "level": {
        "critical": Glyph("✗", "bad", 4),
        "error": Glyph("✗", "bad", 3),
        "warning": Glyph("▲", "warn", 2),
        "info": Glyph("·", "", 1),
        "debug": Glyph("·", "dim"),
    },
    "outcome": {
        "done": Glyph("✓", "good"),
        "refused": Glyph("✗", "bad", 1),
    },
}

#: For headings and breadcrumbs, beside tagged and followed rows, for unknown values, and where text was cut.
SORT_DOWN, SORT_UP = "↓", "↑"
TAGGED, FOLLOWED, CURSOR = "◆", "»", "▌"
CRUMB, NOTHING, CUT = "›", "–", "…"
BLOCKS = "▁▂▃▄▅▆▇█"
BAR_FULL, BAR_HALF, BAR_EMPTY = "━", "╸", "─"

#: Each replacement is as wide as its glyph, so nothing moves. Textual draws borders with boxes and blocks.
_ASCII = str.maketrans(
    {
        **dict(zip("●✗▽○‖▲▸◌↑⊘✓·↓◆»▌›–…━╸─", "*xvo=!>.^/+.v#>|>-~#--", strict=True)),
        **dict(zip(BLOCKS, "_.-:=+*#", strict=True)),
        **dict.fromkeys("│┃║▏▎▍▐▕", "|"),
        **dict.fromkeys("═▔", "-"),
        **dict.fromkeys("┌┐└┘├┤┬┴┼╭╮╰╯┏┓┗┛╔╗╚╝╶╴╷╵╺╹╻", "+"),
        **dict.fromkeys("▊▋▉▀", "#"),
        "’": "'",
        "→": ">",
        "←": "<",
    }
)


def look(kind: Kind, state: str) -> Glyph:
    """How this state is shown; a state that only a newer relay knows gets a dot."""
    return GLYPHS[kind].get(state, _UNKNOWN)


def mark(kind: Kind, state: str) -> str:
    """The glyph and the word of a state."""
    return f"{look(kind, state).glyph} {state}"


def to_ascii(text: str) -> str:
    """Replace our own glyphs in `text` by ASCII; other characters stay."""
    return text if text.isascii() else text.translate(_ASCII)
