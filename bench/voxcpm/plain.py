"""Runs plain voxcpm as a program without relayd would: one process per slot, each with its own model.

`python -m bench.voxcpm.plain MODEL DEVICE OPTIMIZE` is such a process: it reads and writes lines of JSON.
"""

import contextlib
import hashlib
import importlib.metadata
import json
import os
import platform
import select
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import IO, Any

import attrs

from bench.voxcpm.round import Deadline, Failed, Gauge, Job, OutOfTime, Side, Spoken

_STOP_S = 5.0
_LOG_LINES = 6


@attrs.frozen
class Talker:
    """A process with a loaded model."""

    process: "subprocess.Popen[bytes]"
    log: Path
    _buffer: bytearray = attrs.field(factory=bytearray)

    def send(self, job: Job, *, deterministic: bool) -> None:
        """Make it speak."""
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # `answer` reports why the process ended
            self.process.stdin.write(json.dumps({**attrs.asdict(job), "deterministic": deterministic}).encode() + b"\n")

    def answer(self, deadline: Deadline) -> dict[str, Any]:
        """Return its next line.

        Raises:
            Failed: the process has ended.
        """
        assert self.process.stdout is not None
        while b"\n" not in self._buffer:
            ready, _, _ = select.select([self.process.stdout], [], [], deadline.left_s())
            if not ready:
                raise OutOfTime
            data = os.read(self.process.stdout.fileno(), 65_536)
            if not data:
                raise Failed(end_of_log(self.log))
            self._buffer.extend(data)
        line, _, rest = bytes(self._buffer).partition(b"\n")
        self._buffer[:] = rest
        reply: dict[str, Any] = json.loads(line)
        return reply


