"""The values of a completed request, as far as they fit into its status."""

import json
from typing import Any

from starlette.requests import Request as HttpRequest

from protocol.wire.frames import Output
from relayd.http.errors import HttpError
from relayd.http.json_encoding import jsonable
from relayd.http.request_stream import open_reader
from relayd.requests.request import Request

#: Most bytes of frames that are read for a status, which a client may ask for every second.
MAX_READ_BYTES = 1024 * 1024
#: Most characters of values, as JSON, in a status.
MAX_CHARS = 64 * 1024


async def outputs_of(http: HttpRequest, request: Request) -> list[Any] | None:
    """Return the data of all `output` frames of a completed request; None if it is too much, or no longer kept."""
    if not request.outcome.has_outputs:
        return []
    if request.log.size_bytes > MAX_READ_BYTES:
        return None
    values: list[Any] = []
    chars = 0
    try:
        async with open_reader(http, request) as held:
            async for frame in held:
                if isinstance(frame, Output) and frame.mark is None:
                    values.append(jsonable(frame.data))
                    chars += len(json.dumps(values[-1], ensure_ascii=False))
                    if chars > MAX_CHARS:
                        return None
    except HttpError:  # the result cannot be read, but the status can be told
        return None
    return values
