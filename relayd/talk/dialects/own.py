"""relayd's own way to talk over HTTP: `/v1/talks`. docs/talk.md describes it; what is said comes to `own_say`."""

from starlette.endpoints import HTTPEndpoint
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute, Route

from protocol.wire.validators import Rule, choice, integer, optional, text
from relayd.http.authentication import principal_of
from relayd.http.body_parser import MAX_FIELDS_BYTES
from relayd.http.errors import HttpError
from relayd.http.streaming_response import StreamingRoute
from relayd.talk.dialects.access import fields_of, open_named, or_refuse, talks_of
from relayd.talk.dialects.ice import ice_servers
from relayd.talk.dialects.own_say import say
from relayd.talk.dialects.talk_json import talk_json, turn_json
from relayd.talk.dialects.whep import OneCall, call_by_whep
from relayd.talk.talks import MAX_INSTRUCTIONS_CHARS, MAX_SESSION_CHARS, MAX_USER_CHARS

#: A text that is too long for a turn is refused where all are; no field is longer than a body.
_text, _user = text(MAX_FIELDS_BYTES), text(MAX_USER_CHARS)
_instructions = optional(text(MAX_INSTRUCTIONS_CHARS))
_NEW: dict[str, Rule] = {"session": text(MAX_SESSION_CHARS), "user": _user, "instructions": _instructions}
_TURN: dict[str, Rule] = {"role": choice("user", "assistant", "system"), "content": _text, "user": _user}
_INTERRUPT: dict[str, Rule] = {"user": _user, "reason": text(200)}
_HEARD: dict[str, Rule] = {"user": _user, "number": integer(0), "samples": integer(0)}


def routes() -> list[BaseRoute]:
    """Return the routes."""
    one = "/v1/talks/{talk}"
    return [
        Route("/v1/talk/ice", ice_servers, methods=["GET"]),
        Route("/v1/talks", AllTalks),
        Route(one, OneTalk),
        Route(f"{one}/turns", Turns),
        Route(f"{one}/turns/{{number:int}}", delete_turn, methods=["DELETE"]),
        Route(f"{one}/say", StreamingRoute(say), methods=["POST"]),
        Route(f"{one}/interrupt", interrupt, methods=["POST"]),
        Route(f"{one}/heard", note_played, methods=["POST"]),
        Route(f"{one}/whep", call_by_whep, methods=["POST", "OPTIONS"]),
        Route(f"{one}/whep/{{call}}", OneCall),
    ]


class AllTalks(HTTPEndpoint):
    """The conversations of the principal."""

    async def get(self, http: Request) -> Response:
        """List them, the one in which something was said last first; with `?user=`, those of one user."""
        talks = talks_of(http)
        found = talks.list(principal_of(http), http.query_params.get("user"))
        settings = talks.place.settings
        can = {"transcribes": bool(settings.transcribe), "calls": bool(settings.calls)}
        return JSONResponse({"talks": list(map(talk_json, found)), **can})

    async def post(self, http: Request) -> Response:
        """Begin one, with an id of its own or one that the client gives; one that is there is opened."""
        principal, fields = principal_of(http), await fields_of(http, _NEW)
        talks, session, user = talks_of(http), fields.get("session") or None, fields.get("user", "")
        known = session is not None and talks.find(principal, session, user) is not None
        talk = or_refuse(await talks.open(principal, session, user, instructions=fields.get("instructions")))
        or_refuse(await talks.settle())
        headers = {"Location": f"/v1/talks/{talk.talk_id}"}
        return JSONResponse(talk_json(talk.record), 200 if known else 201, headers=headers)


class OneTalk(HTTPEndpoint):
    """One conversation, by its id or by its session."""

    async def get(self, http: Request) -> Response:
        """Return what is known of it, and whether a reply is being made."""
        talk = await open_named(http)
        return JSONResponse(talk_json(talk.record) | {"turns": len(talk.turns), "unended": len(talk.replies)})

    async def delete(self, http: Request) -> Response:
        """Delete it with all of its turns; a reply that is being made is interrupted."""
        or_refuse(await talks_of(http).delete(await open_named(http)))
        return Response(status_code=204)


class Turns(HTTPEndpoint):
    """What was said and replied in one conversation."""

    async def get(self, http: Request) -> Response:
        """List the turns, in order; a reply that is being made has what has come so far."""
        return JSONResponse({"turns": list(map(turn_json, (await open_named(http)).turns))})

    async def post(self, http: Request) -> Response:
        """Add a turn that is not answered."""
        principal_of(http)
        fields = await fields_of(http, _TURN, "role", "content")
        talk = await open_named(http, fields.get("user"))
        return JSONResponse(turn_json(or_refuse(await talk.add(fields["role"], fields["content"]))), 201)


async def delete_turn(http: Request) -> Response:
    """Delete a turn that has ended."""
    talk, number = await open_named(http), http.path_params["number"]
    if not talk.delete_turn(number):
        raise HttpError("not_found", f"there is no turn {number} that has ended", status=404)
    or_refuse(await talks_of(http).settle())
    return Response(status_code=204)


async def interrupt(http: Request) -> Response:
    """End the reply that is being made, and keep what was heard of it."""
    principal_of(http)
    fields = await fields_of(http, _INTERRUPT)
    talk = await open_named(http, fields.get("user"))
    reason = fields.get("reason") or "interrupted by the client"
    return JSONResponse({"interrupted": await talk.interrupt_for_good(reason)})


async def note_played(http: Request) -> Response:
    """Note how much of the speech of a reply was played."""
    principal_of(http)
    fields = await fields_of(http, _HEARD, "number", "samples")
    talk = await open_named(http, fields.get("user"))
    if talk.note_played(fields["number"], fields["samples"]):
        or_refuse(await talks_of(http).settle())
    return Response(status_code=204)
