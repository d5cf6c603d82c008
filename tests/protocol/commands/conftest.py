"""A standard input that a test writes to while a command reads it."""

import os
import sys
from collections.abc import Iterator

import attrs
import pytest


@attrs.define
class WrittenInput:
    """The end of a pipe that another program would write to."""

    fd: int
    closed: bool = False

    def write(self, data: bytes, *, last: bool = False) -> None:
        os.write(self.fd, data)
        if last:
            self.close()

    def close(self) -> None:
        if not self.closed:
            self.closed = True
            os.close(self.fd)


@pytest.fixture
def stdin(monkeypatch: pytest.MonkeyPatch) -> Iterator[WrittenInput]:
    reading, writing = os.pipe()
    written = WrittenInput(writing)
    with open(reading) as source:  # noqa: PTH123  there is no path
        monkeypatch.setattr(sys, "stdin", source)
        yield written
        written.close()
