"""Requests over HTTP: submitted, listed, refused, held and cancelled."""

from pathlib import Path
from typing import Any

import pytest
import trio

from protocol.wire.frames import (
    Cancelled,
)
from protocol.wire.messages import (
    Ack,
    Cancel,
)
from relayd.store.records import TokenLimits
from tests.relayd.http.requests_api.answers import ALL, INPUTS, PCM, POST, one
from tests.support.fake_worker import fake_worker, identity
from tests.support.raw_http_client import visitor
from tests.support.relay import a_submit, an_id, daemon, peer, until

# -- submitting ------------------------------------------------------------------------------------------------------


@pytest.mark.trio
async def test_a_request_is_posted_asked_about_and_heard(tmp_path: Path) -> None:
    async with daemon(tmp_path) as relay, fake_worker(relay.url) as worker, visitor(relay.url) as http:
        posted = await http.ask("POST", POST, told={"params": {"text": "hello"}, "priority": 7})
        assert posted.status == 202
        told = posted.json
        assert posted.headers["location"] == told["links"]["self"] == one(posted)
        assert (told["space"], told["attempt"]) == ("tts", 1)
        assign = await worker.assigned()
        assert (assign.request_id, assign.params) == (told["request_id"], {"text": "hello"})
        assert (await http.get(one(posted))).json["state"] == "running"
        worker.speak(assign, PCM)
        heard = await http.get(told["links"]["audio"] + "?format=pcm")
        assert (heard.status, heard.body) == (200, ALL)
        await relay.at_rest()
        ended = (await http.get(one(posted))).json
        assert (ended["state"], ended["next_seq"], ended["code"], ended["audio_s"]) == ("completed", 5, None, 0.15)


@pytest.mark.trio
async def test_queued_requests_are_told_their_place_and_eta(tmp_path: Path) -> None:
    async with daemon(tmp_path) as relay, visitor(relay.url) as http:
        first = await http.ask("POST", POST, told={"params": {"text": "one"}})
        second = await http.ask("POST", POST, told={"params": {"text": "two"}})
        assert [(a.json["state"], a.json["position"], a.json["of"]) for a in (first, second)] == [
            ("queued", 1, 1),
            ("queued", 2, 2),
        ]
        async with fake_worker(relay.url) as worker:
            worker.speak(await worker.assigned(), PCM)
            worker.speak(await worker.assigned(), PCM)
            await relay.at_rest()
            assigned = [await http.ask("POST", POST, told={"params": {"text": text}}) for text in ("a", "b")]
            status = (await http.get(one(assigned[1]))).json
            assert (status["position"], status["of"]) == (1, 1)
            assert status["eta_s"] is not None
            for _ in range(2):
                worker.speak(await worker.assigned(), PCM)


@pytest.mark.trio
async def test_the_same_put_twice_is_one_request_and_another_under_its_id_is_a_conflict(tmp_path: Path) -> None:
    async with daemon(tmp_path) as relay, fake_worker(relay.url) as worker, visitor(relay.url) as http:
        path = f"/v1/requests/{an_id()}?space=tts"
        for _ in range(2):
            assert (await http.ask("PUT", path, told={"params": {"text": "hello", "rate": 2}})).status == 202
        assert (await http.ask("PUT", path, told={"params": {"rate": 2, "text": "hello"}})).status == 202
        other = await http.ask("PUT", path, told={"params": {"text": "other"}})
        assert (other.status, other.error["code"]) == (409, "id_conflict")
        worker.speak(await worker.assigned(), PCM)
        await relay.at_rest()
        again = await http.ask("PUT", path, told={"params": {"text": "hello", "rate": 2}})
        assert (again.status, again.json["state"]) == (200, "completed")
        assert len(relay.relay.requests) == 1


@pytest.mark.trio
async def test_a_websocket_client_and_an_http_client_mean_the_same_request(tmp_path: Path) -> None:
    submit = a_submit("hello")
    async with (
        daemon(tmp_path) as relay,
        fake_worker(relay.url) as worker,
        visitor(relay.url) as http,
        peer(relay.url, "client") as client,
    ):
        client.send(submit)
        assign = await worker.assigned()
        path = f"/v1/requests/{submit.request_id}"
        assert (await http.ask("PUT", f"{path}?space=tts", told={"params": {"text": "hello"}})).status == 202
        worker.speak(assign, PCM)
        assert (await http.get(f"{path}/audio?format=pcm")).body == ALL
        assert [frame.TYPE for frame in await client.frames(submit)][-1] == "completed"


