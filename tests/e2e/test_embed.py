"""A program that already runs, with a web page of its own, serves its model through a real relay as well."""

import json
import signal
import sys
import urllib.request
import wave
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import attrs
import pytest
import trio

from tests.support.processes import PATIENCE_S, Place, Proc, a_place, a_relay

#: As docs/examples/gradio_app.py, with the page of the standard library in place of Gradio's, which is heavy: threads
#: of a server's pool, one model behind a lock, a handle that the page asks and stops.
PROGRAM = """
import json, sys, threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlsplit

from gpuworker.embed import EmbedError, serve

lock, held, released = threading.Lock(), threading.Event(), threading.Event()


def speak(text: str):
    for _letter in text:
        yield bytes(4_800)  # a tenth of a second at 24 kHz


def speak_for_relay(text: str):
    if text == "wait":
        held.set()
        released.wait(60)
    with lock:
        yield from speak(text)


class Page(BaseHTTPRequestHandler):
    def do_GET(self):
        asked = urlsplit(self.path)
        said = {}
        if asked.path == "/speak":
            with lock:
                said["bytes"] = sum(map(len, speak(*parse_qs(asked.query)["text"])))
        elif asked.path == "/held":
            said["held"] = held.wait(60)
        elif asked.path == "/release":
            released.set()
        elif asked.path == "/stop":
            said["stopped"] = handle.stop()
        status = handle.status()
        said |= {"state": status.state, "running": status.running, "completed": status.completed}
        body = json.dumps(said).encode()
        self.send_response(200)
        self.end_headers()
        self.wfile.write(body)
        if asked.path == "/quit":
            threading.Thread(target=server.shutdown).start()

    def log_message(self, *given):
        pass


server = ThreadingHTTPServer(("127.0.0.1", 0), Page)
try:
    handle = serve(speak_for_relay, space="tts", sample_rate=24_000, name="page")
except EmbedError as fault:
    raise SystemExit(f"not served: {fault}")
print(f"page on {server.server_address[1]}", file=sys.stderr, flush=True)
server.serve_forever()
"""


@attrs.frozen
class ProgramPlace(Place):
    """A place where `program` is a command, too."""

    def command(self, name: str, *args: str) -> list[str]:
        return [sys.executable, "program.py", *args] if name == "program" else Place.command(self, name, *args)


@attrs.frozen
class Page:
    """The program's page, as its visitors use it."""

    port: int

    async def get(self, path: str) -> dict[str, Any]:
        def fetch() -> dict[str, Any]:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=PATIENCE_S) as answer:
                said: dict[str, Any] = json.load(answer)
                return said

        return await trio.to_thread.run_sync(fetch)


@asynccontextmanager
async def a_program(place: Place) -> AsyncIterator[tuple[Proc, Page]]:
    async with place.start("program") as program:
        port = await program.until(lambda line: line.removeprefix("page on ") if "page on " in line else None)
        yield program, Page(int(port))


def program_place(folder: Path) -> Place:
    (folder / "program.py").write_text(PROGRAM)
    place = a_place(folder)
    return ProgramPlace(place.folder, place.environ)


def seconds_of(path: Path) -> float:
    with wave.open(str(path)) as wav:
        return float(wav.getnframes() / wav.getframerate())


@pytest.mark.trio
async def test_a_running_program_serves_tells_its_standing_and_stops_while_its_own_page_goes_on(tmp_path: Path) -> None:
    place = program_place(tmp_path)
    async with a_relay(place) as relay, a_program(place) as (program, page):
        await relay.event("worker registered")
        assert await page.get("/status") == {"state": "registered", "running": 0, "completed": 0}
        assert (await page.get("/speak?text=four"))["bytes"] == 4 * 4_800
        await place.run("relay", "say", "seven..", "-o", "seven.wav")
        assert seconds_of(tmp_path / "seven.wav") == pytest.approx(0.7)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(place.run, "relay", "say", "wait", "-o", "wait.wav")
            assert (await page.get("/held"))["running"] == 1
            said = await page.get("/speak?text=meanwhile")  # the relay's request runs, and the page is served
            assert (said["bytes"], said["running"]) == (9 * 4_800, 1)
            await page.get("/release")
        assert seconds_of(tmp_path / "wait.wav") == pytest.approx(0.4)
        assert (await page.get("/status"))["completed"] == 2
        said = await page.get("/stop")
        assert (said["stopped"], said["state"]) == (True, "stopped")
        await relay.event("worker disconnected")
        assert (await page.get("/speak?text=after"))["bytes"] == 5 * 4_800
        await page.get("/quit")
        assert await program.ended() == 0


@pytest.mark.trio
async def test_a_program_that_ends_takes_its_worker_along_and_needs_no_stop(tmp_path: Path) -> None:
    place = program_place(tmp_path)
    async with a_relay(place) as relay, a_program(place) as (program, page):
        await relay.event("worker registered")
        await page.get("/quit")
        assert await program.ended() == 0
        await relay.event("worker disconnected")
        relay.send_signal(signal.SIGTERM)
        assert await relay.ended() == 0
