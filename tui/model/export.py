"""Writes rows to a file, as CSV or JSON."""

import csv
import io
import json
import os
import time
from collections.abc import Sequence
from pathlib import Path

from protocol.wire.validators import Value
from tui.model.relay_model import RowView

#: A spreadsheet takes a cell that begins with one of these for a formula.
_FORMULA = ("=", "+", "-", "@", "\t", "\r")


def suggested_name(kind: str) -> str:
    """A default file name for the rows of a table."""
    return f"relay-{kind}-{time.strftime('%Y%m%d-%H%M%S')}.csv"


def write_rows(path: Path, views: Sequence[RowView]) -> None:
    """Write the rows in order to a new file that only its owner can read: JSON if its name ends in .json, else CSV.

    Raises:
        OSError: the file exists already or cannot be written.
    """
    rows = [dict(view.row) for view in views]
    text = json.dumps(rows, ensure_ascii=False, indent=1) + "\n" if path.suffix.lower() == ".json" else _csv(rows)
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
    with os.fdopen(handle, "w", encoding="utf-8", newline="") as file:
        file.write(text)


def _csv(rows: Sequence[dict[str, Value]]) -> str:
    names = list(dict.fromkeys(name for row in rows for name in row))
    out = io.StringIO()
    writer = csv.writer(out)
    writer.writerow(names)
    writer.writerows([_cell(row.get(name)) for name in names] for row in rows)
    return out.getvalue()


def _cell(value: Value) -> object:
    if value is None or isinstance(value, bool | int | float):
        return value
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    return f"'{text}" if text.startswith(_FORMULA) else text
