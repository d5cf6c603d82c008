"""npm's `openai`, unchanged, against a relay and workers as a user starts them: chat, and the Realtime API."""

import json
import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio

from tests.e2e.test_openai import NODE
from tests.e2e.test_openai_realtime import CONFIG, MODEL
from tests.support.processes import PATIENCE_S, Place, Proc, a_place, a_relay, a_worker

HERE = Path(__file__).parent
MODULES = HERE.parents[1] / "docs" / "examples" / "node_modules"
SCRIPT = HERE / "openai_talk.mjs"
TLS = HERE.parent / "support" / "tls"


@asynccontextmanager
async def talking(folder: Path) -> AsyncIterator[tuple[Place, Proc]]:
    """A relay with a space that says back what it is told, and one that speaks."""
    (folder / "model.py").write_text(MODEL)
    place = a_place(folder, f'{CONFIG}[tls]\ncert = "{TLS}/cert.pem"\nkey = "{TLS}/key.pem"\n')
    words = ("--engine", "function", "-o", "call=model:reply", "--space", "llm")
    async with (
        a_relay(place) as relay,
        a_worker(place, relay, *words, PYTHONPATH=str(folder)),
        a_worker(place, relay, "--engine", "mock", "-o", "speed=0.5", "--space", "tts"),
    ):
        yield place, relay


async def run(place: Place, relay: Proc, kind: str) -> dict[str, Any]:
    """What the package gets."""
    assert NODE is not None, "there is no `node` on PATH; `make test` puts one into .venv/bin"
    assert (MODULES / "openai").is_dir(), "`make test` installs npm's openai"
    (place.folder / "node_modules").symlink_to(MODULES)
    script = shutil.copy(SCRIPT, place.folder)
    token, _ = await place.run("relayd", "token", "create", "--role", "client", "--name", "reader")
    environ = place.environ | {
        "OPENAI_BASE_URL": (await relay.event("listening"))["openai_base_url"],
        "OPENAI_API_KEY": token.decode().strip(),
        # The Realtime classes of the package connect to `wss`, whatever the URL.
        "NODE_EXTRA_CA_CERTS": str(TLS / "cert.pem"),
    }
    with trio.fail_after(PATIENCE_S):
        command = [NODE, "--experimental-websocket", script, kind]  # Node 20 has its own WebSocket behind this switch
        done = await trio.run_process(command, env=environ, capture_stdout=True)
    got: dict[str, Any] = json.loads(done.stdout)
    return got


@pytest.mark.trio
async def test_npms_openai_streams_a_reply_and_hangs_up(tmp_path: Path) -> None:
    place = a_place(tmp_path, "[spaces.llm]\n")
    eliza = ("--engine", "eliza", "--space", "llm", "-o", "pace_ms=100")
    async with a_relay(place) as relay, a_worker(place, relay, *eliza):
        got = await run(place, relay, "chat")
        await relay.event("request cancelled")
    assert (got["text"], got["reason"], got["usage"]["prompt_tokens"]) == ("1，2，3。", "stop", 2)


@pytest.mark.trio
@pytest.mark.parametrize("kind", ["ws", "websocket"])
async def test_npms_openai_talks_truncates_and_cancels(tmp_path: Path, kind: str) -> None:
    async with talking(tmp_path) as (place, relay):
        got = await run(place, relay, kind)
        await relay.event("request cancelled")
    assert (got["session"], got["instructions"]) == ("realtime", "Be brief.")
    assert (got["status"], got["said"]) == ("completed", "Message 2 was hello there ")
    assert got["samples"] > 24_000
    assert got["same"], "the samples are those of /v1/audio/speech"
    assert 0 < len(got["kept"]) < len(got["said"])
    assert got["said"].startswith(got["kept"])
    assert got["text"] == "Message 4 was and now "
    assert (got["cancelled"], got["late"]) == ("cancelled", "response_cancel_not_active")
