"""The operator: steers while everything breaks, and looks whether what was answered holds, also after a restart."""

import random
import time
from collections.abc import Awaitable, Callable

import attrs
import h11
import trio

from protocol.wire.errors import LinkError
from protocol.wire.messages import Accepted, Rejected
from tests.chaos.operator_view import OperatorView, SteerRefused, steered
from tests.chaos.processes import Actor
from tests.chaos.report import Fault, Ledger
from tests.chaos.workload import DEEP, HELD, LOOSE, REPRODUCIBLE
from tests.support.raw_http_client import visitor
from tests.support.relay import a_submit, peer

#: Time between two actions, seconds.
GAP_S = (0.1, 1.0)
#: How long a request that ran when it was cancelled may take to end: a killed relay asks its worker again.
STOPPING_S = 20.0
#: Cancelled requests and tokens that are looked at again after each restart; more would only cost time.
KEPT = 5
#: Time after which a request that has ended may be forgotten: less than `retain_s` of a long run.
REMEMBERED_S = 100.0
#: The requests that the operator cancels while they run are no longer than this, if the cancel is lost with its answer.
RUN_S = 8.0
#: The same of those that wait where no worker is.
WAIT_S = 20.0
#: The relay went away, or is too busy to answer.
AWAY = (OSError, LinkError, trio.TooSlowError, trio.BrokenResourceError, trio.ClosedResourceError, h11.ProtocolError)

#: What is wrong now with what was answered; empty if it holds.
Look = Callable[[], Awaitable[str]]


