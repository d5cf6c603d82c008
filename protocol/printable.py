"""Text that peers have chosen, escaped so that it cannot control a terminal, in output and in logs."""

import json
import unicodedata
from collections.abc import Callable
from typing import Any


def printable(text: str) -> str:
    """`text` with control characters and newlines escaped as Python writes them.

    Text chosen by a peer (a message, a name, a description) must neither control the terminal nor imitate a line of
    its own.
    """
    return text if text.isprintable() else "".join(c if _is_harmless(c) else ascii(c)[1:-1] for c in text)


def printable_lines(text: str) -> str:
    """Like `printable`, for text of several lines: newlines are kept."""
    return "\n".join(map(printable, text.split("\n")))


def printable_json(value: Any, default: Callable[[Any], Any] | None = None) -> str:
    """`value` as one line of JSON that cannot control a terminal: json.dumps does not escape 0x7f to 0x9f."""
    text = json.dumps(value, ensure_ascii=False, default=default)
    return text if text.isprintable() else "".join(c if _is_harmless(c) else json.dumps(c)[1:-1] for c in text)


def _is_harmless(char: str) -> bool:
    # Python does not count the spaces of other scripts, such as the ideographic one, as printable.
    return char.isprintable() or unicodedata.category(char) == "Zs"
