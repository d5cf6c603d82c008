"""A relay behind nginx and behind Caddy, as the examples have them: real programs, TLS, loopback."""

import json
import re
import shutil
import ssl
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import attrs
import h11
import pytest
import trio

from protocol import open_relay
from protocol.wire.errors import LoginRefused
from protocol.wire.frames import Failed
from protocol.wire.messages import Assign, Cancel
from tests.deploy.proxies import DEPLOY, Proxy, certificate_in, nginx_command, nginx_config, open_proxy
from tests.support.fake_worker import SCHEMA, FakeWorker, fake_worker, identity, samples
from tests.support.relay import Daemon, daemon, kept_logs
from tests.support.timed_http_client import Answer, ask_on, asking

KINDS = ("nginx", "caddy")
MIB = 1024 * 1024
#: A tenth of a second: less than any proxy's buffer.
PIECES = [samples(2_400, seed) for seed in range(4)]
#: What the proxies see us as; all of 127/8 is loopback.
OUR_ADDRESS = "127.0.0.2"


@attrs.frozen
class Stage:
    """A relay, a worker of it, and a proxy that is the way to it."""

    relay: Daemon
    worker: FakeWorker
    proxy: Proxy
    token: str
    context: ssl.SSLContext

    @property
    def url(self) -> str:
        """As clients get it."""
        return f"wss://localhost:{self.proxy.port}"

    def asking(self, method: str, path: str, **more: Any) -> Any:
        """A request through the proxy."""
        return asking(f"https://localhost:{self.proxy.port}", method, path, context=self.context, **more)


@asynccontextmanager
async def staged(kind: str, folder: Path, **overrides: Any) -> AsyncIterator[Stage]:
    """One stage, set."""
    settings: dict[str, Any] = {"listen": "127.0.0.1:0", "behind_proxy": True}
    inputs = {"audio": {"max_bytes": 64 * MIB}}
    with trio.fail_after(60):
        async with (
            daemon(folder / "state", **(settings | overrides)) as relay,
            fake_worker(relay.url, params=SCHEMA, inputs=inputs) as worker,
            open_relay(relay.url, token="", role="operator") as operator,
            open_proxy(kind, folder, relay.urls[0].removeprefix("ws://")) as proxy,
        ):
            token = str((await operator.steer("create_token", "ann", role="client"))["token"])
            yield Stage(relay, worker, proxy, token, certificate_in(folder).trusting())


def speech(**fields: Any) -> bytes:
    return json.dumps({"model": "tts", "input": "hello", "response_format": "pcm"} | fields).encode()


@pytest.mark.trio
@pytest.mark.parametrize("kind", KINDS)
async def test_a_websocket_hears_each_frame_before_the_next_is_made(kind: str, tmp_path: Path) -> None:
    async with (
        staged(kind, tmp_path) as stage,
        open_relay(stage.url, token=stage.token, ssl_context=stage.context) as relay,
        relay.submit("tts", {"text": "hi"}) as stream,
    ):
        assign = await stage.worker.assigned()
        stage.worker.speak(assign, PIECES[:1], end=False)
        audio = stream.audio()
        assert await anext(audio) == PIECES[0]
        stage.worker.speak(assign, PIECES, first=2)
        assert [pcm async for pcm in audio] == PIECES[1:]


@pytest.mark.trio
@pytest.mark.parametrize("kind", KINDS)
async def test_http_hears_audio_while_it_is_made(kind: str, tmp_path: Path) -> None:
    async with staged(kind, tmp_path) as stage, trio.open_nursery() as nursery:
        begun: list[Assign] = []
        nursery.start_soon(speak_first, stage.worker, begun)
        async with stage.asking("POST", "/v1/audio/speech", token=stage.token, body=speech()) as answer:
            first = b""
            while len(first) < len(PIECES[0]):
                first += await answer.piece() or pytest.fail("it ended")
            assert (answer.status, first) == (200, PIECES[0])
            stage.worker.speak(begun[0], PIECES, first=2)
            assert await answer.body() == b"".join(PIECES[1:])


async def speak_first(worker: FakeWorker, begun: list[Assign]) -> None:
    """Take a request up, speak its first piece, and leave it at that."""
    begun.append(await worker.assigned())
    worker.speak(begun[-1], PIECES[:1], end=False)


