"""The scheduler's data about spaces, workers and requests, and the decisions it returns. Pure."""

from collections import Counter, deque
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
    #: After a restart: later attempts may have begun than the store knows, up to `highest_attempt`.
    attempt_may_be_newer: bool = False
    #: The highest number that may have been given out: one more than the store knew, at each restart since.
    highest_attempt: int = 0
    #: After a restart: the current attempt is known only from a client, and its worker is not known.
    attempt_known_from_client: bool = False
    losses: int = 0
    #: Attempts that ended with a shared engine's process and are held against others that ran there.
    innocent_losses: int = 0
    #: It may be what ends a shared engine's process: its next attempt on such a worker runs alone.
    alone: bool = False
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
    #: Whether frames come all the time while it runs, so that silence means a hung engine.
    streams: bool = True
    has_output: bool = False
    next_seq: int = 0
    #: Workers whose engine failed an attempt of it; another one is tried next where there is one.
    failed_on: set[str] = attrs.field(factory=set)
    #: Size of its whole inputs, and of what has come of those that are fed; the store keeps them until it has ended.
    input_bytes: int = 0
    fed_bytes: int = 0
    #: Whether no worker runs it, because its frames are copied from those of an equal request.
    copied: bool = False
    #: While it waits: above 0 it was promoted, and the highest is served first.
    promoted: int = 0
    #: Ids of the live requests whose output is its input; and of those of its sources, also ended ones, of whose output
    #: nothing has come yet.
    sources: set[str] = attrs.field(factory=set)
    silent_sources: set[str] = attrs.field(factory=set)
    #: Whether it is stored and waits for its sources; its state is `uploading` then.
    waits: bool = False
    #: Whether its whole inputs are not in the store yet.
    is_uploading: bool = False

    @property
    def is_piped(self) -> bool:
        """Whether it has a source that has not ended, or of which nothing has come yet."""
        return bool(self.sources or self.silent_sources)


