"""Attaching to a request that another program submitted."""

import pytest
import trio
import trio.testing

from protocol import (
    AudioRestarted,
    RequestRejected,
)
from protocol.wire.frames import (
    Completed,
    Frame,
)
from protocol.wire.messages import (
    Accepted,
    Attach,
    Leave,
    Rejected,
)
from protocol.wire.validators import Message
from tests.protocol.client.scripted_client import A, B, C, relay_with
from tests.support.scripted_relay import ID, Connection, Script, frames


@pytest.mark.trio
async def test_attaching_reads_from_behind_the_given_frame_and_leaving_cancels_nothing(
    autojump_clock: trio.testing.MockClock,
) -> None:
    heard: list[Message] = []

    async def script(connection: Connection) -> None:
        attach = await connection.expect(Attach)
        assert (attach.request_id, attach.attempt, attach.after_seq) == (ID, 0, 1)
        connection.send(Accepted(request_id=ID), *frames(ID, A, B, C, seq=2)[:2])
        await connection.hold()
        heard.extend(connection.heard)

    async with relay_with(script) as relay, relay.attach(ID, after_seq=1) as stream:
        assert (await anext(stream)).seq == 2
        assert (await anext(stream)).seq == 3
    assert [type(message) for message in heard] == [Attach, Leave]


@pytest.mark.trio
async def test_attaching_to_what_is_not_there_is_rejected(autojump_clock: trio.testing.MockClock) -> None:
    async def script(connection: Connection) -> None:
        await connection.expect(Attach)
        connection.send(Rejected(request_id=ID, code="request_not_found", message="not known"))
        await connection.hold()

    async with relay_with(script) as relay, relay.attach(ID) as stream:
        with pytest.raises(RequestRejected, match="not known"):
            await anext(stream)


@pytest.mark.trio
async def test_one_request_cannot_be_open_twice(autojump_clock: trio.testing.MockClock) -> None:
    async with relay_with(Connection.hold) as relay, relay.attach(ID) as stream:
        with pytest.raises(ValueError, match="open on this relay already"):
            async with relay.attach(ID):
                pass
        assert relay._streams[ID] is stream


def attached_to(*answer: Frame) -> tuple[Script, list[Attach]]:
    asked: list[Attach] = []

    async def script(connection: Connection) -> None:
        asked.append(await connection.expect(Attach))
        connection.send(Accepted(request_id=ID), *answer)
        await connection.hold()

    return script, asked


@pytest.mark.trio
@pytest.mark.parametrize("attempt", [0, 1])
async def test_frames_that_an_attached_program_has_are_left_out_also_where_a_relay_begins_earlier(
    autojump_clock: trio.testing.MockClock, attempt: int
) -> None:
    """A relay that was restarted has its frames anew from the worker, from number 0 on."""
    script, asked = attached_to(*frames(ID, A, B, C))
    async with relay_with(script) as relay, relay.attach(ID, 2, attempt=attempt) as stream:
        assert b"".join([pcm async for pcm in stream.audio()]) == C
        assert stream.restarts == 0
    assert [(attach.attempt, attach.after_seq) for attach in asked] == [(attempt, 2)]


@pytest.mark.trio
async def test_a_later_attempt_is_told_to_an_attached_program_that_says_whose_frames_it_has(
    autojump_clock: trio.testing.MockClock,
) -> None:
    script, _asked = attached_to(*frames(ID, C, C, attempt=2))
    got = bytearray(A + B)
    async with relay_with(script) as relay, relay.attach(ID, 2, attempt=1) as stream:
        async for pcm in stream.audio(on_restart=got.clear):
            got += pcm
        assert bytes(got) == C + C
    async with relay_with(script) as relay, relay.attach(ID, 2, attempt=1) as stream:
        with pytest.raises(AudioRestarted):
            await anext(stream.audio())


@pytest.mark.trio
@pytest.mark.parametrize("attempt", [0, 1])
async def test_an_attach_behind_the_last_frame_ends_with_it(
    autojump_clock: trio.testing.MockClock, attempt: int
) -> None:
    script, _asked = attached_to(frames(ID, A)[-1])
    async with relay_with(script) as relay, relay.attach(ID, 99, attempt=attempt) as stream:
        with trio.fail_after(60):
            assert (await stream.result())["samples"] == 100
            assert [type(frame) async for frame in stream] == [Completed]
