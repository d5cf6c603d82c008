"""Requests over HTTP: submitted, asked about, read as events and as audio, cancelled."""

import base64
import os
from pathlib import Path
from typing import Any

import h11
import pytest
import trio

from protocol.wire.frames import (
    Audio,
    Cancelled,
    Completed,
    Failed,
    Progress,
    Started,
)
from protocol.wire.messages import (
    Ack,
    Attach,
    Cancel,
    Submit,
)
from protocol.wire.messages import Input as InputPiece
from protocol.wire.structs import (
    AudioFormat,
    InputRule,
)
from relayd.store.records import TokenLimits
from tests.support.raw_http_client import Answer, File, events_of, form, visitor
from tests.support.relay import FORMAT, a_submit, an_id, daemon, fake_worker, identity, peer, samples, until

PCM = [samples(1200, seed) for seed in range(3)]
ALL = b"".join(PCM)
POST = "/v1/spaces/tts/requests"
INPUTS = {
    "audio": InputRule(media_types=["audio/wav", "audio/webm"], max_bytes=400_000),
    "video": InputRule(media_types=["video/mp4"], max_bytes=1000),
}


def one(answer: Answer, more: str = "") -> str:
    """The path of the request that was submitted."""
    return f"/v1/requests/{answer.json['request_id']}{more}"


def pcm_of(body: bytes) -> bytes:
    told = [base64.b64decode(data["pcm"]) for kind, _, data in events_of(body) if kind == "audio"]
    return b"".join(told)


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
        ({"params": {"text": "x" * 70_000}}, 422, "invalid_params", "65536"),
        ({"params": {"text": "\ud800"}}, 422, "invalid_params", "surrogates"),
        ({"params": {"text": "x", "rate": 2**70}}, 422, "invalid_params", ""),
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


# -- forms and files -------------------------------------------------------------------------------------------------


@pytest.mark.trio
async def test_a_form_is_taken_by_the_types_of_the_spaces_params(tmp_path: Path) -> None:
    async with daemon(tmp_path) as relay, fake_worker(relay.url) as worker, visitor(relay.url) as http:
        await until(lambda: bool(relay.relay.spaces["tts"].params))
        body = b"text=12&rate=3&detach=true&priority=9"
        kind = {"content-type": "application/x-www-form-urlencoded"}
        assert (await http.ask("POST", POST, body=body, headers=kind)).status == 202
        assign = await worker.assigned()
        assert assign.params == {"text": "12", "rate": 3}
        worker.speak(assign, PCM)
        fields: dict[str, str | File] = {"params": '{"rate": 1}', "text": "你好"}
        assert (await http.ask("POST", POST, **form(fields))).status == 202
        assert (await worker.assigned()).params == {"text": "你好", "rate": 1}


@pytest.mark.trio
async def test_a_file_of_a_form_is_an_input_and_its_name_is_used_for_nothing(tmp_path: Path) -> None:
    voice = samples(150_000)
    async with daemon(tmp_path) as relay, fake_worker(relay.url, inputs=INPUTS) as worker, visitor(relay.url) as http:
        await until(lambda: bool(relay.relay.spaces["tts"].params))
        parts: dict[str, str | File] = {"text": "hello"}
        parts |= {"audio": File(voice, filename="../../etc/passwd"), "video": File(b"", "", "")}
        posted = await http.ask("POST", POST, **form(parts))
        assert posted.status == 202, posted.body
        assign = await worker.assigned()
        assert list(assign.inputs) == ["audio"]
        assert (assign.inputs["audio"].media_type, assign.inputs["audio"].size) == ("audio/wav", len(voice))
        got = b""
        while len(got) < len(voice):
            got += (await worker.peer.next(InputPiece)).data
        assert got == voice
        assert not any("passwd" in name for _, _, files in os.walk(tmp_path) for name in files)
        worker.speak(assign, PCM)
        await relay.at_rest()
        assert relay.http_context.upload_bytes == 0


