"""Compares plain voxcpm in N processes with relayd, a worker and N clients, on models of full size and random weights.

`python -m bench voxcpm [--slots 1,2,4,8] [--out FILE]`, or `python -m bench.voxcpm.gpu`. Speed does not depend on the
values of weights, so nothing is downloaded. Both sides speak the same text with the same seed for the same number of
steps, so they make the same samples, whose SHA-256 is compared. Without a CUDA GPU, tiny models on the CPU show that
the bench works, but their figures mean little.
"""

import argparse
import os
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, get_args

import attrs

from bench.machine import machine_line
from bench.relay.servers import Server, open_relayd
from bench.voxcpm.path import measure_path
from bench.voxcpm.plain import Plain
from bench.voxcpm.round import MAX_STEPS, MIN_STEPS, Deadline, Failed, Gauge, Job, OutOfTime, Side, make_job
from gpuworker.engines.voxcpm.memory import lacking_memory
from protocol.commands.exit_codes import INTERRUPTED
from tests.support.voxcpm_checkpoint.checkpoint import write_checkpoint
from tests.support.voxcpm_checkpoint.dimensions import FULL, Arch, Size

NAMES = {"voxcpm2": "VoxCPM2", "voxcpm1.5": "VoxCPM 1.5", "voxcpm": "VoxCPM 0.5B"}
_GIB = 1024**3
_HEAD = (
    "| model | slots | first audio p50, ms | first audio max, ms | real-time factor p50 | "
    "speech per second, all slots, s | loading a slot, s | memory, GiB | same samples |\n"
    "| --- | ---: | --- | --- | --- | --- | --- | --- | --- |"
)
#: Marks complete models in `--folder`, which are reused: 5 GB of weights are not written for every run.
_WRITTEN = "written"


@attrs.frozen(kw_only=True)
class Plan:
    """What to measure."""

    size: Size
    arches: tuple[Arch, ...]
    slots: tuple[int, ...]
    job: Job
    rounds: int
    device: str
    optimize: bool
    environ: dict[str, str]


#: The result of one side at one number of slots; or why there is none, and whether that is a failure.
Outcome = Side | tuple[str, bool]


@attrs.frozen(kw_only=True)
class Row:
    """The results of one model at one number of slots, on both sides."""

    arch: Arch
    slots: int
    plain: Outcome
    path: Outcome

    @property
    def same(self) -> bool | None:
        """Whether both sides made the same samples in every round; None if one side made none."""
        if not isinstance(self.plain, Side) or not isinstance(self.path, Side):
            return None
        return {spoken.digest for spoken in self.path.speeches} == self.plain.references

    @property
    def failed(self) -> bool:
        """Whether a side failed, or the sides made different samples. A skipped side is not a failure."""
        broke = any(not isinstance(side, Side) and side[1] for side in (self.plain, self.path))
        return broke or self.same is False

    def line(self) -> str:
        """Format it as a line of the table."""
        cells = [NAMES[self.arch], str(self.slots)]
        if isinstance(self.plain, Side) or isinstance(self.path, Side):
            cells += [self._pair(value, form) for value, form in _FIGURES]
            cells.append({True: "yes", False: "**NO**", None: "–"}[self.same])
        else:
            cells += ["–"] * (len(_FIGURES) + 1)
        return f"| {' | '.join(cells)} |"

    def notes(self) -> Iterator[str]:
        """Explain missing figures, and anything else worth knowing."""
        where = f"{NAMES[self.arch]}, {self.slots} slot{'s' if self.slots > 1 else ''}"
        for name, side in (("plain", self.plain), ("relayd", self.path)):
            if not isinstance(side, Side):
                yield f"{where}, {name}: {'failed' if side[1] else 'skipped'}: {side[0]}"
        if isinstance(self.plain, Side):
            made = {spoken.digest for spoken in self.plain.speeches}
            if made != self.plain.references:
                yield (
                    f"{where}, plain: the timed runs made {len(made)} different outputs; the comparison uses "
                    "a run with deterministic cuDNN, as the engine sets it"
                )

    def _pair(self, value: "Callable[[Side], float | None]", form: str) -> str:
        plain, path = (value(side) if isinstance(side, Side) else None for side in (self.plain, self.path))
        text = " / ".join("–" if figure is None else format(figure, form) for figure in (plain, path))
        return f"{text} (**{path / plain:.2f}**)" if plain and path else text


def _audio_rate(side: Side) -> float:
    return statistics.median(
        sum(spoken.audio_s for spoken in each) / max(spoken.wall_s for spoken in each) for each in side.rounds
    )


