"""Records and a store for the tests of the store."""

import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import trio

from protocol.wire.messages import Submit
from protocol.wire.structs import InputInfo
from relayd.config.schema import Config
from relayd.store import (
    RequestRecord,
    TalkRecord,
    TokenRecord,
    TurnRecord,
    open_store,
)
from relayd.store.sqlite import SqliteStore

DIGEST = "0" * 64


def request_id(number: int) -> str:
    return f"{number:032x}"


def request(number: int, **fields: Any) -> RequestRecord:
    submit = Submit(
        request_id=request_id(number),
        space="tts",
        params={"text": "你好", "seed": 2**63, "blob": b"\xff", "nested": {"a": [1, None, True, 0.5]}},
        inputs={"voice": InputInfo(media_type="audio/wav", size=3, sha256=DIGEST)},
        priority=7,
        queue_timeout_s=1.5,
        detach=True,
        retry="always",
    )
    values: dict[str, Any] = {"request_id": request_id(number), "principal": "ann", "ticket": number, "submit": submit}
    return RequestRecord(**{**values, "created_at": 1000.25 + number, **fields})


def token(number: int = 1, **fields: Any) -> TokenRecord:
    values: dict[str, Any] = {
        "token_id": f"tok_{number}",
        "principal": "ann",
        "role": "client",
        "sha256": bytes([number]) * 32,
    }
    return TokenRecord(**{**values, "created_at": float(number), **fields})


def talk(number: int = 1, **fields: Any) -> TalkRecord:
    values: dict[str, Any] = {"talk_id": f"talk-{number}", "principal": "ann", "user": "user_6"}
    values |= {"session": f"session-{number}", "created_at": 1.5 + number, "touched_at": 2e9}
    return TalkRecord(**{**values, **fields})


def turn(number: int, talk_number: int = 1, **fields: Any) -> TurnRecord:
    values: dict[str, Any] = {"talk_id": f"talk-{talk_number}", "number": number, "role": "user", "at": 3.5}
    return TurnRecord(**{**values, "content": "你好", **fields})


def reply_to_come(number: int, talk_number: int = 1) -> TurnRecord:
    ids = {"text_request": request_id(100 * talk_number + number), "speech_request": request_id(10_000 + talk_number)}
    return turn(number, talk_number, role="assistant", content="", state="waiting", options=b"\x80", **ids)


def config(state_dir: Path, store: Any = "sqlite") -> Config:
    return Config(state_dir=state_dir, store=store)


@contextlib.asynccontextmanager
async def open_sqlite_store(state_dir: Path) -> AsyncIterator[SqliteStore]:
    async with open_store(config(state_dir)) as store:
        assert isinstance(store, SqliteStore)
        with trio.fail_after(20):
            yield store