@pytest.mark.trio
@pytest.mark.parametrize(
    ("parts", "status", "code"),
    [
        ({"text": "x", "file": File(b"1")}, 422, "invalid_params"),
        ({"text": "x", "audio": File(b"1", "text/html")}, 422, "invalid_params"),
        ({"text": "x", "audio": File(b"1" * 400_001)}, 413, "input_too_large"),
        ({"text": "x", "Video!": File(b"1")}, 422, "invalid_params"),
        ({"text": "x", "video": File(b"1" * 1001, "video/mp4")}, 413, "input_too_large"),
        ({"text": "x" * 600_000}, 413, "input_too_large"),
        ({str(n): "x" for n in range(70)}, 422, "invalid_params"),
    ],
)
async def test_files_that_a_space_does_not_take_are_refused_while_they_come(
    tmp_path: Path, parts: Any, status: int, code: str
) -> None:
    async with daemon(tmp_path) as relay, fake_worker(relay.url, inputs=INPUTS), visitor(relay.url) as http:
        await until(lambda: bool(relay.relay.spaces["tts"].params))
        answer = await http.ask("POST", POST, **form(parts))
        assert (answer.status, answer.error["code"]) == (status, code)
        assert not relay.relay.requests
        assert relay.http_context.upload_bytes == 0


@pytest.mark.trio
async def test_an_endless_upload_is_refused_at_its_cap_and_not_read_on(tmp_path: Path) -> None:
    async with daemon(tmp_path) as relay, fake_worker(relay.url, inputs=INPUTS), visitor(relay.url) as http:
        await until(lambda: bool(relay.relay.spaces["tts"].params))
        head = form({"audio": File(b"")})
        begin = head["body"].partition(b"\r\n\r\n")[0] + b"\r\n\r\n"
        kind = head["headers"]["content-type"]
        await http.stream.send_all(
            f"POST {POST} HTTP/1.1\r\nHost: x\r\nContent-Type: {kind}\r\nTransfer-Encoding: chunked\r\n\r\n".encode()
        )
        await http.stream.send_all(f"{len(begin):x}\r\n".encode() + begin + b"\r\n")
        sent = 0
        chunk = bytes(65536)
        with trio.fail_after(10):
            try:
                while sent < 50_000_000:
                    await http.stream.send_all(f"{len(chunk):x}\r\n".encode() + chunk + b"\r\n")
                    sent += len(chunk)
            except trio.BrokenResourceError:
                pass
        assert sent < 40_000_000, "it hung up"
        assert relay.http_context.upload_bytes == 0
        await relay.goes_on()


@pytest.mark.trio
async def test_a_client_that_stops_in_the_middle_of_a_body_is_not_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("relayd.http.body_parser.BODY_STALL_S", 0.1)
    async with daemon(tmp_path) as relay, visitor(relay.url) as http:
        head = f"POST {POST} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 50\r\n\r\n{{"
        await http.stream.send_all(head.encode())
        heard = bytes(await http.stream.receive_some())
        assert heard.startswith(b"HTTP/1.1 408")
        assert await http.hears_the_end()
        await relay.goes_on()


@pytest.mark.trio
async def test_a_body_that_only_trickles_is_not_waited_for_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("relayd.http.body_parser.BODY_STALL_S", 0.2)
    async with daemon(tmp_path) as relay, visitor(relay.url) as http:
        head = f"POST {POST} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 500\r\n\r\n"
        await http.stream.send_all(head.encode())
        sent = 0
        with trio.fail_after(5):
            async with trio.open_nursery() as nursery:

                async def trickle() -> None:
                    nonlocal sent
                    while True:
                        await http.stream.send_all(b" ")
                        sent += 1
                        await trio.sleep(0.05)

                nursery.start_soon(trickle)
                assert bytes(await http.stream.receive_some()).startswith(b"HTTP/1.1 408")
                nursery.cancel_scope.cancel()
        assert sent < 50


# -- events ----------------------------------------------------------------------------------------------------------


