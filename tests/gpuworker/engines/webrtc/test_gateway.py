"""The loop of all calls: what takes too long is told, and one that hangs is started anew."""

import asyncio
import time
from collections.abc import Iterator

import pytest

from gpuworker.engines.base import EngineError
from gpuworker.engines.webrtc import gateway as gateways
from gpuworker.engines.webrtc.gateway import Gateway
from gpuworker.engines.webrtc.peer import Settings


@pytest.fixture
def gateway() -> Iterator[Gateway]:
    opened = Gateway(Settings(), range(20_800, 20_801), ["127.0.0.1"])
    opened.open()
    yield opened
    opened.close()


def test_what_takes_too_long_is_told_and_the_other_calls_go_on(gateway: Gateway) -> None:
    with pytest.raises(EngineError, match="do not answer") as fault:
        gateway.do(asyncio.sleep(60), 0.01)
    assert not fault.value.restart
    assert gateway.do(asyncio.sleep(0, "goes on")) == "goes on"


def test_a_loop_that_hangs_is_started_anew(gateway: Gateway, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gateways, "HANG_S", 0.05)
    gateway.soon(time.sleep, 0.5)
    with pytest.raises(EngineError) as fault:
        gateway.do(asyncio.sleep(0), 0.05)
    assert fault.value.restart
    assert fault.value.retryable


def test_calls_are_counted_where_they_are_made(gateway: Gateway) -> None:
    peer = gateway.do(gateway.open_peer("first"))
    with pytest.raises(EngineError, match="all 1 calls of this worker are taken"):
        gateway.do(gateway.open_peer("second"))
    gateway.do(gateway.close_peer("first", peer))
    again = gateway.do(gateway.open_peer("second"))
    gateway.do(gateway.close_peer("second", again))
