"""What the relay holds of connections that are gone: nothing, and without a garbage collection; and of unfinished
messages all together."""

import gc
import tracemalloc
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

import h11
import pytest
import trio
import trio.testing

from protocol.client.address import parse_address
from protocol.link.connect import connect, perform_handshake
from protocol.link.stream_link import StreamLink
from protocol.link.websocket_frames import BINARY, TRY_AGAIN_LATER, Close, Event, Parser, frame_head, make_frame
from protocol.wire.codec import encode
from protocol.wire.frames import MAX_MESSAGE_BYTES
from protocol.wire.messages import PROTOCOL_VERSION, Hello, Input, Register, Watch
from protocol.wire.validators import Message
from relayd.connections import gateway
from relayd.connections.budget import ConnectionSlot
from relayd.connections.client import ClientHandler
from relayd.connections.connection import Connection
from relayd.connections.operator import OperatorHandler
from relayd.connections.pending import PendingConnection
from relayd.connections.worker import WorkerHandler
from relayd.http.body_parser import Uploads
from relayd.http.connection import Connection as HttpConnection
from relayd.http.connection import RequestCycle
from relayd.http.context import Exchange
from relayd.net.socket_link import SocketLink
from relayd.views.watch import WatchFeed
from tests.support.fake_worker import FORMAT, SCHEMA
from tests.support.relay import Daemon, a_submit, an_id, an_input, daemon, until

PEERS = 12
KIB = 1024
#: For what the relay remembers of a worker or a request, and what is cached; a third of what the smallest case sends.
SLACK_BYTES = 256 * KIB
OF_NEWCOMERS = (PendingConnection,)
OF_CONNECTIONS = (
    SocketLink,
    StreamLink,
    Parser,
    *OF_NEWCOMERS,
    ConnectionSlot,
    Connection,
    ClientHandler,
    WorkerHandler,
    OperatorHandler,
    WatchFeed,
    HttpConnection,
    RequestCycle,
    Exchange,
    Uploads,
    h11.Connection,
)


@pytest.fixture
def no_collections() -> Iterator[None]:
    """Whatever hangs on the garbage collector stays."""
    gc.collect()
    gc.disable()
    tracemalloc.start()
    try:
        yield
    finally:
        tracemalloc.stop()
        gc.enable()


def _alive() -> Counter[str]:
    return Counter(type(each).__name__ for each in gc.get_objects() if type(each) in OF_CONNECTIONS)


def _held_bytes() -> int:
    return tracemalloc.get_traced_memory()[0]


async def _shaken(url: str) -> trio.abc.Stream:
    address = parse_address(url)
    stream = await connect(address)
    await perform_handshake(stream, address)
    return stream


async def _say(stream: trio.abc.Stream, *messages: Message) -> None:
    for message in messages:
        await stream.send_all(make_frame(BINARY, encode(message), masked=True))


async def _logged_in(url: str, role: str) -> trio.abc.Stream:
    stream = await _shaken(url)
    await _say(stream, Hello(version=PROTOCOL_VERSION, role=role))
    assert await stream.receive_some()
    return stream


def _half_a_message(size: int) -> bytes:
    return frame_head(BINARY, size, b"mask") + bytes(size - 10)


async def _cut_in_a_first_message(url: str) -> None:
    stream = await _shaken(url)
    await stream.send_all(_half_a_message(64 * KIB))
    await stream.aclose()


async def _cut_in_a_fragmented_message(url: str) -> None:
    stream = await _logged_in(url, "client")
    first = bytearray(make_frame(BINARY, bytes(500 * KIB), masked=True))
    first[0] = BINARY  # without FIN
    await stream.send_all(first)
    await stream.aclose()


async def _client_cut_in_a_large_message(url: str) -> None:
    stream = await _logged_in(url, "client")
    await stream.send_all(_half_a_message(MAX_MESSAGE_BYTES))
    await stream.aclose()


async def _operator_cut_in_a_large_message(url: str) -> None:
    stream = await _logged_in(url, "operator")
    await _say(stream, Watch(topics=["requests"]))
    await stream.receive_some()
    await stream.send_all(_half_a_message(MAX_MESSAGE_BYTES))
    await stream.aclose()


async def _worker_cut_in_a_frame(url: str) -> None:
    stream = await _logged_in(url, "worker")
    register = Register(worker="box", instance=an_id(), spaces=["tts"], engine="fake", params=SCHEMA, format=FORMAT)
    await _say(stream, register)
    assert await stream.receive_some()
    await stream.send_all(_half_a_message(MAX_MESSAGE_BYTES))
    await stream.aclose()


