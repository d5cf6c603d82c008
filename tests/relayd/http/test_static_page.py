"""The page's files: what is served, under which policy, and from which pages a WebSocket may come."""

import base64
import hashlib
import re
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
import trio

from tests.support.relay import Daemon, daemon
from tests.support.timed_http_client import asking, open_stream

TCP: dict[str, Any] = {"listen": "127.0.0.1:0"}


async def fetch(relay: Daemon, path: str, *headers: tuple[str, str]) -> tuple[int, dict[str, str], str]:
    async with asking(relay.urls[0], "GET", path, headers=list(headers)) as answer:
        return answer.status, answer.headers, (await answer.body()).decode()


@pytest.mark.trio
async def test_all_that_the_page_loads_is_there_and_nothing_comes_from_elsewhere(tmp_path: Path) -> None:
    async with daemon(tmp_path, **TCP) as relay:
        seen = set[str]()
        for path, script in (("/", "app.js"), ("/docs", "docs.js")):
            status, headers, page = await fetch(relay, path)
            assert (status, headers["content-type"]) == (200, "text/html; charset=utf-8")
            assert re.findall(r"<script[^>]*>", page) == [f'<script type="module" src="{script}">']
            # a name of its icon's, not fetched
            assert set(re.findall(r"[a-z]+://[a-z0-9.]+", page)) == {"http://www.w3.org"}
            assert not re.search(r"\sstyle=|\son[a-z]+=", page)
            wanted = [script]
            while wanted:
                name = wanted.pop()
                status, headers, source = await fetch(relay, f"/{name}")
                assert (status, headers["content-type"]) == (200, "text/javascript; charset=utf-8")
                assert "://" not in source
                seen.add(name)
                wanted += {*re.findall(r'(?:from "\./|URL\(")([a-z]+\.js)"', source)} - seen
        assert "worklet.js" in seen
        documents = {"index.html", "docs.html"}
        assert seen | documents == {entry.name for entry in files("relayd.http").joinpath("static").iterdir()}


@pytest.mark.trio
async def test_its_policy_lets_in_its_own_scripts_alone(tmp_path: Path) -> None:
    async with daemon(tmp_path, **TCP) as relay:
        _status, headers, page = await fetch(relay, "/", ("Host", "relay.example:8443"))
        for of, text in ((headers, page), (await fetch(relay, "/docs"))[1:]):
            [style] = re.findall(r"<style>(.*?)</style>", text, re.DOTALL)
            digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
            assert f"style-src 'sha256-{digest}';" in of["content-security-policy"]
        policy = dict(rule.split(" ", 1) for rule in headers["content-security-policy"].split("; "))
        assert policy["default-src"] == "'none'"
        assert policy["script-src"] == "'self'"
        assert policy["connect-src"] == "'self' ws://relay.example:8443 wss://relay.example:8443"
        assert "unsafe" not in headers["content-security-policy"]
        assert headers["x-content-type-options"] == "nosniff"
        for odd in ("x;script-src *", "a b", "'unsafe-inline'", "[::1", "*"):
            status, headers, _page = await fetch(relay, "/", ("Host", odd))
            assert status == 400 or "connect-src 'self';" in headers["content-security-policy"]
        _status, headers, _page = await fetch(relay, "/", ("Host", "[::1]:8765"))
        assert "connect-src 'self' ws://[::1]:8765 wss://[::1]:8765;" in headers["content-security-policy"]


@pytest.mark.trio
async def test_a_copy_that_is_still_the_one_is_not_sent_again(tmp_path: Path) -> None:
    async with daemon(tmp_path, **TCP) as relay:
        for path in ("/", "/app.js"):
            _status, headers, source = await fetch(relay, path)
            assert headers["cache-control"] == "no-cache"
            for named in (headers["etag"], f'"other", W/{headers["etag"]}', "*"):
                status, again, body = await fetch(relay, path, ("If-None-Match", named))
                assert (status, again["etag"], body) == (304, headers["etag"], "")
            status, _again, body = await fetch(relay, path, ("If-None-Match", '"other"'))
            assert (status, body) == (200, source)
            async with asking(relay.urls[0], "HEAD", path) as answer:
                assert (answer.status, await answer.body()) == (200, b"")
            async with asking(relay.urls[0], "POST", path) as answer:
                assert answer.status == 405


@pytest.mark.trio
@pytest.mark.parametrize(
    ("origin", "status"),
    [
        ("http://relay.example:8443", 101),
        ("https://relay.example:8443", 101),
        ("https://relay.example", 403),
        ("https://elsewhere.example", 403),
        ("null", 403),
        (None, 101),
    ],
)
async def test_its_websocket_is_taken_and_that_of_another_page_is_not(
    tmp_path: Path, origin: str | None, status: int
) -> None:
    extra = f"Origin: {origin}\r\n" if origin else ""
    head = (
        "GET /v1/relay HTTP/1.1\r\nHost: relay.example:8443\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n"
        f"Sec-WebSocket-Protocol: relay.v1.msgpack\r\n{extra}\r\n"
    )
    async with daemon(tmp_path, **TCP) as relay, open_stream(relay.urls[0]) as stream:
        with trio.fail_after(20):
            await stream.send_all(head.encode())
            said = b""
            while b"\r\n" not in said:
                said += await stream.receive_some() or pytest.fail(f"it hung up, and said {said!r}")
    assert said.startswith(f"HTTP/1.1 {status} ".encode())