_FIGURES: tuple[tuple[Callable[[Side], float | None], str], ...] = (
    (lambda side: 1e3 * statistics.median(spoken.first_s for spoken in side.speeches), ",.1f"),
    (lambda side: 1e3 * max(spoken.first_s for spoken in side.speeches), ",.1f"),
    (lambda side: statistics.median(spoken.real_time_factor for spoken in side.speeches), ".3f"),
    (_audio_rate, ".2f"),
    (lambda side: statistics.median(side.load_s) if side.load_s else None, ".1f"),
    (lambda side: None if side.memory is None else side.memory / _GIB, ".2f"),
)


# -- measuring ---------------------------------------------------------------------------------------------------


def measure(plan: Plan, folder: Path, deadline: Deadline) -> tuple[list[Row], str]:
    """Measure each model: plain voxcpm at every number of slots, then the whole path likewise.

    Plain processes are added as the numbers rise, and ended before the first worker starts, because there is not
    enough memory for both. So the rounds of the two sides do not alternate; do not use the machine meanwhile.

    Returns:
        the rows, and a description of the software and hardware.
    """
    rows, versions = [], ""
    with open_relayd() as server:
        for arch in plan.arches:
            model = _checkpoint(folder, arch, plan.size)
            gauge = Gauge.at_rest(plan.device)
            plain, described = _plain(plan, model, gauge, deadline)
            versions = versions or described
            path = [_path(plan, server, model, slots, gauge, deadline) for slots in plan.slots]
            rows += [
                Row(arch=arch, slots=slots, plain=one, path=other)
                for slots, one, other in zip(plan.slots, plain, path, strict=True)
            ]
    return rows, versions


def _checkpoint(folder: Path, arch: Arch, size: Size) -> Path:
    model = folder / f"{arch}-{size}"
    if not (model / _WRITTEN).exists():
        _say(f"writing {model}")
        write_checkpoint(model, arch, stop="never", size=size)
        (model / _WRITTEN).touch()
    return model


def _plain(plan: Plan, model: Path, gauge: Gauge, deadline: Deadline) -> tuple[list[Outcome], str]:
    outcomes: list[Outcome] = []
    with Plain(model, plan.device, optimize=plan.optimize, gauge=gauge, environ=plan.environ) as plain:

        def at(slots: int) -> Side:
            while plain.count < slots:
                plain.add(plan.job, deadline)
            return plain.measure(plan.job, plan.rounds, deadline)

        for slots in plan.slots:
            _say(f"{model.name}: plain voxcpm, {slots} at once")
            outcomes.append(_outcome(plan, model, slots - plain.count, deadline, lambda: at(slots)))  # noqa: B023
        return outcomes, plain.versions


def _path(plan: Plan, server: Server, model: Path, slots: int, gauge: Gauge, deadline: Deadline) -> Outcome:
    def at() -> Side:
        return measure_path(
            server,
            model,
            plan.device,
            slots,
            plan.job,
            plan.rounds,
            deadline,
            optimize=plan.optimize,
            gauge=gauge,
            environ=plan.environ,
        )

    _say(f"{model.name}: relayd and a worker, {slots} at once")
    return _outcome(plan, model, slots, deadline, at)


def _outcome(plan: Plan, model: Path, more: int, deadline: Deadline, measured: Callable[[], Side]) -> Outcome:
    try:
        deadline.left_s()
        if lacks := lacking_memory(str(model), plan.device, more):
            return f"needs {'; '.join(lack.what for lack in lacks)}", False
        return measured()
    except OutOfTime:
        return "the time was up (--seconds)", False
    except Failed as fault:
        return str(fault), "out of memory" not in str(fault).lower()


def _say(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


# -- command line ------------------------------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 1 if a side failed or the two made different samples, 130 if Ctrl-C or SIGTERM ended it."""
    plan, args = _plan(argv)
    began = time.monotonic()
    machine = machine_line()
    before = signal.signal(signal.SIGTERM, _as_ctrl_c)
    rows: list[Row] | None = None
    versions = ""
    try:
        with ExitStack() as stack:
            folder = args.folder or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="relayd-bench-")))
            rows, versions = measure(plan, folder, Deadline.after(args.seconds))
    except* KeyboardInterrupt:
        _say("interrupted")
    finally:
        signal.signal(signal.SIGTERM, before)
    if rows is None:
        return INTERRUPTED
    text = "\n".join(_report(plan, rows, machine, versions, time.monotonic() - began))
    print(text)
    if args.out is not None:
        args.out.write_text(f"{text}\n", encoding="utf-8")
    return 1 if any(row.failed for row in rows) else 0