async def _upload_cut_in_an_input(url: str) -> None:
    stream, data = await _logged_in(url, "client"), bytes(256 * KIB)
    submit = a_submit(inputs={"voice": an_input(data)})
    piece = encode(Input(request_id=submit.request_id, name="voice", offset=0, data=data))
    await _say(stream, submit)
    await stream.send_all(make_frame(BINARY, piece, masked=True)[: 200 * KIB])
    await stream.aclose()


async def _fault_in_a_message(url: str) -> None:
    stream = await _logged_in(url, "client")
    await stream.send_all(b"\xff" * 16)
    while await stream.receive_some():
        pass
    await stream.aclose()


async def _http_cut_in_a_json_body(url: str) -> None:
    await _post(url, "application/json", b'{"params": {"text": "' + b"x" * 200 * KIB)


async def _http_cut_in_an_upload(url: str) -> None:
    head = b'--b\r\ncontent-disposition: form-data; name="voice"; filename="a.wav"\r\ncontent-type: audio/wav\r\n\r\n'
    await _post(url, "multipart/form-data; boundary=b", head + bytes(400 * KIB))


async def _post(url: str, media_type: str, data: bytes) -> None:
    stream = await connect(parse_address(url))
    head = f"POST /v1/spaces/tts HTTP/1.1\r\nhost: x\r\ncontent-type: {media_type}\r\ncontent-length: 450000\r\n\r\n"
    await stream.send_all(head.encode() + data)
    await stream.aclose()


async def _http_cut_between_requests(url: str) -> None:
    stream = await connect(parse_address(url))
    await stream.send_all(b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n")
    assert await stream.receive_some()
    await stream.aclose()


async def _all_gone(relay: Daemon) -> None:
    """Wait until the relay has heard of every end, and looked through those who had not said hello."""
    await until(lambda: not (relay.relay.connections or relay.http_context.connections or relay.gateway.budget.open))
    await until(lambda: not any(type(each) in OF_NEWCOMERS for each in gc.get_objects()))


@pytest.mark.trio
@pytest.mark.usefixtures("no_collections")
@pytest.mark.parametrize(
    "come_and_go",
    [
        _cut_in_a_first_message,
        _cut_in_a_fragmented_message,
        _client_cut_in_a_large_message,
        _operator_cut_in_a_large_message,
        _worker_cut_in_a_frame,
        _upload_cut_in_an_input,
        _fault_in_a_message,
        _http_cut_in_a_json_body,
        _http_cut_in_an_upload,
        _http_cut_between_requests,
    ],
)
async def test_nothing_of_a_departed_peer_waits_for_the_garbage_collector(
    tmp_path: Path, come_and_go: Callable[[str], Awaitable[None]]
) -> None:
    async with daemon(tmp_path) as relay:
        for _ in range(3):  # what is imported, made or cached once
            await come_and_go(relay.url)
        await _all_gone(relay)
        alive, held = _alive(), _held_bytes()
        for _ in range(PEERS):
            await come_and_go(relay.url)
        await _all_gone(relay)
        assert _alive() <= alive
        assert _held_bytes() - held < SLACK_BYTES


@pytest.mark.trio
async def test_unfinished_messages_of_all_connections_are_bounded_and_the_oldest_goes_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gateway, "MAX_PARTIAL_BYTES", 2 * MAX_MESSAGE_BYTES)
    async with daemon(tmp_path) as relay, trio.open_nursery() as nursery:
        streams = [await _logged_in(relay.url, "client") for _ in range(3)]
        for stream in streams:
            await stream.send_all(_half_a_message(MAX_MESSAGE_BYTES - 20))
            await _read_by(relay)
        nursery.start_soon(streams[0].send_all, bytes(10))
        answer: list[Event] = []
        parser = Parser(masked=False, max_message_bytes=MAX_MESSAGE_BYTES)
        with trio.fail_after(10):
            while not any(isinstance(event, Close) for event in answer):
                parser.feed(await streams[0].receive_some())
                answer += parser.pop_events()
        assert [event.code for event in answer if isinstance(event, Close)] == [TRY_AGAIN_LATER]
        await _read_by(relay)
        assert sum(not link.gone for link in (each.link for each in relay.relay.connections.values())) == 2
        for stream in streams:
            await stream.aclose()


async def _read_by(relay: Daemon) -> None:
    """Wait until the relay has read what was sent before."""
    stream = await _logged_in(relay.url, "client")
    await stream.aclose()
    await trio.testing.wait_all_tasks_blocked(0.02)
