"""Finds what a person means by the beginning of an id, as screens and file names show it."""

import re
from collections.abc import Mapping

from protocol.client.client import RelayClient
from protocol.wire.errors import ErrorCode, RequestRejected
from protocol.wire.structs import ID_PATTERN
from protocol.wire.validators import Value

#: Ids that a refusal lists.
MAX_TOLD = 20


class AmbiguousId(ValueError):
    """The beginning of several ids.

    Attributes:
        details: the ids, and what each is.
    """

    def __init__(self, given: str, kind: str, count: int, details: Mapping[str, str]) -> None:
        more = f", {count - len(details)} of them not listed" if count > len(details) else ""
        super().__init__(f"{given!r} is the beginning of {count} {kind} ids{more}; give more of one of them")
        self.details = dict(details)


def check_request_id(given: str) -> str:
    """Return what may be the id of a request, or its beginning.

    Raises:
        ValueError: it is neither.
    """
    if not re.fullmatch("[0-9a-f]{1,32}", given):
        raise ValueError(f"{given!r} is not a request id (32 lower-case hex digits), nor the beginning of one")
    return given


async def find_request_id(relay: RelayClient, given: str) -> str:
    """Return the request id that `given` is, or is the beginning of.

    Raises:
        ValueError: it is neither, or the beginning of several (`AmbiguousId`).
        RequestRejected: `request_not_found`: no request of this principal begins with it.
    """
    if ID_PATTERN.fullmatch(check_request_id(given)):
        return given
    rows, total = await relay.find(given, limit=MAX_TOLD)
    if not rows:
        message = f"no request that you may see begins with {given}; see relay requests"
        raise RequestRejected(given, ErrorCode.REQUEST_NOT_FOUND, message)
    if total > 1:
        raise AmbiguousId(given, "request", total, {str(row["request_id"]): _described(row) for row in rows})
    return str(rows[0]["request_id"])


def _described(row: Mapping[str, Value]) -> str:
    return f"{row.get('state')}, space {row.get('space')}, of {row.get('principal')}, {row.get('age_s')} s old"