def _as_ctrl_c(_number: int, _frame: object) -> None:
    """Raise KeyboardInterrupt, so that SIGTERM also ends everything that was started."""
    signal.raise_signal(signal.SIGINT)


def _report(plan: Plan, rows: Sequence[Row], machine: str, versions: str, took_s: float) -> Iterator[str]:
    compiled = " (torch.compile)" if plan.optimize and plan.device != "cpu" else ""
    yield machine
    yield f"\nVoxCPM on: {versions}; device {plan.device}{compiled}"
    if plan.device == "cpu" or plan.size == "tiny":
        yield "\n**A smoke test: the figures of tiny models or of a CPU say nothing about a GPU.**"
    yield (
        f"\nWeights are random, of {plan.size} size. A speech: {plan.job.steps} steps from {len(plan.job.text)} "
        f"characters, {plan.job.timesteps} timesteps, seed {plan.job.seed}; {plan.rounds} rounds, each with one speech "
        "per slot, all started together. Each cell: plain voxcpm, one process per slot / relayd, a worker and one "
        "client per slot (**ratio**).\n"
    )
    yield _HEAD
    yield from (row.line() for row in rows)
    if notes := [note for row in rows for note in row.notes()]:
        yield ""
        yield from (f"- {note}" for note in notes)
    yield f"\n{time.strftime('%Y-%m-%d', time.gmtime())}, {took_s:.0f} s."


def _plan(argv: Sequence[str] | None) -> tuple[Plan, Any]:
    parser = argparse.ArgumentParser(prog="python -m bench voxcpm", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--size", choices=get_args(Size), help="of the models; full on a GPU, else tiny")
    parser.add_argument("--arch", action="append", choices=get_args(Arch), help="repeatable; voxcpm2 and voxcpm (0.5B)")
    parser.add_argument("--slots", type=_numbers, metavar="N,N…", help="1,2,4,8 on a GPU, else 1,2")
    steps = f"steps of a speech, {MIN_STEPS}..{MAX_STEPS}: 100 of full size, else 24"
    parser.add_argument("--steps", type=int, metavar="N", help=steps)
    parser.add_argument("--timesteps", type=int, default=10, metavar="N", help="diffusion steps of each (10)")
    parser.add_argument(
        "--rounds", type=int, default=3, metavar="N", help="rounds that count, after one that does not (3)"
    )
    parser.add_argument(
        "--seconds", type=float, default=1500.0, metavar="S", help="skip the rest after this many seconds (1500)"
    )
    parser.add_argument("--device", default="auto", help="auto, cuda, cuda:1, cpu")
    parser.add_argument("--no-optimize", action="store_true", help="without torch.compile, on both sides")
    parser.add_argument("--folder", type=Path, help="keep the models here (7 GB) and reuse them")
    parser.add_argument("--out", type=Path, help="write the report to this file as well")
    args = parser.parse_args(argv)
    device = _device(args.device)
    size: Size = args.size or ("tiny" if device == "cpu" else "full")
    arches = tuple(dict.fromkeys(args.arch or ("voxcpm2", "voxcpm")))
    if size == "full" and (unknown := [arch for arch in arches if arch not in FULL]):
        parser.error(f"--arch {unknown[0]}: its full dimensions are unknown; known: {', '.join(FULL)}")
    if args.rounds < 1 or not 1 <= args.timesteps <= 50:
        parser.error("--rounds must be 1 or more, --timesteps 1 to 50")
    try:
        job = make_job(args.steps or (100 if size == "full" else 24), args.timesteps)
    except ValueError as fault:
        parser.error(f"--steps: {fault}")
    environ = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
    if device == "cpu":
        # Sums depend on the number of threads, and tiny models are slower with more.
        environ["OMP_NUM_THREADS"] = os.environ.get("OMP_NUM_THREADS", "1")
    slots = args.slots or ((1, 2) if device == "cpu" else (1, 2, 4, 8))
    plan = Plan(
        size=size,
        arches=arches,
        slots=slots,
        job=job,
        rounds=args.rounds,
        device=device,
        optimize=not args.no_optimize,
        environ=environ,
    )
    return plan, args


def _device(asked: str) -> str:
    if asked != "auto":
        return asked
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def _numbers(text: str) -> tuple[int, ...]:
    numbers = tuple(sorted({int(part) for part in text.split(",")}))
    if not 1 <= numbers[0] <= numbers[-1] <= 64:
        raise argparse.ArgumentTypeError("must be 1 to 64 each")
    return numbers


if __name__ == "__main__":
    sys.exit(main())
