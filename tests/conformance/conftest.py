"""One echo process for all of these tests."""

import os
import subprocess
import sys
from collections.abc import Iterator

import attrs
import pytest

#: `ws://127.0.0.1:PORT` of another server to hold the same cases against; it need not be this repository's.
ECHO_URL = "ECHO_URL"


@attrs.frozen
class Echo:
    """A WebSocket echo on this machine."""

    port: int
    #: None where it was not started here.
    pid: int | None


@pytest.fixture(scope="session")
def echo() -> Iterator[Echo]:
    """The relay's own WebSocket code, echoing; it must live through all the tests, and have nothing to complain of."""
    if url := os.environ.get(ECHO_URL):
        yield Echo(int(url.rpartition(":")[2].rstrip("/")), None)
        return
    command = [sys.executable, "-W", "error", "-m", "tests.conformance.echo_server", "--listen", "127.0.0.1:0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        try:
            first = process.stdout.readline()
            assert first.startswith("listening ws://127.0.0.1:"), first + process.stderr.read()
            yield Echo(int(first.rpartition(":")[2]), process.pid)
            assert process.poll() is None, "the echo ended"
        finally:
            process.kill()
        assert process.stderr.read() == ""
