"""Compares rows of one batch with plain voxcpm, one speech at a time, and with as many processes of it, in one run.

`python -m bench voxcpm --batch [--rows 1,2,4,8,16] [--size tiny|mid|full] [--out FILE]`. In each round every side makes
the same speech, the batch with a seed for each row. `python -m bench.voxcpm.batch MODEL DEVICE ROWS RECORD` is the
process of a batch: it reads and writes lines of JSON.
"""

import argparse
import hashlib
import json
import os
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import IO, Any, get_args

import attrs

from bench.machine import machine_line
from bench.voxcpm.plain import Plain, Talker, talker_process, versions
from bench.voxcpm.round import Deadline, Failed, Gauge, Job, OutOfTime, Spoken, cpu_seconds, make_job
from gpuworker.engines.voxcpm.memory import lacking_memory
from tests.support.voxcpm_checkpoint.checkpoint import write_checkpoint
from tests.support.voxcpm_checkpoint.dimensions import Arch, Size

_HEAD = (
    "| model | at once | audio seconds a second: plain, one at a time / so many processes / batch | batch ÷ plain | "
    "first audio p50, ms: plain / processes / batch | audio seconds a CPU second: plain / processes / batch | "
    "batch ÷ plain |\n| --- | ---: | --- | ---: | --- | --- | ---: |"
)


@attrs.frozen
class Round:
    """What one side made in one round: its speeches, and the CPU seconds of its processes."""

    speeches: list[Spoken]
    cpu_s: float

    @property
    def rate(self) -> float:
        """Seconds of audio a second."""
        return self._audio_s / max(spoken.wall_s for spoken in self.speeches)

    @property
    def cpu_rate(self) -> float:
        """Seconds of audio a CPU second."""
        return self._audio_s / max(self.cpu_s, 1e-3)

    @property
    def first_ms(self) -> float:
        """The median time to the first audio."""
        return 1e3 * statistics.median(spoken.first_s for spoken in self.speeches)

    @property
    def _audio_s(self) -> float:
        return sum(spoken.audio_s for spoken in self.speeches)


def measure(
    model: Path, rows: int, processes: int, job: Job, rounds: int, args: Any, environ: Mapping[str, str]
) -> dict[str, list[Round]]:
    """The rounds of each side, in turns: `plain`, `processes` (none if there are to be none) and `batch`."""
    optimize, deadline = not args.no_optimize, args.deadline
    gauge = Gauge(args.device, None)
    command = [sys.executable, "-m", "bench.voxcpm.batch", str(model), args.device, str(rows), str(int(optimize))]
    with ExitStack() as open_:
        folder = Path(open_.enter_context(tempfile.TemporaryDirectory(prefix="relayd-bench-")))
        batch = Talker(
            open_.enter_context(talker_process(command, folder / "log", {**os.environ, **environ})), folder / "log"
        )
        batch.answer(deadline)
        sides: dict[str, Plain] = {"plain": _plain(open_, model, 1, job, args, gauge, environ)}
        if processes:
            sides["processes"] = _plain(open_, model, processes, job, args, gauge, environ)
        made: dict[str, list[Round]] = {name: [] for name in (*sides, "batch")}
        for _ in range(1 + rounds):
            for name, side in sides.items():
                before = sum(map(cpu_seconds, side.pids))
                speeches = side.round(job, deadline)
                made[name].append(Round(speeches, sum(map(cpu_seconds, side.pids)) - before))
            before = cpu_seconds(batch.process.pid)
            batch.send(job, deterministic=True)
            speeches = [Spoken(**spoken) for spoken in batch.answer(deadline)["speeches"]]
            made["batch"].append(Round(speeches, cpu_seconds(batch.process.pid) - before))
        return {name: each[1:] for name, each in made.items()}


def _plain(
    open_: ExitStack, model: Path, count: int, job: Job, args: Any, gauge: Gauge, environ: Mapping[str, str]
) -> Plain:
    plain = open_.enter_context(
        Plain(model, args.device, optimize=not args.no_optimize, gauge=gauge, environ=dict(environ))
    )
    for _ in range(count):
        plain.add(job, args.deadline)
    return plain


def _line(name: str, rows: int, made: Mapping[str, list[Round]]) -> str:
    def medians(value: str, form: str) -> str:
        found = [
            format(statistics.median(getattr(one, value) for one in made[side]), form) if side in made else "–"
            for side in ("plain", "processes", "batch")
        ]
        return " / ".join(found)

    def ratio(value: str) -> str:
        pairs = zip(made["batch"], made["plain"], strict=True)
        return f"**{statistics.median(getattr(a, value) / getattr(b, value) for a, b in pairs):.2f}**"

    return (
        f"| {name} | {rows} | {medians('rate', '.2f')} | {ratio('rate')} | {medians('first_ms', ',.0f')} | "
        f"{medians('cpu_rate', '.2f')} | {ratio('cpu_rate')} |"
    )


