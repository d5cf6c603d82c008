"""The relay told to leave, and killed, with real processes around it."""

import signal
from pathlib import Path

import pytest
import trio

from tests.support.processes import a_place, a_relay, a_worker

MOCK = ("--engine", "mock")


@pytest.mark.trio
async def test_a_second_sigterm_leaves_at_once_and_what_runs_to_its_worker(tmp_path: Path) -> None:
    place = a_place(tmp_path)
    async with a_relay(place) as relay, a_worker(place, relay, *MOCK) as worker:
        say = ("say", "long", "--param", "duration_s=100", "-o", "long.wav", "--json")
        async with place.start("relay", *say) as client:
            await client.audio_chunks(3)
            relay.send_signal(signal.SIGTERM)
            draining = await relay.event("draining")
            assert (draining["running"], draining["at_most_s"]) == (1, 30.0)
            await client.audio_chunks(3)  # it goes on
            relay.send_signal(signal.SIGTERM)
            with trio.fail_after(10):
                assert await relay.ended() == 0
            await relay.event("exiting without waiting for running requests")
            assert (await relay.event("exiting with running requests; they continue when the relay is back"))[
                "requests"
            ] == 1
            assert client.process.poll() is None, "client and worker wait for it to come back"
            assert worker.process.poll() is None


@pytest.mark.trio
async def test_a_relay_killed_in_mid_stream_and_started_again_costs_a_pause_and_no_sample(tmp_path: Path) -> None:
    place = a_place(tmp_path)
    say = ("say", "a tune of three seconds", "--param", "duration_s=3")
    async with a_relay(place) as relay, a_worker(place, relay, *MOCK) as worker:
        await place.run("relay", *say, "--param", "speed=0", "-o", "whole.wav")
        async with place.start("relay", *say, "-o", "cut.wav", "--json") as client:
            await client.audio_chunks(5)
            relay.send_signal(signal.SIGKILL)
            await relay.ended()
            async with a_relay(place):
                await client.audio_chunks(None)
                assert await client.ended() == 0
            assert worker.process.poll() is None
    whole = (tmp_path / "whole.wav").read_bytes()
    assert len(whole) > 3 * 2 * 16_000
    assert (tmp_path / "cut.wav").read_bytes() == whole


@pytest.mark.trio
async def test_a_standby_takes_over_from_a_killed_relay_and_its_listener_misses_no_sample(tmp_path: Path) -> None:
    place = a_place(tmp_path)
    say = ("say", "a tune of three seconds", "--param", "duration_s=3")
    async with a_relay(place) as relay, place.start("relayd", "serve", "--wait") as standby:
        holder = (await standby.event("standing by"))["why"]
        assert str(relay.process.pid) in holder
        several = f"unix:{tmp_path}/nobody.sock,unix:{tmp_path}/state/relayd.sock"
        async with a_worker(place, relay, *MOCK, RELAY_URL=several) as worker:
            await place.run("relay", *say, "--param", "speed=0", "-o", "whole.wav", RELAY_URL=several)
            async with place.start("relay", *say, "-o", "cut.wav", "--json", RELAY_URL=several) as client:
                await client.audio_chunks(5)
                assert not any('"listening"' in line for line in standby.lines)
                relay.send_signal(signal.SIGKILL)
                await standby.event("listening")
                await client.audio_chunks(None)
                assert await client.ended() == 0
            assert worker.process.poll() is None
        standby.send_signal(signal.SIGTERM)
        assert await standby.ended() == 0
    assert (tmp_path / "cut.wav").read_bytes() == (tmp_path / "whole.wav").read_bytes()


@pytest.mark.trio
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_a_waiting_standby_leaves_at_once_and_one_that_may_not_wait_names_the_option(
    tmp_path: Path, number: signal.Signals
) -> None:
    place = a_place(tmp_path)
    async with a_relay(place) as relay:
        async with place.start("relayd", "serve", "--wait") as standby:
            await standby.event("standing by")
            standby.send_signal(signal.SIGHUP)
            standby.send_signal(number)
            assert await standby.ended() == 0
            await standby.event("stopped")
        _, refused = await place.run("relayd", "serve", code=1)
        assert "take over when it ends with relayd serve --wait" in refused
        assert relay.process.poll() is None