@attrs.define(eq=False)
class Operator:
    """Steers the relay at `url`, over its unix socket, and `leaver`, the worker that it drains."""

    view: OperatorView
    ledger: Ledger
    seed: int
    leaver: Actor
    nursery: trio.Nursery
    #: What was answered, by what it is about; a later answer about the same replaces it.
    told: dict[str, Look] = attrs.field(factory=dict)
    _told_at: dict[str, float] = attrs.field(factory=dict)
    #: Spaces that are paused, or may be, with the account of it.
    _paused: dict[str, Fault | None] = attrs.field(factory=dict)
    _drained: str = ""
    _tokens: dict[str, str] = attrs.field(factory=dict)
    _number: int = 0
    _verified: int = 0
    _random: random.Random = attrs.field(init=False)

    def __attrs_post_init__(self) -> None:
        self._random = random.Random(f"{self.seed} operator")

    async def serve(self, calm: trio.Event) -> None:
        """Steer until `calm` is set, then let everything back."""
        while not calm.is_set():
            await trio.sleep(self._random.uniform(*GAP_S))
            await self._keep_leaver()
            await self.verify_after_restart()
            action = self._random.choice(_ACTIONS)
            await self._try(action(self))
        while self._paused or not await self._try(self._wait_leaver()):
            await self._try(self._let_back())
            await trio.sleep(GAP_S[0])

    async def _try(self, action: Awaitable[None]) -> bool:
        """Whether it was answered: otherwise the relay was killed, and it may have been done or not."""
        answered = True
        try:
            await action
        except* AWAY:
            answered = False
        except* SteerRefused as refused:
            self.ledger.complain(f"an operator was refused: {refused.exceptions}")
        return answered

    # -- what was answered

    async def answered(self, what: str, key: str, look: Look) -> None:
        """An answer has arrived: look at once whether it holds, and again after every restart."""
        self.ledger.note_answer()
        self.ledger.counts["steers answered"] += 1
        self.ledger.note("operator", f"was told: {what}")
        self.told[key], self._told_at[key] = look, trio.current_time()
        kind = key.split()[0]
        for old in [each for each in self.told if each.startswith(f"{kind} ")][:-KEPT]:
            del self.told[old]
        await self._look(key)

    async def _look(self, key: str) -> None:
        if complaint := await self.told[key]():
            self.ledger.complain(f"an operator was told that it was done: {key}; {complaint}")
            del self.told[key]
        self.ledger.counts["steers looked at"] += 1

    async def verify_after_restart(self) -> None:
        """After a restart, look at everything that was answered before it."""
        starts = len(self.ledger.relay_starts)
        if starts == self._verified:
            return

        async def verify() -> None:
            for key in list(self.told):
                if (
                    key.startswith(("cancelled", "promoted"))
                    and self._told_at[key] + REMEMBERED_S < trio.current_time()
                ):
                    del self.told[key]
                else:
                    await self._look(key)
            self._verified = starts
            self.ledger.counts["restarts after which all steers were looked at"] += 1

        await self._try(verify())

    # -- the actions

    async def _pause(self) -> None:
        if self._paused or self._drained:
            await self._let_back()
            return
        space = self._random.choice((LOOSE, DEEP, REPRODUCIBLE))
        self.told.pop(f"paused {space}", None)
        self._paused[space] = None
        await self.view.steer("pause_space", space)
        self.ledger.held_back[space] = time.time()
        self._paused[space] = self.ledger.begin_fault("paused", f"space {space}")
        await self.answered(f"{space} is paused", f"paused {space}", self.is_paused(space, True))

    def is_paused(self, space: str, paused: bool) -> Look:
        async def look() -> str:
            row = await self.view.space(space)
            return "" if row and row["paused"] is paused else f"its row is {row}"

        return look

    async def _drain(self) -> None:
        row = await self.view.worker(self.leaver.name)
        if row is None or row["state"] == "away" or self._drained or self._paused:
            return
        worker_id: str = row["worker_id"]
        self._drained = worker_id
        try:
            await self.view.steer("drain_worker", worker_id)
        except SteerRefused:  # it is away at this moment
            self._drained = ""
            return
        self.ledger.held_back[worker_id] = time.time()

        async def look() -> str:
            again = await self.view.worker(self.leaver.name)
            if again is None or again["worker_id"] != worker_id or again["draining"]:
                return ""
            return f"its row is {again}"

        await self.answered(f"{worker_id} is drained", f"drained {worker_id}", look)

    async def _let_back(self) -> None:
        """Resume spaces, and either take the drain of a worker back or let it leave."""
        for space, fault in list(self._paused.items()):
            self.told.pop(f"paused {space}", None)
            self.ledger.held_back.pop(space, None)
            await self.view.steer("resume_space", space)
            del self._paused[space]
            if fault is not None:
                self.ledger.heal_fault(fault)
            await self.answered(f"{space} is resumed", f"paused {space}", self.is_paused(space, False))
        if self._drained:
            worker_id, self._drained = self._drained, ""
            self.told.pop(f"drained {worker_id}", None)
            self.ledger.held_back.pop(worker_id, None)
            if self._random.random() < 0.5:
                await self._undrain(worker_id)

    async def _undrain(self, worker_id: str) -> None:
        try:
            await self.view.steer("undrain_worker", worker_id)
        except SteerRefused:
            self.ledger.counts["drained workers that had left"] += 1

    async def _keep_leaver(self) -> None:
        """Start the worker again that was drained, and has left."""
        if self.leaver.left:
            self._drained = ""
            self.ledger.counts["drained workers started again"] += 1
            await self.leaver.start(self.nursery)

    async def _wait_leaver(self) -> None:
        """Wait until the worker that is drained serves again."""
        while True:
            await self._keep_leaver()
            row = await self.view.worker(self.leaver.name)
            if row is not None and row["state"] in ("idle", "busy"):
                return
            if row is not None and row["draining"]:
                self.ledger.held_back.pop(row["worker_id"], None)
                await self._undrain(row["worker_id"])
            await trio.sleep(GAP_S[1])

    async def _cancel(self) -> None:
        space = self._random.choice((HELD, REPRODUCIBLE))
        params = {"text": "to be cancelled", "duration_s": RUN_S}
        submit = a_submit(space=space, params=params, detach=True, queue_timeout_s=WAIT_S)
        async with peer(self.view.url, "operator") as operator:
            operator.send(submit)
            if isinstance(await operator.next(Accepted, Rejected), Rejected):
                return  # the space is paused
            await trio.sleep(self._random.choice((0.0, 0.0, 1.0)))
            state = (await steered(operator, "cancel", submit.request_id))["state"]
        if state == "failed":  # it has waited for too long
            return
        await self.answered(
            f"{submit.request_id}: {state}", f"cancelled {submit.request_id}", self.is_cancelled(submit.request_id)
        )

    def is_cancelled(self, request_id: str) -> Look:
        told_at = trio.current_time()

        async def look() -> str:
            state = await self.view.state(request_id)
            stopping = state == "running" and trio.current_time() < told_at + STOPPING_S
            return "" if state == "cancelled" or stopping else f"its state is {state!r}"

        return look

    async def _promote(self) -> None:
        last = ""
        async with peer(self.view.url, "operator") as operator:
            for priority in (9, 5):
                submit = a_submit(space=HELD, detach=True, queue_timeout_s=WAIT_S, priority=priority)
                operator.send(submit)
                await operator.next(Accepted)
                last = submit.request_id
            self.told.pop("promoted", None)
            await steered(operator, "promote", last)

        async def look() -> str:
            status = await self.view.status(last)
            timed_out = status is not None and status.state == "failed" and status.code == "queue_timeout"
            return "" if timed_out or (status and status.position == 1) else f"its status is {status}"

        await self.answered(f"{last} is promoted", "promoted", look)

    async def _token(self) -> None:
        self._number += 1
        if len(self._tokens) < KEPT:
            name = f"guest{self._number}"
            token = (await self.view.steer("create_token", name, role="client"))["token"]
            self._tokens[name] = token
        else:
            name = self._random.choice(list(self._tokens))
            token = self._tokens.pop(name)
            self.told.pop(f"token {name}", None)
            try:
                await self.view.steer("revoke_token", name)
            except SteerRefused:  # refused: an earlier answer was lost
                return
        expected = 200 if name in self._tokens else 401

        async def look() -> str:
            async with visitor(self.view.url, token=token) as http:
                answer = await http.get("/v1/spaces")
            return "" if answer.status == expected else f"it is answered with {answer.status}"

        await self.answered(f"the token of {name} is good for {expected}", f"token {name}", look)

    async def _space(self) -> None:
        self.told.pop("space fresh", None)
        there = await self.view.space("fresh") is None
        await self.view.steer("create_space" if there else "delete_space", "fresh")

        async def look() -> str:
            row = await self.view.space("fresh")
            return "" if (row is not None) is there else f"its row is {row}"

        await self.answered(f"space fresh: {there}", "space fresh", look)


_ACTIONS: tuple[Callable[[Operator], Awaitable[None]], ...] = (
    Operator._pause,
    Operator._pause,
    Operator._drain,
    Operator._cancel,
    Operator._cancel,
    Operator._promote,
    Operator._token,
    Operator._space,
)
