"""The official `openai` package, unchanged, against a relay and workers of language spaces, as a user starts them."""

import os
import signal
import socket
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trio

from gpuworker.engines.eliza.rules import ENGLISH
from tests.e2e.test_openai import client_of
from tests.support.processes import PATIENCE_S, a_place, a_relay, a_worker

#: A foreign chat server; `make test` installs it beside .venv.
ELIZA_GPT = Path(f"{sys.prefix}-clients") / "bin" / "eliza-gpt"
SPACES = "[spaces.llm]\n"


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


@pytest.mark.trio
async def test_the_openai_package_talks_with_eliza_and_hangs_up(tmp_path: Path) -> None:
    place = a_place(tmp_path, SPACES)
    command = ("--engine", "eliza", "--space", "llm", "-o", "pace_ms=100")
    async with a_relay(place) as relay, a_worker(place, relay, *command):
        with await client_of(place, relay) as client:
            create: Any = partial(client.chat.completions.create, model="gpt-4o-mini")
            said = [
                user("My number is 4711."),
                {"role": "assistant", "content": "I see."},
                user("What number did I tell you?"),
            ]
            whole = await trio.to_thread.run_sync(partial(create, messages=said))
            assert whole.choices[0].message.content == "You told me the number 4711."
            assert whole.usage.completion_tokens == 6

            def read_all() -> list[Any]:
                return list(create(messages=[user("数到3")], stream=True, stream_options={"include_usage": True}))

            *pieces, usage = await trio.to_thread.run_sync(read_all)
            assert "".join(piece.choices[0].delta.content or "" for piece in pieces) == "1，2，3。"
            assert usage.usage.prompt_tokens == 2

            def hang_up() -> None:
                with create(messages=[user("Tell me a story.")], stream=True) as stream:
                    assert any(chunk.choices[0].delta.content == " once" for chunk in stream)

            await trio.to_thread.run_sync(hang_up)
        await relay.event("request cancelled")


@pytest.mark.trio
async def test_a_reply_of_eliza_is_whole_although_its_process_is_killed(tmp_path: Path) -> None:
    place = a_place(tmp_path, SPACES)
    command = ("--engine", "eliza", "--space", "llm", "-o", "pace_ms=20")
    async with a_relay(place) as relay, a_worker(place, relay, *command) as worker:
        with await client_of(place, relay) as client:

            def read_all() -> str:
                text = ""
                create: Any = client.chat.completions.create
                for chunk in create(model="llm", messages=[user("Tell me a story.")], stream=True):
                    if not text and chunk.choices[0].delta.content:
                        os.kill(child_of(worker.process.pid), signal.SIGKILL)
                    text += chunk.choices[0].delta.content or ""
                return text

            assert await trio.to_thread.run_sync(read_all) == ENGLISH.story
        await relay.event("request queued again")


def child_of(pid: int) -> int:
    (child,) = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return int(child)


@pytest.mark.trio
async def test_a_foreign_server_behind_engine_chat_serves_the_openai_package(tmp_path: Path) -> None:
    assert ELIZA_GPT.exists(), "`make test` installs the programs that are tried as clients"
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = int(listener.getsockname()[1])
    place = a_place(tmp_path, SPACES)
    (tmp_path / "key").write_text("a-secret-of-ours")
    serve = [str(ELIZA_GPT), "--port", str(port), "--api-key", "a-secret-of-ours", "--avg-response-time", "1"]
    url = f"http://127.0.0.1:{port}/v1"
    command = (
        "--engine",
        "chat",
        "--space",
        "llm",
        "-o",
        f"url={url}",
        "-o",
        "model=eliza",
        "-o",
        f"api_key_file={tmp_path / 'key'}",
    )
    async with trio.open_nursery() as nursery:
        server = await nursery.start(
            partial(trio.run_process, serve, check=False, capture_stdout=True, env={"PYTHONUNBUFFERED": "1"})
        )
        with trio.fail_after(PATIENCE_S):
            while True:
                try:
                    await (await trio.open_tcp_stream("127.0.0.1", port)).aclose()
                    break
                except OSError:
                    await trio.sleep(0.05)
        async with a_relay(place) as relay, a_worker(place, relay, *command) as worker:
            with await client_of(place, relay) as client:
                create: Any = partial(client.chat.completions.create, model="llm", messages=[user("I am sad.")])
                whole = await trio.to_thread.run_sync(create)
                assert "sad" in whole.choices[0].message.content
                assert whole.choices[0].finish_reason == "stop"

                def hang_up() -> None:
                    with create(stream=True) as stream:
                        assert any(chunk.choices[0].delta.content for chunk in stream)

                await trio.to_thread.run_sync(hang_up)
            await relay.event("request cancelled")
            assert not any("killed" in line or "a-secret" in line for line in worker.lines)
        server.terminate()
