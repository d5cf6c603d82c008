"""Encodes requests, frames and spaces as JSON."""

import base64
import json
import math
from typing import Any

import trio

from protocol.wire.validators import Message, Value
from relayd.core.relay import Relay
from relayd.http.errors import HttpError
from relayd.requests.request import Request
from relayd.scheduling.model import State
from relayd.views.rows import fed_inputs


def status_json(relay: Relay, request: Request) -> dict[str, Any]:
    """Return a request's status, as in the wire's `status`, with links."""
    entry, now = request.entry, trio.current_time()
    place = relay.scheduler.position(entry, now)
    url = f"/v1/requests/{request.request_id}"
    return {
        "request_id": request.request_id,
        "space": entry.space,
        "state": str(entry.state),
        "position": place.position if place else None,
        "of": place.of if place else None,
        "eta_s": place.eta_s if place else None,
        "attempt": entry.attempt,
        "next_seq": request.log.next_seq,
        "age_s": round(max(0.0, now - request.created_at), 3),
        "fraction": request.fraction,
        "audio_s": request.audio_s,
        "inputs": fed_inputs(request),
        "code": request.code and str(request.code),
        "message": request.message,
        "details": {} if request.live else jsonable(request.details),
        "retryable": request.outcome.retryable,
        "run_s": request.outcome.run_s,
        "result": jsonable(request.outcome.result) if entry.state is State.COMPLETED else None,
        "links": {"self": url} | {name: f"{url}/{name}" for name in ("events", "audio", "video", "output")},
    }


def error_json(refusal: HttpError) -> dict[str, Any]:
    """Return an error, as in the body of an error response and in an `error` event."""
    return {
        "code": refusal.code,
        "message": refusal.message,
        "retryable": refusal.retryable,
        "retry_after_s": refusal.retry_after_s,
        "details": jsonable(refusal.details),
    }


def frame_json(message: Message) -> dict[str, Any]:
    """Convert a wire message to JSON: the same names, with binary data in base64."""
    wire = message.to_map()
    fields = {name: jsonable(value) for name, value in wire.items()}
    if isinstance(pcm := wire.get("pcm"), bytes):
        fields["pcm"] = base64.b64encode(pcm).decode()
    return fields


def jsonable(value: Value) -> Any:
    """Convert a wire value to JSON: binary data to `{"base64": "…"}`, NaN and infinities to null."""
    if isinstance(value, bytes):
        return {"base64": base64.b64encode(value).decode()}
    if isinstance(value, dict):
        return {key: jsonable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [jsonable(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def format_sse(kind: str, data: dict[str, Any], event_id: str | None = None) -> bytes:
    """Encode a server-sent event (WHATWG HTML, section 9.2)."""
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"))
    head = f"id: {event_id}\n" if event_id is not None else ""
    return f"{head}event: {kind}\ndata: {text}\n\n".encode()
