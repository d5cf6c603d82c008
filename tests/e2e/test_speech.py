"""The main job with real processes, as the README tells a user to run it."""

import array
import json
import math
import re
import signal
import tempfile
import wave
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio

from tests.support.processes import PATIENCE_S, a_place, a_relay, a_worker


def seconds_of(path: Path) -> float:
    with wave.open(str(path)) as wav:
        assert (wav.getnchannels(), wav.getsampwidth()) == (1, 2)
        return float(wav.getnframes() / wav.getframerate())


def level_of(path: Path) -> float:
    """Root mean square, 0..1."""
    with wave.open(str(path)) as wav:
        data: array.array[int] = array.array("h", wav.readframes(wav.getnframes()))
    return math.sqrt(sum(sample * sample for sample in data) / len(data)) / 32_768


@pytest.mark.trio
async def test_a_sentence_in_two_languages_is_spoken_and_again_after_the_worker_was_restarted(tmp_path: Path) -> None:
    place = a_place(tmp_path)
    async with a_relay(place) as relay:
        async with a_worker(place, relay, "--engine", "espeak") as worker:
            await place.run("relay", "say", "你好，世界。Hello world.", "--space", "tts", "-o", "out.wav")
            worker.send_signal(signal.SIGTERM)
            assert await worker.ended() == 0
        assert 1.0 < seconds_of(tmp_path / "out.wav") < 6.0
        assert level_of(tmp_path / "out.wav") > 0.02
        async with a_worker(place, relay, "--engine", "espeak"):
            await place.run("relay", "say", "And again.", "--space", "tts", "-o", "again.wav")
        assert seconds_of(tmp_path / "again.wav") > 0.5


@pytest.mark.trio
async def test_the_first_audio_of_a_long_text_comes_long_before_its_last(tmp_path: Path) -> None:
    place = a_place(tmp_path)
    async with a_relay(place) as relay, a_worker(place, relay, *MOCK):
        say = ("say", "a tune in real time", "-p", "duration_s=100", "-o", "long.wav", "--json")
        async with place.start("relay", *say) as client:
            await client.audio_chunks(1)  # less patient than the request is long
            out, _ = await place.run("relayd", "requests", "--json")
            assert [row["state"] for row in json.loads(out)] == ["running"]
            assert not any("request completed" in line for line in relay.lines)
            client.send_signal(signal.SIGINT)
            assert await client.ended() == 130
    assert 0 < seconds_of(tmp_path / "long.wav") < 100


@pytest.mark.trio
async def test_a_long_text_comes_whole_and_in_many_pieces(tmp_path: Path) -> None:
    place = a_place(tmp_path)
    text = "This sentence is one of very many. " * 400
    async with a_relay(place) as relay, a_worker(place, relay, "--engine", "espeak"):
        out, _ = await place.run("relay", "say", text, "--json", "-o", "long.wav")
    kinds = [json.loads(line)["type"] for line in out.splitlines()]
    assert kinds.count("audio") > 1_000
    assert seconds_of(tmp_path / "long.wav") > 300


def processes_in(tmpdir: Path) -> list[int]:
    """Processes that were started, or whose parents were, with this TMPDIR; a zombie has no environment and is none."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/environ"):
        try:
            if f"TMPDIR={tmpdir}".encode() in entry.read_bytes().split(b"\0"):
                found.append(int(entry.parent.name))
        except OSError:  # gone, or another user's
            continue
    return found


def is_empty(folder: Path) -> bool:
    return not any(folder.iterdir())


@pytest.fixture
def tmpdir() -> Iterator[Path]:
    """A folder for the demo's own; the path of a socket in it must be short."""
    with tempfile.TemporaryDirectory(prefix="relayd-") as name:
        yield Path(name)


@pytest.mark.trio
async def test_demo_speaks_and_leaves_nothing_behind(tmp_path: Path, tmpdir: Path) -> None:
    place = a_place(tmp_path)
    out, _ = await place.run("relayd", "demo", "Hello there.", "-o", "hello.wav", TMPDIR=str(tmpdir))
    assert processes_in(tmpdir) == []
    said = out.decode()
    for words in ("listens on ws://127.0.0.1:", "registered space 'tts'", "first audio", "real-time factor"):
        assert words in said
    assert seconds_of(tmp_path / "hello.wav") > 0.5
    assert level_of(tmp_path / "hello.wav") > 0.02
    assert is_empty(tmpdir)


@pytest.mark.trio
async def test_kept_demo_tells_a_command_that_works_and_one_that_ends_it(tmp_path: Path, tmpdir: Path) -> None:
    place = a_place(tmp_path)
    out, _ = await place.run("relayd", "demo", "--keep", "Hello.", "-o", "hello.wav", TMPDIR=str(tmpdir))
    said = out.decode()
    url, token = re.search(r"export RELAY_URL=(\S+) RELAY_TOKEN=(\S+)", said).groups()  # type: ignore[union-attr]
    kill = re.search(r"  (kill .*)", said)
    assert kill is not None
    try:
        await place.run("relay", "say", "Another.", "-o", "another.wav", RELAY_URL=url, RELAY_TOKEN=token)
        assert seconds_of(tmp_path / "another.wav") > 0.3
        assert {int(pid) for pid in re.findall(r"\b\d+\b", kill[1].partition(";")[0])} < set(processes_in(tmpdir))
    finally:
        await trio.run_process(["sh", "-c", kill[1]])
    with trio.fail_after(PATIENCE_S):
        while processes_in(tmpdir):  # noqa: ASYNC110 - they are no children of ours: nothing tells their end
            await trio.sleep(0.05)
    assert is_empty(tmpdir)


