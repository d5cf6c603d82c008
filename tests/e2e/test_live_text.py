"""A text that is spoken while it is written, through real processes, one of which is killed."""

import signal
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
import trio

from protocol import Live, RelayClient, open_relay
from protocol.wire.frames import Audio, Output
from tests.support.processes import Place, Proc, a_place, a_relay, a_worker

TEXT = "This is a first sentence. The second one is here, see? 你好，今天天气很好。 Good-bye, my friend, and good luck."
PATIENCE_S = 60


async def speak(
    client: RelayClient, parts: list[str], between: Callable[[], Awaitable[None]] | None = None
) -> tuple[bytes, list[dict[str, int]]]:
    """The samples of a text that comes in these parts, and its marks; `between` is called once the first has one."""
    pcm, marks = b"", []
    marked = trio.Event()
    async with (
        client.submit("tts", {"duration_s": 0.5}, inputs={"text": Live("text/plain")}) as stream,
        trio.open_nursery() as nursery,
    ):

        async def write() -> None:
            for number, part in enumerate(parts):
                if number == 1 and between is not None:
                    await marked.wait()
                    await between()
                await stream.feed("text", part)
            await stream.end_input("text")

        nursery.start_soon(write)
        async for frame in stream:
            if isinstance(frame, Audio):
                pcm += frame.pcm
            elif isinstance(frame, Output) and frame.mark is not None:
                marks.append(frame.mark)
                marked.set()
    return pcm, marks


@pytest.mark.trio
@pytest.mark.parametrize("killed", ["nobody", "worker"])
@pytest.mark.parametrize("options", [(), ("-o", "shared=true", "--slots", "2")], ids=["process", "seats"])
async def test_a_piece_is_heard_before_the_next_is_written_and_a_lost_worker_changes_no_sample(
    tmp_path: Path, options: tuple[str, ...], killed: str
) -> None:
    place = a_place(tmp_path, "[limits]\nworker_grace_s = 0.1\n[spaces.tts]\n")
    mock = ("--engine", "mock", "-o", "speed=0", *options)
    with trio.fail_after(PATIENCE_S):
        async with (
            a_relay(place) as relay,
            trio.open_nursery() as nursery,
            a_worker(place, relay, *mock) as worker,
            open_relay(f"unix:{tmp_path}/state/relayd.sock") as client,
        ):
            whole, ends = await speak(client, [TEXT])
            assert [TEXT[: end["text_end"]][-5:] for end in ends] == ["ence.", " see?", "天气很好。", "luck."]
            assert len(whole) == 2 * ends[-1]["sample"]

            async def between() -> None:
                if killed == "worker":
                    worker.send_signal(signal.SIGKILL)
                    await worker.ended()
                    await nursery.start(another_worker, place, relay, mock)

            again = await speak(client, [TEXT[:30], *TEXT[30:]], between)
            assert again == (whole, ends)
            nursery.cancel_scope.cancel()


async def another_worker(
    place: Place, relay: Proc, mock: tuple[str, ...], *, task_status: trio.TaskStatus[None]
) -> None:
    async with a_worker(place, relay, *mock):
        task_status.started()
        await trio.sleep_forever()
