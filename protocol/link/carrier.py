"""What a link needs of whatever carries its bytes: a Trio stream with tasks, or a socket of the relay's reactor."""

import abc


class Carrier(abc.ABC):
    """The part of a link that depends on its transport; nothing here waits."""

    __slots__ = ()

    @abc.abstractmethod
    def _put(self, data: bytes) -> None:
        """Queue a binary message, and count it in `backlog_bytes`."""

    @abc.abstractmethod
    def _put_control(self, opcode: int, payload: bytes) -> None:
        """Queue a control frame."""

    @abc.abstractmethod
    def _drop_unsent(self) -> None:
        """Drop what is queued and not on its way yet, whole frames alone."""

    @abc.abstractmethod
    def _finish(self) -> None:
        """The link has ended: cut the transport, once what `_put_control` queued last is out, or at `_close_by`."""

    @abc.abstractmethod
    def _cut(self) -> None:
        """Cut the transport now."""

    @abc.abstractmethod
    def _schedule_notify(self) -> None:
        """Have a task call `notify_closed`."""

    @abc.abstractmethod
    def _resume_reading(self) -> None:
        """The inbox has room again."""

    @abc.abstractmethod
    def schedule(self, due: float) -> None:
        """Have `check_liveness` called at `due` (Trio time) at the latest."""

    @property
    @abc.abstractmethod
    def _sending(self) -> bool:
        """Whether the transport has something that the peer has not taken."""

    @abc.abstractmethod
    def _peer_acknowledges(self) -> bool:
        """Whether the peer's machine is there, as far as the kernel can tell."""

    @abc.abstractmethod
    def _in_kernel(self) -> int:
        """Bytes that the kernel has, and the peer's has not; 0 where that cannot be told."""
