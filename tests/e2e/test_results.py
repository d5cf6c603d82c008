"""Results on disk, with real processes: the relay is killed, started again, and given a disk that takes nothing."""

import json
import resource
import signal
from pathlib import Path

import pytest
import trio

from tests.support.processes import Place, Proc, a_place, a_relay, a_worker

MOCK = ("--engine", "mock")
SMALL = "[results]\nmemory_bytes = 200000\n[spaces.tts]\n"


async def submitted(place: Place, text: str, *more: str) -> str:
    """A detached request; its id."""
    out, _ = await place.run("relay", "submit", "--space", "tts", "--detach", "--param", f"text={text}", *more)
    return out.decode().strip()


async def state_of(place: Place, request_id: str) -> str:
    out, _ = await place.run("relay", "status", request_id, "--json")
    state: str = json.loads(out)["state"]
    return state


def result_files(place: Place) -> list[Path]:
    return sorted((place.folder / "state/results").iterdir())


async def killed(relay: Proc) -> None:
    relay.send_signal(signal.SIGKILL)
    await relay.ended()


@pytest.mark.trio
async def test_a_result_is_fetched_from_a_relay_that_was_killed_and_started_again_without_its_worker(
    tmp_path: Path,
) -> None:
    place = a_place(tmp_path)
    tune = ("--param", "duration_s=20", "--param", "speed=0")
    async with a_relay(place) as relay:
        async with a_worker(place, relay, *MOCK):
            await place.run("relay", "say", "a long tune", *tune, "-o", "whole.wav")
            request_id = await submitted(place, "a long tune", *tune)
            await place.run("relay", "attach", request_id, "-o", "first.wav")
        await killed(relay)
    async with a_relay(place):
        assert await state_of(place, request_id) == "completed"
        await place.run("relay", "attach", request_id, "-o", "out.wav")
        _, why = await place.run("relay", "attach", "0" * 32, "-o", "none.wav", code=1)
        assert "is unknown" in why
    whole = (tmp_path / "whole.wav").read_bytes()
    assert len(whole) > 20 * 2 * 16_000
    assert (tmp_path / "first.wav").read_bytes() == (tmp_path / "out.wav").read_bytes() == whole


@pytest.mark.trio
async def test_a_killed_relay_that_had_spilled_a_running_request_costs_a_pause_and_no_sample(tmp_path: Path) -> None:
    place = a_place(tmp_path, SMALL)
    tune = ("--param", "duration_s=12", "--param", "speed=4")
    async with a_relay(place) as relay, a_worker(place, relay, *MOCK):
        await place.run("relay", "say", "in and out", *tune, "-o", "whole.wav")
        async with place.start("relay", "say", "in and out", *tune, "-o", "cut.wav", "--json") as client:
            before = len(result_files(place))
            with trio.fail_after(40):
                while len(result_files(place)) == before:  # noqa: ASYNC110  another process's
                    await trio.sleep(0.02)
            await killed(relay)
            async with a_relay(place):
                await client.audio_chunks(None)
                assert await client.ended() == 0
    assert (tmp_path / "cut.wav").read_bytes() == (tmp_path / "whole.wav").read_bytes()


@pytest.mark.trio
async def test_a_disk_that_takes_nothing_fails_the_one_that_fits_nowhere_and_recovers_by_itself(tmp_path: Path) -> None:
    """The limit on a process's files stands in for a full disk: writes fail with EFBIG, and it can be lifted again."""
    place = a_place(tmp_path, SMALL)
    long = ("--param", "duration_s=60", "--param", "speed=0")
    async with a_relay(place) as relay, a_worker(place, relay, *MOCK, "--slots", "2"):
        async with place.start(
            "relay", "say", "goes on", "--param", "duration_s=4", "-o", "on.wav", "--json"
        ) as listener:
            await listener.audio_chunks(2)
            soft, hard = resource.prlimit(relay.process.pid, resource.RLIMIT_FSIZE)
            resource.prlimit(relay.process.pid, resource.RLIMIT_FSIZE, (100_000, hard))
            _, why = await place.run("relay", "say", "too long", *long, "-o", "none.wav", code=1)
            assert "storage_full" in why
            assert (await relay.event("results cannot be written to disk; they stay in memory"))["level"] == "error"
            await listener.audio_chunks(None)
            assert await listener.ended() == 0
        resource.prlimit(relay.process.pid, resource.RLIMIT_FSIZE, (soft, hard))
        await place.run("relay", "say", "too long", *long, "-o", "long.wav")
        await place.run("relay", "say", "goes on", "--param", "duration_s=4", "--param", "speed=0", "-o", "whole.wav")
        await relay.event("results can be written to disk again")
    assert (tmp_path / "on.wav").read_bytes() == (tmp_path / "whole.wav").read_bytes()
    assert (tmp_path / "long.wav").stat().st_size > 60 * 2 * 16_000


@pytest.mark.trio
async def test_a_cancel_outlives_a_relay_that_is_killed_right_behind_it(tmp_path: Path) -> None:
    place = a_place(tmp_path)
    async with a_relay(place) as relay, a_worker(place, relay, *MOCK) as worker:
        request_id = await submitted(place, "for hours", "--param", "duration_s=100")
        with trio.fail_after(40):
            while await state_of(place, request_id) != "running":  # noqa: ASYNC110  another process's
                await trio.sleep(0.05)
        worker.send_signal(signal.SIGSTOP)  # so that it does not hear the cancel before the relay is gone
        await place.run("relay", "cancel", request_id)
        await killed(relay)
        worker.send_signal(signal.SIGCONT)
        async with a_relay(place) as again:
            assert await state_of(place, request_id) == "cancelled"
            await again.event("worker registered")
            _, why = await place.run("relay", "attach", request_id, "-o", "none.wav", code=1)
            assert "cancelled" in why