@pytest.mark.trio
async def test_events_tell_the_place_and_every_frame_and_go_on_behind_the_last_one_heard(tmp_path: Path) -> None:
    async with daemon(tmp_path) as relay, visitor(relay.url) as http, visitor(relay.url) as other:
        posted = await other.ask("POST", POST, told={"params": {"text": "x"}})
        answer = await http.open("GET", one(posted, "/events"))
        assert answer.headers["content-type"] == "text/event-stream; charset=utf-8"
        await answer.until(b"event: queued")
        async with fake_worker(relay.url) as worker:
            assign = await worker.assigned()
            worker.send(Started(**identity(assign, 0), format=FORMAT))
            worker.send(Progress(**identity(assign, 1), state="generating", fraction=0.5))
            worker.send(Audio(**identity(assign, 2), pcm=PCM[0]))
            await answer.until(b"id: 1.2\n")
            before = events_of(answer.body)
            assert [kind for kind, *_ in before][:3] == ["queued", "started", "progress"]
            assert before[1][2]["format"] == {"encoding": "pcm_s16le", "sample_rate": 24000, "channels": 1}
            async with visitor(relay.url) as resumed:
                tail = await resumed.open("GET", one(posted, "/events"), headers={"last-event-id": "1.1"})
                await tail.until(b"id: 1.2\n")
                worker.speak(assign, [PCM[2], PCM[1], PCM[2]], first=3)
                await answer.rest()
                await tail.rest()
            assert [(kind, name) for kind, name, _ in events_of(tail.body)] == [
                ("audio", "1.2"),
                ("audio", "1.3"),
                ("completed", "1.4"),
            ]
            assert pcm_of(answer.body) == PCM[0] + PCM[2]
            await relay.at_rest()
        again = await http.get(one(posted, "/events"), headers={"last-event-id": "1.4"})
        assert again.status == 204, "all of it was heard"
        replayed = await http.get(one(posted, "/events"))
        assert pcm_of(replayed.body) == PCM[0] + PCM[2]


@pytest.mark.trio
async def test_a_failure_is_told_as_an_event_and_a_bad_last_event_id_is_refused(tmp_path: Path) -> None:
    async with daemon(tmp_path) as relay, fake_worker(relay.url) as worker, visitor(relay.url) as http:
        posted = await http.ask("POST", POST, told={"params": {"text": "x"}})
        assign = await worker.assigned()
        worker.send(Started(**identity(assign, 0), format=FORMAT))
        worker.send(Failed(**identity(assign, 1), code="engine_failed", message="no air", details={"at": 3}))
        told = events_of((await http.get(one(posted, "/events"))).body)
        assert told[-1][0] == "failed"
        assert (told[-1][2]["code"], told[-1][2]["details"]["at"]) == ("engine_failed", 3)
        for bad in ("x", "1", "1.x", "1.99999999999", "-1.0"):
            answer = await http.get(one(posted, "/events"), headers={"last-event-id": bad})
            assert (answer.status, answer.error["code"]) == (422, "invalid_params")
        audio = await http.get(one(posted, "/audio"))
        assert (audio.status, audio.error["code"], audio.error["message"]) == (502, "engine_failed", "no air")


@pytest.mark.trio
async def test_a_silent_stream_is_kept_open_by_comments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("relayd.http.requests_api.event_stream.COMMENT_S", 0.05)
    async with daemon(tmp_path) as relay, visitor(relay.url) as http, visitor(relay.url) as other:
        posted = await other.ask("POST", POST, told={"params": {"text": "x"}})
        answer = await http.open("GET", one(posted, "/events"))
        await answer.until(b":\n\n:\n\n")


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


# -- audio -----------------------------------------------------------------------------------------------------------


@pytest.mark.trio
async def test_audio_is_heard_while_it_is_made(tmp_path: Path) -> None:
    async with daemon(tmp_path) as relay, fake_worker(relay.url) as worker, visitor(relay.url) as http:
        posted = await http.ask("POST", POST, told={"params": {"text": "x"}})
        assign = await worker.assigned()
        await http.begin("GET", one(posted, "/audio"))
        worker.speak(assign, PCM[:1], end=False)
        answer = await http.answer()
        assert (answer.status, answer.headers["content-type"]) == (200, "audio/wav")
        assert answer.headers["accept-ranges"] == "none"
        await answer.until(PCM[0])
        assert relay.relay.requests[assign.request_id].live, "it came before the end"
        worker.speak(assign, PCM, first=2)
        await answer.rest()
        assert answer.body[:4] == b"RIFF"
        assert answer.body[44:] == ALL


