"""`gpuworker.embed`: a callable of a running program served from its threads."""

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import trio

from gpuworker.embed import EmbedError, Handle, serve
from gpuworker.engines.mock import MockEngine
from protocol.wire.errors import ErrorCode
from protocol.wire.frames import Audio, Cancelled, Completed, Failed, Frame, Output, Started
from protocol.wire.messages import Ack, Cancel, Draining, Register, Rejected
from protocol.wire.validators import Message
from tests.support.scripted_relay import Desk, RelayThread, assign, refuse, script

PATIENCE_S = 10


def until(condition: Callable[[], bool]) -> None:
    """Wait for what happens in another thread."""
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


@pytest.fixture
def handles() -> Iterator[list[Handle]]:
    """Stopped at the end of the test."""
    made: list[Handle] = []
    yield made
    for handle in made:
        assert handle.stop()


def speak(text: str, speed: float = 1.0) -> Iterator[bytes]:
    for _ in range(3):
        yield bytes(4800)


def test_a_callable_is_served_and_stopped_from_a_program_with_a_loop_of_its_own(
    tmp_path: Path, handles: list[Handle]
) -> None:
    seen: list[Any] = []

    async def relay(desk: Desk) -> None:
        seen.append(await desk.register())
        desk.send(assign())
        seen.extend(await desk.frames())
        await trio.sleep_forever()

    async def program(url: str) -> Handle:
        return serve(speak, url=url, space="tts", token="t", sample_rate=24_000, name="webui")

    with RelayThread(tmp_path, script(relay)) as url:
        handle = asyncio.run(program(url))
        handles.append(handle)
        assert handle.status().state == "registered"
        until(lambda: handle.status().completed == 1)
        until(lambda: len(seen) == 6)
        began = time.monotonic()
        assert handle.stop()
        assert time.monotonic() - began < 3
        assert handle.status().state == "stopped"
        assert handle.stop()
    register = seen[0]
    assert isinstance(register, Register)
    assert (register.worker, register.spaces, register.slots) == ("webui", ["tts"], 1)
    assert set(register.params["properties"]) == {"text", "speed"}
    assert [type(frame) for frame in seen[1:]] == [Started, Audio, Audio, Audio, Completed]
    assert not [thread for thread in threading.enumerate() if thread.name == "gpuworker"]


def test_the_callable_runs_in_one_thread_that_is_not_the_programs_and_may_raise(
    tmp_path: Path, handles: list[Handle]
) -> None:
    threads: list[str] = []
    outcomes: list[str] = []
    frames: list[list[Frame]] = []

    def call(text: str) -> str:
        threads.append(threading.current_thread().name)
        if len(threads) == 1:
            raise RuntimeError("model is in a bad mood")
        return text.upper()

    async def relay(desk: Desk) -> None:
        await desk.register()
        for attempt in (1, 2):
            desk.send(assign(attempt=attempt))
            frames.append(await desk.frames())
            outcomes.append(frames[-1][-1].TYPE)
        assert isinstance(frames[1][1], Output)
        assert frames[1][1].data == "HI"
        await trio.sleep_forever()

    with RelayThread(tmp_path, script(relay)) as url:
        handles.append(serve(call, url=url, space="tts"))
        until(lambda: len(outcomes) == 2)
    assert outcomes == ["failed", "completed"]
    assert set(threads) == {"gpuworker-0"}


def test_a_call_that_breaks_the_gpu_for_this_program_ends_its_worker_with_a_clear_word(
    tmp_path: Path, handles: list[Handle]
) -> None:
    heard: list[Message] = []

    def call(text: str) -> str:
        raise RuntimeError(f"CUDA error: device-side assert triggered ({text})")

    async def relay(desk: Desk) -> None:
        await desk.register()
        desk.send(assign())
        while not isinstance(message := await desk.hear(), Failed):
            heard.append(message)
        heard.append(message)
        desk.send(Ack(request_id=message.request_id, attempt=message.attempt, seq=message.seq))
        await trio.sleep_forever()

    with RelayThread(tmp_path, script(relay)) as url:
        handle = serve(call, url=url, space="tts")
        handles.append(handle)
        until(lambda: handle.status().state == "stopped")
    assert any(isinstance(message, Draining) for message in heard), (
        "before the end of the request: nothing new may come"
    )
    last = heard[-1]
    assert isinstance(last, Failed)
    assert last.retryable
    assert "the GPU cannot be used by this program any more" in handle.status().fault
    assert "start the program again" in handle.status().fault


def test_a_call_that_finds_no_memory_on_the_gpu_is_served_on(tmp_path: Path, handles: list[Handle]) -> None:
    calls: list[str] = []
    outcomes: list[str] = []

    def call(text: str) -> str:
        calls.append(text)
        if len(calls) == 1:
            raise RuntimeError("CUDA out of memory. Tried to allocate 20.00 GiB")
        return text.upper()

    async def relay(desk: Desk) -> None:
        await desk.register()
        for attempt in (1, 2):
            desk.send(assign(attempt=attempt))
            while not isinstance(message := await desk.hear(), Completed | Failed):
                pass
            outcomes.append(message.TYPE)
            desk.send(Ack(request_id=message.request_id, attempt=message.attempt, seq=message.seq))
        await trio.sleep_forever()

    with RelayThread(tmp_path, script(relay)) as url:
        handles.append(serve(call, url=url, space="tts"))
        until(lambda: len(outcomes) == 2)
    assert outcomes == ["failed", "completed"]


