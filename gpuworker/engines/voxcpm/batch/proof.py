"""Proves, on the very device, that a speech does not depend on its row or on what is in the others."""

import hashlib
from collections.abc import Callable

from gpuworker.engines.voxcpm.batch.rows import Batch, Task

#: Steps that the others make before the speech in the last row begins, so that no row is where another is.
HEAD_START = 2


def is_independent(batch: Batch, task: Callable[[int], Task]) -> bool:
    """Whether a speech has the same samples alone in the first row, and in the last row among others.

    Args:
        batch: with all rows free; they are free again afterwards.
        task: makes the task of a row; row 0 has the speech, and the others must speak for longer than that.
    """
    alone = _digest(batch, 0, task(0))
    last = batch.rows - 1
    try:
        for row in range(last):
            batch.admit(row, task(row + 1))
        for _ in range(HEAD_START):
            batch.step()
        return _digest(batch, last, task(0)) == alone
    finally:
        for row in range(last):
            batch.leave(row)


def _digest(batch: Batch, row: int, task: Task) -> str:
    digest = hashlib.sha256()
    batch.admit(row, task)
    ended = False
    while not ended:
        patch = batch.step()[row]
        assert patch.samples is not None
        digest.update(patch.samples.numpy().tobytes())
        ended = patch.ended or patch.fault is not None
    return digest.hexdigest()
