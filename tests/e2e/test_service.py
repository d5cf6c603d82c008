"""Relay and worker as systemd runs them: real processes, and a stand-in for its socket."""

import os
import pty
import signal
from pathlib import Path

import pytest
import trio

from protocol.client.client import open_relay
from protocol.commands.exit_codes import DONE, INTERRUPTED
from tests.support.fake_systemd import fake_systemd
from tests.support.processes import a_place, a_relay, a_worker

MOCK = ("--engine", "mock")
#: Signs of life every half second.
WATCHED = "1000000"


@pytest.mark.trio
async def test_a_worker_that_is_drained_or_interrupted_ends_as_its_unit_takes_for_asked_to_leave(
    tmp_path: Path,
) -> None:
    place = a_place(tmp_path)
    async with a_relay(place) as relay:
        async with a_worker(place, relay, *MOCK) as worker:
            worker_id = (await relay.event("worker registered"))["worker"]
            async with open_relay(f"unix:{tmp_path}/state/relayd.sock", role="operator") as operator:
                await operator.steer("drain_worker", worker_id)
            assert await worker.ended() == DONE
        async with a_worker(place, relay, *MOCK) as worker:
            worker.send_signal(signal.SIGINT)
            assert await worker.ended() == INTERRUPTED


@pytest.mark.trio
async def test_a_relay_tells_systemd_its_whole_life(tmp_path: Path) -> None:
    place = a_place(tmp_path)
    with fake_systemd(tmp_path / "notify") as systemd:
        told = {"NOTIFY_SOCKET": systemd.address, "WATCHDOG_USEC": WATCHED}
        async with place.start("relayd", "serve", **told) as relay:
            ready = await systemd.next()
            assert ready["READY"] == "1"
            assert ready["STATUS"].startswith("0 workers, 0 running, 0 queued; listens on ws://127.0.0.1:")
            for _ in range(3):
                await systemd.until("WATCHDOG")

            config = tmp_path / "relayd.toml"
            config.write_text(config.read_text() + "[spaces.more]\n")
            relay.send_signal(signal.SIGHUP)
            assert int((await systemd.until("RELOADING"))["MONOTONIC_USEC"]) > 0
            assert (await systemd.until("READY"))["STATUS"] == "configuration reloaded: 1 changes"
            assert (await relay.event("configuration reloaded"))["spaces_added"] == ["more"]

            config.write_text("listen = 5\nstore = 6\n")
            relay.send_signal(signal.SIGHUP)
            await systemd.until("RELOADING")
            await systemd.until("READY", "1")
            faults = (await relay.event("configuration not reloaded: nothing changed"))["faults"]
            assert len(faults) == 2
            spaces, _ = await place.run("relay", "spaces", "--json")
            assert b"more" in spaces

            relay.send_signal(signal.SIGTERM)
            assert (await systemd.until("STOPPING"))["STATUS"].startswith("draining")
            assert int((await systemd.until("EXTEND_TIMEOUT_USEC"))["EXTEND_TIMEOUT_USEC"]) > 30e6
            assert await relay.ended() == 0


@pytest.mark.parametrize("program", ["relayd", "gpuworker"])
@pytest.mark.trio
async def test_a_process_that_stands_still_gives_no_signs_of_life_and_its_log_says_where(
    tmp_path: Path, program: str
) -> None:
    place = a_place(tmp_path)
    with fake_systemd(tmp_path / "notify") as systemd:
        args = ("serve",) if program == "relayd" else ("run", *MOCK)
        told = {"NOTIFY_SOCKET": systemd.address, "WATCHDOG_USEC": WATCHED}
        async with place.start(program, *args, **told) as service:
            await systemd.until("WATCHDOG")
            service.send_signal(signal.SIGSTOP)
            await trio.to_thread.run_sync(os.waitid, os.P_PID, service.process.pid, os.WSTOPPED | os.WNOWAIT)
            systemd.drain()
            await systemd.silent(1.5, "WATCHDOG")
            service.send_signal(signal.SIGABRT)  # as systemd does
            service.send_signal(signal.SIGCONT)
            assert await service.ended() == -signal.SIGABRT
            await service.until(lambda line: "Fatal Python error: Aborted" in line)


@pytest.mark.trio
async def test_a_worker_is_ready_without_a_relay_and_tells_its_link_and_its_leaving(tmp_path: Path) -> None:
    place = a_place(tmp_path)
    with fake_systemd(tmp_path / "notify") as systemd:
        told = {"NOTIFY_SOCKET": systemd.address, "WATCHDOG_USEC": WATCHED}
        async with place.start("gpuworker", "run", *MOCK, **told) as worker:
            assert (await systemd.until("READY"))["STATUS"].startswith("not connected to unix:")
            await systemd.until("WATCHDOG")
            async with a_relay(place) as relay:
                await systemd.until("STATUS", "registered at unix:")
                worker.send_signal(signal.SIGTERM)
                await systemd.until("STOPPING")
                await systemd.until("EXTEND_TIMEOUT_USEC")
                assert await worker.ended() == 0
                await relay.event("worker registered")


@pytest.mark.trio
async def test_a_relay_stopped_and_started_again_in_mid_stream_loses_nothing(tmp_path: Path) -> None:
    """An upgrade: `systemctl restart`, with more to run than the drain has time for, and more in the queue."""
    place = a_place(tmp_path)
    told = {"RELAYD_DRAIN_TIMEOUT_S": "0.5"}
    place = type(place)(place.folder, place.environ | told)
    say = ("say", "a tune of three seconds", "--param", "duration_s=3", "--json")
    async with a_relay(place) as relay, a_worker(place, relay, *MOCK) as worker:
        async with (
            place.start("relay", *say, "-o", "first.wav") as first,
            place.start("relay", *say, "-o", "second.wav") as second,
        ):
            await first.audio_chunks(5)
            relay.send_signal(signal.SIGTERM)
            assert await relay.ended() == 0
            async with a_relay(place) as again:
                await first.audio_chunks(None)
                await second.audio_chunks(None)
                assert (await first.ended(), await second.ended()) == (0, 0)
                assert (await again.event("worker registered"))["resumes"] == 1
        assert worker.process.poll() is None
    whole = (tmp_path / "first.wav").read_bytes()
    assert len(whole) > 3 * 2 * 16_000
    assert (tmp_path / "second.wav").read_bytes() == whole


@pytest.mark.trio
async def test_a_relay_leaves_with_its_terminal(tmp_path: Path) -> None:
    """SIGHUP is also what a terminal says that goes away, and then it does not mean: read the configuration again."""
    place = a_place(tmp_path)
    ours, theirs = pty.openpty()
    with fake_systemd(tmp_path / "notify") as systemd:
        process = await trio.lowlevel.open_process(
            ["setsid", "--ctty", "--wait", *place.command("relayd", "serve")],
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            env=place.environ | {"NOTIFY_SOCKET": systemd.address},
            cwd=place.folder,
        )
        os.close(theirs)
        try:
            await systemd.until("READY")
            os.close(ours)
            await systemd.until("STOPPING")
            with trio.fail_after(40):
                assert await process.wait() == 0
        finally:
            if process.poll() is None:
                process.kill()
                await process.wait()
