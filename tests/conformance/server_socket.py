"""The server's end of a connection, as the kernel sees it: what it has not read yet, and whether it has let go.

Only so is a chopped write known to arrive chopped: TCP hands many small writes to a slow reader as one, and a test of
chopping would test nothing. Linux alone: its sock_diag netlink (linux/inet_diag.h), 10 µs a question, where
/proc/net/tcp takes 6 ms.
"""

import fcntl
import socket
import struct
import termios
from types import TracebackType

import trio

_NETLINK_SOCK_DIAG = 4
_SOCK_DIAG_BY_FAMILY = 20
_NLM_F_REQUEST = 1
_NLMSG_ERROR = 2
_ANY_STATE = 0xFFFFFFFF
_NO_COOKIE = b"\xff" * 8
#: Behind the 16 octets of the netlink header: family, state, timer, retransmits (4), the addresses (48), expires (4);
#: there come the receive queue, the send queue, the user and the inode.
_STATE_AT = 16 + 1
_QUEUES_AT = 16 + 4 + 48 + 4
_LISTEN = 10


class ServerSocket:
    """What the kernel knows of the server's end of one TCP connection over IPv4 on this machine."""

    def __init__(self, client: trio.socket.SocketType) -> None:
        self._client = client
        here, there = client.getsockname(), client.getpeername()
        ports = struct.pack("!HH", there[1], here[1])
        addresses = struct.pack("4s12x4s12x", socket.inet_aton(there[0]), socket.inet_aton(here[0]))
        asked = struct.pack("=BBxxI", socket.AF_INET, socket.IPPROTO_TCP, _ANY_STATE)
        asked += ports + addresses + struct.pack("=I", 0) + _NO_COOKIE
        header = struct.pack("=IHHII", 16 + len(asked), _SOCK_DIAG_BY_FAMILY, _NLM_F_REQUEST, 0, 0)
        self._question = header + asked
        self._kernel = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, _NETLINK_SOCK_DIAG)

    def __enter__(self) -> "ServerSocket":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, fault: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._kernel.close()

    @property
    def has_read_all(self) -> bool:
        """Whether the server's program has read all that was sent to it, or will never read it."""
        # In this order: what is underway now may wait in its queue a moment later.
        underway = any(fcntl.ioctl(self._client.fileno(), termios.TIOCOUTQ, b"\0" * 4))
        there = self._look()
        return there is None or (not underway and not there[0])

    @property
    def is_let_go(self) -> bool:
        """Whether the server's program has closed it; what the kernel still keeps of it is no file any more."""
        there = self._look()
        return there is None or there[1] == 0

    async def let_go(self) -> None:
        """Wait until the server's program has closed it. The kernel can only be asked: it tells nobody."""
        while not self.is_let_go:  # noqa: ASYNC110
            await trio.sleep(0.01)

    async def read_all(self) -> None:
        """Wait until the server's program has read all that was sent to it, or will never read it."""
        while not self.has_read_all:
            await trio.lowlevel.checkpoint()

    def _look(self) -> tuple[int, int] | None:
        """Octets in its receive queue, and its inode; None where there is no such socket any more."""
        self._kernel.send(self._question)
        answer = self._kernel.recv(4096)
        (kind,) = struct.unpack_from("=H", answer, 4)
        if kind == _NLMSG_ERROR or answer[_STATE_AT] == _LISTEN:  # with it gone, its listener is what is found
            return None
        waiting, _, _, inode = struct.unpack_from("=IIII", answer, _QUEUES_AT)
        return waiting, inode
