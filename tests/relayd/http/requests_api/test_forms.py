"""Forms and files of requests over HTTP."""

import os
from pathlib import Path
from typing import Any

import pytest
import trio
from starlette.routing import Route

from protocol.wire.messages import Input as InputPiece
from protocol.wire.structs import InputRule
from relayd.http.app import make_app
from relayd.http.requests_api.input_feed import feed_input
from relayd.http.requests_api.routes import OneRequest
from relayd.http.sessions import Session, password
from tests.relayd.http.requests_api.answers import INPUTS, PCM, POST
from tests.support.fake_worker import fake_worker, samples
from tests.support.raw_http_client import File, form, visitor
from tests.support.relay import an_id, daemon, until


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


TYPES = {
    "type": "object",
    "properties": {
        "untyped": {},
        "text": {"type": "string", "minLength": 1},
        "note": {"type": "string"},
        "voice": {"enum": ["a", "b"]},
        "size": {"enum": [1, 2, "auto"]},
        "flag": {"type": "boolean"},
        "count": {"type": "integer", "minimum": 1},
        "ratio": {"type": ["number", "null"]},
        "list": {"type": "array", "items": {"type": "integer"}},
        "either": {"anyOf": [{"type": "integer"}, {"type": "boolean"}]},
    },
}


@pytest.mark.trio
@pytest.mark.parametrize(
    ("sent", "params"),
    [
        ("untyped=123", {"untyped": "123"}),
        ("untyped=true", {"untyped": "true"}),
        ("untyped=%22quoted%22&other=null", {"untyped": '"quoted"', "other": "null"}),
        ("untyped=", {"untyped": ""}),
        ("voice=&flag=&count=&ratio=&list=&size=&either=&text=&note=", {"note": ""}),
        ("text=1&note=true&voice=a", {"text": "1", "note": "true", "voice": "a"}),
        *((f"flag={word}", {"flag": True}) for word in ("true", "True", "on", "1", "yes")),
        *((f"flag={word}", {"flag": False}) for word in ("false", "False", "off", "0", "no")),
        ("count=2.0", {"count": 2}),
        ("ratio=0.5", {"ratio": 0.5}),
        ("ratio=null", {"ratio": None}),
        ("list=[1,2]", {"list": [1, 2]}),
        ("size=2", {"size": 2}),
        ("size=auto", {"size": "auto"}),
        ("either=1", {"either": 1}),
        ("either=on", {"either": True}),
        ("params=&count=1&detach=on&priority=&queue_timeout_s=&retry=", {"count": 1}),
    ],
)
async def test_a_forms_field_means_what_html_and_python_mean_by_it(tmp_path: Path, sent: str, params: Any) -> None:
    async with daemon(tmp_path) as relay, fake_worker(relay.url, params=TYPES) as worker, visitor(relay.url) as http:
        await until(lambda: bool(relay.relay.spaces["tts"].params))
        kind = {"content-type": "application/x-www-form-urlencoded"}
        answer = await http.ask("POST", POST, body=sent.encode(), headers=kind)
        assert answer.status == 202, answer.body
        given = (await worker.assigned()).params
        assert given == params
        assert [*map(type, given.values())] == [*map(type, params.values())]


@pytest.mark.trio
@pytest.mark.parametrize(
    ("sent", "details"),
    [
        ("count=0", {"count": "must be at least 1"}),
        ("count=many", {"count": "must be an integer, not string"}),
        ("flag=maybe", {"flag": "must be a boolean, not string"}),
        ("voice=c", {"voice": "must be one of a, b"}),
    ],
)
async def test_a_forms_wrong_field_is_named_with_what_it_must_be(tmp_path: Path, sent: str, details: Any) -> None:
    async with daemon(tmp_path) as relay, fake_worker(relay.url, params=TYPES), visitor(relay.url) as http:
        await until(lambda: bool(relay.relay.spaces["tts"].params))
        kind = {"content-type": "application/x-www-form-urlencoded"}
        answer = await http.ask("POST", POST, body=sent.encode(), headers=kind)
        assert (answer.status, answer.error["details"]) == (422, details)


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


