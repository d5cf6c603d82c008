"""The microphone of a peer, without one."""

import queue
from typing import Any

import pytest

from gpuworker.engines.base import AudioChunk, EngineError
from gpuworker.engines.webrtc import microphone as module
from gpuworker.engines.webrtc.microphone import PIECE_BYTES, Microphone

LOUD, MUTED = b"\x00\x10" * (PIECE_BYTES // 2), bytes(PIECE_BYTES)


def heard_by(listener: "queue.SimpleQueue[Any]") -> list[Any]:
    """What waits for a listener: samples, an error or the end."""
    found = [listener.get() for _ in range(listener.qsize())]
    return [each.pcm if isinstance(each, AudioChunk) else each for each in found]


def test_what_is_said_between_two_listeners_is_heard_by_the_second() -> None:
    microphone, first, second = Microphone(), queue.SimpleQueue[Any](), queue.SimpleQueue[Any]()
    microphone.listen(first)
    microphone.add(b"\1\1" * 1_600 + b"\2\2" * 100)
    microphone.stop(first)
    microphone.add(b"\2\2" * 1_500)
    microphone.listen(second)
    microphone.add(b"\3\3" * 1_600)
    microphone.end()
    assert heard_by(first) == [b"\1\1" * 1_600, None]
    assert heard_by(second) == [b"\2\2" * 1_600, b"\3\3" * 1_600, None]
    microphone.listen(first)
    assert heard_by(first) == [None]


def test_while_nobody_listens_only_the_last_is_kept() -> None:
    microphone, listener = Microphone(), queue.SimpleQueue[Any]()
    microphone.add(LOUD * (module.KEPT + 5))
    microphone.listen(listener)
    assert len(heard_by(listener)) == module.KEPT


def test_a_muted_microphone_sends_nothing_after_a_while() -> None:
    microphone, listener = Microphone(), queue.SimpleQueue[Any]()
    microphone.listen(listener)
    microphone.add(LOUD + MUTED * 1_000 + LOUD)
    assert heard_by(listener) == [LOUD, *[MUTED] * module.MUTED_PIECES, LOUD]


def test_a_listener_that_takes_nothing_hears_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_WAITING", 3)
    microphone, slow, other = Microphone(), queue.SimpleQueue[Any](), queue.SimpleQueue[Any]()
    microphone.listen(slow)
    microphone.add(LOUD * 4)
    microphone.listen(other)
    microphone.add(LOUD)
    (*pieces, fault) = heard_by(slow)
    assert pieces == [LOUD] * 4
    assert isinstance(fault, EngineError)
    assert heard_by(other) == [LOUD]
