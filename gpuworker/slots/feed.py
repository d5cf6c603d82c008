"""The way of a live input from the worker to its engine."""

from collections.abc import Callable

Sink = Callable[[bytes, bool], None]


class Feed:
    """Takes the pieces of a live input as they come, and holds them until a slot passes them to its engine.

    Args:
        media_type: as submitted.
        on_taken: called with the number of bytes that the engine has taken, as it grows.

    Attributes:
        received: bytes that have come.
        taken: bytes that the engine has taken. What lies between is held, here or in the engine's process.
        ended: all have come.
    """

    def __init__(self, media_type: str, on_taken: Callable[[int], None]) -> None:
        self.media_type = media_type
        self.received = 0
        self.taken = 0
        self.ended = False
        self._on_taken = on_taken
        self._held: list[tuple[bytes, bool]] = []
        self._sink: Sink = self._hold

    def _hold(self, data: bytes, last: bool) -> None:
        self._held.append((data, last))

    def add(self, data: bytes, *, last: bool) -> None:
        """Take the next piece."""
        self.received += len(data)
        self.ended = last
        self._sink(data, last)

    @property
    def starves(self) -> bool:
        """Whether the engine has taken all that came, though that is not the end."""
        return self.taken == self.received and not self.ended

    # -- for the slot

    def flow_into(self, sink: Sink) -> None:
        """Pass on what has come, and all that comes."""
        held, self._held, self._sink = self._held, [], sink
        for data, last in held:
            sink(data, last)

    def note_taken(self, taken: int) -> None:
        """The engine has taken this many bytes."""
        if taken > self.taken:
            self.taken = taken
            self._on_taken(taken)

    def close(self) -> None:
        """The run has ended: whatever comes now is thrown away."""
        self._held, self._sink, self._on_taken = [], lambda _data, _last: None, lambda _taken: None