MOCK = ("--engine", "mock")


@pytest.mark.trio
async def test_a_worker_killed_while_speaking_costs_a_pause_and_no_sample(tmp_path: Path) -> None:
    place = a_place(tmp_path)
    say = ("say", "a tune of three seconds", "--param", "duration_s=3")
    async with a_relay(place) as relay:
        async with a_worker(place, relay, *MOCK):
            await place.run("relay", *say, "-o", "whole.wav")
        async with (
            a_worker(place, relay, *MOCK) as worker,
            place.start("relay", *say, "-o", "cut.wav", "--json") as client,
        ):
            await client.audio_chunks(5)
            worker.send_signal(signal.SIGKILL)
            await worker.ended()
            async with a_worker(place, relay, *MOCK):
                await client.audio_chunks(None)
                assert await client.ended() == 0
    assert (tmp_path / "cut.wav").read_bytes() == (tmp_path / "whole.wav").read_bytes()


@pytest.mark.trio
async def test_a_killed_client_frees_its_slot_after_its_resume_window(tmp_path: Path) -> None:
    place = a_place(tmp_path, "[limits]\nresume_window_s = 0.2\n[spaces.tts]\n")
    async with a_relay(place) as relay, a_worker(place, relay, *MOCK):
        say = ("say", "long", "--param", "duration_s=100", "-o", "gone.wav", "--json")
        async with place.start("relay", *say) as client:
            await client.audio_chunks(5)
            client.send_signal(signal.SIGKILL)
            await client.ended()
        ended = await relay.event("request cancelled")
        assert "did not return" in ended["why"]
        await place.run("relay", "say", "next", "--param", "duration_s=0.2", "-o", "next.wav")
    with wave.open(str(tmp_path / "gone.wav")) as wav:  # interrupted, and a valid WAV all the same
        assert wav.getnframes() >= 4 * 2_400


@pytest.mark.trio
async def test_a_relay_told_to_stop_finishes_what_runs_and_keeps_what_waits(tmp_path: Path) -> None:
    place = a_place(tmp_path)
    async with (
        a_relay(place) as relay,
        place.start("relay", "say", "runs", "-p", "duration_s=1.5", "-o", "runs.wav") as runs,
    ):
        # Both are queued before there is a worker, so that no slow process lets the second one start.
        await relay.event("request accepted")
        waits = (await place.run("relay", "say", "waits", "-p", "duration_s=0.2", "--detach"))[0].decode().strip()
        async with a_worker(place, relay, *MOCK) as worker:
            await relay.event("request started")
            relay.send_signal(signal.SIGTERM)
            assert await runs.ended() == 0
            assert await relay.ended() == 0
            assert seconds_of(tmp_path / "runs.wav") == pytest.approx(1.5)
            async with a_relay(place) as again:
                await again.event("request started")
                await place.run("relay", "attach", waits, "-o", "waits.wav")
            assert seconds_of(tmp_path / "waits.wav") == pytest.approx(0.2)
            assert worker.process.poll() is None


@pytest.mark.trio
async def test_interrupting_a_client_cancels_its_request_and_ends_with_130(tmp_path: Path) -> None:
    place = a_place(tmp_path)
    async with a_relay(place) as relay, a_worker(place, relay, *MOCK):
        async with place.start("relay", "say", "long", "-p", "duration_s=100", "-o", "cut.wav") as client:
            await relay.event("request started")
            client.send_signal(signal.SIGINT)
            assert await client.ended() == 130
        await relay.event("request cancelled")


@pytest.mark.trio
async def test_commands_end_with_the_code_of_what_went_wrong(tmp_path: Path) -> None:
    place = a_place(tmp_path)
    await place.run("relay", "say", "hi", code=3)
    await place.run("relayd", "workers", code=3)
    await place.run("relayd", "check-config", "--config", "nowhere.toml", code=2)
    async with a_relay(place) as relay, a_worker(place, relay, "--engine", "espeak"):
        await place.run("relay", "say", "", code=2)
        _, said = await place.run("relay", "say", "hi", "--space", "nowhere", code=1)
        assert "space 'nowhere' does not exist" in said
        _, said = await place.run("relay", "say", "hi", "-p", "rate=fast", "-p", "colour=red", code=1)
        assert "rate: must be an integer" in said
        assert "colour: is unknown" in said
        _, said = await place.run("gpuworker", "run", "--engine", "espeak", "--name", "second", code=1)
        assert "space 'tts' already has its 1 worker" in said
        _, said = await place.run("gpuworker", "run", "--engine", "espeak", "--space", "nowhere", code=1)
        assert "space 'nowhere' does not exist" in said
        await place.run("relay", "say", "still here", "-o", "still.wav")
        with trio.fail_after(10):
            await place.run("relayd", "drain")
            await relay.ended()
