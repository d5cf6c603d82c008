"""The status of a worker, and the error that ends it."""

from typing import Literal

import attrs

State = Literal["loading", "connecting", "registered", "draining", "stopped"]


class WorkerError(Exception):
    """The worker cannot continue, and trying again will not help; the message says why and what to do.

    Attributes:
        code: the code of the relay's refusal, or `model_not_loaded`.
    """

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


@attrs.frozen(kw_only=True)
class WorkerStatus:
    """The status of a worker.

    Args:
        state: `loading` until its first slot is ready, `connecting` while there is no link.
        relay: the relay's address.
        spaces: the spaces it serves.
        slots: the number of ready slots.
        running: the number of attempts that have not ended.
        completed: attempts since the worker started; `failed` and `cancelled` likewise.
        fault: the latest problem, empty if there is none.
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