@pytest.mark.trio
@pytest.mark.parametrize("kind", KINDS)
async def test_a_client_that_hangs_up_is_seen_through_the_proxy(kind: str, tmp_path: Path) -> None:
    async with staged(kind, tmp_path) as stage:
        begun: list[Assign] = []
        async with trio.open_nursery() as nursery:
            nursery.start_soon(speak_first, stage.worker, begun)
            async with stage.asking("POST", "/v1/audio/speech", token=stage.token, body=speech()) as answer:
                await answer.piece()
        cancel: Cancel = await stage.worker.peer.next(Cancel)
        assert cancel.request_id == begun[0].request_id


def kinds_that_pass_a_cut_on() -> tuple[str, ...]:
    """Caddy does from 2.7.6 on (its pull request 5952); Debian 12 has 2.6.2, as docs/proxies.md says."""
    if shutil.which("caddy") is None:
        return ("nginx",)
    version = subprocess.run(["caddy", "version"], capture_output=True, text=True, check=True).stdout
    numbers = tuple(map(int, re.findall(r"\d+", version)[:3]))
    return KINDS if numbers >= (2, 7, 6) else ("nginx",)


@pytest.mark.trio
@pytest.mark.parametrize("kind", kinds_that_pass_a_cut_on())
async def test_what_was_cut_off_does_not_look_whole_behind_a_proxy(kind: str, tmp_path: Path) -> None:
    async with staged(kind, tmp_path) as stage, trio.open_nursery() as nursery:
        begun: list[Assign] = []
        nursery.start_soon(speak_first, stage.worker, begun)
        async with stage.asking("POST", "/v1/audio/speech", token=stage.token, body=speech()) as answer:
            assert await answer.piece()
            broken = Failed(**identity(begun[0], 2), code="internal", message="it broke", retryable=False)
            stage.worker.send(broken)
            with pytest.raises((h11.RemoteProtocolError, trio.BrokenResourceError)):
                await answer.body()


@pytest.mark.trio
@pytest.mark.parametrize("kind", KINDS)
async def test_events_come_one_by_one(kind: str, tmp_path: Path) -> None:
    async with staged(kind, tmp_path) as stage:
        body = json.dumps({"params": {"text": "hello"}}).encode()
        headers = [("Content-Type", "application/json")]
        path = "/v1/spaces/tts/requests"
        async with stage.asking("POST", path, token=stage.token, headers=headers, body=body) as answer:
            assert answer.status == 202, await answer.body()
        assign = await stage.worker.assigned()
        async with stage.asking("GET", f"/v1/requests/{assign.request_id}/events", token=stage.token) as answer:
            heard = b""
            for first, pieces, word in ((0, PIECES[:1], b"event: audio"), (2, PIECES, b"event: completed")):
                stage.worker.speak(assign, pieces, first=first, end=len(pieces) > 1)
                while word not in heard:
                    heard += await answer.piece() or pytest.fail(f"it ended: {heard!r}")


@pytest.mark.trio
@pytest.mark.parametrize("kind", KINDS)
async def test_the_proxy_says_who_came_and_nobody_else_can(kind: str, tmp_path: Path) -> None:
    forged = [("X-Forwarded-For", "203.0.113.9"), ("X-Forwarded-Proto", "http"), ("Forwarded", "for=203.0.113.9")]
    with kept_logs() as logs:
        async with staged(kind, tmp_path) as stage:
            for header in ([], forged):
                async with from_our_address(stage) as stream:
                    wrong = await ask_on(
                        stream, "POST", "/v1/audio/speech", token="rly_c_wrong", body=speech(), headers=header
                    )
                    assert (wrong.status, (await wrong.json())["error"]["code"]) == (401, "unauthenticated")
            with pytest.raises(LoginRefused):
                async with open_relay(stage.url, token="rly_c_wrong", ssl_context=stage.context):
                    pytest.fail("entered")
    refused = [line["peer"] for line in logs if line["event"] == "login refused"]
    assert refused == [OUR_ADDRESS, OUR_ADDRESS, "127.0.0.1"]


@asynccontextmanager
async def from_our_address(stage: Stage) -> AsyncIterator[trio.abc.Stream]:
    """A TLS connection to the proxy from an address that is not its own."""
    plain = await trio.open_tcp_stream("127.0.0.1", stage.proxy.port, local_address=OUR_ADDRESS)
    async with trio.SSLStream(plain, stage.context, server_hostname="localhost", https_compatible=True) as stream:
        yield stream


