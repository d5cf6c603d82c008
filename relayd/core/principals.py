"""What one principal uses of the relay, over all of its connections, and what it may use (docs/design.md §8).

A hostile or broken tenant costs only itself: beyond its share its messages wait, and beyond its limits its requests
are refused with `rate_limited`. Local users of the unix socket and operators are not limited.
"""

import heapq
import time
from collections import deque
from collections.abc import Iterable
from itertools import count
from typing import Protocol

import attrs
import structlog
import trio

from protocol.wire.messages import Submit
from relayd.auth.tokens import Principal
from relayd.config.schema import PrincipalLimits, SpaceConfig
from relayd.logs.flood import LogFlood

log = structlog.get_logger("relayd.limits")

#: Part of the event loop's time that the messages of one principal may take, and how much of it at once, in seconds.
CPU_SHARE = 0.2
CPU_BURST_S = 0.003
MIN_WAIT_S = 1e-4
#: Debt at which no more is added: after a flood of strangers, others must not wait until all of it is paid.
MAX_DEBT_S = 1.0
#: The same of all peers together that have not logged in.
STRANGERS_SHARE = 0.5
#: Least number of connections that wait at which those that have ended are dropped.
TIDY_AT = 100
#: No principal's name: those of tokens and users are not empty.
_STRANGERS = ""
#: Seconds of `requests_per_s` that may come at once: a client that connects again sends all it has.
BURST_S = 5.0
#: Registrations of workers of one principal, and how many at once: all of its connections after a restart of the relay.
REGISTRATIONS_PER_S = 2.0
REGISTRATIONS_AT_ONCE = 300.0
#: What a `progress` counts for at least: readers and watchers of its request pay for it, too.
PROGRESS_S = 1e-4
#: Log lines a second about the connections and workers of one principal.
LINES_PER_S = 20
#: When it makes sense to try again where a principal has its share: no better answer is known.
RETRY_S = 2.0


@attrs.define(eq=False)
class TokenBucket:
    """Allows `rate` events a second, and `burst` at once after a rest."""

    rate: float
    burst: float
    level: float
    updated_at: float

    @classmethod
    def full(cls, rate: float, burst: float, now: float) -> "TokenBucket":
        """A bucket that nobody has used."""
        return cls(rate, burst, burst, now)

    def refill(self, now: float) -> None:
        """Account for the time that has passed until `now`, in monotonic seconds."""
        self.level = min(self.burst, self.level + max(0.0, now - self.updated_at) * self.rate)
        self.updated_at = now

    def consume(self, now: float) -> float:
        """Count one event and return 0; or count nothing, and return the seconds until one is allowed."""
        self.refill(now)
        if self.level >= 1.0:
            self.level -= 1.0
            return 0.0
        return (1.0 - self.level) / self.rate


class Deferrable(Protocol):
    """A connection whose messages wait for its principal's share of the event loop."""

    def resume(self) -> None:
        """Handle messages again."""


@attrs.define(eq=False)
class PrincipalUsage:
    """What one principal uses now; one object for all of its connections."""

    name: str
    cpu: TokenBucket
    requests: TokenBucket
    registrations: TokenBucket
    #: Lines in the log about its connections and workers.
    log_flood: LogFlood = attrs.field(factory=lambda: LogFlood(LINES_PER_S))
    #: Ended requests of it that are remembered; None until its first submit.
    max_retained: int | None = None
    #: Bytes that the inputs of its live requests may have; None until its first submit.
    max_input_bytes: int | None = None
    #: Connections whose messages wait for the principal's share, in order of turn.
    deferred: deque[Deferrable] = attrs.field(factory=deque)
    #: Whether the latest has its turn first: in a flood of strangers, those who came before may be gone by now.
    newest_first: bool = False
    #: All time charged or waived so far.
    charged_s: float = 0.0
    #: Whether a time is set at which they have their turn.
    scheduled: bool = False
    #: Number of those that wait at which the links that have ended meanwhile are dropped.
    tidy_at: int = TIDY_AT

    def charge(self, cpu_s: float, now: float) -> bool:
        """Account for time spent on the principal's messages; False where its share is used up for now."""
        self.cpu.refill(now)
        self.cpu.level = max(-MAX_DEBT_S, self.cpu.level - cpu_s)
        self.charged_s += cpu_s
        return self.cpu.level > 0.0

    def waive(self, cpu_s: float) -> None:
        """Account for time that costs the principal nothing."""
        self.charged_s += cpu_s


class MeteredLink(Protocol):
    """The link of a connection, whose reading can be paused."""

    reading_paused: bool
    stopped: bool

    def pause_reading(self) -> None:
        """Stop reading until `resume_reading`."""

    def resume_reading(self) -> None:
        """Read again."""


