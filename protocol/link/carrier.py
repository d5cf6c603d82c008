"""What a link needs from its transport: a Trio stream with tasks, or a socket of the relay's reactor."""

import abc


class Carrier(abc.ABC):
    """The part of a link that depends on its transport; nothing here waits."""

    __slots__ = ()

    @abc.abstractmethod
    def _put(self, data: bytes) -> None:
        """Queue a binary message, and add it to `backlog_bytes`."""

    @abc.abstractmethod
    def _put_control(self, opcode: int, payload: bytes) -> None:
        """Queue a control frame."""

    @abc.abstractmethod
    def _drop_unsent(self) -> None:
        """Drop the queued frames of which nothing has been sent yet."""

    @abc.abstractmethod
    def _finish(self) -> None:
        """The link has ended: cut the transport after the last control frame was sent, or at `_close_by`."""

    @abc.abstractmethod
    def _cut(self) -> None:
        """Cut the transport now."""

    @abc.abstractmethod
    def _schedule_notify(self) -> None:
        """Arrange for a task to call `notify_closed`."""

    @abc.abstractmethod
    def _resume_reading(self) -> None:
        """Continue reading: the inbox has room again."""

    @abc.abstractmethod
    def schedule(self, due: float) -> None:
        """Arrange for `check_liveness` to be called at `due` (Trio time) or earlier."""

    @property
    @abc.abstractmethod
    def _sending(self) -> bool:
        """Whether the transport holds data that the peer has not accepted."""

    @abc.abstractmethod
    def _peer_acknowledges(self) -> bool:
        """Whether the peer's machine still acknowledges data, as far as the kernel can tell."""

    @abc.abstractmethod
    def _in_kernel(self) -> int:
        """Bytes that our kernel has sent or queued but the peer's has not acknowledged; 0 if unknown."""
