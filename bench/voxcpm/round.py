"""What is spoken in the bench of VoxCPM, what one speech took, and how much memory and time there is."""

import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import attrs

from gpuworker.engines.voxcpm.memory import free_memory

_SENTENCE = "The quick brown fox jumps over the lazy dog, and nobody who saw it could say why it had done so. "
#: What voxcpm adds to tokens * ratio before it cuts off. The ratio must lie in 1..20, and a text has 2 tokens or more.
_SPARE_STEPS = 10
MIN_STEPS, MAX_STEPS = 12, 600
SEED = 7
_ASK_S = 120.0


class Failed(Exception):
    """A side cannot speak; the text says why."""


class OutOfTime(Exception):
    """The bench has taken as long as it may."""


@attrs.frozen
class Job:
    """One speech, for both sides. With weights that never stop it takes exactly `steps` steps.

    Args:
        ratio: voxcpm's `retry_badcase_ratio_threshold`, which makes the cap of `int(tokens * ratio + 10)` steps that.
        timesteps: `inference_timesteps`.
    """

    steps: int
    text: str
    ratio: float
    timesteps: int
    seed: int = SEED


def make_job(steps: int, timesteps: int) -> Job:
    """A job of so many steps, with half as many tokens of text, which is about what speech has.

    The checkpoints' tokenizer makes one token of a character, and one of the text's start.

    Raises:
        ValueError: no text can have so many.
    """
    if not MIN_STEPS <= steps <= MAX_STEPS:
        raise ValueError(f"{steps} steps: must lie in {MIN_STEPS}..{MAX_STEPS}")
    room = steps - _SPARE_STEPS
    characters = max(1, room // 2 - 1)
    text = (_SENTENCE * (1 + characters // len(_SENTENCE)))[: characters - 1] + "." if characters > 1 else "A"
    return Job(steps, text, (room + 0.5) / (characters + 1), timesteps)


@attrs.frozen
class Spoken:
    """What one speech took.

    Args:
        first_s: from the call to the first audio.
        wall_s: from the call to the last.
        audio_s: how long it is.
        digest: SHA-256 of its samples as 16-bit PCM.
    """

    first_s: float
    wall_s: float
    audio_s: float
    digest: str

    @property
    def real_time_factor(self) -> float:
        """Seconds that a second of speech takes to make."""
        return self.wall_s / self.audio_s


@attrs.frozen
class Side:
    """What one side showed at one number of slots.

    Args:
        rounds: in each, a speech a slot, begun together.
        references: samples of a run under the engine's own settings, where they differ from those of `rounds`.
        load_s: of each slot.
        memory: bytes, None where it cannot be told.
    """

    rounds: list[list[Spoken]]
    references: frozenset[str]
    load_s: list[float]
    memory: int | None

    @property
    def speeches(self) -> list[Spoken]:
        """Of all rounds."""
        return [spoken for each in self.rounds for spoken in each]


@attrs.frozen
class Deadline:
    """When the bench is to be done."""

    at: float

    @classmethod
    def after(cls, seconds: float) -> "Deadline":
        """So many seconds from now."""
        return cls(time.monotonic() + seconds)

    def left_s(self) -> float:
        """Seconds to it, more than none.

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
    """Memory that what was started since takes: of the GPU, or resident memory of processes.

    Args:
        device: as torch names it.
        free_at_rest: bytes of the GPU.
    """

    device: str
    free_at_rest: int | None

    @classmethod
    def at_rest(cls, device: str) -> "Gauge":
        """To be made before anything is started."""
        return cls(device, None if device == "cpu" else _free_on_gpu(device))

    def used(self, processes: Sequence[int]) -> int | None:
        """Bytes; `processes`, with all that they started, counts on a CPU."""
        if self.device == "cpu":
            return resident_bytes(processes)
        free = _free_on_gpu(self.device)
        return None if free is None or self.free_at_rest is None else self.free_at_rest - free


def _free_on_gpu(device: str) -> int | None:
    if (free := free_memory(device)) is not None:
        return free.size if free.gpu else None
    # nvidia-smi does not say (MIG). CUDA does, in a process whose own share goes with it.
    program = f"import torch; print(torch.cuda.mem_get_info({device!r})[0])"
    try:
        told = subprocess.run([sys.executable, "-c", program], capture_output=True, timeout=_ASK_S, check=True).stdout
        return int(told)
    except (subprocess.SubprocessError, ValueError):
        return None


def resident_bytes(processes: Sequence[int]) -> int:
    """Resident memory of processes and of all that they started."""
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
