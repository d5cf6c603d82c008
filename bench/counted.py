"""The program that `guard` starts instead of relayd: relayd in the same process, with its work counted.

    python counted.py CELLS [argument of relayd]...

CELLS is a file of numbers that both processes map. On SIGUSR1, this process switches to the counter whose number is in
cell `WANTED`, and confirms in cell `DONE`; until then nothing is counted or slowed down. It imports nothing of the
bench, because the measured relayd may be another checkout with another interpreter.
"""

import mmap
import runpy
import signal
import sys
from types import FrameType
from typing import Any

CALLS, BYTECODES, STEPS, WAITS, WANTED, DONE = range(6)
CELLS = 6
OFF = 0


def main() -> None:
    path = sys.argv[1]
    with open(path, "r+b") as file:  # noqa: PTH123
        cells = memoryview(mmap.mmap(file.fileno(), 8 * CELLS)).cast("Q")

    def profile(_frame: FrameType, event: str, _given: Any) -> None:
        if event in ("call", "c_call"):
            cells[CALLS] += 1

    def trace(frame: FrameType, event: str, _given: Any) -> Any:
        if event == "opcode":
            cells[BYTECODES] += 1
        else:
            frame.f_trace_opcodes, frame.f_trace_lines = True, False
        return trace

    def switch(_number: int, frame: FrameType | None) -> None:
        import trio

        class Instrument(trio.abc.Instrument):
            def before_task_step(self, task: trio.lowlevel.Task) -> None:
                cells[STEPS] += 1

            def before_io_wait(self, timeout: float) -> None:
                cells[WAITS] += 1

        wanted = cells[WANTED]
        sys.setprofile(profile if wanted == CALLS + 1 else None)
        tracing = trace if wanted == BYTECODES + 1 else None
        sys.settrace(tracing)
        while frame is not None:  # frames that are already running, including Trio's own loop
            frame.f_trace = tracing
            if tracing is not None:
                frame.f_trace_opcodes, frame.f_trace_lines = True, False
            frame = frame.f_back
        if wanted == STEPS + 1 and not instruments:
            instruments.append(Instrument())
            trio.lowlevel.add_instrument(instruments[0])
        elif wanted != STEPS + 1 and instruments:
            trio.lowlevel.remove_instrument(instruments.pop())
        cells[DONE] += 1

    instruments: list[Any] = []
    signal.signal(signal.SIGUSR1, switch)
    sys.argv = ["relayd", *sys.argv[2:]]
    # Instead of this file's folder: the directory in which `python -m` would look for relayd.
    sys.path[0] = ""
    runpy.run_module("relayd.cli", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
