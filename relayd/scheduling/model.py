"""What the scheduler knows of spaces, workers and requests, and the decisions it returns. Pure."""

from collections import deque
from enum import StrEnum

import attrs

from protocol.wire.errors import ErrorCode
from relayd.scheduling.fair_queue import FairQueue

#: Run times an ETA is made of: enough to even out one odd text, few enough to follow a changed model.
RECENT_RUNS = 20


class State(StrEnum):
    """Where a request is in its life (docs/design.md §2)."""

    UPLOADING = "uploading"
    QUEUED = "queued"
    RUNNING = "running"
    COMPLETED = "completed"
    FAILED = "failed"
    CANCELLED = "cancelled"

    @property
    def live(self) -> bool:
        """Whether it has not ended."""
        return self in (State.UPLOADING, State.QUEUED, State.RUNNING)


@attrs.define(eq=False, kw_only=True)
class ScheduledRequest:
    """A request, as far as scheduling is concerned.

    The caller keeps `reproducible`, `has_output` and `next_seq` true to the frames that have come.
    """

    request_id: str
    space: str
    principal: str
    priority: int = 5
    ticket: int
    retry: str = "before_output"
    state: State = State.UPLOADING
    attempt: int = 0
    #: After a restart: one attempt more may have begun than the store had written.
    attempt_may_be_newer: bool = False
    #: After a restart: the attempt is known from a listener alone, and not where it began.
    attempt_known_from_client: bool = False
    #: After a restart, until an attempt starts: a listener may know of one attempt more than the store does.
    may_be_behind: bool = False
    losses: int = 0
    #: Where the attempt runs; None while queued, and after a restart until its worker has come back.
    worker_id: str | None = None
    #: When the attempt was handed out.
    started_at: float = 0.0
    #: Since when its worker has been away; None while it is linked.
    worker_lost_at: float | None = None
    #: Why its worker was told to stop it for good; such a request ends with its attempt, however that ends.
    cancel_reason: str | None = None
    #: Who makes the same frames from the same params: engine, format and fingerprint in words; "" for nobody.
    reproducible: str = ""
    has_output: bool = False
    next_seq: int = 0


@attrs.define(eq=False, kw_only=True)
class WorkerState:
    """A worker, as far as scheduling is concerned. `held`: request id -> attempt, one slot each."""

    worker_id: str
    instance: str
    spaces: tuple[str, ...]
    slots: int
    #: As `ScheduledRequest.reproducible`; workers with the same words can stand in for each other in mid-stream.
    reproducible: str = ""
    linked: bool = True
    draining: bool = False
    held: dict[str, int] = attrs.field(factory=dict)
    #: Rises with each use of any worker; the lowest has been idle longest.
    last_used: int = 0

    @property
    def free_slots(self) -> int:
        """Slots that can take a request now."""
        return max(0, self.slots - len(self.held)) if self.linked and not self.draining else 0


@attrs.frozen(kw_only=True)
class SpaceRules:
    """What a space allows; the defaults are docs/design.md §7's."""

    max_workers: int = 1
    max_queued: int = 1000
    max_queued_per_principal: int = 100
    max_running_per_principal: int | None = None
    refuse_when_empty: bool = False
    max_attempts: int = 3


@attrs.define(eq=False, kw_only=True)
class SpaceState:
    """A space, as far as scheduling is concerned."""

    name: str
    rules: SpaceRules
    paused: bool = False
    queue: FairQueue[ScheduledRequest] = attrs.field(factory=FairQueue)
    running: dict[str, ScheduledRequest] = attrs.field(factory=dict)
    #: Admitted, and not yet in the queue: inputs on their way, or the store still writing. Principal of each.
    admitted: dict[str, str] = attrs.field(factory=dict)
    recent_runs_s: deque[float] = attrs.field(factory=lambda: deque(maxlen=RECENT_RUNS))


@attrs.define(eq=False)
class SchedulerState:
    """All that scheduling knows: spaces, workers, and requests that have not ended. Data and questions about it."""

    spaces: dict[str, SpaceState] = attrs.field(factory=dict)
    workers: dict[str, WorkerState] = attrs.field(factory=dict)
    entries: dict[str, ScheduledRequest] = attrs.field(factory=dict)
    #: True: start no more requests (the daemon drains).
    draining: bool = False
    #: Spaces whose queue or pace changed since the caller last looked.
    moved: set[str] = attrs.field(factory=set)
    #: Principal -> requests it may have running in all spaces together.
    max_running: dict[str, int] = attrs.field(factory=dict)
    #: How often a worker has been used; orders `WorkerState.last_used`.
    uses: int = 0

    def workers_of(self, name: str) -> list[WorkerState]:
        """Linked workers of a space."""
        return [worker for worker in self.workers.values() if worker.linked and name in worker.spaces]

    def slots_of(self, name: str) -> tuple[int, int]:
        """Busy slots and all slots of a space's linked workers."""
        workers = self.workers_of(name)
        return sum(len(w.held) for w in workers), sum(w.slots for w in workers)


@attrs.frozen
class Start:
    """Hand `entry` to the worker it names now; frames begin at `from_seq`."""

    entry: ScheduledRequest
    from_seq: int


@attrs.frozen
class Stop:
    """Tell a worker to stop an attempt; its slot stays held until it answers."""

    worker_id: str
    request_id: str
    reason: str


@attrs.frozen
class Requeue:
    """The attempt was lost and the request waits again, in its old place."""

    entry: ScheduledRequest


@attrs.frozen
class Finish:
    """The relay itself ends `entry`: FAILED with a code, or CANCELLED (no code)."""

    entry: ScheduledRequest
    code: ErrorCode | None
    message: str


@attrs.frozen
class Registration:
    """A worker is in: which of the attempts it named go on, which it is to forget, and what else follows."""

    resume: list[ScheduledRequest]
    abandon: list[str]
    decisions: list["Decision"]


Decision = Start | Stop | Requeue | Finish


@attrs.frozen
class QueuePosition:
    """Where a queued request stands: `position` from 1, and seconds until it should start, if that can be told."""

    position: int
    of: int
    eta_s: float | None
