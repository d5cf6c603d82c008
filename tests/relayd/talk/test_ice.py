"""The servers for calls, and credentials as coturn checks them."""

from pathlib import Path
from typing import Any

import pytest

from relayd.config.schema import WebRtc
from relayd.talk.dialects.ice import servers
from tests.relayd.http.sample_handlers import make_token
from tests.support.raw_http_client import visitor
from tests.support.talking import stage

URL = "turn:turn.example.org:3478"


def test_the_password_is_the_one_that_coturn_computes() -> None:
    """The expected value is that of `openssl dgst -sha1 -hmac north -binary | base64`."""
    settings = WebRtc(turn_urls=(URL,), turn_secret_file="s", turn_s=600, stun_urls=("stun:turn.example.org",))
    assert servers(settings, b"north", "ann", 1_000_000_000) == [
        {"urls": ["stun:turn.example.org"]},
        {"urls": [URL], "username": "1000000600:ann", "credential": "pzJwfNOtkUWF9ALS/HL+0cWDGgg="},
    ]


@pytest.mark.trio
async def test_they_are_told_to_who_has_a_token(tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("north\n")
    webrtc: dict[str, Any] = {"turn_urls": [URL], "turn_secret_file": str(secret)}
    async with stage(tmp_path, listen="127.0.0.1:0", webrtc=webrtc) as on:
        async with visitor(on.daemon.urls[0], token=make_token(on.daemon)) as http:
            (server,) = (await http.get("/v1/talk/ice")).json["iceServers"]
            assert server["username"].endswith(":ann")
            secret.unlink()
            lost = await http.get("/v1/talk/ice")
            assert (lost.status, lost.json["error"]["code"]) == (500, "internal")
        async with visitor(on.daemon.urls[0]) as http:
            assert (await http.get("/v1/talk/ice")).status == 401