@pytest.mark.trio
@pytest.mark.parametrize(
    ("told", "status", "code", "words"),
    [
        ({"params": {}}, 422, "invalid_params", "text"),
        ({"params": {"text": "x", "pitch": 1}}, 422, "invalid_params", "pitch"),
        ({"params": {"text": "x"}, "priority": 10}, 422, "invalid_params", "priority"),
        ({"params": {"text": "x"}, "priority": "high"}, 422, "invalid_params", "priority"),
        ({"params": {"text": "x"}, "text": "x"}, 422, "invalid_params", "'text'"),
        ({"params": "x"}, 422, "invalid_params", "params"),
        ({"params": {"text": "x" * 70_000}}, 422, "invalid_params", "text has 70000 bytes"),
        ({"params": {"text": "a\ud800"}}, 422, "invalid_params", "text is not UTF-8 at character 2"),
        (
            {"params": {"text": "x", "rate": 2**70}},
            422,
            "invalid_params",
            "rate is a whole number of more than 64",
        ),
        ({"params": {"text": "x", "a": [[{"b": 10**29}]]}}, 422, "invalid_params", "a.0.0.b is a whole number"),
        ([], 400, "bad_request", "object"),
    ],
)
async def test_what_the_space_or_the_wire_does_not_take_is_refused_in_words(
    tmp_path: Path, told: Any, status: int, code: str, words: str
) -> None:
    async with daemon(tmp_path) as relay, fake_worker(relay.url), visitor(relay.url) as http:
        await until(lambda: bool(relay.relay.spaces["tts"].params))
        answer = await http.ask("POST", POST, told=told)
        assert (answer.status, answer.error["code"]) == (status, code)
        assert words in answer.error["message"]
        assert not relay.relay.requests
        assert (await http.get("/v1/spaces")).status == 200, "the connection goes on"


@pytest.mark.trio
@pytest.mark.parametrize(
    ("body", "kind", "status"),
    [
        (b"{", "application/json", 400),
        (b'{"params": {"text": NaN}}', "application/json", 400),
        (b"[" * 100_000, "application/json", 400),
        (b"\xff\xfe", "application/json", 400),
        (b"text=%ff", "application/x-www-form-urlencoded", 400),
        (b"text=a&text=b", "application/x-www-form-urlencoded", 422),
        (b"text", "text/plain", 415),
        (b"{}", "", 415),
        (b"--x\r\nnonsense", "multipart/form-data; boundary=x", 400),
        (b"--x\r\n", "multipart/form-data", 400),
        (b"", "multipart/form-data; boundary=x", 400),
        (b" " * 600_000, "application/json", 413),
    ],
)
async def test_bodies_that_are_none_are_refused(tmp_path: Path, body: bytes, kind: str, status: int) -> None:
    async with daemon(tmp_path) as relay, visitor(relay.url) as http:
        answer = await http.ask("POST", POST, body=body, headers={"content-type": kind} if kind else {})
        assert answer.status == status, answer.body
        assert not relay.relay.requests


@pytest.mark.trio
async def test_unknown_spaces_ids_and_requests_are_told(tmp_path: Path) -> None:
    async with daemon(tmp_path) as relay, visitor(relay.url) as http:
        told = {"params": {"text": "x"}}
        for method, path, status, code in (
            ("POST", "/v1/spaces/nope/requests", 404, "space_not_found"),
            ("PUT", f"/v1/requests/{an_id()}?space=nope", 404, "space_not_found"),
            ("PUT", f"/v1/requests/{an_id()}", 422, "invalid_params"),
            ("PUT", "/v1/requests/mine?space=tts", 422, "invalid_params"),
            ("GET", f"/v1/requests/{an_id()}", 404, "request_not_found"),
            ("DELETE", f"/v1/requests/{an_id()}", 404, "request_not_found"),
            ("GET", f"/v1/requests/{an_id()}/events", 404, "request_not_found"),
            ("GET", f"/v1/requests/{an_id()}/audio", 404, "request_not_found"),
            ("PATCH", f"/v1/requests/{an_id()}", 405, "method_not_allowed"),
            ("GET", "/nothing/here", 404, "not_found"),
            ("GET", "/v1/relay", 426, "upgrade_required"),
        ):
            more = {"told": told} if method in ("POST", "PUT") else {}
            answer = await http.ask(method, path, **more)
            assert (answer.status, answer.error["code"]) == (status, code), (method, path)


@pytest.mark.trio
async def test_a_missing_space_and_a_forbidden_one_get_the_same_answer(tmp_path: Path) -> None:
    async with daemon(tmp_path, listen="127.0.0.1:0") as relay:
        token = make_token(relay, "ann", spaces=("tts",))
        async with visitor(relay.urls[0], token=token) as http:
            for method, path in (("POST", "/v1/spaces/{}/requests"), ("PUT", f"/v1/requests/{an_id()}?space={{}}")):
                answers = [await http.ask(method, path.format(name), told={}) for name in ("check", "nope")]
                assert [answer.status for answer in answers] == [403, 403]
                first, second = (answer.error for answer in answers)
                assert second == first | {"message": first["message"].replace("'check'", "'nope'")}