@attrs.define(eq=False)
class LinkMeter:
    """Charges a principal with the turns of a link: what its messages cost is charged where they are handled, the rest
    is parsing, fragments and control frames. Beyond the principal's share the link is not read for a while."""

    link: MeteredLink
    usage: PrincipalUsage
    principals: "Principals"
    #: When this turn began; infinite between two turns.
    _began_s: float = attrs.field(factory=time.thread_time)
    _charged_s: float = 0.0
    #: What its latest turn took, and what was charged for the next one in advance.
    _turn_s: float = 0.0
    _prepaid_s: float = 0.0

    def __attrs_post_init__(self) -> None:
        self._charged_s = self.usage.charged_s

    def begin(self) -> None:
        """See `protocol.link.limits.TurnMeter`."""
        self._began_s, self._charged_s = time.thread_time(), self.usage.charged_s

    def end(self) -> None:
        """See `protocol.link.limits.TurnMeter`."""
        spent_s = time.thread_time() - self._began_s - (self.usage.charged_s - self._charged_s)
        self._began_s, self._turn_s = float("inf"), max(0.0, spent_s)
        unpaid_s, self._prepaid_s = self._turn_s - self._prepaid_s, 0.0
        if not self.usage.charge(unpaid_s, trio.current_time()) and not self.link.reading_paused:
            self.link.pause_reading()
            self.principals.defer(self.usage, self)

    def resume(self) -> None:
        """Let the link be read again; it is charged for that at once, or all that wait would be read together."""
        if not self.link.stopped:
            self._prepaid_s = self._turn_s
            self.usage.charge(self._prepaid_s, trio.current_time())
            self.link.resume_reading()


@attrs.define(eq=False)
class _Turn:
    """A task that waits for the strangers' turn."""

    usage: PrincipalUsage
    cost_s: float
    came: trio.Event = attrs.field(factory=trio.Event)

    def resume(self) -> None:
        """Let the task go on."""
        self.usage.cpu.level -= self.cost_s
        self.came.set()


@attrs.define(eq=False)
class Principals:
    """The usage of every principal that has logged in, and the turns of those that wait for their share."""

    _by_name: dict[str, PrincipalUsage] = attrs.field(factory=dict)
    _due: list[tuple[float, int, PrincipalUsage]] = attrs.field(factory=list)
    _numbers: "count[int]" = attrs.field(factory=count)
    _some_due: trio.Event = attrs.field(factory=trio.Event)

    def usage_of(self, name: str) -> PrincipalUsage:
        """The usage of a principal; bounded, as the principals are, by the tokens that operators make."""
        usage = self._by_name.get(name)
        if usage is None:
            now = trio.current_time()
            cpu = TokenBucket.full(CPU_SHARE if name != _STRANGERS else STRANGERS_SHARE, CPU_BURST_S, now)
            registrations = TokenBucket.full(REGISTRATIONS_PER_S, REGISTRATIONS_AT_ONCE, now)
            usage = PrincipalUsage(name, cpu, TokenBucket.full(1.0, float("inf"), now), registrations)
            usage.newest_first = name == _STRANGERS
            self._by_name[name] = usage
        return usage

    def strangers(self) -> PrincipalUsage:
        """The usage of all peers together that have not logged in."""
        return self.usage_of(_STRANGERS)

    def request_wait_s(self, principal: Principal, settings: PrincipalLimits) -> float:
        """Count one request; returns 0, or the seconds to wait where the principal sends more than it may."""
        if not is_limited(principal):
            return 0.0
        bucket = self.usage_of(principal.name).requests
        bucket.rate = limits_of(principal, settings).requests_per_s  # it may have been reloaded
        bucket.burst = max(1.0, bucket.rate * BURST_S)
        return bucket.consume(trio.current_time())

    async def wait_stranger_turn(self, cost_s: float) -> None:
        """Wait for the turn of peers that have not logged in, who have the share of one principal together.

        Args:
            cost_s: what the turn is expected to take of the event loop's time.
        """
        await self.wait_turn(self.strangers(), cost_s)

    async def wait_refused_turn(self, name: str, cost_s: float) -> None:
        """Wait for a principal's turn if it has used up its requests, so that refusing more costs only its share."""
        usage = self.usage_of(name)
        usage.requests.refill(trio.current_time())
        if usage.requests.level < 1.0:
            await self.wait_turn(usage, cost_s)

    async def wait_turn(self, usage: PrincipalUsage, cost_s: float) -> None:
        """Wait for a principal's turn; it is charged with `cost_s` of the event loop's time."""
        if usage.deferred or not usage.charge(0.0, trio.current_time()):
            turn = _Turn(usage, cost_s)
            self.defer(usage, turn)
            try:
                await turn.came.wait()
            finally:
                if turn in usage.deferred:
                    usage.deferred.remove(turn)
        else:
            usage.cpu.level -= cost_s

    def defer(self, usage: PrincipalUsage, connection: Deferrable) -> None:
        """Have `connection.resume` called once its principal has its turn again."""
        usage.deferred.append(connection)
        if len(usage.deferred) >= usage.tidy_at:  # of strangers, the first may not have their turn for long
            usage.deferred = deque(
                each for each in usage.deferred if not (isinstance(each, LinkMeter) and each.link.stopped)
            )
            usage.tidy_at = max(TIDY_AT, 2 * len(usage.deferred))
        if not usage.scheduled:
            self._schedule(usage, trio.current_time())

    def _schedule(self, usage: PrincipalUsage, now: float) -> None:
        usage.cpu.refill(now)
        usage.scheduled = True
        # The smallest debt waits, too: rounding may leave one after just the time that it should take.
        wait_s = max(MIN_WAIT_S, -usage.cpu.level / usage.cpu.rate) if usage.cpu.level < 0.0 else 0.0
        heapq.heappush(self._due, (now + wait_s, next(self._numbers), usage))
        self._some_due.set()

    async def serve(self) -> None:
        """Give those that wait their turns, until cancelled."""
        while True:
            self._some_due = trio.Event()
            with trio.move_on_at(self._due[0][0] if self._due else float("inf")):
                await self._some_due.wait()
            _, _, usage = heapq.heappop(self._due)  # one that is still in debt is scheduled again
            usage.cpu.refill(trio.current_time())
            turns = len(usage.deferred)
            while turns and usage.deferred and usage.cpu.level >= 0.0:
                turns -= 1
                connection = usage.deferred.pop() if usage.newest_first else usage.deferred.popleft()
                began, charged_s = time.thread_time(), usage.charged_s
                try:
                    connection.resume()
                except Exception:
                    log.exception("internal error in turn", principal=usage.name)
                # The handlers have charged for the messages; what a long list of them costs to keep comes on top.
                spent_s = time.thread_time() - began - (usage.charged_s - charged_s)
                usage.charge(max(0.0, spent_s), trio.current_time())
            usage.scheduled = False
            if usage.deferred:
                self._schedule(usage, trio.current_time())


