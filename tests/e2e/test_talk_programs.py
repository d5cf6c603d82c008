"""Conversations with real processes: the demo, and `relay talk`."""

import json
import os
import re
import signal
import subprocess
from pathlib import Path

import pytest
import trio

from tests.e2e.test_speech import is_empty, level_of, processes_in, seconds_of, tmpdir
from tests.support.processes import PATIENCE_S, Place, Proc, a_place, a_relay, a_worker
from tests.support.raw_http_client import visitor

__all__ = ["tmpdir"]  # the fixture

CONFIG = '[talk]\nreply = "llm"\nspeech = "tts"\n[spaces.llm]\n[spaces.tts]\n'
#: A reply long enough to kill something in.
SLOW = ("--space", "llm", "--engine", "eliza", "-o", "pace_ms=400")
VOICE = ("--space", "tts", "--engine", "mock")


@pytest.mark.trio
async def test_the_demo_holds_conversations_until_it_is_ended(tmp_path: Path, tmpdir: Path) -> None:
    place = a_place(tmp_path)
    async with place.start("relayd", "demo", "--talk", TMPDIR=str(tmpdir)) as demo:
        process = demo.process
        assert process.stdout is not None
        said = ""
        with trio.fail_after(PATIENCE_S):
            while "Ctrl-C" not in said:
                said += (await process.stdout.receive_some()).decode()
        environ = dict(re.findall(r"(RELAY_(?:URL|TOKEN))=(\S+)", said))
        link, page = re.findall(r"http://127\.0\.0\.1:\d+/\S*", said)
        assert environ["RELAY_TOKEN"] not in link
        first, again = await visit(link), await visit(link)
        assert first == (303, f"{page.rstrip(',')}#login={environ['RELAY_TOKEN']}")
        assert again == (410, "")
        assert page.startswith(environ["RELAY_URL"].replace("ws", "http"))
        talk = ("talk", "-o", "spoken", "--session", "s1")
        out, told = await place.run("relay", *talk, stdin="Hello!\n\n你好\n".encode(), **environ)
        assert len(replies := out.decode().splitlines()) == 2
        assert replies[0].startswith("Hello")
        assert replies[1] > "\u2e80"
        assert "wrote spoken/reply-001.wav" in told
        assert all(level_of(tmp_path / "spoken" / f"reply-00{number}.wav") > 0.02 for number in (1, 2))
        demo.send_signal(signal.SIGINT)
        assert await demo.ended() == 0
    assert processes_in(tmpdir) == []
    assert is_empty(tmpdir)


async def visit(link: str) -> tuple[int, str]:
    """What a link answers, and where it leads."""
    address, _, path = link.removeprefix("http://").partition("/")
    async with visitor(f"http://{address}") as http:
        answer = await http.get(f"/{path}")
    return answer.status, answer.headers.get("location", "")


async def lines_of(proc: Proc, count: int) -> list[str]:
    """The first lines of what a process writes."""
    assert proc.process.stdout is not None
    said = b""
    with trio.fail_after(PATIENCE_S):
        while said.count(b"\n") < count:
            piece = await proc.process.stdout.receive_some()
            assert piece, f"it ended: {said!r}"
            said += piece
    return said.decode().splitlines()


async def rest_of(proc: Proc) -> str:
    assert proc.process.stdout is not None
    with trio.fail_after(PATIENCE_S):
        return b"".join([piece async for piece in proc.process.stdout]).decode()


@pytest.mark.trio
async def test_a_relay_killed_in_mid_reply_does_not_end_the_talk_and_costs_no_sample(tmp_path: Path) -> None:
    place = a_place(tmp_path, CONFIG)
    said = b"I am sad.\n"
    talk = ("talk", "-o", "spoken", "--json")
    async with a_relay(place) as relay, a_worker(place, relay, *SLOW), a_worker(place, relay, *VOICE):
        await place.run("relay", *talk, stdin=said)  # as it is when nothing is lost
        several = f"unix:{tmp_path}/nobody.sock,unix:{tmp_path}/state/relayd.sock"
        async with place.start("relay", *talk, stdin=subprocess.PIPE, RELAY_URL=several) as client:
            assert client.process.stdin is not None
            await client.process.stdin.send_all(said)
            await lines_of(client, 2)
            relay.send_signal(signal.SIGKILL)
            await relay.ended()
            async with a_relay(place):
                await client.process.stdin.send_all(said)
                await client.process.stdin.aclose()
                told = [json.loads(line) for line in (await rest_of(client)).splitlines()]
                assert await client.ended() == 0
    ended = [line for line in told if line["type"] == "ended"]
    assert [turn["state"] for turn in ended] == ["done", "done"]  # and the next line was answered, too
    whole, cut = ((tmp_path / "spoken" / f"reply-00{number}.wav").read_bytes() for number in (1, 2))
    assert seconds_of(tmp_path / "spoken" / "reply-002.wav") > 0.5
    assert cut[44:] == whole[44:]


@pytest.mark.trio
async def test_talk_says_what_is_wrong(tmp_path: Path) -> None:
    place = a_place(tmp_path)
    async with place.start("relayd", "serve") as relay:
        await relay.event("listening")
        await refused(place, 1, "table [talk] in relayd.toml")
    await refused(place, 3, "cannot connect to unix:")
    place = a_place(tmp_path, CONFIG)
    async with a_relay(place) as relay:
        await refused(place, 1, "is not an id of a session", "--session", "no digit")
        await refused(place, 1, "no_worker")  # nobody is there to reply
        async with a_worker(place, relay, "--space", "llm", "--engine", "eliza"):
            out, told = await place.run("relay", "talk", "-o", "spoken", stdin=b"Hello!\n")
    assert out.decode() == "Hello. What is on your mind today?\n"  # the text comes all the same
    assert "no_worker" in told
    assert not list((tmp_path / "spoken").iterdir())


async def refused(place: Place, code: int, words: str, *args: str) -> None:
    _, told = await place.run("relay", "talk", *args, code=code, stdin=b"Hello!\n")
    assert words in told


@pytest.mark.trio
async def test_ctrl_c_interrupts_a_reply_and_the_talk_goes_on_at_a_terminal(tmp_path: Path) -> None:
    place = a_place(tmp_path, CONFIG)
    keyboard, terminal = os.openpty()
    talk = ("talk", "--session", "s1", "--json")
    async with a_relay(place) as relay, a_worker(place, relay, *SLOW):
        async with place.start("relay", *talk, stdin=terminal) as client:
            os.write(keyboard, b"I am sad.\n")
            await lines_of(client, 1)
            client.send_signal(signal.SIGINT)
            await client.until(lambda line: "interrupted" in line and "Ctrl-C" not in line)
            os.write(keyboard, b"Hello.\n\x04")
            told = await rest_of(client)
            assert await client.ended() == 0
        assert json.loads(told.splitlines()[-2])["state"] == "done"
        async with place.start("relay", *talk, stdin=subprocess.PIPE) as client:
            assert client.process.stdin is not None
            await client.process.stdin.send_all(b"I am sad.\n")
            await lines_of(client, 1)
            client.send_signal(signal.SIGINT)
            assert await client.ended() == 130
        async with visitor(f"unix:{tmp_path}/state/relayd.sock") as http:
            turns = (await http.get("/v1/talks/s1/turns")).json["turns"]
    assert [turn["state"] for turn in turns if turn["role"] == "assistant"] == ["interrupted", "done", "interrupted"]
    os.close(keyboard)
    os.close(terminal)
