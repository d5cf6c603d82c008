"""What a worker is doing, for those who watch it."""

from typing import Literal

import attrs

State = Literal["loading", "connecting", "registered", "draining", "stopped"]


class WorkerError(Exception):
    """The worker cannot go on, and trying again will not help; the text says why and what to do.

    Attributes:
        code: of the relay's refusal, or `model_not_loaded`.
    """

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


@attrs.frozen(kw_only=True)
class WorkerStatus:
    """How a worker stands.

    Args:
        state: `loading` until its first slot is ready, `connecting` while there is no link.
        relay: its address.
        spaces: it serves.
        slots: ready ones.
        running: attempts that have not ended.
        completed: attempts, since it started; as `failed` and `cancelled`.
        fault: what went wrong last, empty when all is well.
    """

    state: State
    relay: str
    spaces: tuple[str, ...]
    slots: int
    running: int
    completed: int
    failed: int
    cancelled: int
    fault: str
