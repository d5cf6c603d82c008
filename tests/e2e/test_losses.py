"""Workers and engines that go down, and a client that is put to sleep, as real processes: what becomes of requests."""

import signal
from pathlib import Path

import pytest
import trio

from tests.support.processes import a_place, a_relay, a_worker

MOCK = ("--engine", "mock")


@pytest.mark.trio
async def test_a_request_under_which_three_workers_are_killed_fails_and_the_fourth_serves_on(tmp_path: Path) -> None:
    place = a_place(tmp_path, "[limits]\nworker_grace_s = 0.1\n[spaces.tts]\n")
    tune = ("--param", "duration_s=60")
    async with (
        a_relay(place) as relay,
        place.start("relay", "say", "kills", "--space", "tts", *tune, "-o", "bad.wav") as bad,
    ):
        request_ids = set()
        for _ in range(3):
            heard = len(relay.lines)
            async with a_worker(place, relay, *MOCK) as worker:
                request_ids.add((await relay.event("request started", after=heard))["request_id"])
                worker.send_signal(signal.SIGKILL)
                await worker.ended()
        assert await bad.ended() == 1
        failed = await relay.event("request failed")
        assert {failed["request_id"]} == request_ids
        assert failed["code"] == "worker_lost"
        assert "3 attempts have been lost" in failed["why"]
        assert any("worker_lost" in line for line in bad.lines)
        async with a_worker(place, relay, *MOCK):
            await place.run("relay", "say", "hello", "--param", "speed=0", "-o", "good.wav")


@pytest.mark.trio
@pytest.mark.parametrize(("how", "code"), [("exit", "engine_failed"), ("hang", "idle_timeout")])
async def test_an_engine_that_crashes_or_hangs_costs_its_own_request_alone(tmp_path: Path, how: str, code: str) -> None:
    place = a_place(tmp_path, "[spaces.tts]\nidle_timeout_s = 1.0\n")
    tune = ("--param", "duration_s=6")
    async with a_relay(place) as relay, a_worker(place, relay, *MOCK, "--slots", "2", "--cancel-grace", "0.2"):
        await place.run("relay", "say", "goes on", *tune, "--param", "speed=0", "-o", "whole.wav")
        async with place.start("relay", "say", "goes on", *tune, "-o", "on.wav") as listener:
            heard = len(relay.lines)
            _, why = await place.run(
                "relay", "say", "bad", "--param", f'fail={{"how":"{how}","at":2}}', "-o", "bad.wav", code=1
            )
            assert code in why
            failed = await relay.event("request failed", after=heard)
            assert (failed["code"], "3 attempts have been lost" in failed["why"]) == (code, True)
            assert await listener.ended() == 0
        await place.run("relay", "say", "goes on", *tune, "--param", "speed=0", "-o", "after.wav")
    whole = (tmp_path / "whole.wav").read_bytes()
    assert (tmp_path / "on.wav").read_bytes() == (tmp_path / "after.wav").read_bytes() == whole


@pytest.mark.trio
async def test_a_client_put_to_sleep_in_mid_stream_is_waited_for_and_misses_nothing(tmp_path: Path) -> None:
    """As by Ctrl-Z: it answers no ping for longer than `dead_after_s`, while more waits for it than kernels hold."""
    place = a_place(tmp_path, "[limits]\nping_interval_s = 0.2\ndead_after_s = 1.0\n[spaces.tts]\n")
    tune = ("--param", "duration_s=400")
    async with a_relay(place) as relay, a_worker(place, relay, *MOCK):
        await place.run("relay", "say", "sleeps", *tune, "--param", "speed=0", "-o", "whole.wav")
        heard = len(relay.lines)
        async with place.start(
            "relay", "say", "sleeps", *tune, "--param", "speed=150", "-o", "out.wav", "--json"
        ) as client:
            await client.audio_chunks(2)
            client.send_signal(signal.SIGSTOP)
            await relay.event("request completed", after=heard)
            await trio.sleep(2.0)
            client.send_signal(signal.SIGCONT)
            await client.audio_chunks(None)
            assert await client.ended() == 0
        gone = await relay.event("disconnected", after=heard)
        assert "closed the connection (1000)" in gone["why"], "nobody cut it off"
    assert (tmp_path / "out.wav").read_bytes() == (tmp_path / "whole.wav").read_bytes()