@pytest.mark.trio
async def test_spaces_are_listed_with_what_they_take(tmp_path: Path) -> None:
    async with daemon(tmp_path) as relay, fake_worker(relay.url, inputs=INPUTS), visitor(relay.url) as http:
        await until(lambda: bool(relay.relay.spaces["tts"].params))
        spaces = {space["name"]: space for space in (await http.get("/v1/spaces")).json["spaces"]}
        assert spaces.keys() == {"tts", "check"}
        assert (spaces["tts"]["state"], spaces["check"]["state"]) == ("ready", "no worker")
        assert spaces["tts"]["params"]["required"] == ["text"]


@pytest.mark.trio
async def test_a_token_sees_its_own_requests_in_its_own_spaces_and_has_its_limits(tmp_path: Path) -> None:
    async with daemon(tmp_path, listen="127.0.0.1:0") as relay:
        mine, others = (
            make_token(relay, name, spaces=("t*",), limits=TokenLimits(max_queued=1)) for name in ("ann", "bob")
        )
        async with visitor(relay.urls[0], token=mine) as ann, visitor(relay.urls[0], token=others) as bob:
            assert [space["name"] for space in (await ann.get("/v1/spaces")).json["spaces"]] == ["tts"]
            posted = await ann.ask("POST", POST, told={"params": {"text": "x"}})
            assert (await bob.get(one(posted))).status == 404
            assert (await bob.ask("DELETE", one(posted))).status == 404
            forbidden = await ann.ask("POST", "/v1/spaces/check/requests", told={})
            assert (forbidden.status, forbidden.error["code"]) == (403, "forbidden")
            full = await ann.ask("POST", POST, told={"params": {"text": "y"}})
            assert (full.status, full.error["code"], full.headers["retry-after"]) == (429, "queue_full", "5")


def make_token(relay: Any, name: str, **more: Any) -> str:
    """A client's token, made behind the daemon's back."""
    text: str = relay.tokens.create(role="client", name=name, now=0.0, **more).text
    return text


# -- who holds it ----------------------------------------------------------------------------------------------------


@pytest.mark.trio
async def test_what_nobody_asks_about_is_cancelled_after_its_window_and_asking_keeps_it(tmp_path: Path) -> None:
    async with daemon(tmp_path, limits={"resume_window_s": 0.4}) as relay, visitor(relay.url) as http:
        posted = await http.ask("POST", POST, told={"params": {"text": "x"}})
        kept = await http.ask("POST", POST, told={"params": {"text": "y"}, "detach": True})
        for _ in range(5):
            await trio.sleep(0.15)  # twice as long as the window, all in all
            assert (await http.get(one(posted))).json["state"] == "queued"
        requests = relay.relay.requests
        await until(lambda: not requests[posted.json["request_id"]].live)
        status = (await http.get(one(posted))).json
        assert status["state"] == "cancelled"
        assert (await http.get(one(kept))).json["state"] == "queued"


@pytest.mark.trio
async def test_an_event_stream_holds_its_request_and_leaving_it_lets_go(tmp_path: Path) -> None:
    async with daemon(tmp_path, limits={"resume_window_s": 0.2}) as relay, visitor(relay.url) as other:
        posted = await other.ask("POST", POST, told={"params": {"text": "x"}})
        request = relay.relay.requests[posted.json["request_id"]]
        async with visitor(relay.url) as http:
            answer = await http.open("GET", one(posted, "/events"))
            await answer.until(b"event: queued")
            await trio.sleep(0.4)  # twice the window
            assert request.live
            assert len(request.holders) == 1
        await until(lambda: not request.live)
        await relay.at_rest()


@pytest.mark.trio
async def test_a_delete_cancels_what_waits_at_once_and_what_runs_through_its_worker(tmp_path: Path) -> None:
    async with daemon(tmp_path) as relay, fake_worker(relay.url) as worker, visitor(relay.url) as http:
        running = await http.ask("POST", POST, told={"params": {"text": "x"}})
        assign = await worker.assigned()
        waiting = await http.ask("POST", POST, told={"params": {"text": "y"}})
        gone = await http.ask("DELETE", one(waiting))
        assert (gone.status, gone.json["state"]) == (200, "cancelled")
        assert (await http.ask("DELETE", one(running))).status == 202
        assert (await worker.peer.next(Cancel)).request_id == assign.request_id
        worker.send(Cancelled(**identity(assign, 0)))
        await worker.peer.next(Ack)
        await relay.at_rest()
        audio = await http.get(one(running, "/audio"))
        assert (audio.status, audio.error["code"]) == (410, "cancelled")