@pytest.mark.trio
async def test_a_worker_lost_in_mid_stream_cuts_the_audio_short_and_never_silently(tmp_path: Path) -> None:
    async with daemon(tmp_path, limits={"worker_grace_s": 0.1}) as relay, visitor(relay.url) as http:
        async with fake_worker(relay.url) as worker:
            posted = await http.ask("POST", POST, told={"params": {"text": "x"}})
            worker.speak(await worker.assigned(), PCM[:1], end=False)
            answer = await http.open("GET", one(posted, "/audio"))
            await answer.until(PCM[0])
        with pytest.raises((trio.BrokenResourceError, h11.RemoteProtocolError)):
            await answer.rest()
        assert not answer.whole
        await relay.at_rest()


@pytest.mark.trio
@pytest.mark.parametrize("store", ["memory", "sqlite"])
async def test_finished_audio_has_its_length_and_is_given_in_ranges(tmp_path: Path, store: str) -> None:
    async with (
        daemon(tmp_path, store=store, results={"memory_bytes": 1}) as relay,
        fake_worker(relay.url) as worker,
        visitor(relay.url) as http,
    ):
        posted = await http.ask("POST", POST, told={"params": {"text": "x"}})
        worker.speak(await worker.assigned(), PCM)
        await relay.at_rest()
        path = one(posted, "/audio")
        whole = await http.get(path)
        assert (whole.status, whole.headers["content-length"], whole.body[44:]) == (200, str(44 + len(ALL)), ALL)
        assert int.from_bytes(whole.body[40:44], "little") == len(ALL)
        head = await http.ask("HEAD", path)
        assert (head.status, head.headers["content-length"], head.body) == (200, str(44 + len(ALL)), b"")
        total = 44 + len(ALL)
        for asked, begin, end in (
            ("bytes=0-9", 0, 10),
            ("bytes=40-50", 40, 51),
            ("bytes=2000-3000", 2000, 3001),
            ("bytes=-100", total - 100, total),
            (f"bytes=7000-{total + 5}", 7000, total),
        ):
            part = await http.get(path, headers={"range": asked})
            assert (part.status, part.body) == (206, whole.body[begin:end]), asked
            assert part.headers["content-range"] == f"bytes {begin}-{end - 1}/{total}"
        beyond = await http.get(path, headers={"range": f"bytes={total}-"})
        assert (beyond.status, beyond.headers["content-range"]) == (416, f"bytes */{total}")
        for other in ("bytes=5-2", "lines=1-2", "bytes=0-1,5-6", "bytes=-"):
            assert (await http.get(path, headers={"range": other})).status == 200
        etag = whole.headers["etag"]
        same = await http.get(path, headers={"range": "bytes=0-9", "if-range": etag})
        assert same.status == 206
        assert (await http.get(path, headers={"range": "bytes=0-9", "if-range": '"x"'})).status == 200
        pcm = await http.get(f"{path}?format=pcm", headers={"range": "bytes=2-5"})
        assert (pcm.body, pcm.headers["content-type"]) == (ALL[2:6], "audio/pcm; rate=24000; channels=1")
        assert (await http.get(f"{path}?format=ogg")).status == 422


@pytest.mark.trio
async def test_a_result_that_is_no_audio_says_so(tmp_path: Path) -> None:
    async with daemon(tmp_path) as relay, fake_worker(relay.url, format=None) as worker, visitor(relay.url) as http:
        posted = await http.ask("POST", POST, told={"params": {"text": "x"}})
        assign = await worker.assigned()
        worker.send(Started(**identity(assign, 0), format=None))
        answer = await http.get(one(posted, "/audio"))
        assert (answer.status, answer.error["code"]) == (409, "no_audio")


