"""A worker whose GPU fails or runs out of memory, in a run and while a model loads."""

import logging
from pathlib import Path

import pytest
import trio

from gpuworker.identity import Identity
from gpuworker.slots.process_slot import EngineHost, ProcessSlot
from gpuworker.status import WorkerError
from gpuworker.worker import Worker
from protocol.wire.frames import Completed, Failed
from protocol.wire.messages import Register
from tests.gpuworker.engines.engine_package import NAME, install_engine
from tests.support.scripted_relay import ADDRESS, ID, OTHER, Desk, FakeRelay, assign, script

#: A GPU with room for as many processes as the file `room` says; each takes its place at load until it ends.
SOURCE = """
    import os, pathlib
    from gpuworker.engines.base import *
    from protocol.wire.messages import AudioFormat

    FOLDER = pathlib.Path(__file__).parent

    class Made(Engine):
        capabilities = Capabilities(format=AudioFormat(sample_rate=24_000))

        def load(self):
            for taken in FOLDER.glob("taken-*"):
                if not pathlib.Path("/proc", taken.name.partition("-")[2]).exists():
                    taken.unlink()
            if len(list(FOLDER.glob("taken-*"))) >= int((FOLDER / "room").read_text()):
                raise EngineError("CUDA out of memory while the model loads; use fewer --slots", restart=True)
            (FOLDER / f"taken-{os.getpid()}").touch()

        def generate(self, params, inputs):
            yield AudioChunk(bytes(2))
            if params.get("broken"):
                raise RuntimeError("CUDA error: device-side assert triggered; use fewer --slots")
            if params.get("greedy"):
                raise EngineError("CUDA out of memory; use fewer --slots", retryable=True, restart=True)
            yield AudioChunk(bytes(2))
"""


class Gpu:
    """What there is room for, as a file that the engines' processes read."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def fit(self, processes: int) -> None:
        (self._folder / "room").write_text(str(processes))

    def taken(self) -> set[Path]:
        return set(self._folder.glob("taken-*"))


@pytest.fixture
def gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Gpu:
    install_engine(tmp_path, monkeypatch, SOURCE)
    gpu = Gpu(tmp_path)
    gpu.fit(9)
    return gpu


async def run_worker(work: object, slots: int) -> None:
    """Run a worker with real slot processes against one script, to the script's end."""
    done = trio.Event()

    async def last(connection: object) -> None:
        await script(work)(connection)  # type: ignore[arg-type]  # the fake relay's own types
        done.set()

    loading = trio.Lock()
    with trio.fail_after(60):
        async with trio.open_nursery() as nursery:
            relay = FakeRelay(nursery, last)
            worker = Worker(
                Identity(name="box", spaces=("tts",), engine=NAME, token="t"),
                ADDRESS,
                [ProcessSlot(index, EngineHost(NAME, {}, loading=loading)) for index in range(slots)],
                connect_to=relay.connect,
            )
            nursery.start_soon(worker.run)
            await done.wait()
            nursery.cancel_scope.cancel()


async def until_slots(desk: Desk, slots: int) -> None:
    while (await desk.expect(Register)).slots != slots:
        pass


@pytest.mark.trio
@pytest.mark.parametrize("how", ["greedy", "broken"])
async def test_a_run_that_the_gpu_failed_may_be_tried_again_and_its_slot_is_started_anew(gpu: Gpu, how: str) -> None:
    async def relay(desk: Desk) -> None:
        await desk.register()
        taken = gpu.taken()
        desk.send(assign(params={how: True}))
        message = await desk.hear()
        while not isinstance(message, Register):  # told before the request fails: nothing new may come
            message = await desk.hear()
        assert message.slots == 0
        last = (await desk.frames())[-1]
        assert isinstance(last, Failed)
        assert (last.code, last.retryable) == ("engine_failed", True)
        assert "use fewer --slots" in last.message
        await until_slots(desk, 1)
        assert gpu.taken().isdisjoint(taken)
        desk.send(assign(request_id=OTHER))
        assert isinstance((await desk.frames())[-1], Completed)

    await run_worker(relay, slots=1)


@pytest.mark.trio
async def test_a_slot_that_finds_no_memory_to_load_leaves_the_others_to_work_and_comes_when_there_is_room(
    gpu: Gpu, caplog: pytest.LogCaptureFixture
) -> None:
    gpu.fit(1)

    async def relay(desk: Desk) -> None:
        assert (await desk.register()).slots == 1
        while "cannot be loaded: CUDA out of memory while the model loads" not in caplog.text:  # noqa: ASYNC110 - a log
            await trio.sleep(0.01)
        desk.send(assign(request_id=ID))
        assert isinstance((await desk.frames())[-1], Completed)
        gpu.fit(2)
        await until_slots(desk, 2)

    with caplog.at_level(logging.ERROR, "gpuworker"):
        await run_worker(relay, slots=2)


@pytest.mark.trio
async def test_a_slot_that_cannot_come_back_for_want_of_memory_is_tried_again_and_the_worker_stays(gpu: Gpu) -> None:
    async def relay(desk: Desk) -> None:
        await desk.register()
        gpu.fit(0)
        desk.send(assign(params={"greedy": True}))
        while not isinstance(await desk.hear(), Register):
            pass
        await desk.frames()
        await desk.silent(1.0)  # two loads fail in this time
        gpu.fit(1)
        await until_slots(desk, 1)

    await run_worker(relay, slots=1)


@pytest.mark.trio
async def test_a_worker_none_of_whose_models_can_be_loaded_ends_with_the_words(gpu: Gpu) -> None:
    gpu.fit(0)

    async def relay(desk: Desk) -> None:
        await trio.sleep_forever()

    with trio.fail_after(60):
        async with trio.open_nursery() as nursery:
            fake = FakeRelay(nursery, script(relay))
            identity = Identity(name="box", spaces=("tts",), engine=NAME, token="t")
            worker = Worker(identity, ADDRESS, [ProcessSlot(0, EngineHost(NAME, {}))], connect_to=fake.connect)
            with pytest.raises(WorkerError, match="use fewer --slots") as told:
                await worker.run()
            assert told.value.code == "model_not_loaded"
            nursery.cancel_scope.cancel()
