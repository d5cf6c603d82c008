"""A relay that does what a test's script says, over streams in memory or a socket."""

import contextlib
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, TypeVar

import attrs
import trio
import trio.testing

from protocol.client.address import Address
from protocol.link.base import Link
from protocol.link.dial import serve_link
from protocol.link.limits import LinkLimits
from protocol.wire.codec import decode
from protocol.wire.errors import LinkBroken
from protocol.wire.frames import (
    Audio,
    Completed,
    Failed,
    Frame,
    Started,
)
from protocol.wire.messages import (
    FROM_ANYONE,
    FROM_OPERATOR,
    SUBPROTOCOL,
    Accepted,
    Error,
    Hello,
    Queued,
    Submit,
    Welcome,
)
from protocol.wire.structs import AudioFormat
from protocol.wire.validators import Message
from relayd.net.http_head import is_complete, read_head, split_head
from relayd.net.websocket_handshake import HandshakeRejected, build_response, parse_head

M = TypeVar("M", bound=Message)

FORMAT = AudioFormat(sample_rate=24_000)
ADDRESS = Address(kind="tcp", host="relay.test", port=1)
URL = "ws://relay.test:1"
ID = "0123456789abcdef0123456789abcdef"


@attrs.define
class Connection:
    """One client's connection, its hello taken and answered."""

    link: Link
    stream: trio.abc.Stream
    hello: Hello
    #: Every message taken by `expect`.
    heard: list[Message] = attrs.field(factory=list)

    async def expect(self, kind: type[M]) -> M:
        """The next message, which must be of this kind."""
        message = decode(await self.link.receive(), FROM_OPERATOR)
        self.heard.append(message)
        assert isinstance(message, kind), f"expected {kind.__name__}, got {message}"
        return message

    def send(self, *messages: Message) -> None:
        for message in messages:
            self.link.send(message)

    async def accept(self) -> Submit:
        """Take a submit and accept it."""
        submit = await self.expect(Submit)
        self.send(Accepted(request_id=submit.request_id))
        return submit

    async def cut(self) -> None:
        """Once all is sent, break the connection as a network does: no close frame."""
        await self.link.drained()
        await trio.testing.wait_all_tasks_blocked()
        await trio.aclose_forcefully(self.stream)

    async def hold(self) -> None:
        """Take messages until the client goes."""
        async for data in self.link:
            self.heard.append(decode(data, FROM_OPERATOR))


@asynccontextmanager
async def accept_link(stream: trio.abc.Stream, **rules: Any) -> AsyncIterator[Link]:
    """The relay's end of a link over a stream at whose other end a handshake is asked for."""
    data = await read_head(stream)
    if not is_complete(data):
        await stream.send_all(HandshakeRejected(400, "this is not HTTP").to_bytes())
        await stream.aclose()
        raise LinkBroken("no handshake came")
    head, early = split_head(data)
    await stream.send_all(build_response(parse_head(head), SUBPROTOCOL))
    async with serve_link(stream, peer="client", limits=LinkLimits(**rules), early=early) as link:
        yield link


Script = Callable[[Connection], Awaitable[None]]


async def serve(stream: trio.abc.Stream, script: Script) -> None:
    """One connection."""
    async with contextlib.AsyncExitStack() as stack:
        try:
            link = await stack.enter_async_context(accept_link(stream))
            hello = decode(await link.receive(), FROM_ANYONE)
        except LinkBroken:
            return
        assert isinstance(hello, Hello)
        if hello.token == "wrong" or script is refuse:
            link.send(Error(code="unauthenticated", message="this token is not known"))
            return
        link.send(Welcome(connection_id="c1", principal="tester", server="fake"))
        connection = Connection(link, stream, hello)
        await script(connection)


async def refuse(_connection: Connection) -> None:
    """As a script: the login is refused."""


class FakeRelay:
    """Answers each connection with the next script; the last script answers all that follow."""

    def __init__(self, nursery: trio.Nursery, *scripts: Script) -> None:
        self._nursery = nursery
        self._scripts = list(scripts)
        self.connections = 0

    def next_script(self) -> Script:
        self.connections += 1
        return self._scripts.pop(0) if len(self._scripts) > 1 else self._scripts[0]

    async def connect(self, _address: Address) -> trio.abc.Stream:
        """A new connection's client end."""
        await trio.lowlevel.checkpoint()
        ours, theirs = trio.testing.memory_stream_pair()
        self._nursery.start_soon(serve, theirs, self.next_script())
        return ours


def frames(request_id: str, *pcm: bytes, attempt: int = 1, seq: int = 0, ends: bool = True) -> list[Frame]:
    """started, audio..., completed, from `seq` on of the same sequence."""
    every: list[Frame] = [Started(request_id=request_id, attempt=attempt, seq=0, format=FORMAT)]
    every += [Audio(request_id=request_id, attempt=attempt, seq=number, pcm=data) for number, data in enumerate(pcm, 1)]
    if ends:
        result = {"samples": sum(map(len, pcm)) // 2}
        every.append(Completed(request_id=request_id, attempt=attempt, seq=len(pcm) + 1, result=result))
    return every[seq:]


async def speak(connection: Connection) -> None:
    """Serve any number of submits, each with a place in the queue and three chunks."""
    async for data in connection.link:
        message = decode(data, FROM_OPERATOR)
        connection.heard.append(message)
        if isinstance(message, Submit):
            connection.send(Accepted(request_id=message.request_id))
            connection.send(Queued(request_id=message.request_id, position=1, of=1, eta_s=2.0))
            connection.send(*frames(message.request_id, b"\1\0" * 2400, b"\2\0" * 2400, b"\3\0" * 2400))


def failed(request_id: str, seq: int = 0, **more: object) -> Failed:
    return Failed.from_map(
        {"request_id": request_id, "attempt": 1, "seq": seq, "code": "engine_failed", "message": "it broke", **more}
    )


class RelayThread:
    """A fake relay on a unix socket, in a thread of its own, for tests of what is not Trio; gives its URL.

    A fault of a script is raised at the end of the block.
    """

    def __init__(self, directory: Path, *scripts: Script) -> None:
        self._path = directory / "relay.sock"
        self._scripts = scripts
        self._ready = threading.Event()
        self._thread = threading.Thread(target=self._run, name="fake relay")
        self._fault: BaseException | None = None
        self._token: trio.lowlevel.TrioToken | None = None
        self._scope = trio.CancelScope()

    def __enter__(self) -> str:
        self._path.unlink(missing_ok=True)
        self._thread.start()
        self._ready.wait()
        if self._fault is not None:
            raise self._fault
        return f"unix:{self._path}"

    def __exit__(self, kind: object, *_more: object) -> None:
        assert self._token is not None
        with contextlib.suppress(trio.RunFinishedError):
            self._token.run_sync_soon(self._scope.cancel)
        self._thread.join()
        if self._fault is not None and kind is None:
            raise self._fault

    def _run(self) -> None:
        try:
            trio.run(self._main)
        except BaseException as fault:  # noqa: BLE001  raised again at the end of the block
            self._fault = fault
        finally:
            self._ready.set()

    async def _main(self) -> None:
        with self._scope, trio.socket.socket(trio.socket.AF_UNIX) as listening:
            await listening.bind(str(self._path))
            listening.listen()
            self._token = trio.lowlevel.current_trio_token()
            self._ready.set()
            async with trio.open_nursery() as nursery:
                fake = FakeRelay(nursery, *self._scripts)
                while True:
                    connection, _peer = await listening.accept()
                    nursery.start_soon(serve, trio.SocketStream(connection), fake.next_script())
