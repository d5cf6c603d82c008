"""A scheduler whose clock the test sets, and what its decisions say."""

from itertools import count
from typing import Any

from protocol.wire.errors import ErrorCode
from protocol.wire.messages import Rejected
from relayd.scheduling.model import (
    Decision,
    Finish,
    Registration,
    ScheduledRequest,
    SpaceRules,
    State,
    Stop,
    WorkerState,
)
from relayd.scheduling.scheduler import Scheduler

TONE = "tone 24000"


class Bench:
    """A scheduler with a clock in the test's hand."""

    def __init__(self, **rules: Any) -> None:
        self.scheduler = Scheduler()
        self.scheduler.add_space("tts", SpaceRules(**rules))
        self.now = 1000.0
        self._tickets = count(1)

    def admit(self, name: str, **fields: Any) -> Rejected | None:
        return self.scheduler.admit(self.entry(name, **fields))

    def entry(self, name: str, **fields: Any) -> ScheduledRequest:
        plain: dict[str, Any] = {"space": "tts", "principal": "ann", "ticket": next(self._tickets)}
        return ScheduledRequest(request_id=name, **(plain | fields))

    def queue(self, name: str, **fields: Any) -> list[Decision]:
        entry = self.entry(name, **fields)
        assert self.scheduler.admit(entry) is None
        return self.scheduler.enqueue(entry, self.now)

    def join(self, worker_id: str = "box", running: dict[str, int] | None = None, **fields: Any) -> Registration:
        joined = self.try_join(worker_id, running, **fields)
        assert isinstance(joined, Registration)
        return joined

    def try_join(
        self, worker_id: str = "box", running: dict[str, int] | None = None, **fields: Any
    ) -> Rejected | Registration:
        plain: dict[str, Any] = {"instance": "i", "spaces": ("tts",), "slots": 1}
        return self.scheduler.join(WorkerState(worker_id=worker_id, **(plain | fields)), running or {}, self.now)

    def complete(self, name: str, worker_id: str = "box") -> list[Decision]:
        attempt = self[name].attempt
        decisions = self.scheduler.end(name, State.COMPLETED, self.now)
        return [*decisions, *self.scheduler.release(worker_id, name, attempt, self.now)]

    def lose(self, name: str, code: ErrorCode = ErrorCode.WORKER_LOST) -> list[Decision]:
        return self.scheduler.lose(name, code, "it broke", self.now)

    def order(self) -> list[str]:
        return list(self.scheduler.positions("tts", self.now))

    def heard(self, name: str, frames: int = 3) -> None:
        self[name].has_output, self[name].next_seq = True, frames

    def __getitem__(self, name: str) -> ScheduledRequest:
        return self.scheduler.state.entries[name]


def kinds(decisions: list[Decision]) -> list[tuple[str, str]]:
    """Each decision as (kind, request id)."""
    return [(type(d).__name__, d.request_id if isinstance(d, Stop) else d.entry.request_id) for d in decisions]


def started(decisions: list[Decision]) -> list[str]:
    return [name for kind, name in kinds(decisions) if kind == "Start"]


def code_of(decisions: list[Decision]) -> ErrorCode | None:
    (finish,) = (d for d in decisions if isinstance(d, Finish))
    return finish.code
