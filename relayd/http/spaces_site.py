"""The two routes of the WebSocket Spaces site that programs called: submit a prompt to a space, and ask for its result.

The paths, the form's `prompt`, `request_id`, `status` with `completed` and `failed`, `result` with `error`, and the
refusal of a space that has no worker are those of the site; a token is needed as everywhere.
"""

import secrets
import time
import uuid
from typing import Any

import trio
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute, Route

from protocol.wire.errors import ErrorCode
from protocol.wire.validators import Value, kind_of
from relayd.auth.result_links import LinkGrant
from relayd.core.space import Space
from relayd.http.authentication import LINK, principal_of, result_name
from relayd.http.body_parser import Body, open_uploads
from relayd.http.context import context_of
from relayd.http.errors import HttpError
from relayd.http.openai.chat_request import MESSAGES
from relayd.http.openai.speech_request import PARAMS
from relayd.http.request_stream import find_request, open_submission, wait_safe
from relayd.http.requests_api.outputs import outputs_of
from relayd.http.requests_api.submission import build_submit, find_space, input_limits
from relayd.requests.request import Request
from relayd.scheduling.model import State

PREFIX = "/websockets/"
#: The site's name of a state, where it differs.
_STATES = {State.RUNNING: "processing", State.CANCELLED: "failed"}
#: How long a link to a result is good.
LINK_S = 3600


def routes() -> list[BaseRoute]:
    """Return the routes of the site."""
    return [
        Route(f"{PREFIX}submit/{{space}}", submit, methods=["POST"]),
        Route(f"{PREFIX}status", status),
    ]


def error_body(refusal: HttpError) -> dict[str, Value]:
    """Return the body of an error response of the site."""
    return {"success": False, "message": refusal.message, "error": refusal.message}


async def submit(http: HttpRequest) -> Response:
    """Submit a form with a `prompt`, and files, to a space."""
    space, context = find_space(http, http.path_params["space"]), context_of(http)
    with open_uploads(http) as uploads:
        body = await uploads.read(input_limits(http, space))
        if not context.relay.workers.serving(space.name):
            chinese = http.headers.get("accept-language", "").lower().startswith("zh")
            message = "远程应用未连接" if chinese else "Remote app not connected"
            raise HttpError(ErrorCode.NO_WORKER, message, retryable=True)
        form = Body(_params(space, body.fields) | {"detach": True}, body.uploads, is_form=True)
        order = build_submit(secrets.token_hex(16), space, form)
        inputs = {name: upload.data for name, upload in body.uploads.items()}
        async with open_submission(http, order, inputs, keep=True) as held:
            await wait_safe(http, held.request)
            place = held.place()
            answer = {"success": True, "request_id": order.request_id, "status": _state(held.request)}
            return JSONResponse(answer | {"queue_size": place.of if place else 0})


def _params(space: Space, fields: dict[str, Value]) -> dict[str, Value]:
    """The fields that the space has params for, and the prompt by the name that it has there."""
    if not isinstance(prompt := fields.get("prompt", ""), str):
        what = f"must be a string, not {kind_of(prompt)}"
        raise HttpError(ErrorCode.INVALID_PARAMS, f"prompt {what}", details={"prompt": what})
    known = space.params.get("properties") or fields
    params = {name: value for name, value in fields.items() if name in known}
    if "prompt" not in fields or "prompt" in known:
        return params
    if (name := next((name for name in PARAMS["input"] if name in known), None)) is not None:
        return params | {name: prompt}
    if MESSAGES in known:
        return params | {MESSAGES: [{"role": "user", "content": prompt}]}
    what = f"is not accepted by space {space.name!r}; it accepts {', '.join(sorted(known))}"
    raise HttpError(ErrorCode.INVALID_PARAMS, f"prompt {what}", details={"prompt": what})


async def status(http: HttpRequest) -> Response:
    """Tell how far a request is, and its result once it has ended."""
    principal_of(http)
    asked = http.query_params.get("request_id", "")
    if not asked:
        raise HttpError(ErrorCode.INVALID_PARAMS, "name the request: /websockets/status?request_id=ID", status=400)
    try:
        request_id = uuid.UUID(asked).hex  # with hyphens or without
    except ValueError:
        request_id = asked
    request = find_request(http, request_id)
    request.renew(trio.current_time())
    await wait_safe(http, request)
    place = context_of(http).relay.scheduler.position(request.entry, trio.current_time())
    return JSONResponse(
        {
            "success": True,
            "request_id": request.request_id,
            "status": _state(request),
            "result": None if request.live else await _result(http, request),
            "progress": request.fraction,
            "queue_position": place.position if place else 0,
            "processing_time": request.outcome.run_s,
        }
    )


def _state(request: Request) -> str:
    return _STATES.get(request.entry.state, str(request.entry.state))


async def _result(http: HttpRequest, request: Request) -> dict[str, Any]:
    """What the site's remote programs sent as `result`: their own object, or `output`; of a failure, `error`."""
    if request.entry.state is not State.COMPLETED:
        return {"error": request.message or "the request was cancelled"}
    if request.audio_s is not None:
        return {"output": _link(http, request, "audio"), "duration": request.audio_s}
    outputs = await outputs_of(http, request)
    if outputs is None:  # too much for a status
        return {"output": _link(http, request, "output")}
    texts = [each for each in outputs if isinstance(each, str)]
    others = [each for each in outputs if not isinstance(each, str)]
    result: dict[str, Any] = others[-1] if others and isinstance(others[-1], dict) else {}
    if texts:
        return {"output": "".join(texts)} | result
    return result or {"output": outputs[0] if len(outputs) == 1 else outputs}


def _link(http: HttpRequest, request: Request, what: str) -> str:
    """The URL of a result: for everybody and an hour, if the relay makes such links."""
    context, url = context_of(http), f"/v1/requests/{request.request_id}/{what}"
    if (most := context.relay.config.http.link_s) == 0:
        return url
    grant = LinkGrant(int(time.time()) + min(most, LINK_S), principal_of(http).link_id)
    return f"{url}?{LINK}={context.links.make(result_name(request), grant)}"
