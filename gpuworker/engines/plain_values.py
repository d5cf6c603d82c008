"""Turns the values that programs return into those that a message has; imports none of the libraries they come from."""

import dataclasses
import datetime
import decimal
import enum
import math
import os
import uuid
from collections.abc import Mapping, Set
from typing import Any

from protocol.wire.validators import Value

#: Deeper than any message may be nested; a value that contains itself ends here.
MAX_DEPTH = 32


def plain(value: Any, depth: int = 0) -> Value:
    """`value` with numbers and lists for scalars and arrays of numpy, torch and their like, lists for tuples and sets,
    maps for dataclasses and named tuples, and text for dates, paths and ids. What else it contains is left as it is.

    Raises:
        ValueError: it contains an array that no message has room for.
    """
    if value is None or type(value) in (bool, int, float, str, bytes) or depth > MAX_DEPTH:
        return value
    if isinstance(value, enum.Enum):
        return plain(value.value, depth + 1)
    if isinstance(value, Mapping):
        return {_key(key): plain(inner, depth + 1) for key, inner in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_asdict"):
        return plain(value._asdict(), depth)
    if isinstance(value, list | tuple | Set):
        return [plain(inner, depth + 1) for inner in value]
    if isinstance(value, bytearray | memoryview):
        return bytes(value)
    if isinstance(value, datetime.date | datetime.time):
        return value.isoformat()
    if isinstance(value, datetime.timedelta):
        return value.total_seconds()
    if isinstance(value, decimal.Decimal):
        return float(value)
    if isinstance(value, os.PathLike | uuid.UUID):
        return str(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain(getattr(value, field.name), depth + 1) for field in dataclasses.fields(value)}
    if is_array(value):
        from protocol.wire.codec import MAX_VALUES  # here, for `gpuworker engines` needs no msgpack

        if math.prod(value.shape) > MAX_VALUES:
            raise ValueError(f"an array of {math.prod(value.shape)} values; yield it in parts, or as array.tobytes()")
        value = value.detach().cpu() if hasattr(value, "detach") else value  # torch, perhaps on the GPU
        return plain(value.tolist(), depth)
    if hasattr(value, "dtype") and hasattr(value, "item"):
        return plain(value.item(), depth)
    if (dump := getattr(value, "model_dump", None)) is not None and not isinstance(value, type):  # pydantic
        return plain(dump(), depth + 1)
    return value


def is_array(value: Any) -> bool:
    """Whether it is an array of numpy, torch or their like, or one of their scalars."""
    return (
        hasattr(value, "__array__") and hasattr(value, "dtype") and hasattr(value, "shape") and hasattr(value, "tolist")
    )


def _key(key: Any) -> Any:
    """A key as JSON has it: text."""
    key = key if isinstance(key, tuple | Set) else plain(key)
    if isinstance(key, bool) or key is None:
        return {None: "null", True: "true", False: "false"}[key]
    return str(key) if isinstance(key, int | float) else key
