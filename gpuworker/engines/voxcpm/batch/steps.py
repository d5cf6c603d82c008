"""The one thread that uses the model: it admits speeches, makes steps, and hands out what they made."""

import queue
import threading
import traceback
from collections import deque
from collections.abc import Callable
from typing import TypeVar

from gpuworker.engines.base import EngineError
from gpuworker.engines.voxcpm.batch.device import bind_thread
from gpuworker.engines.voxcpm.batch.rows import Batch, Patch, Task
from gpuworker.engines.voxcpm.errors import named_faults

T = TypeVar("T")
#: What a speech receives: its patches, or the error that ended the step of all.
Patches = queue.SimpleQueue[Patch | EngineError]


class Steps:
    """Drives a batch. Every method may be called from any thread.

    What takes long (a prefill, a prompt to encode) runs between two steps, one at a time: so those who speak pause for
    one newcomer and not for all. With nothing to do, the thread waits and costs nothing.

    Args:
        device: where the model is.
    """

    def __init__(self, device: str) -> None:
        self._device = device
        self._asked: queue.SimpleQueue[tuple[bool, Callable[[], None]]] = queue.SimpleQueue()
        self._waiting: deque[Callable[[], None]] = deque()
        self._outs: dict[int, Patches] = {}
        self._batch: Batch | None = None
        self._ends = False
        self._thread = threading.Thread(target=self._serve, name="voxcpm-steps", daemon=True)

    def start(self, make: Callable[[], Batch]) -> Batch:
        """Start the thread and make the batch in it, because CUDA graphs are best used where they were recorded."""

        def begin() -> Batch:
            bind_thread(self._device)
            return make()

        self._thread.start()
        self._batch = self.ask(begin)
        return self._batch

    def close(self) -> None:
        """End the thread, after the step that it makes."""
        self._asked.put((False, self._end))
        self._thread.join()

    def ask(self, call: Callable[[], T], *, at_once: bool = False) -> T:
        """Run `call` in the thread of the model, between two steps; return or raise what it does.

        Args:
            call: uses the model.
            at_once: before the next step, even if others wait; for what takes no time.
        """
        answer: queue.SimpleQueue[tuple[T, None] | tuple[None, BaseException]] = queue.SimpleQueue()

        def run() -> None:
            try:
                answer.put((call(), None))
            except BaseException as fault:  # noqa: BLE001 - it is raised where it was asked for
                answer.put((None, fault))

        self._asked.put((at_once, run))
        value, fault = answer.get()
        if fault is not None:
            raise fault
        return value  # type: ignore[return-value]  # the other half of the pair

    def admit(self, row: int, task: Task) -> Patches:
        """Begin a speech in a free row; its patches come in the queue until one has `ended` or a `fault`."""

        def begin() -> Patches:
            assert self._batch is not None
            self._batch.admit(row, task)
            out: Patches = queue.SimpleQueue()
            self._outs[row] = out
            return out

        return self.ask(begin)

    def leave(self, row: int, out: Patches) -> None:
        """Free the row of a speech before the next step; nothing happens if it has ended."""

        def end() -> None:
            if self._outs.get(row) is out:
                assert self._batch is not None
                self._batch.leave(row)
                del self._outs[row]

        self.ask(end, at_once=True)

    # -- in the thread

    def _end(self) -> None:
        self._ends = True

    def _serve(self) -> None:
        while not self._ends:
            self._pop_calls(wait=not self._outs and not self._waiting)
            if self._waiting:
                self._waiting.popleft()()
            if self._outs:
                self._step()

    def _pop_calls(self, *, wait: bool) -> None:
        """Run what has no time to wait, and put the rest behind those who wait."""
        try:
            while not self._ends:
                at_once, call = self._asked.get(block=wait)
                wait = False
                if at_once:
                    call()
                else:
                    self._waiting.append(call)
        except queue.Empty:
            pass

    def _step(self) -> None:
        assert self._batch is not None
        try:
            with named_faults(self._batch.places):
                made = self._batch.step()
        except Exception as fault:  # noqa: BLE001 - the batch is one: every speech in it fails with it
            traceback.print_exc()
            # Nobody knows whose fault it is: the slots find out, with a new process. And nobody may read of others.
            message = "a step, which all requests share, failed; the worker's log says why"
            message = str(fault) if isinstance(fault, EngineError) else message
            for row, out in self._outs.items():
                self._batch.leave(row)
                out.put(EngineError(message, retryable=True, restart=True))
            self._outs.clear()
            return
        for row, patch in made.items():
            self._outs[row].put(patch)
            if patch.ended or patch.fault:
                del self._outs[row]