def half_a_body(method: str, path: str) -> bytes:
    """A request whose body stops after its first byte."""
    media_type, first = "application/json", "{"
    if "transcriptions" in path:
        media_type, first = "multipart/form-data; boundary=x", "-"
    fields = f"Host: x\r\nSec-Fetch-Site: same-origin\r\nContent-Type: {media_type}\r\nContent-Length: 50"
    return f"{method} {path} HTTP/1.1\r\n{fields}\r\n\r\n{first}".encode()


@pytest.mark.trio
async def test_a_client_that_stops_in_the_middle_of_a_body_is_waited_for_on_no_route(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("relayd.http.body_parser.BODY_STALL_S", 0.1)
    async with daemon(tmp_path, users={"enabled": True}) as relay:
        routes = [route for route in make_app(relay.http_context).routes if isinstance(route, Route)]
        taking = [(route, method) for route in routes for method in route.methods or () if method in ("POST", "PUT")]
        taking += [(route, "PUT") for route in routes if route.endpoint is OneRequest]
        taking += [(route, "POST") for route in routes if route.endpoint is Session]
        assert len(taking) >= 3
        for route, method in taking:
            if route.endpoint is feed_input:  # its body lasts as long as the request
                continue
            if route.endpoint is password:  # who is not logged in is refused before a body is read
                continue
            path = route.path.format(space="tts", request_id=an_id()) + "?space=tts"
            async with visitor(relay.url) as http:
                await http.stream.send_all(half_a_body(method, path))
                with trio.fail_after(5):
                    assert bytes(await http.stream.receive_some()).startswith(b"HTTP/1.1 408"), path
                assert await http.hears_the_end()
        await relay.goes_on()


@pytest.mark.trio
async def test_an_unfinished_body_holds_no_drain_and_its_client_is_told(tmp_path: Path) -> None:
    async with daemon(tmp_path) as relay, visitor(relay.url) as http:
        await http.stream.send_all(half_a_body("POST", "/v1/audio/speech"))
        await until(lambda: any(exchange.reading for exchange in relay.http_context.exchanges))
        assert not relay.http_context.unfinished
        relay.http_context.begin_shutdown()
        with trio.fail_after(5):
            assert bytes(await http.stream.receive_some()).startswith(b"HTTP/1.1 503")


@pytest.mark.trio
async def test_a_body_of_which_a_piece_comes_as_the_relay_leaves_is_not_waited_for(tmp_path: Path) -> None:
    async with daemon(tmp_path) as relay, visitor(relay.url) as http:
        await http.stream.send_all(half_a_body("POST", "/v1/audio/speech"))
        await until(lambda: any(exchange.reading for exchange in relay.http_context.exchanges))
        relay.http_context.leaving = True  # and what cancels the wait meets a piece that is there already
        await http.stream.send_all(b" ")
        with trio.fail_after(5):
            assert bytes(await http.stream.receive_some()).startswith(b"HTTP/1.1 503")


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


@pytest.mark.trio
async def test_a_space_that_takes_all_images_takes_each_kind_of_them(tmp_path: Path) -> None:
    rules = {"picture": InputRule(media_types=["image/*", "audio/webm"])}
    async with (
        daemon(tmp_path) as relay,
        fake_worker(relay.url, inputs=rules) as worker,
        visitor(relay.url) as http,
    ):
        await until(lambda: bool(relay.relay.spaces["tts"].inputs))
        for kind in ("image/png", "IMAGE/JPEG", "audio/webm;codecs=opus"):
            fields: dict[str, str | File] = {"text": "x", "picture": File(b"bytes", kind)}
            assert (await http.ask("POST", POST, **form(fields))).status == 202, kind
            worker.speak(await worker.assigned(), PCM)
        refused = await http.ask("POST", POST, **form({"text": "x", "picture": File(b"bytes", "video/mp4")}))
        assert (refused.status, list(refused.error["details"])) == (422, ["inputs.picture"])