@attrs.define(eq=False, kw_only=True)
class WorkerState:
    """The scheduler's part of a worker. `held`: request id -> attempt, one slot each."""

    worker_id: str
    instance: str
    spaces: tuple[str, ...]
    slots: int
    #: As `ScheduledRequest.reproducible`; workers with the same text can continue each other's streams.
    reproducible: str = ""
    #: As `Register.streams`.
    streams: bool = True
    #: As `Register.shared`.
    shared: bool = False
    linked: bool = True
    draining: bool = False
    held: dict[str, int] = attrs.field(factory=dict)
    #: The value of `SchedulerState.uses` at its last use; the worker with the lowest has been idle longest.
    last_used: int = 0
    #: Attempts that its engine failed since it last completed one, and the rests that it was given for them.
    failures: int = 0
    rests: int = 0
    #: Until when it is handed nothing, as long as another worker of the space can have it; 0 while it does not rest.
    rests_until: float = 0.0
    #: The request that is to run here alone, while it waits for the others to end, and while it runs; or empty.
    alone_for: str = ""

    def can_start(self, entry: ScheduledRequest) -> bool:
        """Whether `entry` can run here now."""
        if self.alone_for not in ("", entry.request_id) or (entry.alone and self.shared and self.held):
            return False
        return self.free_slots > 0 and entry.request_id not in self.held

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
    #: True right after a restart with requests that wait: a worker may come back with an attempt that the store missed.
    settling: bool = False
    queue: FairQueue[ScheduledRequest] = attrs.field(factory=FairQueue)
    running: dict[str, ScheduledRequest] = attrs.field(factory=dict)
    #: Admitted, and not yet in the queue: inputs on their way, the store still writing, or a source waited for.
    admitted: dict[str, ScheduledRequest] = attrs.field(factory=dict)
    #: Principal -> how many of `admitted` are its.
    admitted_per_principal: Counter[str] = attrs.field(factory=Counter)
    recent_runs_s: deque[float] = attrs.field(factory=lambda: deque(maxlen=RECENT_RUNS))

    def waiting_count(self, principal: str) -> int:
        """Requests of `principal` that are admitted or queued."""
        return self.queue.count_for(principal) + self.admitted_per_principal[principal]

    def why_full(self, principal: str, *, answered: bool) -> str:
        """Why nothing more of `principal` is admitted; empty if it is. What is copied at once needs no place here."""
        name, rules = self.name, self.rules
        at_once = answered and self.may_copy(principal)
        waiting, own = len(self.admitted), self.admitted_per_principal[principal]
        if waiting + (0 if at_once else len(self.queue)) >= rules.max_queued:
            return f"space {name!r} already has {rules.max_queued} queued requests, its limit; try again later"
        own += 0 if at_once else self.queue.count_for(principal)
        if own >= rules.max_queued_per_principal:
            return (
                f"{principal!r} has {own} queued requests in space {name!r}, which is its limit; wait for one to start"
            )
        return ""

    def may_copy(self, principal: str) -> bool:
        """Whether fewer requests are copied than may be queued, of all and of `principal`."""
        copied = [entry.principal for entry in self.running.values() if entry.copied]
        own = copied.count(principal)
        return len(copied) < self.rules.max_queued and own < self.rules.max_queued_per_principal


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
    #: Principal -> bytes of inputs of its live requests, and of those of them that are still being uploaded.
    input_bytes: Counter[str] = attrs.field(factory=Counter)
    uploading_bytes: Counter[str] = attrs.field(factory=Counter)
    #: Principal -> requests whose inputs are being uploaded.
    uploads: Counter[str] = attrs.field(factory=Counter)
    #: How often a worker has been used; orders `WorkerState.last_used`.
    uses: int = 0
    #: The live requests that are to run alone, by id, the first to become one first.
    suspects: dict[str, ScheduledRequest] = attrs.field(factory=dict)
    #: Id of a source -> the live requests that it is piped to, by id.
    piped: dict[str, dict[str, ScheduledRequest]] = attrs.field(factory=dict)
    #: Piped requests, by id, which may have to wait for their sources now, or no longer.
    unsettled: dict[str, ScheduledRequest] = attrs.field(factory=dict)

    def suspect(self, entry: ScheduledRequest) -> None:
        """Let a live request run alone from now on."""
        entry.alone = True
        self.suspects[entry.request_id] = entry

    def acquit(self, entry: ScheduledRequest) -> None:
        """Undo `suspect`; without effect where there is nothing to undo."""
        entry.alone = False
        if self.suspects.pop(entry.request_id, None) is not None:
            for worker in self.workers.values():
                if worker.alone_for == entry.request_id:
                    worker.alone_for = ""

    def add_entry(self, entry: ScheduledRequest) -> None:
        """Account for a live request."""
        self.entries[entry.request_id] = entry
        self.input_bytes[entry.principal] += entry.input_bytes + entry.fed_bytes
        for source_id in entry.sources:
            self.piped.setdefault(source_id, {})[entry.request_id] = entry

    def add_fed(self, entry: ScheduledRequest, size: int) -> None:
        """Account for more of a fed input of a live request; negative where it begins anew."""
        entry.fed_bytes += size
        self.input_bytes[entry.principal] += size

    def unsettle(self, entry: ScheduledRequest) -> None:
        """Note that a request began or ended to run: what it is piped to, or itself, may have to wait or go on."""
        if entry.is_piped:
            self.unsettled[entry.request_id] = entry
        if self.piped:
            self.unsettled.update(self.piped.get(entry.request_id, {}))

    def detach(self, entry: ScheduledRequest) -> None:
        """Forget the sources of a request that is ending."""
        for source_id in entry.sources:
            targets = self.piped[source_id]
            del targets[entry.request_id]
            if not targets:
                del self.piped[source_id]
        entry.sources.clear()

    def flows(self, entry: ScheduledRequest) -> bool:
        """Whether each source of a request runs or has ended."""
        return all(self.entries[each].state is State.RUNNING for each in entry.sources)

    def pop_entry(self, request_id: str) -> ScheduledRequest | None:
        """Undo `add_entry`, for a request that has ended; None where there is no such live request."""
        if (entry := self.entries.pop(request_id, None)) is not None:
            _subtract(self.input_bytes, entry.principal, entry.input_bytes + entry.fed_bytes)
            self.acquit(entry)
            self.detach(entry)
            self.unsettled.pop(request_id, None)
            for target in self.piped.pop(request_id, {}).values():
                target.sources.discard(request_id)
                self.unsettled[target.request_id] = target
        return entry

    def add_admitted(self, entry: ScheduledRequest) -> None:
        """Note a request that is admitted and not queued yet."""
        space = self.spaces[entry.space]
        space.admitted[entry.request_id] = entry
        space.admitted_per_principal[entry.principal] += 1
        if entry.input_bytes and not entry.waits:
            entry.is_uploading = True
            self.uploading_bytes[entry.principal] += entry.input_bytes
            self.uploads[entry.principal] += 1

    def end_upload(self, entry: ScheduledRequest) -> None:
        """Note that the store has the inputs of an admitted request."""
        if entry.is_uploading:
            entry.is_uploading = False
            _subtract(self.uploading_bytes, entry.principal, entry.input_bytes)
            _subtract(self.uploads, entry.principal, 1)

    def remove_admitted(self, entry: ScheduledRequest) -> None:
        """Undo `add_admitted`; without effect where there is nothing to undo."""
        space = self.spaces[entry.space]
        if space.admitted.pop(entry.request_id, None) is not None:
            _subtract(space.admitted_per_principal, entry.principal, 1)
            self.end_upload(entry)

    def workers_of(self, name: str) -> list[WorkerState]:
        """Return the linked workers of a space."""
        return [worker for worker in self.workers.values() if worker.linked and name in worker.spaces]

    def fit_workers_of(self, name: str) -> list[WorkerState]:
        """Linked workers of a space without those that rest, or with them where no other takes requests."""
        linked = self.workers_of(name)
        fit = [worker for worker in linked if not worker.rests_until]
        return fit if any(worker.slots and not worker.draining for worker in fit) else linked

    def is_resting(self, worker: WorkerState) -> bool:
        """Whether a worker rests: its engine failed again and again, and others of its spaces take its requests."""
        return bool(worker.rests_until) and all(worker not in self.fit_workers_of(name) for name in worker.spaces)

    def slots_of(self, name: str) -> tuple[int, int]:
        """Return the numbers of busy slots and of all slots of a space's linked workers."""
        workers = self.workers_of(name)
        return sum(len(w.held) for w in workers), sum(w.slots for w in workers)


def _subtract(counter: Counter[str], principal: str, count: int) -> None:
    """Keep no zeros: a relay meets many principals in its life."""
    counter[principal] -= count
    if not counter[principal]:
        del counter[principal]


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
class Wait:
    """A piped request waits for its sources again; its attempt is over, which is no loss of its own."""

    entry: ScheduledRequest


@attrs.frozen
class Enter:
    """A piped request need not wait for its sources any longer: it is queued."""

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


Decision = Start | Stop | Requeue | Wait | Enter | Finish


@attrs.frozen
class QueuePosition:
    """The position of a queued request from 1, and the estimated seconds until it starts, if they are known."""

    position: int
    of: int
    eta_s: float | None
