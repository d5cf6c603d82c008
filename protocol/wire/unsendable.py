"""Says which values of a message cannot be encoded, and what to do about them. Pure."""

from collections.abc import Iterator
from itertools import islice

from protocol.wire.validators import Value, kind_of

#: Faults told at once, and the characters of each part of a path.
MAX_FAULTS, MAX_PART_CHARS = 16, 64
#: What msgpack can hold.
MIN_INT, MAX_INT = -(2**63), 2**64 - 1
_SCALARS = (str, bytes, bytearray, memoryview, bool, int, float, type(None))
_Path = tuple[str, ...]


def find_unsendable(wire: Value, *, depth: int, entries: int, items: int) -> dict[str, str]:
    """Return the places in a message, joined by dots, and what is wrong with each.

    Args:
        wire: the message.
        depth: how deep maps and arrays may be nested.
        entries: how many entries a map may have.
        items: how many items an array may have.
    """

    def walk(value: Value, path: _Path, left: int) -> Iterator[tuple[_Path, str]]:
        if isinstance(value, str):
            if (place := _bad_character(value)) is not None:
                yield path, f"is not UTF-8 at character {place}: send or save it as UTF-8, cut between characters"
        elif isinstance(value, int) and not MIN_INT <= value <= MAX_INT:
            yield path, "is a whole number of more than 64 bits: send it as text"
        elif isinstance(value, dict | list | tuple):
            most, what = (entries, "entries") if isinstance(value, dict) else (items, "items")
            if not left:
                yield path, f"is nested deeper than {depth}: send it flat, or as a file"
            elif len(value) > most:
                yield path, f"has {len(value):,} {what}, and may have {most:,}: send it as a file"
            elif isinstance(value, dict):
                for key, inner in value.items():
                    if not isinstance(key, str):
                        yield path, f"has the key {key!r:.32}, which is no string: use strings as keys"
                    else:
                        yield from walk(key, (*path, key), 0)
                        yield from walk(inner, (*path, key), left - 1)
            else:
                for place, inner in enumerate(value):
                    yield from walk(inner, (*path, str(place)), left - 1)
        elif not isinstance(value, _SCALARS):
            yield path, f"is {kind_of(value)}: send text, numbers, booleans, bytes, and lists and maps of them"

    faults: dict[str, str] = {}
    for path, words in islice(walk(wire, (), depth), MAX_FAULTS):
        faults.setdefault(_joined(path), words)
    return faults


def largest_value(wire: Value) -> tuple[str, int]:
    """Return where in a message its largest text or binary value is, and its size in bytes."""
    where, most = "", 0

    def walk(value: Value, path: _Path) -> None:
        nonlocal where, most
        if isinstance(value, dict | list | tuple):
            pairs = value.items() if isinstance(value, dict) else enumerate(value)
            for key, inner in pairs:
                walk(inner, (*path, str(key)))
        elif isinstance(value, str | bytes | bytearray | memoryview):
            size = len(value.encode("utf-8", "replace")) if isinstance(value, str) else len(value)
            if size > most:
                where, most = _joined(path), size

    walk(wire, ())
    return where, most


def _bad_character(text: str) -> int | None:
    """Return the number of the first character, from 1, that UTF-8 cannot encode; None if there is none."""
    try:
        text.encode()
    except UnicodeEncodeError as fault:
        return fault.start + 1
    return None


def _joined(path: _Path) -> str:
    return ".".join(part[:MAX_PART_CHARS] for part in path).encode("utf-8", "replace").decode()
