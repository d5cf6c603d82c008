"""`relay say -` as a real process: it speaks while another program writes, and loses nothing if a relay is killed."""

import hashlib
import signal
import wave
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from tests.support.processes import Place, Proc, a_place, a_relay, a_worker

MOCK = ("--engine", "mock")
#: How long the mock speaks each sentence.
TUNE = ("-p", "duration_s=0.2")
TEXT = [f"This is sentence number {number}, which is spoken. " for number in range(8)]


def sound_of(path: Path) -> str:
    with wave.open(str(path)) as wav:
        assert wav.getnframes() > 0
        return hashlib.sha256(wav.readframes(wav.getnframes())).hexdigest()


async def write(say: Proc, text: str, *, last: bool = False) -> None:
    stdin = say.process.stdin
    assert stdin is not None
    await stdin.send_all(text.encode())
    if last:
        await stdin.aclose()


@asynccontextmanager
async def saying(place: Place, *args: str) -> AsyncIterator[Proc]:
    async with place.start("relay", "say", "-", *args, stdin=-1) as say:
        yield say


@pytest.mark.trio
@pytest.mark.parametrize("killed", [None, "relay", "worker"])
async def test_a_slow_writer_is_spoken_while_it_writes_and_has_the_samples_of_a_fast_one(
    tmp_path: Path, killed: str | None
) -> None:
    place = a_place(tmp_path)
    async with a_relay(place) as relay, a_worker(place, relay, *MOCK) as worker:
        url = (await relay.event("listening"))["urls"][0]
        await place.run("relay", "say", "-", *TUNE, "-o", "fast.wav", stdin="".join(TEXT).encode())
        async with saying(place, *TUNE, "--json", "-o", "slow.wav") as say:
            await write(say, TEXT[0] + TEXT[1])
            await say.audio_chunks(1)  # before it has ended
            if killed == "worker":
                worker.send_signal(signal.SIGKILL)
                await worker.ended()
                async with a_worker(place, relay, *MOCK):
                    await finish(say)
            elif killed == "relay":
                relay.send_signal(signal.SIGKILL)
                await relay.ended()
                async with a_relay(place, "--listen", url.removeprefix("ws://")):
                    await finish(say)
            else:
                await finish(say)
    assert sound_of(tmp_path / "slow.wav") == sound_of(tmp_path / "fast.wav")


async def finish(say: Proc) -> None:
    for sentence in TEXT[2:]:
        await write(say, sentence)
    await write(say, "", last=True)
    await say.audio_chunks(None)
    assert await say.ended() == 0


@pytest.mark.trio
async def test_what_one_request_writes_is_spoken_by_another_and_a_group_ends_together(tmp_path: Path) -> None:
    place = a_place(tmp_path, "[spaces.tts]\n[spaces.words]\n")
    (tmp_path / "writer.py").write_text(
        "from collections.abc import Iterator\n"
        "def write(first: str) -> Iterator[str]:\n"
        f"    yield first\n    yield from {TEXT[1:]!r}\n"
    )
    words = ("--engine", "function", "-o", "call=writer:write", "--space", "words")
    async with a_relay(place) as relay, a_worker(place, relay, *MOCK), a_worker(place, relay, *words):
        await place.run("relay", "say", "-", *TUNE, "-o", "fast.wav", stdin="".join(TEXT).encode())
        first = ("relay", "submit", "--space", "words", "--detach", "--group", "story", "-p", f"first={TEXT[0]}")
        request_id = (await place.run(*first))[0].decode().strip()
        pipe = ("relay", "submit", "--space", "tts", "--pipe", f"text={request_id}", "--group", "story")
        await place.run(*pipe, *TUNE, "-o", "piped.wav")
        assert sound_of(tmp_path / "piped.wav") == sound_of(tmp_path / "fast.wav")
        async with place.start(*pipe, "-p", "duration_s=60", "-o", "long.wav") as long:
            heard = len(relay.lines)
            second = await place.run(
                "relay", "submit", "--space", "tts", *TUNE, "--group", "story", "--detach", "-p", "text=x"
            )
            await long.until(lambda line: "audio" in line)
            await place.run("relay", "cancel", second[0].decode().strip())
            assert await long.ended() == 1
            await relay.event("request cancelled", after=heard)
