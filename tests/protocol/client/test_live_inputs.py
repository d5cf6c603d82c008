"""Live inputs of the client: fed from iterators and by hand, once and in order whatever is cut, and bounded."""

from collections.abc import AsyncIterator

import pytest
import trio
import trio.testing
from hypothesis import example, given, settings
from hypothesis import strategies as st

from protocol import From, InputClosed, Live, ProtocolError, RelayClient, RequestFailed, RequestRejected, open_relay
from protocol.client.address import Address
from protocol.client.inputs import InputSource
from protocol.wire.frames import Completed, Output
from protocol.wire.messages import MAX_UNACKED_BYTES, Attach, Input, InputAck, Rejected, Submit, Welcome
from protocol.wire.structs import InputInfo
from tests.protocol.client.live_relay import LiveRelay
from tests.protocol.client.scripted_client import A, all_audio, relay_with
from tests.support.scripted_relay import ID, OTHER, URL, Connection, accept_link, failed, frames


async def each(*pieces: str | bytes) -> AsyncIterator[str | bytes]:
    for piece in pieces:
        await trio.lowlevel.checkpoint()
        yield piece


@pytest.mark.trio
async def test_what_an_iterator_yields_is_sent_and_ended(autojump_clock: trio.testing.MockClock) -> None:
    peer = LiveRelay()
    inputs: dict[str, InputSource] = {
        "text": each("Hel", "lo 你", "好", ""),
        "audio": (each(b"\1\0", b"\2\0"), "audio/pcm"),
    }
    async with relay_with(peer.script()) as relay, relay.submit("tts", inputs=inputs, group="turn 1") as stream:
        await stream.result()
    assert peer.infos["text"] == InputInfo(media_type="text/plain", live=True)
    assert peer.infos["audio"] == InputInfo(media_type="audio/pcm", live=True)
    assert peer.stored == {"text": "Hello 你好".encode(), "audio": b"\1\0\2\0"}
    assert not peer.cancels


@pytest.mark.trio
async def test_each_piece_goes_out_at_once(autojump_clock: trio.testing.MockClock) -> None:
    peer = LiveRelay()
    async with relay_with(peer.script()) as relay, relay.submit("tts", inputs={"text": Live()}) as stream:
        pieces: list[str | bytes] = ["a", b"b", "c"]
        for number, piece in enumerate(pieces, 1):
            await stream.feed("text", piece)
            await trio.testing.wait_all_tasks_blocked(0.01)
            assert len(peer.pieces) == number
        await stream.end_input("text")
        await stream.end_input("text")
        await stream.result()
    assert [(piece.offset, piece.data, piece.last) for piece in peer.pieces] == [
        (0, b"a", None),
        (1, b"b", None),
        (2, b"c", None),
        (3, b"", True),
    ]


@pytest.mark.trio
async def test_nothing_is_fed_as_a_sign_of_life(autojump_clock: trio.testing.MockClock) -> None:
    peer = LiveRelay()
    async with relay_with(peer.script()) as relay, relay.submit("tts", inputs={"text": Live()}) as stream:
        for piece in ("", "abc", b"", ""):
            await stream.feed("text", piece)
            await trio.testing.wait_all_tasks_blocked(0.01)
        await stream.end_input("text")
        await stream.result()
    assert [(piece.offset, piece.data) for piece in peer.pieces] == [
        (0, b""),
        (0, b"abc"),
        (3, b""),
        (3, b""),
        (3, b""),
    ]
    assert [piece.last for piece in peer.pieces] == [None] * 4 + [True]


@given(
    pieces=st.lists(st.integers(0, 5) | st.sampled_from([100_000, 300_000, 600_000]), max_size=8),
    cuts=st.lists(st.tuples(st.integers(0, 4), st.integers(1, 3)), max_size=6),
    by_hand=st.booleans(),
    earlier=st.sampled_from([0, 0, 3, 400_000, 900_000]),
)
@example(pieces=[300_000, 0, 1], cuts=[], by_hand=False, earlier=400_000)  # a sign of life below what is stored
@settings(max_examples=60, deadline=None)
def test_wherever_the_connection_is_cut_the_relay_gets_the_bytes_once_and_in_order(
    pieces: list[int], cuts: list[tuple[int, int]], by_hand: bool, earlier: int
) -> None:
    """`cuts`: after how many pieces a link is cut, and each how many are acknowledged; 0: before `accepted`.

    `earlier`: how many bytes the relay has from an earlier program.
    """
    data = [bytes([number + 1]) * size for number, size in enumerate(pieces)]
    peer = LiveRelay(stored={"audio": bytearray(b"".join(data)[:earlier])})

    async def main() -> None:
        scripts = [*(peer.script(*cut) for cut in cuts), peer.script()]
        inputs = {"audio": Live("audio/pcm") if by_hand else (each(*data), "audio/pcm")}
        with trio.fail_after(3600):
            async with relay_with(*scripts) as relay, relay.submit("stt", inputs=inputs) as stream:
                if by_hand:
                    for piece in data:
                        await stream.feed("audio", piece)
                    await stream.end_input("audio")
                await stream.result()

    trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))
    assert peer.stored == {"audio": b"".join(data)}