def end_of_log(log: Path) -> str:
    """The end of a log, in one line."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines()]
    return " ".join(list(filter(None, lines))[-_LOG_LINES:])[-600:] or "it ended without a message"


class Plain:
    """Any number of plain processes; more can be added.

    Attributes:
        versions: a description of the software and hardware, once a process has started.
    """

    def __init__(self, model: Path, device: str, *, optimize: bool, gauge: Gauge, environ: dict[str, str]) -> None:
        self._command = [sys.executable, "-m", "bench.voxcpm.plain", str(model), device, str(int(optimize))]
        self._gauge = gauge
        self._environ = {**os.environ, **environ}
        self._open = ExitStack()
        self._folder = Path(self._open.enter_context(tempfile.TemporaryDirectory(prefix="relayd-bench-")))
        self._talkers: list[Talker] = []
        self._load_s: list[float] = []
        self._references: set[str] = set()
        self.versions = ""

    def __enter__(self) -> "Plain":
        return self

    def __exit__(self, *_fault: object) -> None:
        self._open.close()

    @property
    def pids(self) -> list[int]:
        """The processes that are ready."""
        return [talker.process.pid for talker in self._talkers]

    @property
    def count(self) -> int:
        """The number of processes that are ready."""
        return len(self._talkers)

    def add(self, job: Job, deadline: Deadline) -> None:
        """Add a process. It speaks once with the engine's own settings, for the samples to compare with.

        Raises:
            Failed, OutOfTime: it did not start; it has been ended.
        """
        log = self._folder / f"{self.count}.log"
        began = time.monotonic()
        with ExitStack() as starting:
            talker = Talker(starting.enter_context(talker_process(self._command, log, self._environ)), log)
            self.versions = talker.answer(deadline)["versions"]
            load_s = time.monotonic() - began
            talker.send(job, deterministic=True)
            self._references.add(_spoken(talker.answer(deadline)).digest)
            self._open.push(starting.pop_all())
        self._load_s.append(load_s)
        self._talkers.append(talker)

    def measure(self, job: Job, rounds: int, deadline: Deadline) -> Side:
        """Make all of them speak, for one round more than is counted.

        Raises:
            Failed, OutOfTime: a process has ended or takes too long; the processes cannot be used any further.
        """
        measured = [self.round(job, deadline) for _ in range(1 + rounds)][1:]
        memory = self._gauge.used(self.pids)
        return Side(measured, frozenset(self._references), list(self._load_s), memory)

    def round(self, job: Job, deadline: Deadline) -> list[Spoken]:
        """Make all of them speak once.

        Raises:
            Failed, OutOfTime: as for `measure`.
        """
        for talker in self._talkers:
            talker.send(job, deterministic=False)
        return [_spoken(talker.answer(deadline)) for talker in self._talkers]


def _spoken(reply: dict[str, Any]) -> Spoken:
    return Spoken(reply["first_s"], reply["wall_s"], reply["audio_s"], reply["digest"])


@contextlib.contextmanager
def talker_process(command: list[str], log: Path, environ: dict[str, str]) -> Iterator["subprocess.Popen[bytes]"]:
    """A process of a `Talker`, ended afterwards."""
    with log.open("wb") as out:
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=out, env=environ, bufsize=0
        )
    assert process.stdin is not None
    with process:
        try:
            yield process
        finally:
            process.stdin.close()  # ends an idle process, and its compile workers
            for stop in (process.terminate, process.kill):
                try:
                    process.wait(_STOP_S)
                except subprocess.TimeoutExpired:
                    stop()


# -- in the process ----------------------------------------------------------------------------------------------


def main() -> int:
    """Load the model, then speak each job received; ends with the end of stdin."""
    folder, device, optimize = sys.argv[1:]
    # Output printed by libraries must not be read as an answer.
    with os.fdopen(os.dup(1), "w", buffering=1) as answers:
        os.dup2(2, 1)
        _serve(Path(folder), device, bool(int(optimize)), answers)
    return 0


def _serve(folder: Path, device: str, optimize: bool, answers: IO[str]) -> None:
    from gpuworker.engines.voxcpm.crossfade import pcm16
    from gpuworker.engines.voxcpm.devices import import_voxcpm

    # For the stand-in if torchaudio is missing or does not load, and for a log without progress bars.
    _torchaudio, voxcpm = import_voxcpm()
    import numpy as np
    import torch

    if device.startswith("cuda"):
        torch.cuda.set_device(device if ":" in device else "cuda:0")
    # voxcpm compiles only for exactly "cuda", whichever GPU that is.
    name = device.partition(":")[0]
    model = voxcpm.VoxCPM.from_pretrained(
        str(folder), load_denoiser=False, optimize=optimize, device=name, local_files_only=True
    )
    answers.write(json.dumps({"versions": versions(device)}) + "\n")
    for line in sys.stdin:
        job = json.loads(line)
        # As the engine sets it; plain voxcpm leaves the choice to cuDNN, and may make different samples each time.
        torch.backends.cudnn.deterministic = job["deterministic"]
        began = time.perf_counter()
        torch.manual_seed(job["seed"])
        stream = model.generate_streaming(
            text=job["text"],
            inference_timesteps=job["timesteps"],
            retry_badcase=False,
            retry_badcase_ratio_threshold=job["ratio"],
        )
        chunks, first_s = [], 0.0
        for chunk in stream:
            first_s = first_s or time.perf_counter() - began
            chunks.append(chunk)
        wall_s = time.perf_counter() - began
        if len(chunks) != job["steps"]:
            raise RuntimeError(
                f"{len(chunks)} steps in place of {job['steps']}: this model was not written by the bench"
            )
        samples = np.concatenate(chunks)
        reply = {
            "first_s": first_s,
            "wall_s": wall_s,
            "audio_s": len(samples) / model.tts_model.sample_rate,
            "digest": hashlib.sha256(pcm16(samples)).hexdigest(),
        }
        answers.write(json.dumps(reply) + "\n")


def versions(device: str) -> str:
    import torch

    parts = [f"Python {platform.python_version()}", f"torch {torch.__version__}"]
    for name in ("triton", "torchaudio", "voxcpm", "transformers"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            parts.append(f"{name} {importlib.metadata.version(name)}")
    if device != "cpu":
        gpu = torch.cuda.get_device_properties(device)
        parts.insert(0, f"{gpu.name}, {gpu.total_memory / 1024**3:.1f} GiB")
        cudnn: Any = torch.backends.cudnn
        parts.append(f"CUDA {torch.version.cuda}, cuDNN {cudnn.version()}")
    else:
        parts.insert(0, f"CPU, {torch.get_num_threads()} thread(s) per process")
    return ", ".join(parts)


if __name__ == "__main__":
    sys.exit(main())