def test_a_refusal_is_raised_where_the_program_starts_it(tmp_path: Path) -> None:
    async def full(desk: Desk) -> None:
        await desk.expect(Register)
        desk.send(Rejected.because(ErrorCode.SPACE_FULL, "space 'tts' already has its 1 worker; raise max_workers"))
        await trio.sleep_forever()

    with RelayThread(tmp_path, script(full)) as url, pytest.raises(EmbedError, match="raise max_workers"):
        serve(speak, url=url, space="tts")
    with RelayThread(tmp_path / "..", refuse) as url, pytest.raises(EmbedError, match="not known"):
        serve(speak, url=url, space="tts")


def test_a_shared_engine_has_one_slot_here() -> None:
    class Shared(MockEngine):
        SHARED = True

    with pytest.raises(EmbedError, match="one slot"):
        serve(Shared, url="ws://127.0.0.1:1", space="tts", slots=2)


def test_wrong_arguments_are_raised_at_once() -> None:
    async def waits() -> None:
        pass

    with pytest.raises(ValueError, match="is not a valid space name"):
        serve(speak, url="ws://127.0.0.1:1", space="no/space")
    with pytest.raises(ValueError, match="ws://"):
        serve(speak, url="ftp://127.0.0.1:1", space="tts")
    with pytest.raises(ValueError, match="slots"):
        serve(speak, url="ws://127.0.0.1:1", space="tts", slots=0)
    with pytest.raises(EmbedError, match="async"):
        serve(waits, url="ws://127.0.0.1:1", space="tts")
    with pytest.raises(EmbedError, match="sample_rate"):
        serve(speak, url="ws://127.0.0.1:1", space="tts", sample_rate=7)


def test_a_program_comes_up_without_its_relay_and_the_worker_joins_when_there_is_one(
    tmp_path: Path, handles: list[Handle]
) -> None:
    handle = serve(speak, url=f"unix:{tmp_path}/relay.sock", space="tts", wait_s=0.1)
    handles.append(handle)
    assert handle.status().state == "connecting"
    until(lambda: "no relay listens" in handle.status().fault)

    async def relay(desk: Desk) -> None:
        await desk.register()
        await trio.sleep_forever()

    with RelayThread(tmp_path, script(relay)):
        until(lambda: handle.status().state == "registered")
        assert handle.status().fault == ""


def test_a_drain_finishes_what_runs(tmp_path: Path, handles: list[Handle]) -> None:
    inside, release = threading.Event(), threading.Event()
    last: list[Any] = []

    def call(text: str) -> str:
        inside.set()
        release.wait(PATIENCE_S)
        return text

    async def relay(desk: Desk) -> None:
        await desk.register()
        desk.send(assign())
        await desk.expect(Draining)
        release.set()
        last.extend(await desk.frames())
        async for _ in desk.connection.link:
            pass

    with RelayThread(tmp_path, script(relay)) as url:
        handle = serve(call, url=url, space="tts")
        handles.append(handle)
        assert inside.wait(PATIENCE_S)
        assert handle.stop(drain=True)
    assert isinstance(last[-1], Completed)


def test_stop_does_not_wait_for_a_call_that_does_not_return(tmp_path: Path) -> None:
    inside, release = threading.Event(), threading.Event()

    def call(text: str) -> None:
        inside.set()
        release.wait(60)

    async def relay(desk: Desk) -> None:
        await desk.register()
        desk.send(assign())
        async for _ in desk.connection.link:
            pass

    with RelayThread(tmp_path, script(relay)) as url:
        handle = serve(call, url=url, space="tts")
        assert inside.wait(PATIENCE_S)
        began = time.monotonic()
        assert handle.stop()
        assert time.monotonic() - began < 3
    release.set()


def test_a_callable_that_asks_for_cancelled_is_told_and_the_slot_is_free_at_once(
    tmp_path: Path, handles: list[Handle]
) -> None:
    inside = threading.Event()
    frames: list[Any] = []

    def call(text: str, cancelled: Callable[[], bool]) -> str:
        inside.set()
        while not cancelled():
            time.sleep(0.01)
        return "late"

    async def relay(desk: Desk) -> None:
        await desk.register()
        desk.send(assign())
        await trio.to_thread.run_sync(inside.wait)
        began = trio.current_time()
        desk.send(Cancel(request_id=assign().request_id, reason="client left"))
        frames.extend(await desk.frames())
        assert trio.current_time() - began < 1
        await trio.sleep_forever()

    with RelayThread(tmp_path, script(relay)) as url:
        handles.append(serve(call, url=url, space="tts"))
        until(lambda: bool(frames))
    assert isinstance(frames[-1], Cancelled)
    assert frames[-1].reason == "client left"


def test_an_engine_class_is_served_too(tmp_path: Path, handles: list[Handle]) -> None:
    seen: list[Any] = []

    async def relay(desk: Desk) -> None:
        seen.append(await desk.register())
        desk.send(assign(params={"text": "x", "speed": 0, "duration_s": 1}))
        seen.extend(await desk.frames())
        await trio.sleep_forever()

    with RelayThread(tmp_path, script(relay)) as url:
        handles.append(serve(MockEngine, url=url, space="tts"))
        until(lambda: len(seen) == 1 + 12)
    assert seen[0].reproducible


def test_a_class_is_made_once_for_each_slot_and_in_its_thread(tmp_path: Path, handles: list[Handle]) -> None:
    made: list[str] = []

    class Model:
        def __init__(self) -> None:
            made.append(threading.current_thread().name)

        def __call__(self, text: str) -> str:
            return text

    async def relay(desk: Desk) -> None:
        register = await desk.register()
        while register.slots < 2:
            register = await desk.expect(Register)
        await trio.sleep_forever()

    with RelayThread(tmp_path, script(relay)) as url:
        handle = serve(Model, url=url, space="tts", slots=2)
        handles.append(handle)
        until(lambda: handle.status().slots == 2)
    assert sorted(made) == ["gpuworker-0", "gpuworker-1"]