@pytest.mark.trio
async def test_a_feeder_waits_while_the_relay_stores_nothing(autojump_clock: trio.testing.MockClock) -> None:
    peer = LiveRelay()
    async with relay_with(peer.script(acks=False)) as relay, relay.submit("stt", inputs={"audio": Live()}) as stream:
        await stream.feed("audio", bytes(MAX_UNACKED_BYTES))
        with trio.move_on_after(60) as waited:
            await stream.feed("audio", b"x")
        assert waited.cancelled_caught
    assert len(peer.stored["audio"]) == MAX_UNACKED_BYTES


@pytest.mark.trio
async def test_nothing_is_fed_over_a_new_link_before_the_relay_has_said_how_much_it_has(
    autojump_clock: trio.testing.MockClock,
) -> None:
    peer = LiveRelay()
    async with relay_with(peer.script(cut_after=1), peer.script(acks=False)) as relay:
        async with relay.submit("stt", inputs={"audio": Live()}) as stream:
            await stream.feed("audio", b"ab")
            await trio.sleep(10)
            await stream.feed("audio", b"cd")
            await trio.sleep(10)
        assert [piece.data for piece in peer.pieces] == [b"ab"]


@pytest.mark.trio
async def test_an_exception_of_the_iterator_cancels_the_request_and_reaches_the_caller(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async def breaks() -> AsyncIterator[str]:
        yield "Hello"
        raise KeyError("the model failed")

    for detach in (False, True):
        peer = LiveRelay()
        async with relay_with(peer.script()) as relay:
            with pytest.raises(KeyError, match="the model failed"):
                async with relay.submit("tts", inputs={"text": breaks()}, detach=detach):
                    await trio.sleep_forever()
            await trio.testing.wait_all_tasks_blocked(0.01)
        assert len(peer.cancels) == 1
        assert peer.stored == {"text": b"Hello"}


@pytest.mark.trio
async def test_an_exception_of_the_block_stops_the_iterator_and_is_raised_unchanged(
    autojump_clock: trio.testing.MockClock,
) -> None:
    closed = []

    async def endless() -> AsyncIterator[str]:
        try:
            yield "Hello"
            await trio.sleep_forever()
        finally:
            closed.append(True)

    async def leave(relay: RelayClient) -> None:
        async with relay.submit("tts", inputs={"text": endless()}):
            await trio.testing.wait_all_tasks_blocked(0.01)
            raise KeyError

    peer = LiveRelay()
    async with relay_with(peer.script()) as relay:
        with pytest.raises(KeyError):
            await leave(relay)
        await trio.testing.wait_all_tasks_blocked(0.01)
    assert closed == [True]
    assert len(peer.cancels) == 1


@pytest.mark.trio
async def test_a_request_that_ends_early_tells_its_feeder(autojump_clock: trio.testing.MockClock) -> None:
    async def script(connection: Connection) -> None:
        submit = await connection.accept()
        await connection.expect(Input)
        connection.send(*frames(submit.request_id, A))
        submit = await connection.accept()
        await connection.expect(Input)
        connection.send(failed(submit.request_id))
        submit = await connection.accept()
        message = "other bytes are stored at offset 0"
        connection.send(Rejected(request_id=submit.request_id, code="id_conflict", message=message))
        submit = await connection.expect(Submit)
        connection.send(Rejected(request_id=submit.request_id, code="queue_full", message="it is full"))
        await connection.hold()

    inputs = {"text": Live()}
    async with relay_with(script) as relay:
        async with relay.submit("tts", inputs=inputs) as stream:
            await stream.feed("text", "Hello")
            await stream.result()
            with pytest.raises(InputClosed, match="has completed"):
                await stream.feed("text", "more")
            await stream.end_input("text")
            with pytest.raises(InputClosed, match="was ended"):
                await stream.feed("text", "more")
        async with relay.submit("tts", inputs=inputs) as stream:
            with pytest.raises(RequestFailed, match="it broke"):
                await stream.end_input("text")
        async with relay.submit("tts", inputs=inputs) as stream:
            await trio.testing.wait_all_tasks_blocked(0.01)
            with pytest.raises(RequestFailed, match="id_conflict: other bytes"):
                await stream.feed("text", "Hello")
        with pytest.raises(RequestRejected, match="it is full"):
            async with relay.submit("tts", inputs={"text": each("Hello")}):
                pytest.fail("entered")


@pytest.mark.trio
async def test_an_iterator_is_left_alone_when_the_request_ends_without_the_rest(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async def script(connection: Connection) -> None:
        submit = await connection.accept()
        connection.send(*frames(submit.request_id, A))
        await connection.hold()

    async with relay_with(script) as relay:
        assert await all_audio(relay, inputs={"text": (each(*[bytes(100_000)] * 10), "text/plain")}) == A


@pytest.mark.trio
async def test_what_cannot_be_fed_is_told(autojump_clock: trio.testing.MockClock) -> None:
    peer = LiveRelay()
    async with relay_with(peer.script()) as relay, relay.submit("tts", inputs={"text": Live()}) as stream:
        with pytest.raises(ValueError, match="no live input 'texts'; submit it with"):
            await stream.feed("texts", "hi")
        with pytest.raises(ValueError, match="not Unicode at character 2: cut it between characters"):
            await stream.feed("text", "a\ud83d")
    async with relay_with(LiveRelay().script()) as relay:
        with pytest.raises(ValueError, match="not Unicode"):
            async with relay.submit("tts", inputs={"text": each("\ud83d")}):
                await trio.sleep_forever()


@pytest.mark.trio
async def test_bytes_that_the_relay_has_from_an_earlier_program_are_sent_for_it_to_compare(
    autojump_clock: trio.testing.MockClock,
) -> None:
    peer = LiveRelay(stored={"text": bytearray(b"Hello wor")})
    inputs = {"text": each("Hello", " world")}
    async with relay_with(peer.script()) as relay, relay.submit("tts", inputs=inputs, request_id=ID) as stream:
        await stream.result()
    assert b"".join(piece.data for piece in peer.pieces) == b"Hello world"
    assert peer.stored == {"text": b"Hello world"}


@pytest.mark.trio
async def test_of_what_the_relay_has_from_an_earlier_program_only_the_beginning_is_sent(
    autojump_clock: trio.testing.MockClock,
) -> None:
    data = bytes(range(250)) * 4_000
    peer = LiveRelay(stored={"audio": bytearray(data[:900_000])})
    pieces = [data[start : start + 7_000] for start in range(0, len(data), 7_000)]
    inputs = {"audio": (each(*pieces), "audio/pcm")}
    async with relay_with(peer.script()) as relay, relay.submit("stt", inputs=inputs, request_id=ID) as stream:
        await stream.result()
    assert peer.stored == {"audio": data}
    assert sum(len(piece.data) for piece in peer.pieces) < len(data) - 900_000 + MAX_UNACKED_BYTES + 7_000


@pytest.mark.trio
async def test_a_relay_that_lost_what_it_had_ends_the_request(autojump_clock: trio.testing.MockClock) -> None:
    async def forgets(connection: Connection) -> None:
        attach = await connection.expect(Attach)
        connection.send(InputAck(request_id=attach.request_id, name="text", offset=1))
        await connection.hold()

    peer = LiveRelay()

    async def stores(connection: Connection) -> None:
        with trio.move_on_after(1):
            await peer.script()(connection)
        await connection.cut()

    async with relay_with(stores, forgets) as relay, relay.submit("tts", inputs={"text": Live()}) as stream:
        await stream.feed("text", "Hello")
        with pytest.raises(ProtocolError, match="only 1 bytes of input 'text'"):
            await stream.result()


@pytest.mark.trio
async def test_a_pipe_is_announced(autojump_clock: trio.testing.MockClock) -> None:
    peer = LiveRelay()
    inputs = {"text": From(OTHER), "audio": From(ID, "audio/pcm")}
    async with relay_with(peer.script()) as relay, relay.submit("tts", inputs=inputs) as stream:
        await stream.result()
    assert peer.infos == {"text": InputInfo(from_=OTHER), "audio": InputInfo(from_=ID, media_type="audio/pcm")}


@pytest.mark.trio
async def test_marks_are_events_and_no_audio(autojump_clock: trio.testing.MockClock) -> None:
    async def script(connection: Connection) -> None:
        for _ in range(2):
            request_id = (await connection.accept()).request_id
            started, audio = frames(request_id, A, ends=False)
            mark = Output(request_id=request_id, attempt=1, seq=2, mark={"text_end": 5, "sample": 100})
            connection.send(started, audio, mark, Completed(request_id=request_id, attempt=1, seq=3))
        await connection.hold()

    async with relay_with(script) as relay:
        assert await all_audio(relay) == A
        async with relay.submit("tts") as stream:
            outputs = [event for event in [event async for event in stream.events()] if isinstance(event, Output)]
    assert [output.mark for output in outputs] == [{"text_end": 5, "sample": 100}]


@pytest.mark.trio
async def test_a_relay_without_live_inputs_is_named(autojump_clock: trio.testing.MockClock) -> None:
    async def old(stream: trio.abc.Stream) -> None:
        async with accept_link(stream) as link:
            await link.receive()
            link.send(Welcome(connection_id="c", principal="p", server="relayd/0.1.0"))
            await trio.sleep_forever()

    async with trio.open_nursery() as nursery:

        async def connect(_address: Address) -> trio.abc.Stream:
            ours, theirs = trio.testing.memory_stream_pair()
            nursery.start_soon(old, theirs)
            await trio.lowlevel.checkpoint()
            return ours

        async with open_relay(URL, connect_to=connect) as relay:
            for source in (Live(), From(ID)):
                with pytest.raises(ValueError, match=r"relayd/0\.1\.0 is too old for live inputs"):
                    async with relay.submit("tts", inputs={"text": source}):
                        pytest.fail("entered")
        nursery.cancel_scope.cancel()
