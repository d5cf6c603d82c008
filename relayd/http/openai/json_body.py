"""Reads the JSON body of a request to OpenAI's API, and words what is wrong with its fields. Pure."""

import json
import re
from collections.abc import Mapping
from itertools import islice
from typing import Any

from protocol.wire.errors import ErrorCode
from protocol.wire.validators import kind_of
from relayd.http.errors import HttpError

#: Values in a body; parsing as many takes 20 ms.
MAX_BODY_VALUES = 100_000
#: Fields of a body, and characters of the name of a field, a model or a voice: every name is looked at.
MAX_FIELDS, MAX_NAME_CHARS = 256, 256
#: Limits of a refusal: names of fields come from the client, in any number and length.
MAX_FAULTS, MAX_FIELD_CHARS = 16, 64
#: A string, also one without an end, as everything behind would be looked at again and again otherwise.
_STRING = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+(?:"|\\?\Z)', re.DOTALL)


def read_fields(body: bytes) -> dict[str, Any]:
    """Parse a body.

    Raises:
        HttpError: 400 if it is not a JSON object, 413 if it holds too many values.
    """
    if _values(body) > MAX_BODY_VALUES and _values(_STRING.sub(b"", body)) > MAX_BODY_VALUES:
        raise HttpError(ErrorCode.INPUT_TOO_LARGE, f"the body holds more than {MAX_BODY_VALUES} values")
    try:
        fields = json.loads(body, parse_constant=str)
    except (ValueError, RecursionError) as fault:
        why = str(fault) if isinstance(fault, json.JSONDecodeError) else "it is not UTF-8, or nested too deeply"
        raise HttpError("invalid_json", f"the body must be JSON: {why}", status=400) from None
    if not isinstance(fields, dict):
        raise HttpError("invalid_json", f"the body must be a JSON object, not {kind_of(fields)}", status=400)
    if len(fields) > MAX_FIELDS or any(len(name) > MAX_NAME_CHARS for name in fields):
        message = f"a body may have {MAX_FIELDS} fields, whose names have at most {MAX_NAME_CHARS} characters"
        raise HttpError(ErrorCode.INPUT_TOO_LARGE, message)
    return fields


def _values(body: bytes) -> int:
    """About how many values there are; marks in texts count too."""
    return sum(map(body.count, (b",", b"[", b"{")))


def invalid(faults: Mapping[str, str], *, status: int = 422) -> HttpError:
    """The error for faults of fields: field -> what is wrong."""
    faults = {field[:MAX_FIELD_CHARS]: what for field, what in islice(faults.items(), MAX_FAULTS)}
    message = "; ".join(f"{field}: {what}" for field, what in faults.items())
    return HttpError(ErrorCode.INVALID_PARAMS, message, status=status, details=faults)
