"""The simulated relay: spaces, workers and requests, advanced by `step`. Pure: it reads no clock and does no I/O.

It imitates only what the screens show, not how the scheduler decides.
"""

import random
from collections import deque
from collections.abc import Iterator

import attrs

from protocol.wire.errors import ErrorCode
from protocol.wire.messages import Rejected
from protocol.wire.validators import Value
from tui.demo.scenes import BEGIN_UNIX, FAILURES, TEXTS, Scene, SpacePart, TalkPart, WorkerPart

#: The longest time that is simulated in one step.
TICK_S = 0.25
#: How many ended requests are kept; the relay does it by `results.retain_s`.
MAX_ENDED = 120
#: How long a model thinks.
THINKS_S = 1.0
#: The default of a space.
QUEUE_TIMEOUT_S = 120.0
#: Seconds for which counts are kept, for rates and sparklines.
KEPT_S = 120
#: How long before the demo begins its faults happen.
TROUBLE_S = 20.0
#: Bytes a second of 48 kHz, 16 bit, mono audio.
BYTES_PER_AUDIO_S = 96_000
#: The backlog of a stalled reader is shown as growing up to here.
MAX_PENDING_BYTES = 6_000_000


@attrs.define(eq=False)
class Request:
    """One simulated request; times are in seconds of the simulation."""

    request_id: str
    principal: str
    space: str
    created: float
    text: str
    #: Seconds of audio it will produce, run seconds for each of them, and how it will end.
    run_s: float
    speed: float
    #: Seconds from its start to its first audio.
    warm_s: float
    fails: tuple[str, str] | None = None
    state: str = "queued"
    priority: int = 5
    attempt: int = 0
    worker_id: str | None = None
    started: float | None = None
    first_frame: float | None = None
    ended: float | None = None
    fraction: float | None = None
    audio_s: float = 0.0
    stopping: bool = False
    code: str | None = None
    message: str | None = None
    timeline: list[dict[str, Value]] = attrs.field(factory=list)

    def note(self, event: str, at: float, **more: Value) -> None:
        """Add an event to its timeline."""
        self.timeline.append({"at_s": round(at - self.created, 3), "event": event, **more})


@attrs.define(eq=False)
class Worker:
    """One simulated worker."""

    part: WorkerPart
    worker_id: str
    connection_id: str
    draining: bool = False
    held: list[str] = attrs.field(factory=list)
    connected: bool = True
    #: When its last message came, if it is silent; None while it answers.
    silent_since: float | None = None

    @property
    def free(self) -> bool:
        """Whether it can take another request."""
        return self.connected and self.silent_since is None and not self.draining and len(self.held) < self.part.slots


@attrs.define(eq=False)
class Space:
    """One simulated space."""

    part: SpacePart
    paused: bool = False
    queue: list[str] = attrs.field(factory=list)
    running: int = 0
    ended: dict[str, int] = attrs.field(factory=lambda: {"completed": 0, "failed": 0, "cancelled": 0})
    first_audio: "deque[float]" = attrs.field(factory=lambda: deque(maxlen=200))
    #: Arrival times of its requests.
    arrivals: "deque[float]" = attrs.field(factory=lambda: deque(maxlen=400))


@attrs.define(eq=False)
class Client:
    """One simulated client connection."""

    connection_id: str
    principal: str
    slow: bool = False
    bytes_sent: int = 0
    pending_bytes: int = 0


@attrs.define(eq=False)
class Talk:
    """One simulated conversation; `said` is when something was last said in it."""

    part: TalkPart
    talk_id: str
    said: float
    turns: int
    waiting: int
    #: Code and message of its last reply that has ended.
    failed: tuple[str, str] | tuple[None, None]
    #: Whether its last reply was ended by the operator.
    ended: bool = False

    def state(self, now: float) -> str:
        """What it does: it thinks first, and speaks for a third of the time; some never get so far."""
        if self.ended or self.failed[0]:
            return "idle"
        if now - self.said < THINKS_S:
            return "thinking"
        return "speaking" if now - self.said < self.part.period_s / 3 else "idle"


