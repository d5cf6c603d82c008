"""What the kernel knows of the other end of a connection; of a stream without a socket, and beside Linux, nothing."""

import socket
import struct
import sys

import trio


def waiting_bytes(stream: trio.abc.Stream) -> int | None:
    """Bytes handed to the kernel that the peer's has not acknowledged; of a unix socket, that the peer has not read.

    None where that cannot be told.
    """
    sock = _socket_of(stream)
    if sock is None or sys.platform != "linux":
        return None
    import fcntl  # not there on Windows
    import termios

    try:  # SIOCOUTQ, tcp(7) and unix(7); TIOCOUTQ is the same number
        return int(struct.unpack("i", fcntl.ioctl(sock.fileno(), termios.TIOCOUTQ, bytes(4)))[0])
    except (OSError, ValueError):  # closed meanwhile
        return None


def answers(stream: trio.abc.Stream) -> bool:
    """Whether the peer's machine acknowledges what it is sent, though its program may read nothing.

    A machine that is there answers each probe of its closed window at once; one that is gone leaves two of these, or
    of what was sent again, without an answer. False where that cannot be told.
    """
    sock = _socket_of(stream)
    if sock is None or sys.platform != "linux":
        return False
    if sock.family == socket.AF_UNIX:
        return True  # with the program its end goes, too
    try:  # struct tcp_info of linux/tcp.h begins: state, ca_state, retransmits, probes
        _state, _ca_state, retransmits, probes = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 4)
    except OSError:  # closed meanwhile
        return False
    return retransmits < 2 and probes < 2


def _socket_of(stream: trio.abc.Stream) -> trio.socket.SocketType | None:
    while (under := getattr(stream, "transport_stream", None)) is not None:  # of TLS, or of what was read ahead
        stream = under
    return stream.socket if isinstance(stream, trio.SocketStream) else None