def is_limited(principal: Principal) -> bool:
    """Whether `[limits.principal]` holds for a principal: not for local users and operators."""
    return not principal.local and principal.role != "operator"


def limits_of(principal: Principal, settings: PrincipalLimits) -> PrincipalLimits:
    """What a principal may use: its token's own limits, and the settings where its token names none."""
    if not is_limited(principal):
        return UNLIMITED
    own = {name: value for name, value in attrs.asdict(principal.limits).items() if value is not None}
    return attrs.evolve(settings, **own) if own else settings


def too_fast(name: str) -> str:
    """The refusal for a principal that sends more requests a second than it may."""
    return f"{name!r} sends more requests a second than it may; send them again later, and fewer at once"


class HasPrincipal(Protocol):
    """A connection, or an HTTP request that is being answered."""

    @property
    def principal(self) -> Principal | None:
        """Whose it is; None before the login."""


def full_message(principal: Principal, settings: PrincipalLimits, open_now: Iterable[HasPrincipal]) -> str | None:
    """Why a principal may not have one more connection; None if it may.

    Args:
        open_now: connections and HTTP requests, of everybody.
    """
    own = principal.limits.max_connections
    others = [other.principal for other in open_now if other.principal is not None]
    if own is not None:
        if sum(other.token_id == principal.token_id for other in others) >= own:
            return f"the token of {principal.name!r} allows {own} connections at once; close one first"
    elif is_limited(principal) and sum(other.name == principal.name for other in others) >= settings.max_connections:
        return f"{principal.name!r} may have {settings.max_connections} connections at once; close one first"
    return None


def cap_submit(submit: Submit, limits: PrincipalLimits, space: SpaceConfig) -> Submit:
    """The submit with what an operator allows: the client's own priority and timeouts cannot exceed it.

    A submit that is sent again is capped in the same way, so that it is still the same request.
    """
    return attrs.evolve(
        submit,
        priority=min(submit.priority, limits.max_priority),
        queue_timeout_s=_at_most(submit.queue_timeout_s, space.queue_timeout_s),
        run_timeout_s=_at_most(submit.run_timeout_s, space.run_timeout_s),
    )


def _at_most(asked: float | None, ceiling: float) -> float | None:
    return None if asked is None else min(asked, ceiling)


#: What nobody reaches.
UNLIMITED = PrincipalLimits(
    max_connections=1_000_000,
    requests_per_s=1e6,
    max_queued=1_000_000,
    max_running=None,
    max_uploads=1_000_000,
    max_input_bytes=2**40,
    max_readers=1_000_000,
    max_retained=1_000_000,
    max_priority=9,
)
