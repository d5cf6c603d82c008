"""Chooses the rows that a listing shows, as its options `--space`, `--state`, `--principal` and `--limit` say."""

import argparse
import sys
from collections.abc import Sequence
from fnmatch import fnmatchcase

from protocol.wire.validators import Value

Row = dict[str, Value]


def chosen(rows: Sequence[Row], args: argparse.Namespace) -> list[Row]:
    """The rows that `args` ask for, in their order; a note on standard error says how many `--limit` left out."""
    found = [row for row in rows if all(_fits(row, name, getattr(args, name, None)) for name in _KEYS)]
    most = getattr(args, "limit", None)
    if most is None or len(found) <= most:
        return found
    print(f"{len(found) - most} more are left out by --limit", file=sys.stderr)
    return found[:most]


#: Option -> the keys of rows that it is compared with; the first that a row has.
_KEYS = {"space": ("space", "spaces", "name"), "state": ("state",), "principal": ("principal",)}


def _fits(row: Row, name: str, wanted: Sequence[str] | None) -> bool:
    if not wanted:
        return True
    value = next((row[key] for key in _KEYS[name] if key in row), None)
    values = value if isinstance(value, list | tuple) else [value]
    return any(fnmatchcase(str(each), pattern) for each in values for pattern in wanted)
