"""Calls of a conversation by WHEP, as a player opens, feeds and ends them."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from relayd.talk.dialects.whep import candidates_of
from tests.relayd.http.sample_handlers import make_token
from tests.support.calling import CALLS, OFFER, SPEAKS, Gateway, gateway, silence, tone
from tests.support.raw_http_client import Answer, Visitor, visitor
from tests.support.talking import Stage, speech_of, stage
from tests.support.until import until

SDP = {"content-type": "application/sdp"}
FRAGMENT = {"content-type": "application/trickle-ice-sdpfrag"}
LINES = """a=ice-ufrag:abcd\r
m=audio 9 UDP/TLS/RTP/SAVPF 111\r
a=mid:0\r
a=candidate:1 1 udp 2122260223 192.0.2.5 54321 typ host\r
m=video 9 UDP/TLS/RTP/SAVPF 96\r
a=mid:1\r
a=candidate:2 1 udp 2122260222 192.0.2.5 54322 typ host\r
a=end-of-candidates\r
"""
SPACES = CALLS | {"stt": {}}
WITH_UFRAG = OFFER + "a=ice-ufrag:abcd\r\n"


@asynccontextmanager
async def player(tmp_path: Path, **options: Any) -> AsyncIterator[tuple[Stage, Gateway, Visitor]]:
    """A daemon with a language model, a voice and a gateway, and a conversation `s1` to call."""
    talk = {"calls": "calls"} | options.pop("talk", {})
    async with stage(tmp_path, listen="127.0.0.1:0", talk=talk, spaces=SPACES, **options) as on:
        await on.writer()
        await on.speaker()
        calls = await gateway(on)
        async with visitor(on.daemon.urls[0], token=make_token(on.daemon)) as http:
            assert (await http.ask("POST", "/v1/talks", told={"session": "s1"})).status == 201
            yield on, calls, http


async def call(http: Visitor, offer: str = WITH_UFRAG) -> Answer:
    return await http.ask("POST", "/v1/talks/s1/whep", body=offer.encode(), headers=SDP)


@pytest.mark.trio
async def test_what_is_said_is_heard_on_the_call(tmp_path: Path) -> None:
    webrtc = {"stun_urls": ["stun:stun.example.org"]}
    async with player(tmp_path, webrtc=webrtc) as (_on, calls, http):
        answer = await call(http)
        assert (answer.status, answer.headers["content-type"]) == (201, "application/sdp")
        assert answer.body.decode() == f"answer 0 to {WITH_UFRAG}"
        assert answer.headers["link"] == '<stun:stun.example.org>; rel="ice-server"'
        (peer,) = calls.peers
        assert answer.headers["location"].endswith(f"/whep/{peer}")
        said = (await http.ask("POST", "/v1/talks/s1/say", told={"text": "Hello."})).json
        await until(lambda: bytes(calls.heard[peer]) == speech_of(said["text"]))
        assert (await http.ask("DELETE", answer.headers["location"])).status == 200
        await until(lambda: not calls.peers)
        assert (await http.ask("DELETE", answer.headers["location"])).status == 404
        assert (await http.get("/v1/talks")).json["calls"] is True


@pytest.mark.trio
async def test_an_interruption_silences_the_call_and_the_history_has_what_was_heard(tmp_path: Path) -> None:
    async with player(tmp_path) as (_on, calls, http):
        calls.stops_at = 95
        assert (await call(http)).status == 201
        said = (await http.ask("POST", "/v1/talks/s1/say", told={"text": "Hello."})).json
        (peer,) = calls.peers
        await until(lambda: len(calls.heard[peer]) == 2 * 95)
        assert (await http.ask("POST", "/v1/talks/s1/interrupt", told={})).json == {"interrupted": True}
        assert bytes(calls.heard[peer]) == speech_of(said["text"])[: 2 * 95]
        turn = (await http.get("/v1/talks/s1/turns")).json["turns"][-1]
        assert turn["content"][: turn["heard_chars"]] == "You said:"


@pytest.mark.trio
async def test_without_a_gateway_a_call_is_refused_for_now(tmp_path: Path) -> None:
    async with (
        stage(tmp_path, listen="127.0.0.1:0", talk={"calls": "calls"}, spaces=CALLS) as on,
        visitor(on.daemon.urls[0], token=make_token(on.daemon)) as http,
    ):
        await http.ask("POST", "/v1/talks", told={"session": "s1"})
        refused = await call(http)
        assert (refused.status, refused.error["code"], "retry-after" in refused.headers) == (503, "no_worker", True)


@pytest.mark.trio
async def test_another_call_takes_the_place_of_the_one_before(tmp_path: Path) -> None:
    async with player(tmp_path) as (_on, calls, http):
        first = (await call(http)).headers["location"]
        second = (await call(http)).headers["location"]
        await until(lambda: list(calls.peers) == [second.rpartition("/")[2]])
        assert (await http.ask("DELETE", first)).status == 404


@pytest.mark.trio
async def test_candidates_are_passed_on(tmp_path: Path) -> None:
    async with player(tmp_path) as (_on, calls, http):
        answer = await call(http)
        where, etag = answer.headers["location"], answer.headers["etag"]

        async def patch(fragment: str, **headers: str) -> int:
            told = await http.ask("PATCH", where, body=fragment.encode(), headers=FRAGMENT | headers)
            assert "etag" not in told.headers, "only a restart of ICE would tell a new one"
            return told.status

        assert await patch(LINES, **{"if-match": etag}) == 204
        await until(lambda: len(calls.commands) == 2)
        assert calls.commands == [{"candidate": candidate} for candidate in candidates_of(LINES)]
        assert await patch(LINES, **{"if-match": f'"another", {etag}'}) == 204
        assert await patch(LINES, **{"if-match": '"another"'}) == 412
        assert await patch(LINES) == 428
        assert await patch("candidates, please", **{"if-match": etag}) == 422
        assert await patch(LINES.replace("abcd", "efgh"), **{"if-match": "*"}) == 422, "an ICE restart"
        assert (await http.ask("PATCH", where, body=b"{}", headers=SDP)).status == 415


@pytest.mark.trio
async def test_it_is_said_what_is_taken_and_other_methods_are_not_allowed(tmp_path: Path) -> None:
    async with player(tmp_path) as (_on, calls, http):
        where = (await call(http)).headers["location"]
        for path, header, taken in (
            ("/v1/talks/s1/whep", "accept-post", SDP),
            (where, "accept-patch", FRAGMENT),
        ):
            told = await http.ask("OPTIONS", path)
            assert (told.status, told.headers[header]) == (200, taken["content-type"])
            for method in ("GET", "PUT"):
                assert (await http.ask(method, path)).status == 405
        assert len(calls.peers) == 1


def test_candidates_are_told_as_browsers_tell_them() -> None:
    assert candidates_of(LINES) == [
        {"candidate": "candidate:1 1 udp 2122260223 192.0.2.5 54321 typ host", "sdpMid": "0", "sdpMLineIndex": 0},
        {"candidate": "candidate:2 1 udp 2122260222 192.0.2.5 54322 typ host", "sdpMid": "1", "sdpMLineIndex": 1},
    ]


@pytest.mark.trio
async def test_what_cannot_be_a_call_is_refused_in_words(tmp_path: Path) -> None:
    async with player(tmp_path) as (on, calls, http):
        assert (await http.ask("POST", "/v1/talks/s1/whep", told={"sdp": OFFER})).status == 415
        assert (await call(http, "v=1")).error["message"] == "the offer is no SDP; send what createOffer has made"
        assert (await http.ask("POST", "/v1/talks/s2/whep", body=OFFER.encode(), headers=SDP)).status == 404
        where = (await call(http)).headers["location"]
        async with visitor(on.daemon.urls[0], token=make_token(on.daemon, "bob")) as other:
            assert (await other.ask("DELETE", where)).status == 404, "of another principal"
        assert len(calls.peers) == 1
        assert (await call(http, "v=0\r\n" + "x" * 70_000)).status == 413


@pytest.mark.trio
async def test_without_a_space_for_calls_it_is_said_who_can_name_one(tmp_path: Path) -> None:
    async with player(tmp_path, talk={"calls": ""}) as (_on, _calls, http):
        answer = await call(http)
        assert (answer.status, answer.error["code"]) == (404, "space_not_found")
        assert "[talk] calls" in answer.error["message"]
        assert (await http.get("/v1/talks")).json["calls"] is False


@pytest.mark.trio
async def test_what_is_said_on_the_call_is_said_in_the_conversation_and_interrupts(tmp_path: Path) -> None:
    async with player(tmp_path, talk={"transcribe": "stt"}) as (on, calls, http):
        await on.listener("Hello.", "Stop.")
        calls.stops_at = 95
        assert (await call(http, SPEAKS)).status == 201
        calls.speak(tone(0.5) + silence(0.7))
        (peer,) = calls.peers
        await until(lambda: len(calls.heard[peer]) == 2 * 95)
        calls.stops_at = None
        calls.speak(tone(0.5))
        talk = await on.open("s1")
        await until(lambda: talk.turns[1].heard_chars is not None)
        calls.speak(silence(0.7))
        await until(lambda: [turn.state for turn in talk.turns] == ["done"] * 4)
        assert [turn.content[: turn.heard_chars] for turn in talk.turns] == [
            "Hello.", "You said:", "Stop.", "You said: Stop..",
        ]  # fmt: skip


@pytest.mark.trio
async def test_a_player_without_a_microphone_is_not_listened_to(tmp_path: Path) -> None:
    async with player(tmp_path, talk={"transcribe": "stt"}) as (_on, calls, http):
        for offer in (OFFER, SPEAKS.replace("a=sendrecv", "a=recvonly")):
            assert (await call(http, offer)).status == 201
            (peer,) = calls.peers
            assert "microphone" not in calls.peers[peer].assign.params
