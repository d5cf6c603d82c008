"""Diffusion with a schedule, a guidance value and noise for each row: `UnifiedCFM` of voxcpm 2.0.3, for a batch."""

from typing import Any

import attrs
import torch

from gpuworker.engines.voxcpm.batch.device import recorded


@attrs.frozen(eq=False)
class Schedule:
    """The times at which a row is moved.

    Args:
        times, lengths: (steps,) of each step, in the model's dtype.
        still: how many steps at the start leave the row as it is ("zero star" of the package).
    """

    times: torch.Tensor
    lengths: torch.Tensor
    still: int

    def moves_at(self, step: int) -> bool:
        """Whether the row moves in this step, from 0."""
        return self.still <= step < len(self.times)

    @classmethod
    def of(cls, timesteps: int, like: torch.Tensor) -> "Schedule":
        """The schedule of `UnifiedCFM.forward` and `solve_euler`, added up step by step as there."""
        span = torch.linspace(1, 0, timesteps + 1, device=like.device, dtype=like.dtype)
        span = span + (torch.cos(torch.pi / 2 * span) - 1 + span)
        times, lengths = [span[0]], [span[0] - span[1]]
        for after in span[2:]:
            times.append(times[-1] - lengths[-1])
            lengths.append(times[-1] - after)
        return cls(torch.stack(times), torch.stack(lengths), max(1, int(len(span) * 0.04)))


class Diffusion:
    """Makes a patch of every row from noise.

    Attributes:
        noise: (rows, dimensions, patch), to be written before `run`; afterwards it holds the patches.
        mu: (rows, hidden), what to make; to be written before `run`.
        cond: (rows, dimensions, patch), the patches before; to be written before `run`.
    """

    def __init__(self, tts: Any, rows: int, *, device: str, record: bool) -> None:
        weight = tts.lm_to_dit_proj.weight
        self._cfm = tts.feat_decoder
        self.noise = weight.new_zeros(rows, self._cfm.in_channels, tts.patch_size)
        self.cond = torch.zeros_like(self.noise)
        # VoxCPM2 puts both language models side by side, 1.x adds them.
        width = weight.size(0) * (2 if hasattr(tts, "fusion_concat_proj") else 1)
        self.mu = weight.new_zeros(rows, width)
        # Not in the model's dtype: the package multiplies with a Python float.
        self._cfg = torch.ones(rows, 1, 1, device=weight.device)
        self._time, self._length = weight.new_zeros(rows), weight.new_zeros(rows)
        self._moves = torch.zeros(rows, dtype=torch.bool, device=weight.device)
        self._schedules: dict[int, Schedule] = {}
        self._table: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] | None = None
        self._move_all = recorded(self._move, device, record=record)

    def start(self, row: int, *, timesteps: int, cfg_value: float) -> None:
        """Give a row its schedule and guidance."""
        self._cfg[row] = cfg_value
        self._schedules[row] = Schedule.of(timesteps, self.noise)
        self._table = None

    def stop(self, row: int) -> None:
        """Leave a row as it is from now on."""
        self._schedules.pop(row, None)
        self._table = None

    def run(self) -> None:
        """Move all rows to the ends of their schedules; rows with shorter ones wait, unmoved, for the others."""
        if self._table is None:
            self._table = self._tabulated()
        for time, length, moves in self._table:
            self._time.copy_(time)
            self._length.copy_(length)
            self._moves.copy_(moves)
            self._move_all()

    def _tabulated(self) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        """Of each step in which any row moves: the rows' times, the lengths, and which of them move."""
        schedules = self._schedules
        longest = max((len(one.times) for one in schedules.values()), default=0)
        shape = (longest, len(self._time))
        times, lengths = self._time.new_zeros(shape), self._time.new_zeros(shape)
        moves = self._moves.new_zeros(shape)
        for row, one in schedules.items():
            steps = len(one.times)
            times[:steps, row], lengths[:steps, row], moves[one.still : steps, row] = one.times, one.lengths, True
        moving = [step for step in range(longest) if any(one.moves_at(step) for one in schedules.values())]
        return [(times[step], lengths[step], moves[step]) for step in moving]

    def _move(self) -> None:
        """One step of `solve_euler`, with guidance."""
        cfm, x, rows = self._cfm, self.noise, self.noise.size(0)
        time, length = torch.cat((self._time, self._time)), torch.cat((self._length, self._length))
        mu = torch.cat((self.mu, torch.zeros_like(self.mu)))
        length = length if cfm.mean_mode else torch.zeros_like(length)
        out = cfm.estimator(torch.cat((x, x)), mu, time, torch.cat((self.cond, self.cond)), length)
        positive, negative = out[:rows], out[rows:]
        scale = cfm.optimized_scale(positive.reshape(rows, -1), negative.reshape(rows, -1)).view(rows, 1, 1)
        guided = (self._cfg * (positive - negative * scale)).to(x.dtype)
        moved = x - self._length[:, None, None] * (negative * scale + guided)
        x.copy_(torch.where(self._moves[:, None, None], moved, x))