def an_id(number: int) -> str:
    """An id of its own for each number; drawn apart from `Play.rng`, so that what that plays does not depend on it."""
    return f"{random.Random(number).getrandbits(128):032x}"


@attrs.define(eq=False)
class Play:
    """The simulated relay of a scene.

    Attributes:
        now: seconds since the demo began; the history before it has negative times.
        touched: (topic, key) of the rows that have changed since the last delta.
    """

    scene: Scene
    seed: int = 1
    now: float = 0.0
    rng: random.Random = attrs.field(init=False)
    spaces: dict[str, Space] = attrs.field(factory=dict)
    workers: dict[str, Worker] = attrs.field(factory=dict)
    requests: dict[str, Request] = attrs.field(factory=dict)
    clients: dict[str, Client] = attrs.field(factory=dict)
    talks: dict[str, Talk] = attrs.field(factory=dict)
    log: "deque[dict[str, Value]]" = attrs.field(factory=lambda: deque(maxlen=5_000))
    audit: "deque[dict[str, Value]]" = attrs.field(factory=lambda: deque(maxlen=1_000))
    touched: set[tuple[str, str]] = attrs.field(factory=set)
    gone: list[str] = attrs.field(factory=list)
    #: Second -> [requests, seconds of audio, failures].
    seconds: dict[int, list[float]] = attrs.field(factory=dict)
    requests_total: int = 0
    audio_s_total: float = 0.0
    lines: int = 0

    def __attrs_post_init__(self) -> None:
        self.rng = random.Random(self.seed)
        self.now = -self.scene.past_s
        self.spaces = {part.name: Space(part, part.paused) for part in self.scene.spaces}
        for part in self.scene.workers:
            worker = Worker(part, f"{part.name}-{self._id()[:8]}", self._id()[:16])
            self.workers[worker.worker_id] = worker
            details = f"spaces={list(part.spaces)} slots={part.slots} engine={part.engine} resumes=0"
            self.note("info", "worker registered", worker_id=worker.worker_id, details=details)
        for at, principal in enumerate(self.scene.principals):
            client = Client(self._id()[:16], principal, slow=at == self.scene.slow_client)
            self.clients[client.connection_id] = client
        for space in self.spaces.values():
            for ago_s in sorted((self.rng.uniform(0, 6) for _ in range(space.part.waiting)), reverse=True):
                self._ask(space, self.now - ago_s)
        self.step(max(0.0, self.scene.past_s - TROUBLE_S))
        self._go_wrong()
        self.step(-self.now)
        for ago_s, who, action, target, outcome, message in self.scene.steered:
            self.audited(action, target, outcome, message, who=who, at=-ago_s)
        for number, talking in enumerate(self.scene.talks, 1):
            talk = Talk(talking, an_id(number), -talking.said_s, talking.turns, talking.waiting, talking.failed)
            self.talks[talk.talk_id] = talk
        self.touched.clear()
        self.gone.clear()

    def _go_wrong(self) -> None:
        """Cause the faults of the scene, shortly before the demo begins."""
        for worker in self.workers.values():
            worker.draining = worker.part.draining
            worker.connected = not worker.part.away
            if worker.part.silent_s is not None:
                worker.silent_since = -worker.part.silent_s
            if worker.part.away:
                self.note(
                    "warning", "worker disconnected", worker_id=worker.worker_id, details="why=no answer to pings"
                )

    def step(self, dt_s: float) -> None:
        """Advance the simulation by `dt_s` seconds."""
        end = self.now + dt_s
        while self.now < end - 1e-9:
            tick_s = min(TICK_S, end - self.now)
            self.now += tick_s
            self._tick(tick_s)

    def _tick(self, tick_s: float) -> None:
        for space in self.spaces.values():
            if self.rng.random() < space.part.arrivals_min / 60 * tick_s:
                self._ask(space, self.now)
            self._start(space)
            for request in [self.requests[one] for one in space.queue]:
                if self.now - request.created > QUEUE_TIMEOUT_S:
                    request.fails = (
                        "queue_timeout",
                        "waited for 120 s; start another worker, or raise queue_timeout_s",
                    )
                    self.end(request, "failed")
        for request in [one for one in self.requests.values() if one.state == "running"]:
            self._go_on(request, tick_s)
        for talk in self.talks.values():
            self._talk(talk, tick_s)
        ended = [one.request_id for one in self.requests.values() if one.ended is not None]
        for request_id in ended[: max(0, len(ended) - MAX_ENDED)]:
            del self.requests[request_id]
            self.gone.append(request_id)

    def _talk(self, talk: Talk, tick_s: float) -> None:
        """Say something when it is time, and note what has become of the reply."""
        before = talk.state(self.now - tick_s)
        if self.now - talk.said >= talk.part.period_s:
            talk.said, talk.turns, talk.waiting, talk.ended = self.now, talk.turns + 2, 0, False
        if (state := talk.state(self.now)) != before:
            talk.waiting = 0 if state == "idle" else talk.waiting
            self.touched.add(("talks", talk.talk_id))

    def _ask(self, space: Space, at: float) -> None:
        """Submit a request as a client."""
        part = space.part
        request = Request(
            request_id=self._id(),
            principal=self.rng.choice(self.scene.principals),
            space=part.name,
            created=at,
            text=self.rng.choice(TEXTS),
            run_s=self.rng.uniform(*part.run_s),
            speed=1 / part.rtf * self.rng.uniform(0.9, 1.1),
            warm_s=self.rng.uniform(0.12, 0.6) * min(1.0, part.run_s[0] / 3),
            fails=self.rng.choice(FAILURES) if self.rng.random() < part.fail_percent / 100 else None,
        )
        for event in ("created", "accepted"):
            request.note(event, at)
        self.requests[request.request_id] = request
        space.queue.append(request.request_id)
        space.arrivals.append(at)
        self.requests_total += 1
        self._second()[0] += 1
        self.note("info", "request accepted", request)
        self.touch(request)

    def _start(self, space: Space) -> None:
        """Give waiting requests to free slots."""
        while space.queue and not space.paused and (worker := next(self._free(space.part.name), None)):
            request = self.requests[space.queue.pop(0)]
            request.state, request.attempt, request.worker_id = "running", request.attempt + 1, worker.worker_id
            request.started = self.now
            request.note("started", self.now, attempt=request.attempt, worker_id=worker.worker_id)
            worker.held.append(request.request_id)
            space.running += 1
            self.note("info", "request started", request, f"attempt={request.attempt}")
            self.touch(request)

    def _free(self, space: str) -> Iterator[Worker]:
        free = [one for one in self.workers.values() if one.free and space in one.part.spaces]
        yield from sorted(free, key=lambda one: len(one.held) - one.part.slots)

    def _go_on(self, request: Request, tick_s: float) -> None:
        worker = self.workers[request.worker_id or ""]
        if not worker.connected or worker.silent_since is not None:
            return
        ran = self.now - (request.started or 0.0)
        if request.stopping:
            self.end(request, "cancelled")
        elif ran >= request.run_s * (0.4 if request.fails else 1.0):
            self.end(request, "failed" if request.fails else "completed")
        elif ran > request.warm_s:
            self._speak(request, tick_s, ran)
        self.touch(request)

    def _speak(self, request: Request, tick_s: float, ran: float) -> None:
        space = self.spaces[request.space]
        if request.first_frame is None:
            request.first_frame = (request.started or 0.0) + request.warm_s
            request.note("first_frame", request.first_frame)
            space.first_audio.append(request.first_frame - request.created)
        request.fraction = min(0.99, ran / request.run_s)
        made_s = tick_s * request.speed
        request.audio_s += made_s
        self.audio_s_total += made_s
        self._second()[1] += made_s
        for client in self.clients.values():
            if client.principal == request.principal:
                data = int(made_s * BYTES_PER_AUDIO_S)
                if client.slow:
                    client.pending_bytes = min(MAX_PENDING_BYTES, client.pending_bytes + data)
                else:
                    client.bytes_sent += data
                self.touched.add(("clients", client.connection_id))

    def end(self, request: Request, state: str) -> None:
        """End a request in the given state."""
        space = self.spaces[request.space]
        if request.state == "queued":
            space.queue.remove(request.request_id)
        elif request.worker_id:
            self.workers[request.worker_id].held.remove(request.request_id)
            space.running -= 1
        request.state, request.ended = state, self.now
        request.fraction = 1.0 if state == "completed" else request.fraction
        space.ended[state] += 1
        if state == "failed" and request.fails:
            request.code, request.message = request.fails
            self._second()[2] += 1
        request.note(
            "ended", self.now, state=state, **({"code": request.code, "why": request.message} if request.code else {})
        )
        took = f"took_s={self.now - request.created:.3f}"
        why = f"code={request.code} why={request.message} " if request.code else ""
        self.note("warning" if state == "failed" else "info", f"request {state}", request, why + took)
        self.touch(request)

    # -- changes

    def touch(self, request: Request) -> None:
        """Mark a request, and every row that shows it, as changed."""
        self.touched.add(("requests", request.request_id))
        self.touched.add(("spaces", request.space))
        if request.worker_id:
            self.touched.add(("workers", request.worker_id))

    def note(
        self, level: str, event: str, request: Request | None = None, details: str = "", worker_id: str | None = None
    ) -> None:
        """Add a line to the log."""
        self.lines += 1
        self.log.append(
            {
                "id": str(self.lines),
                "time": self.unix,
                "level": level,
                "event": event,
                "request_id": request.request_id if request else None,
                "space": request.space if request else None,
                "worker_id": request.worker_id if request else worker_id,
                "principal": request.principal if request else None,
                "details": details,
            }
        )
        self.touched.add(("log", str(self.lines)))

    @property
    def unix(self) -> float:
        """The simulated time as Unix seconds."""
        return BEGIN_UNIX + round(self.now, 3)

    def _second(self) -> list[float]:
        second = int(self.now // 1)
        if second not in self.seconds:
            for old in [one for one in self.seconds if one <= second - KEPT_S]:
                del self.seconds[old]
        return self.seconds.setdefault(second, [0.0, 0.0, 0.0])

    def _id(self) -> str:
        return f"{self.rng.getrandbits(128):032x}"

    def last_seconds(self, count: int, at: int) -> list[float]:
        """Requests (0), seconds of audio (1) or failures (2) of each of the last `count` seconds, oldest first."""
        second = int(self.now // 1)
        return [self.seconds.get(one, (0.0, 0.0, 0.0))[at] for one in range(second - count + 1, second + 1)]

    def position(self, request: Request) -> int | None:
        """The place of a request in its queue, from 1."""
        queue = self.spaces[request.space].queue
        return queue.index(request.request_id) + 1 if request.state == "queued" else None

    # -- steered

    def audited(
        self, action: str, target: str, outcome: str, message: str, *, who: str = "root", at: float | None = None
    ) -> None:
        """Add an entry to the audit log."""
        self.lines += 1
        self.audit.append(
            {
                "id": str(self.lines),
                "time": self.unix if at is None else BEGIN_UNIX + at,
                "principal": who,
                "connection_id": f"{self.seed:016x}",
                "peer": "unix (pid 4810)",
                "action": action,
                "target": target,
                "outcome": outcome,
                "message": message,
            }
        )
        self.touched.add(("audit", str(self.lines)))

    def end_talk(self, talk: Talk) -> None:
        """End the replies of a conversation."""
        talk.ended, talk.waiting = True, 0
        self.touched.add(("talks", talk.talk_id))

    def disconnect(self, connection_id: str) -> Rejected | None:
        """Disconnect a client, which reconnects, or a worker, which does not."""
        if connection_id in self.clients:
            self.clients[connection_id].pending_bytes = 0
            self.touched.add(("clients", connection_id))
            return None
        for worker in self.workers.values():
            if worker.connection_id == connection_id and worker.connected:
                worker.connected, worker.silent_since = False, self.now
                self.touched.add(("workers", worker.worker_id))
                return None
        return Rejected.because(ErrorCode.INVALID_PARAMS, f"connection {connection_id!r} is unknown")
