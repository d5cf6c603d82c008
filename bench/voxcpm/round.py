"""The job of the VoxCPM bench, its measurements, and gauges of the memory and time that are left."""

import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import attrs

from gpuworker.engines.voxcpm.memory import free_memory

_SENTENCE = "The quick brown fox jumps over the lazy dog, and nobody who saw it could say why it had done so. "
#: Steps that voxcpm adds to tokens * ratio before it stops. The ratio must lie in 1..20; a text has 2 tokens or more.
_SPARE_STEPS = 10
MIN_STEPS, MAX_STEPS = 12, 600
SEED = 7
_ASK_S = 120.0


class Failed(Exception):
    """A side cannot speak; the text says why."""


class OutOfTime(Exception):
    """The time limit of the bench has passed."""


@attrs.frozen
class Job:
    """One speech, for both sides. With weights that never stop it takes exactly `steps` steps.

    Args:
        ratio: voxcpm's `retry_badcase_ratio_threshold`, set so that the limit `int(tokens * ratio + 10)` is `steps`.
        timesteps: `inference_timesteps`.
    """

    steps: int
    text: str
    ratio: float
    timesteps: int
    seed: int = SEED


def make_job(steps: int, timesteps: int) -> Job:
    """A job of `steps` steps, with half as many tokens of text, about the ratio of real speech.

    The tokenizer of the checkpoints makes one token per character, and one for the start of the text.

    Raises:
        ValueError: `steps` is out of range.
    """
    if not MIN_STEPS <= steps <= MAX_STEPS:
        raise ValueError(f"{steps} steps: must lie in {MIN_STEPS}..{MAX_STEPS}")
    room = steps - _SPARE_STEPS
    characters = max(1, room // 2 - 1)
    text = (_SENTENCE * (1 + characters // len(_SENTENCE)))[: characters - 1] + "." if characters > 1 else "A"
    return Job(steps, text, (room + 0.5) / (characters + 1), timesteps)


@attrs.frozen
class Spoken:
    """The measurements of one speech.

    Args:
        first_s: seconds from the call to the first audio.
        wall_s: seconds from the call to the last audio.
        audio_s: its length in seconds.
        digest: SHA-256 of its samples as 16-bit PCM.
    """

    first_s: float
    wall_s: float
    audio_s: float
    digest: str

    @property
    def real_time_factor(self) -> float:
        """Seconds of work per second of speech."""
        return self.wall_s / self.audio_s


@attrs.frozen
class Side:
    """The measurements of one side at one number of slots.

    Args:
        rounds: each with one speech per slot, started together.
        references: digests of runs with the settings of the engine; those of `rounds` may differ.
        load_s: the time that each slot took to load.
        memory: bytes; None if unknown.
    """

    rounds: list[list[Spoken]]
    references: frozenset[str]
    load_s: list[float]
    memory: int | None

    @property
    def speeches(self) -> list[Spoken]:
        """The speeches of all rounds."""
        return [spoken for each in self.rounds for spoken in each]


@attrs.frozen
class Deadline:
    """The moment at which the bench must end."""

    at: float

    @classmethod
    def after(cls, seconds: float) -> "Deadline":
        """The deadline `seconds` from now."""
        return cls(time.monotonic() + seconds)

    def left_s(self) -> float:
        """Seconds until the deadline; always positive.

        Raises:
            OutOfTime: it has passed.
        """
        left = self.at - time.monotonic()
        if left <= 0:
            raise OutOfTime
        return left


# -- memory ------------------------------------------------------------------------------------------------------


@attrs.frozen
class Gauge:
    """Measures the memory that is used by what was started since: GPU memory, or resident memory on a CPU.

    Args:
        device: as torch names it.
        free_at_rest: free bytes on the GPU before anything was started; None if unknown or on a CPU.
    """

    device: str
    free_at_rest: int | None

    @classmethod
    def at_rest(cls, device: str) -> "Gauge":
        """A gauge for `device`; call this before anything is started."""
        return cls(device, None if device == "cpu" else _free_on_gpu(device))

    def used(self, processes: Sequence[int]) -> int | None:
        """Bytes in use; on a CPU those of `processes` and their descendants. None if unknown."""
        if self.device == "cpu":
            return resident_bytes(processes)
        free = _free_on_gpu(self.device)
        return None if free is None or self.free_at_rest is None else self.free_at_rest - free


def _free_on_gpu(device: str) -> int | None:
    if (free := free_memory(device)) is not None:
        return free.size if free.gpu else None
    # nvidia-smi does not report it (MIG). CUDA does; the process that asks frees its own share when it ends.
    program = f"import torch; print(torch.cuda.mem_get_info({device!r})[0])"
    try:
        output = subprocess.run([sys.executable, "-c", program], capture_output=True, timeout=_ASK_S, check=True).stdout
        return int(output)
    except (subprocess.SubprocessError, ValueError):
        return None


def cpu_seconds(pid: int) -> float:
    """CPU time of a process, with all its threads."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def resident_bytes(processes: Sequence[int]) -> int:
    """Resident memory of processes and of all their descendants."""
    parents: dict[int, list[int]] = {}
    sizes: dict[int, int] = {}
    for entry in Path("/proc").glob("[0-9]*/status"):
        try:
            fields = dict(line.split(":\t", 1) for line in entry.read_text().splitlines() if ":\t" in line)
        except OSError:  # it has ended
            continue
        pid = int(fields["Pid"])
        parents.setdefault(int(fields["PPid"]), []).append(pid)
        sizes[pid] = int(fields.get("VmRSS", "0 kB").split()[0]) * 1024
    todo, total = list(processes), 0
    while todo:
        pid = todo.pop()
        total += sizes.get(pid, 0)
        todo += parents.get(pid, [])
    return total
