"""Fixtures of the tests of the HTTP server."""

from collections.abc import Iterator

import pytest

from tests.relayd.http.sample_handlers import Logs
from tests.support.relay import kept_logs


@pytest.fixture
def logs() -> Iterator[Logs]:
    """What the daemon logs."""
    with kept_logs() as kept:
        yield kept
