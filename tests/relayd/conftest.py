"""What holds for the tests of the relay."""

import sys

import pytest


@pytest.fixture(autouse=True)
def _workers_that_said_nothing_have_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a busy machine, no worker of a test is back within the 1.5 s that it has before it said anything."""
    if "relayd.core.workers" in sys.modules:
        monkeypatch.setattr("relayd.core.workers.UNHEARD_GRACE_S", 60.0)
