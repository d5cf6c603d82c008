"""The client's uploads: pieces, a cut in the middle, and the size of the backlog."""

import hashlib
from pathlib import Path

import pytest
import trio
import trio.testing

from protocol import (
    open_relay,
)
from protocol.client.address import Address
from protocol.client.inputs import HIGH_WATER_BYTES
from protocol.wire.messages import (
    Accepted,
    Input,
    Submit,
)
from tests.protocol.client.scripted_client import A, all_audio, relay_with
from tests.support.scripted_relay import URL, Connection, FakeRelay, frames


@pytest.mark.trio
async def test_inputs_are_announced_and_sent_in_pieces(autojump_clock: trio.testing.MockClock, tmp_path: Path) -> None:
    voice, notes = bytes(range(256)) * 3000, tmp_path / "notes.txt"
    notes.write_bytes(b"hello")

    async def script(connection: Connection) -> None:
        submit = await connection.expect(Submit)
        assert submit.inputs["voice"].media_type == "audio/wav"
        assert submit.inputs["voice"].size == len(voice)
        assert submit.inputs["voice"].sha256 == hashlib.sha256(voice).hexdigest()
        assert submit.inputs["notes"].media_type == "text/plain"
        assert submit.inputs["empty"].size == 0
        got = {"voice": b"", "notes": b""}
        while sum(map(len, got.values())) < len(voice) + 5:
            piece = await connection.expect(Input)
            assert piece.offset == len(got[piece.name])
            assert len(piece.data) <= 256 * 1024
            got[piece.name] += piece.data
        assert got == {"voice": voice, "notes": b"hello"}
        connection.send(Accepted(request_id=submit.request_id), *frames(submit.request_id, A))
        await connection.hold()

    inputs = {"voice": (voice, "audio/wav"), "notes": notes, "empty": b""}
    async with relay_with(script) as relay:
        assert await all_audio(relay, inputs=inputs) == A


@pytest.mark.trio
async def test_a_cut_upload_begins_anew_on_the_next_link(autojump_clock: trio.testing.MockClock) -> None:
    data = bytes(2_000_000)

    async def first(connection: Connection) -> None:
        await connection.expect(Submit)
        await connection.expect(Input)
        await connection.cut()

    async def second(connection: Connection) -> None:
        submit = await connection.expect(Submit)
        got = 0
        while got < len(data):
            piece = await connection.expect(Input)
            assert piece.offset == got
            got += len(piece.data)
        connection.send(Accepted(request_id=submit.request_id), *frames(submit.request_id, A))
        await connection.hold()

    async with relay_with(first, second) as relay:
        assert await all_audio(relay, inputs={"voice": data}) == A


@pytest.mark.trio
async def test_an_upload_keeps_the_backlog_small(autojump_clock: trio.testing.MockClock) -> None:
    async def script(connection: Connection) -> None:
        await connection.expect(Submit)
        await trio.sleep(3600)

    async with trio.open_nursery() as nursery:
        fake = FakeRelay(nursery, script)

        async def connect(address: Address) -> trio.abc.Stream:
            stream = await fake.connect(address)
            assert isinstance(stream, trio.StapledStream)
            return trio.StapledStream(SlowSend(stream.send_stream), stream.receive_stream)

        async with open_relay(URL, connect_to=connect) as relay:
            with trio.move_on_after(5):
                async with relay.submit("tts", inputs={"voice": bytes(50_000_000)}):
                    pytest.fail("accepted")
            assert relay._link is not None
            assert relay._link.backlog_bytes < 2 * HIGH_WATER_BYTES
            nursery.cancel_scope.cancel()


class SlowSend(trio.abc.SendStream):
    """Takes 100 kB a second."""

    def __init__(self, stream: trio.abc.SendStream) -> None:
        self.stream = stream

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        await trio.sleep(len(data) / 100_000)
        await self.stream.send_all(data)

    async def wait_send_all_might_not_block(self) -> None:
        await self.stream.wait_send_all_might_not_block()

    async def aclose(self) -> None:
        await self.stream.aclose()
