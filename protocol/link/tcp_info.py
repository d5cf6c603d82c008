"""What the kernel knows about the other end of a connection; available only on Linux."""

import socket
import struct
import sys
from typing import Protocol

import trio


class Socket(Protocol):
    """A socket of the standard library or of Trio."""

    @property
    def family(self) -> int:
        """Address family."""

    def fileno(self) -> int:
        """The file descriptor."""

    def getsockopt(self, level: int, optname: int, buflen: int, /) -> bytes:
        """See `socket.socket.getsockopt`."""


def unsent_bytes(sock: Socket) -> int | None:
    """Bytes given to the kernel that the peer has not acknowledged; for a unix socket, has not read.

    None if this is unknown.
    """
    if sys.platform != "linux":
        return None
    import fcntl  # does not exist on Windows
    import termios

    try:  # SIOCOUTQ, tcp(7) and unix(7); TIOCOUTQ is the same number
        return int(struct.unpack("i", fcntl.ioctl(sock.fileno(), termios.TIOCOUTQ, bytes(4)))[0])
    except (OSError, ValueError):  # closed meanwhile
        return None


def peer_acknowledges(sock: Socket) -> bool:
    """Whether the peer's machine acknowledges data, even if its program reads nothing.

    A reachable machine answers each window probe immediately; one that cannot be reached leaves two probes or
    retransmissions unanswered. False if this is unknown.
    """
    if sys.platform != "linux":
        return False
    if sock.family == socket.AF_UNIX:
        return True  # if the program ends, its end of the socket closes
    try:  # struct tcp_info of linux/tcp.h begins: state, ca_state, retransmits, probes
        _state, _ca_state, retransmits, probes = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 4)
    except OSError:  # closed meanwhile
        return False
    return retransmits < 2 and probes < 2


def socket_of(stream: trio.abc.Stream) -> trio.socket.SocketType | None:
    """The socket under a stream, also through TLS or a buffering wrapper; None if there is none."""
    while (under := getattr(stream, "transport_stream", None)) is not None:
        stream = under
    return stream.socket if isinstance(stream, trio.SocketStream) else None