@pytest.mark.trio
@pytest.mark.parametrize("kind", KINDS)
async def test_an_upload_far_beyond_a_proxys_own_limit_comes_through(kind: str, tmp_path: Path) -> None:
    """nginx takes 1 MiB where nothing else is set."""
    recording = bytes(8 * MIB)
    async with staged(kind, tmp_path) as stage:
        async with post_recording(stage, recording) as answer:
            told = await answer.json()
        assert answer.status == 202, told
        assign = await stage.worker.assigned()
        assert assign.inputs["audio"].size == len(recording)
        assert answer.headers["location"].endswith(assign.request_id)


@pytest.mark.trio
@pytest.mark.parametrize("kind", KINDS)
async def test_what_the_relay_does_not_take_is_refused_by_the_relay(kind: str, tmp_path: Path) -> None:
    async with staged(kind, tmp_path, limits={"max_input_bytes": MIB}) as stage:
        async with post_recording(stage, bytes(2 * MIB)) as answer:
            told = await answer.json()
        assert (answer.status, told["error"]["code"]) == (413, "input_too_large"), told


def post_recording(stage: Stage, recording: bytes) -> Any:
    """A form with a text and a file."""
    edge = b"--edge\r\nContent-Disposition: form-data; name="
    body = edge + b'"text"\r\n\r\nhello\r\n' + edge + b'"audio"; filename="a.wav"\r\nContent-Type: audio/wav\r\n\r\n'
    body += recording + b"\r\n--edge--\r\n"
    headers = [("Content-Type", "multipart/form-data; boundary=edge")]
    return stage.asking("POST", "/v1/spaces/tts/requests", token=stage.token, headers=headers, body=body)


@pytest.mark.trio
@pytest.mark.parametrize("kind", KINDS)
async def test_plain_http_is_sent_to_https_and_metrics_stay_inside(kind: str, tmp_path: Path) -> None:
    async with staged(kind, tmp_path, http={"metrics": "public"}) as stage:
        answer: Answer
        async with asking(f"http://localhost:{stage.proxy.plain_port}", "GET", "/health") as answer:
            assert answer.status in (301, 308)
            assert answer.headers["location"].startswith("https://localhost/")
        async with stage.asking("GET", "/health") as answer:
            assert (await answer.json())["status"] == "healthy"
        for path in ("/metrics", "/metrics?x=1", "/%6detrics", "//metrics", "/v1/../metrics", "/METRICS", "/metrics/"):
            async with stage.asking("GET", path) as answer:
                await answer.body()
                assert answer.status == 404, path
        async with asking(stage.relay.urls[0], "GET", "/metrics") as answer:
            assert answer.status == 200


@pytest.mark.trio
@pytest.mark.parametrize("kind", KINDS)
async def test_a_page_that_came_through_the_proxy_may_talk_to_the_relay(kind: str, tmp_path: Path) -> None:
    async with staged(kind, tmp_path) as stage:
        host, ours = f"localhost:{stage.proxy.port}", f"https://localhost:{stage.proxy.port}"
        for origin, status in ((ours, 200), ("https://elsewhere.example", 403)):
            headers = [("Host", host), ("Origin", origin)]
            async with stage.asking("GET", "/v1/models", token=stage.token, headers=headers) as answer:
                await answer.body()
                assert answer.status == status, origin


def test_nginx_leaves_a_silent_websocket_open_for_more_than_an_hour(tmp_path: Path) -> None:
    config = nginx_config(tmp_path, "127.0.0.1:1", 1, 2, certificate_in(tmp_path))
    done = subprocess.run([*nginx_command(config), "-T", "-q"], capture_output=True, text=True, check=True)
    hours = re.findall(r"proxy_(?:read|send)_timeout +(\d+)h;", done.stdout)
    assert len(hours) == 2
    assert min(map(int, hours)) > 1


def test_caddy_has_no_limit_that_a_silent_websocket_could_meet(tmp_path: Path) -> None:
    """It copies an upgraded connection until either side closes it; only a timeout of the server could end it."""
    text = (DEPLOY / "Caddyfile").read_text()
    directives = re.sub(r"#.*", "", text)
    assert "timeouts" not in directives
    assert re.findall(r"(\w*timeout\w*|stream_\w+)", directives) == ["dial_timeout"]
