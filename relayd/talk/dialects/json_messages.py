"""Messages that are JSON objects: how they are parsed, and how errors name what is in them. Pure."""

import json
from typing import Any

#: Of what a client has sent, in an error that names it.
MAX_SHOWN_CHARS = 128


def parse_object(text: str) -> dict[str, Any]:
    """Parse a message.

    Raises:
        ValueError: it is not a JSON object.
    """
    try:
        value = json.loads(text, parse_constant=str)  # NaN is no JSON: what is sent back must not have it
    except json.JSONDecodeError:
        raise
    except (ValueError, RecursionError) as fault:
        is_deep = isinstance(fault, RecursionError)
        raise ValueError("it is nested too deeply" if is_deep else "it has a number that is too long") from None
    if not isinstance(value, dict):
        raise ValueError("it is not an object")
    return value


def shown(value: object) -> str:
    """Return a value that a client has sent, as an error names it."""
    if isinstance(value, list | dict):
        return "an array" if isinstance(value, list) else "an object"
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= MAX_SHOWN_CHARS else f"{text[:MAX_SHOWN_CHARS]}…"
