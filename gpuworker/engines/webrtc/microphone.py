"""The microphone of a peer: what it sends goes to those who listen, in pieces of a tenth of a second.

Everything here runs in the gateway's event loop, but the queues, which any thread may read.
"""

import queue
from array import array
from collections import deque
from typing import Any

from gpuworker.engines.base import AudioChunk, EngineError

HZ = 16_000
PIECE_BYTES = HZ // 5
#: While nobody listens, so many pieces are kept for the next one: who follows another misses nothing.
KEPT = 20
#: Pieces that wait for a listener that takes none; then it hears no more.
MAX_WAITING = 600
#: A microphone that is muted sends silence: samples of no more than that. After so many pieces, they are left out.
MUTED, MUTED_PIECES = 4, 20


class Microphone:
    """What one peer says."""

    def __init__(self) -> None:
        self._listeners: list[queue.SimpleQueue[Any]] = []
        self._kept: deque[AudioChunk] = deque(maxlen=KEPT)
        self._held = bytearray()
        self._silent = 0
        self._ended = False

    def add(self, pcm: bytes) -> None:
        """Pass on more of it: mono, 16 bits."""
        self._held += pcm
        while len(self._held) >= PIECE_BYTES:
            piece = bytes(self._held[:PIECE_BYTES])
            del self._held[:PIECE_BYTES]
            samples = array("h", piece)
            is_silent = min(samples) >= -MUTED and max(samples) <= MUTED
            self._silent = self._silent + 1 if is_silent else 0
            if self._silent <= MUTED_PIECES:
                self._pass_on(AudioChunk(piece))

    def _pass_on(self, piece: AudioChunk) -> None:
        if not self._listeners:
            self._kept.append(piece)
        for listener in list(self._listeners):
            listener.put(piece)
            if listener.qsize() > MAX_WAITING:
                self.leave(listener)
                listener.put(EngineError("the peer says more than the relay takes; it is not heard any more"))

    def listen(self, listener: "queue.SimpleQueue[Any]") -> None:
        """Let somebody hear it from now on, and what nobody has heard just before; None is its end."""
        if self._ended:
            listener.put(None)
            return
        self._listeners.append(listener)
        while self._kept:
            listener.put(self._kept.popleft())

    def leave(self, listener: "queue.SimpleQueue[Any]") -> None:
        """Let somebody hear no more."""
        if listener in self._listeners:
            self._listeners.remove(listener)

    def stop(self, listener: "queue.SimpleQueue[Any]") -> None:
        """End what somebody hears."""
        self.leave(listener)
        listener.put(None)

    def end(self) -> None:
        """The peer is gone."""
        self._ended = True
        while self._listeners:
            self._listeners.pop().put(None)
