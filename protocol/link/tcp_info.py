"""What the kernel knows of the other end of a connection; beside Linux, nothing."""

import socket
import struct
import sys
from typing import Protocol

import trio


class Socket(Protocol):
    """The standard library's socket, or Trio's."""

    @property
    def family(self) -> int:
        """Address family."""

    def fileno(self) -> int:
        """Its descriptor."""

    def getsockopt(self, level: int, optname: int, buflen: int, /) -> bytes:
        """See the standard library."""


def unsent_bytes(sock: Socket) -> int | None:
    """Bytes handed to the kernel that the peer's has not acknowledged; of a unix socket, that the peer has not read.

    None where that cannot be told.
    """
    if sys.platform != "linux":
        return None
    import fcntl  # not there on Windows
    import termios

    try:  # SIOCOUTQ, tcp(7) and unix(7); TIOCOUTQ is the same number
        return int(struct.unpack("i", fcntl.ioctl(sock.fileno(), termios.TIOCOUTQ, bytes(4)))[0])
    except (OSError, ValueError):  # closed meanwhile
        return None


def peer_acknowledges(sock: Socket) -> bool:
    """Whether the peer's machine acknowledges what it is sent, though its program may read nothing.

    A machine that is there answers each probe of its closed window at once; one that is gone leaves two of these, or
    of what was sent again, without an answer. False where that cannot be told.
    """
    if sys.platform != "linux":
        return False
    if sock.family == socket.AF_UNIX:
        return True  # with the program its end goes, too
    try:  # struct tcp_info of linux/tcp.h begins: state, ca_state, retransmits, probes
        _state, _ca_state, retransmits, probes = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 4)
    except OSError:  # closed meanwhile
        return False
    return retransmits < 2 and probes < 2


def socket_of(stream: trio.abc.Stream) -> trio.socket.SocketType | None:
    """The socket under a stream, under TLS or what was read ahead too; None under one that has none."""
    while (under := getattr(stream, "transport_stream", None)) is not None:
        stream = under
    return stream.socket if isinstance(stream, trio.SocketStream) else None
