"""The worker and the inputs of its requests."""

import hashlib

import pytest
import trio
import trio.testing
from trio.testing import MockClock

from protocol.wire.frames import (
    Cancelled,
    Failed,
)
from protocol.wire.messages import (
    Cancel,
    Input,
)
from protocol.wire.structs import (
    InputInfo,
    InputRule,
)
from tests.support.scripted_relay import (
    ID,
    Desk,
    ScriptedSlot,
    assign,
    run_with,
    script,
)

DATA = b"x" * 300_000


def info(data: bytes = DATA) -> InputInfo:
    return InputInfo(media_type="audio/wav", size=len(data), sha256=hashlib.sha256(data).hexdigest())


def pieces(data: bytes = DATA, name: str = "prompt_wav") -> list[Input]:
    step = 100_000
    return [
        Input(request_id=ID, name=name, offset=start, data=data[start : start + step])
        for start in range(0, len(data), step)
    ]


@pytest.mark.trio
async def test_an_engine_gets_its_inputs_whole_and_only_then(autojump_clock: MockClock) -> None:
    slot = ScriptedSlot(inputs={"prompt_wav": InputRule()})

    async def relay(desk: Desk) -> None:
        await desk.register()
        desk.send(assign(inputs={"prompt_wav": info()}), *pieces()[:-1])
        await desk.silent(5)
        assert slot.jobs == []
        desk.send(pieces()[-1])
        assert len(await desk.frames()) == 5
        assert slot.jobs[0].inputs["prompt_wav"].data == DATA
        assert slot.jobs[0].inputs["prompt_wav"].media_type == "audio/wav"

    await run_with(script(relay), slots=(slot,))


@pytest.mark.trio
@pytest.mark.parametrize(
    ("announced", "sent", "code"),
    [
        ({"prompt_wav": info()}, pieces(b"y" * 300_000), "input_mismatch"),
        ({"prompt_wav": info()}, pieces()[1:], "input_mismatch"),
        ({"prompt_wav": info(b"z" * 5)}, pieces(), "input_mismatch"),
        ({"prompt_wav": info()}, pieces(name="other"), "input_mismatch"),
        ({}, [], "input_missing"),
        ({"prompt_wav": info(), "unknown": info(b"")}, pieces(), "invalid_params"),
        ({"prompt_wav": info(b"z" * 500_000)}, [], "input_too_large"),
    ],
    ids=["wrong sha256", "a gap", "too long", "not announced", "missing", "unknown", "too large"],
)
async def test_inputs_that_are_not_what_was_announced_or_allowed_fail_the_request(
    announced: dict[str, InputInfo], sent: list[Input], code: str, autojump_clock: MockClock
) -> None:
    slot = ScriptedSlot(inputs={"prompt_wav": InputRule(required=True, max_bytes=400_000)})

    async def relay(desk: Desk) -> None:
        await desk.register()
        desk.send(assign(inputs=announced), *sent)
        (last,) = await desk.frames()
        assert isinstance(last, Failed)
        assert last.code == code
        assert slot.jobs == []

    await run_with(script(relay), slots=(slot,))


@pytest.mark.trio
async def test_a_cancel_while_inputs_come_in_ends_at_once_and_a_cut_then_drops_the_attempt(
    autojump_clock: MockClock,
) -> None:
    slot = ScriptedSlot(inputs={"prompt_wav": InputRule()})

    async def first(desk: Desk) -> None:
        await desk.register()
        desk.send(assign(inputs={"prompt_wav": info()}), pieces()[0], Cancel(request_id=ID, reason="no"))
        (last,) = await desk.frames()
        assert isinstance(last, Cancelled)
        desk.send(assign(attempt=2, inputs={"prompt_wav": info()}), pieces()[0])
        await trio.testing.wait_all_tasks_blocked()
        await desk.connection.cut()

    async def second(desk: Desk) -> None:
        assert (await desk.register()).running == ()  # the rest of the input would never come

    await run_with(script(first), script(second), slots=(slot,))
