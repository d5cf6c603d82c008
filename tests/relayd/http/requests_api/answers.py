"""Requests of the tests of the requests API, and how to read the answers."""

import base64

from protocol.wire.structs import (
    InputRule,
)
from tests.support.fake_worker import samples
from tests.support.raw_http_client import Answer, events_of

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
