"""The models of OpenAI's API: the space that each stands for, and the lists of models and voices."""

from contextlib import suppress

import attrs
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from protocol.wire.errors import ErrorCode
from protocol.wire.messages import Rejected
from protocol.wire.validators import Value
from relayd.auth.tokens import Principal
from relayd.core.access import find_space
from relayd.core.relay import Relay
from relayd.core.space import Space
from relayd.http.authentication import principal_of
from relayd.http.context import HttpContext, context_of
from relayd.http.errors import HttpError
from relayd.http.openai.names import KINDS, SPEECH, Kind, kinds_of, space_named, spaces_of
from relayd.http.openai.speech_request import DEFAULT_VOICE, voices_of

#: Names that a refusal lists.
MAX_MODELS_TOLD = 16
_ANYBODY = Principal(name="anybody", role="client")


def space_of(context: HttpContext, principal: Principal, model: str, kind: Kind) -> Space:
    """Return the space that a client calls a model, or that the model stands for where this kind of space is asked.

    Raises:
        HttpError: 403 for a name that the token may not use, whether or not the space exists; 404 for other unknown
            names.
    """
    relay = context.relay
    name = space_named(model, relay.spaces, principal, relay.config.openai, kind)
    space = find_space(relay, principal, name)
    if not isinstance(space, Rejected):
        return space
    if name != model and space.code == ErrorCode.FORBIDDEN:  # its name is the operator's own
        message = f"principal {principal.name!r} may not use model {model[:64]!r}; ask for a token that may"
        raise HttpError(ErrorCode.FORBIDDEN, message)
    if name != model:
        what = f"; model {model[:64]!r} stands for it ([openai] models of relayd.toml)"
    elif space.code == ErrorCode.SPACE_NOT_FOUND and (others := spaces_of(kind, relay.spaces.values(), principal)):
        what = f"; models are {', '.join(other.name for other in others[:MAX_MODELS_TOLD])} (GET /v1/models)"
    else:
        what = ""
    raise HttpError.of(attrs.evolve(space, message=space.message + what))


async def list_models(request: Request) -> Response:
    """List the spaces that speak, write replies or transcribe, as models."""
    relay = context_of(request).relay
    found = {space.name: space for kind in KINDS for space in _spaces(request, kind)}
    return JSONResponse({"object": "list", "data": [_model(relay, found[name]) for name in sorted(found)]})


async def show_model(request: Request) -> Response:
    """Return one model, or what a name stands for, under that name."""
    context, reader, name = context_of(request), _reader(request), request.path_params["model"]
    *others, last = kinds_of(name)
    for kind in others:
        with suppress(HttpError):
            return JSONResponse(_model(context.relay, space_of(context, reader, name, kind), name))
    return JSONResponse(_model(context.relay, space_of(context, reader, name, last), name))


async def list_audio_models(request: Request) -> Response:
    """List the models that speak, in Open WebUI's format."""
    rows = [{"id": space.name, "name": space.config.description or space.name} for space in _spaces(request, SPEECH)]
    return JSONResponse({"models": rows})


async def list_voices(request: Request) -> Response:
    """List the voices of the space in `?model=`, or of all spaces that speak."""
    name = request.query_params.get("model")
    spaces = [space_of(context_of(request), _reader(request), name, SPEECH)] if name else _spaces(request, SPEECH)
    models_by_voice: dict[str, list[str]] = {}
    for space in spaces:
        for voice in dict.fromkeys((DEFAULT_VOICE, *(voices_of(space) or ()))):
            models_by_voice.setdefault(voice, []).append(space.name)
    return JSONResponse(
        {"voices": [{"id": voice, "name": voice, "models": models} for voice, models in models_by_voice.items()]}
    )


def _reader(request: Request) -> Principal:
    """Who asks what there is. Some programs ask without the key that they have: Open WebUI does."""
    without_key = request.headers.get("authorization", "").strip().lower() in ("", "bearer")
    if without_key and context_of(request).relay.config.http.lists == "public":
        return _ANYBODY
    return principal_of(request)


def _spaces(request: Request, kind: Kind) -> list[Space]:
    """Return the spaces of a kind that the principal may use, sorted by name."""
    return spaces_of(kind, context_of(request).relay.spaces.values(), _reader(request))


def _model(relay: Relay, space: Space, name: str | None = None) -> dict[str, Value]:
    ready = relay.workers.serving(space.name) and not relay.scheduler.state.spaces[space.name].paused
    model = {"id": name or space.name, "object": "model", "created": int(space.created_at), "owned_by": "relayd"}
    return model | {"ready": ready}