@pytest.mark.trio
async def test_a_listener_beside_the_http_client_hears_the_same(tmp_path: Path) -> None:
    async with (
        daemon(tmp_path) as relay,
        fake_worker(relay.url) as worker,
        visitor(relay.url) as http,
        peer(relay.url, "client") as client,
    ):
        posted = await http.ask("POST", POST, told={"params": {"text": "x"}})
        request_id = posted.json["request_id"]
        assign = await worker.assigned()
        client.send(Attach(request_id=request_id))
        worker.speak(assign, PCM)
        frames = await client.frames(Submit(request_id=request_id, space="tts"))
        assert b"".join(frame.pcm for frame in frames if isinstance(frame, Audio)) == ALL


# -- cuts ------------------------------------------------------------------------------------------------------------


@pytest.mark.trio
async def test_a_reproducible_worker_lost_in_mid_stream_is_a_pause_and_nothing_else(tmp_path: Path) -> None:
    same: dict[str, Any] = {"reproducible": True, "fingerprint": "a"}
    async with daemon(tmp_path, limits={"worker_grace_s": 0.1}) as relay, visitor(relay.url) as http:
        async with fake_worker(relay.url, name="one", **same) as worker:
            posted = await http.ask("POST", POST, told={"params": {"text": "x"}})
            worker.speak(await worker.assigned(), PCM[:1], end=False)
            answer = await http.open("GET", one(posted, "/audio?format=pcm"))
            await answer.until(PCM[0])
        async with fake_worker(relay.url, name="two", **same) as worker:
            assign = await worker.assigned()
            assert (assign.attempt, assign.from_seq) == (2, 2)
            worker.speak(assign, PCM, first=2)
            assert await answer.rest() == ALL
            events = events_of((await http.get(one(posted, "/events"), headers={"last-event-id": "1.1"})).body)
            assert [name for _, name, _ in events] == ["2.2", "2.3", "2.4"]
        await relay.at_rest()


@pytest.mark.trio
async def test_an_attempt_lost_before_its_first_audio_is_not_heard_of(tmp_path: Path) -> None:
    async with daemon(tmp_path, limits={"worker_grace_s": 0.1}) as relay, visitor(relay.url) as http:
        async with fake_worker(relay.url, name="one") as worker:
            posted = await http.ask("POST", POST, told={"params": {"text": "x"}})
            await http.begin("GET", one(posted, "/audio"))
            worker.speak(await worker.assigned(), [], end=False)  # it has `started`
            await until(lambda: relay.relay.requests[posted.json["request_id"]].log.next_seq == 1)
        other = AudioFormat(sample_rate=16_000)
        async with fake_worker(relay.url, name="two", format=other) as worker:
            assign = await worker.assigned()
            worker.send(Started(**identity(assign, 0), format=other))
            worker.send(Audio(**identity(assign, 1), pcm=PCM[0]))
            worker.send(Completed(**identity(assign, 2)))
            answer = await http.answer()
            await answer.rest()
        assert answer.status == 200
        assert int.from_bytes(answer.body[24:28], "little") == 16_000
        assert answer.body[44:] == PCM[0]


@pytest.mark.trio
async def test_a_result_outlives_the_relay_that_made_it(tmp_path: Path) -> None:
    async with daemon(tmp_path, store="sqlite") as relay, visitor(relay.url) as http, fake_worker(relay.url) as worker:
        posted = await http.ask("POST", POST, told={"params": {"text": "x"}, "detach": True})
        worker.speak(await worker.assigned(), PCM)
        await worker.peer.next(Ack)
        await relay.at_rest()
    async with daemon(tmp_path, store="sqlite") as relay, visitor(relay.url) as http:
        assert (await http.get(one(posted))).json["state"] == "completed"
        assert pcm_of((await http.get(one(posted, "/events"))).body) == ALL
        part = await http.get(one(posted, "/audio"), headers={"range": "bytes=44-143"})
        assert (part.status, part.body) == (206, ALL[:100])
        again = await http.ask("PUT", f"{one(posted)}?space=tts", told={"params": {"text": "x"}, "detach": True})
        assert (again.status, again.json["state"]) == (200, "completed")
