"""One engine process for all slots of a worker: what its listeners hear when it is killed, hangs or is poisoned."""

import os
import signal
from contextlib import AsyncExitStack
from pathlib import Path

import pytest

from tests.support.processes import a_place, a_relay, a_worker, engines_of
from tests.support.seat_storm import WEIGHTS, storm

LISTENERS = 3


@pytest.mark.trio
async def test_kills_hangs_and_poisons_cost_no_innocent_request_a_sample(tmp_path: Path) -> None:
    found = await storm(tmp_path, 16, seed=1)
    assert found.complaints == []
    assert found.faults.keys() == WEIGHTS.keys()
    assert found.seen["innocent losses of listeners"] > 0


@pytest.mark.trio
async def test_every_listener_hears_the_same_when_the_engine_process_is_killed_in_mid_stream(tmp_path: Path) -> None:
    place = a_place(tmp_path)
    command = ("--engine", "mock", "-o", "shared=true", "--slots", "8")
    async with a_relay(place) as relay, a_worker(place, relay, *command) as worker:
        for number in range(LISTENERS):
            say = ("relay", "say", f"text {number}", "--param", "duration_s=40", "--param")
            await place.run(*say, "speed=0", "-o", f"whole{number}.wav")
        heard = len(relay.lines)
        (engine,) = engines_of(worker)
        async with AsyncExitStack() as stack:
            listeners = []
            for number in range(LISTENERS):
                say = ("relay", "say", f"text {number}", "--param", "duration_s=40", "--param")
                listening = place.start(*say, "speed=4", "-o", f"out{number}.wav", "--json")
                listeners.append(await stack.enter_async_context(listening))
            for listener in listeners:
                await listener.audio_chunks(2)
            os.kill(engine, signal.SIGKILL)
            for listener in listeners:
                await listener.audio_chunks(None)
                assert await listener.ended() == 0
        requeued = await relay.event("request queued again", after=heard)
        assert requeued["losses"] == 0, "nobody is to blame"
    for number in range(LISTENERS):
        assert (tmp_path / f"out{number}.wav").read_bytes() == (tmp_path / f"whole{number}.wav").read_bytes()
