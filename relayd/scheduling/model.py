"""The scheduler's data about spaces, workers and requests, and the decisions it returns. Pure."""

from collections import deque
from enum import StrEnum

import attrs

from protocol.wire.errors import ErrorCode
from relayd.scheduling.fair_queue import FairQueue

#: Number of run times that an ETA is computed from: enough to average out one unusual request, few enough to follow a
#: change of the model.
RECENT_RUNS = 20


class State(StrEnum):
    """The state of a request (docs/design.md §2)."""

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
    """The scheduler's part of a request.

    The caller updates `reproducible`, `has_output` and `next_seq` when frames arrive.
    """

    request_id: str
    space: str
    principal: str
    priority: int = 5
    ticket: int
    retry: str = "before_output"
    state: State = State.UPLOADING
    attempt: int = 0
    #: After a restart: one more attempt may have begun than the store knows.
    attempt_may_be_newer: bool = False
    #: After a restart: the current attempt is known only from a client, and its worker is not known.
    attempt_known_from_client: bool = False
    #: After a restart, until an attempt starts: a client may know of one more attempt than the store.
    may_be_behind: bool = False
    losses: int = 0
    #: The worker that runs the attempt; None while queued, and after a restart while the worker is not known.
    worker_id: str | None = None
    #: When the attempt was assigned to a worker.
    started_at: float = 0.0
    #: When the link of its worker ended; None while the worker is linked.
    worker_lost_at: float | None = None
    #: Why its worker was asked to cancel it; such a request ends with its attempt, however that ends.
    cancel_reason: str | None = None
    #: Engine, format and fingerprint as text: workers with the same text make the same frames from the same params;
    #: "" if the engine is not reproducible.
    reproducible: str = ""
    has_output: bool = False
    next_seq: int = 0


@attrs.define(eq=False, kw_only=True)
class WorkerState:
    """The scheduler's part of a worker. `held`: request id -> attempt, one slot each."""

    worker_id: str
    instance: str
    spaces: tuple[str, ...]
    slots: int
    #: As `ScheduledRequest.reproducible`; workers with the same text can continue each other's streams.
    reproducible: str = ""
    linked: bool = True
    draining: bool = False
    held: dict[str, int] = attrs.field(factory=dict)
    #: The value of `SchedulerState.uses` at its last use; the worker with the lowest has been idle longest.
    last_used: int = 0

    @property
    def free_slots(self) -> int:
        """Number of slots that can run a request now."""
        return max(0, self.slots - len(self.held)) if self.linked and not self.draining else 0


@attrs.frozen(kw_only=True)
class SpaceRules:
    """The limits of a space; the defaults are those of docs/design.md §7."""

    max_workers: int = 1
    max_queued: int = 1000
    max_queued_per_principal: int = 100
    max_running_per_principal: int | None = None
    refuse_when_empty: bool = False
    max_attempts: int = 3


@attrs.define(eq=False, kw_only=True)
class SpaceState:
    """The scheduler's part of a space."""

    name: str
    rules: SpaceRules
    paused: bool = False
    queue: FairQueue[ScheduledRequest] = attrs.field(factory=FairQueue)
    running: dict[str, ScheduledRequest] = attrs.field(factory=dict)
    #: Request id -> principal of the requests that are admitted but not queued yet: their inputs are being uploaded, or
    #: the store is still writing them.
    admitted: dict[str, str] = attrs.field(factory=dict)
    recent_runs_s: deque[float] = attrs.field(factory=lambda: deque(maxlen=RECENT_RUNS))


@attrs.define(eq=False)
class SchedulerState:
    """The scheduler's data: spaces, workers, and requests that have not ended."""

    spaces: dict[str, SpaceState] = attrs.field(factory=dict)
    workers: dict[str, WorkerState] = attrs.field(factory=dict)
    entries: dict[str, ScheduledRequest] = attrs.field(factory=dict)
    #: True while the daemon drains: no more requests are started.
    draining: bool = False
    #: Spaces whose queue or speed changed since the caller last cleared this set.
    moved: set[str] = attrs.field(factory=set)
    #: Principal -> limit of its running requests in all spaces together.
    max_running: dict[str, int] = attrs.field(factory=dict)
    #: Counts the uses of all workers; the source of `WorkerState.last_used`.
    uses: int = 0

    def workers_of(self, name: str) -> list[WorkerState]:
        """Return the linked workers of a space."""
        return [worker for worker in self.workers.values() if worker.linked and name in worker.spaces]

    def slots_of(self, name: str) -> tuple[int, int]:
        """Return the numbers of busy slots and of all slots of a space's linked workers."""
        workers = self.workers_of(name)
        return sum(len(w.held) for w in workers), sum(w.slots for w in workers)


@attrs.frozen
class Start:
    """Send `entry` to the worker that it names; its frames begin at `from_seq`."""

    entry: ScheduledRequest
    from_seq: int


@attrs.frozen
class Stop:
    """Ask a worker to stop an attempt; its slot stays held until the worker answers."""

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
    """The result of a worker's registration: attempts to resume, attempts to abandon, and further decisions."""

    resume: list[ScheduledRequest]
    abandon: list[str]
    decisions: list["Decision"]


Decision = Start | Stop | Requeue | Finish


@attrs.frozen
class QueuePosition:
    """The position of a queued request from 1, and the estimated seconds until it starts, if they are known."""

    position: int
    of: int
    eta_s: float | None
