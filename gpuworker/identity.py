"""Who a worker is, how it stands, and why it gave up."""

import os
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
class Identity:
    """Who the worker is.

    Args:
        name: for people.
        spaces: it serves, at least one.
        engine: its name, for people.
        token: of role `worker`; None on the relay's own unix socket.
        instance: one per process start.
    """

    name: str
    spaces: tuple[str, ...]
    engine: str
    token: str | None = None
    instance: str = attrs.field(factory=lambda: os.urandom(16).hex())


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
