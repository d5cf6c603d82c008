"""One Chromium for all of these tests, and one relay for those that break nothing."""

import json
import subprocess
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import trio

from tests.browser.window import MOCK, PATIENCE_S, Browser, BrowserPlace, steer
from tests.support.processes import Place, a_place


@pytest.fixture(scope="session")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    started = Browser.start(tmp_path_factory.mktemp("downloads"))
    yield started
    started.driver.quit()


@pytest.fixture(scope="session")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[BrowserPlace]:
    """A relay with a worker, both there for all of the tests that take it."""
    place = a_place(tmp_path_factory.mktemp("site"), "[spaces.tts]\n[spaces.echo]\n[spaces.empty]\n")
    started: list[subprocess.Popen[bytes]] = []
    try:
        started.append(_start(place, "relayd", "serve"))
        url = _listening(place.folder / "relayd.log")
        started.append(_start(place, "gpuworker", "run", *MOCK))
        token = trio.run(partial(steer, place, "create_token", "anna", role="client"))["token"]
        yield BrowserPlace(place.folder, place.environ, url.replace("ws:", "http:") + "/", token)
    finally:
        for process in reversed(started):
            process.kill()
            process.wait()


def _start(place: Place, name: str, *args: str) -> subprocess.Popen[bytes]:
    with (place.folder / f"{name}.log").open("wb") as log:
        return subprocess.Popen(place.command(name, *args), stderr=log, env=place.environ, cwd=place.folder)


def _listening(log: Path) -> str:
    """The URL of a relay, once it is there."""
    deadline = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline:
        for line in log.read_text().splitlines():
            told = json.loads(line) if line.startswith("{") and line.endswith("}") else {}
            if told.get("event") == "listening":
                return str(told["urls"][0])
        time.sleep(0.02)
    raise AssertionError(f"the relay does not listen; it said:\n{log.read_text()}")