def main(argv: Sequence[str]) -> int:
    """Returns 1 if a side failed."""
    args = _arguments(argv)
    environ = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
    if args.device == "cpu":
        environ["OMP_NUM_THREADS"] = "1"  # sums depend on the number of threads, and CPU seconds are compared
    lines, notes, failed = [_HEAD], [], False
    began, machine = time.monotonic(), machine_line()
    with tempfile.TemporaryDirectory(prefix="relayd-bench-") as temporary:
        for size in args.sizes:
            steps = args.steps or (100 if size == "full" else 60)
            job, model = make_job(steps, args.timesteps), (args.folder or Path(temporary)) / f"{args.arch}-{size}"
            if not (model / "written").exists():
                write_checkpoint(model, args.arch, stop="never", size=size)
                (model / "written").touch()
            for rows in args.rows:
                processes = rows if rows <= args.processes else 0
                print(f"{time.strftime('%H:%M:%S')} {model.name}, {rows} at once", file=sys.stderr, flush=True)
                try:
                    if lacks := lacking_memory(str(model), args.device, 1 + processes, rows=1):
                        notes.append(f"- {size}, {rows}: no processes beside it: {lacks[0].what}")
                        processes = 0
                    made = measure(model, rows, processes, job, args.rounds, args, environ)
                    lines.append(_line(f"{args.arch}, {size}", rows, made))
                except OutOfTime:
                    notes.append(f"- {size}, {rows}: skipped: the time was up (--seconds)")
                except Failed as fault:
                    notes.append(f"- {size}, {rows}: failed: {fault}")
                    failed = True
    text = "\n".join([machine, "", *_words(args), "", *lines, "", *notes, f"{time.monotonic() - began:.0f} s."])
    print(text)
    if args.out is not None:
        args.out.write_text(f"{text}\n", encoding="utf-8")
    return int(failed)


def _words(args: Any) -> Iterator[str]:
    yield (
        f"VoxCPM in rows of a batch, random weights, device {args.device}; {args.timesteps} timesteps, "
        f"{args.rounds} rounds in turns after one that does not count."
    )
    if args.device == "cpu":
        yield "**A CPU says little about a GPU: it is busy with arithmetic at one row already.**"


def _arguments(argv: Sequence[str]) -> Any:
    def numbers(text: str) -> tuple[int, ...]:
        return tuple(sorted({int(part) for part in text.split(",")}))

    parser = argparse.ArgumentParser(prog="python -m bench voxcpm --batch", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--arch", choices=get_args(Arch), default="voxcpm2")
    parser.add_argument(
        "--size", action="append", choices=get_args(Size), dest="sizes", help="full on a GPU, else all but full"
    )
    parser.add_argument("--rows", type=numbers, default=(1, 2, 4, 8, 16), metavar="N,N…", help="1,2,4,8,16")
    parser.add_argument("--processes", type=int, metavar="N", help="most plain processes beside it (4; on a GPU 0)")
    parser.add_argument("--steps", type=int, metavar="N", help="of a speech: 100 of full size, else 60")
    parser.add_argument("--timesteps", type=int, default=10, metavar="N", help="diffusion steps of each (10)")
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="rounds that count (3)")
    parser.add_argument("--seconds", type=float, default=540.0, metavar="S", help="skip what is left then (540)")
    parser.add_argument("--device", default="auto", help="auto, cuda, cuda:1, cpu")
    parser.add_argument("--no-optimize", action="store_true", help="without torch.compile and CUDA graphs")
    parser.add_argument("--folder", type=Path, help="keep the models here and reuse them")
    parser.add_argument("--out", type=Path, help="write the report to this file as well")
    args = parser.parse_args(argv)
    if args.device == "auto":
        import torch

        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    on_gpu = args.device != "cpu"
    args.sizes = args.sizes or (["full"] if on_gpu else ["tiny", "mid"])
    args.processes = args.processes if args.processes is not None else (0 if on_gpu else 4)
    args.deadline = Deadline.after(args.seconds)
    return args


# -- in the process of a batch -----------------------------------------------------------------------------------


def _serve(folder: str, device: str, rows: int, record: bool, answers: IO[str]) -> None:
    from gpuworker.engines.voxcpm.batch.seat import Seat
    from gpuworker.engines.voxcpm.batch.shared_model import SharedModel
    from gpuworker.engines.voxcpm.crossfade import pcm16
    from gpuworker.engines.voxcpm.model import Model, Settings

    shared = SharedModel.of(Model.load(folder, device=device, optimize=False), rows, record=record)
    answers.write(json.dumps({"versions": versions(device), "independent": shared.independent}) + "\n")

    def speak(seat: Seat, job: Mapping[str, Any], number: int, began: float, speeches: list[Any]) -> None:
        seat.seed(job["seed"] + number)
        settings = Settings(inference_timesteps=job["timesteps"], ratio_threshold=job["ratio"])
        chunks, first_s = [], 0.0
        for chunk in seat.stream(job["text"], None, settings):
            first_s = first_s or time.perf_counter() - began
            chunks.append(pcm16(chunk))
        pcm = b"".join(chunks)
        spoken = {"first_s": first_s, "wall_s": time.perf_counter() - began, "digest": hashlib.sha256(pcm).hexdigest()}
        speeches.append({**spoken, "audio_s": len(pcm) / 2 / seat.sample_rate})

    for line in sys.stdin:
        job, began = json.loads(line), time.perf_counter()
        speeches: list[Any] = []
        threads = [
            threading.Thread(target=speak, args=(seat, job, number, began, speeches))
            for number, seat in enumerate(shared.seats)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        answers.write(json.dumps({"speeches": speeches}) + "\n")


if __name__ == "__main__":
    # Output printed by libraries must not be read as an answer.
    with os.fdopen(os.dup(1), "w", buffering=1) as out:
        os.dup2(2, 1)
        _serve(sys.argv[1], sys.argv[2], int(sys.argv[3]), bool(int(sys.argv[4])), out)
