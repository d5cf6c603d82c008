"""The clients: each follows its plans one after another, with the public client library."""

import random
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress

import attrs
import trio

from protocol import From, ProtocolError, RelayClient, RequestCancelled, RequestFailed, RequestRejected, Restarted
from protocol.client.client import new_request_id, open_relay
from protocol.client.inputs import InputSource
from protocol.client.stream import Stream
from protocol.wire.errors import ConnectError, ErrorCode, LinkBroken, LinkError
from protocol.wire.frames import Audio, Frame, Output
from protocol.wire.messages import LIVE_STATES, Queued, StatusReply
from tests.chaos.proxy import Line, Target, open_line
from tests.chaos.report import NOT_FOUND, Case, Ledger
from tests.chaos.verdict import Reception
from tests.chaos.workload import CHUNK_MS, KINDS, LOOSE, Plan, draw_plan, draw_short_plan

#: A listener must have its end by then: many times all windows of the configuration together, for a busy machine.
END_S = 300.0
#: Time for an answer to `status`, while the relay may be killed: on a busy machine each of its starts takes 10 s.
ANSWER_S = 240.0
#: Time between two checks of a request that is being stored again.
POLL_S = 0.1
#: Time between two status questions about a request without a listener.
ASK_S = 0.5
#: Time before a submit that a draining relay refused is sent again.
AGAIN_S = 0.3
#: Refusals after which a program submits again later.
AGAIN_AFTER = (ErrorCode.SHUTTING_DOWN, ErrorCode.SPACE_PAUSED, ErrorCode.RATE_LIMITED, ErrorCode.QUEUE_FULL)
#: Time from a burst of requests to the next.
BURST_GAP_S = (2.0, 12.0)

Act = Callable[[Stream], Awaitable[bool]]


@asynccontextmanager
async def open_client(line: Line, token: str, ledger: Ledger, tls: ssl.SSLContext | None) -> AsyncIterator[RelayClient]:
    """Open a client over `line`; the first attempt is repeated too, because the relay may be down."""
    url = f"{'ws' if tls is None else 'wss'}://127.0.0.1:{line.port}"
    async with AsyncExitStack() as stack:
        relay: RelayClient | None = None
        while relay is None:
            try:
                relay = await stack.enter_async_context(
                    open_relay(
                        url,
                        token=token,
                        agent=line.name,
                        ssl_context=tls,
                        on_up=lambda _welcome: ledger.link_up(line.name),
                        on_reconnect=lambda _fault, _delay_s: ledger.link_down(line.name),
                    )
                )
            except (ConnectError, LinkBroken):  # no relay, or it was killed before it answered
                await trio.sleep(AGAIN_S)
        yield relay


@attrs.define(eq=False)
class Client:
    """One permanent client with its line; `others` are used by plans that need two clients."""

    name: str
    relay: RelayClient
    line: Line
    ledger: Ledger
    token: str
    seed: int
    target: Target
    tls: ssl.SSLContext | None = None
    others: Sequence["Client"] = ()
    kinds: Mapping[str, int] = attrs.field(factory=lambda: KINDS)
    current: Case | None = None
    _random: random.Random = attrs.field(init=False)
    _plans: random.Random = attrs.field(init=False)

    def __attrs_post_init__(self) -> None:
        self._random = random.Random(f"{self.seed} choices of {self.name}")
        self._plans = random.Random(f"{self.seed} plans of {self.name}")

    async def serve(self, calm: trio.Event) -> None:
        """Follow one plan after another until `calm` is set."""
        number = 0
        while not calm.is_set():
            number += 1
            await self.follow(draw_plan(self._plans, f"{self.name} #{number}", self.kinds))

    async def serve_bursts(self, calm: trio.Event, size: int) -> None:
        """Submit `size` short requests at once, and follow them all, again and again until `calm` is set."""
        number = 0
        while not calm.is_set():
            with trio.move_on_after(self._random.uniform(*BURST_GAP_S)):
                await calm.wait()
                return
            self.ledger.counts["bursts"] += 1
            async with trio.open_nursery() as nursery:
                for _ in range(size):
                    number += 1
                    nursery.start_soon(self.follow, draw_short_plan(self._plans, f"{self.name} #{number}"))

    async def follow(self, plan: Plan) -> None:
        """Follow one plan, and judge its result."""
        case = self.current = self.ledger.open_case(plan, new_request_id(), self.name)
        with trio.move_on_after(END_S * (2 if plan.fail else 1)) as patience:
            try:
                await _DEEDS[plan.kind](self, case)
                await self._check_status(case)
            except RequestRejected as refusal:
                if refusal.code != NOT_FOUND or not self.ledger.may_be_forgotten(case):
                    self.ledger.complain(f"it was refused: {refusal}", case)
            except (LinkError, ProtocolError) as fault:
                self.ledger.complain(f"its client gave up: {fault!r}", case)
        if patience.cancelled_caught:
            self.ledger.complain(f"no end within {END_S:g} s", case)
        self.ledger.close_case(case)
        self.current = None

    @property
    def other(self) -> "Client":
        """Return another client of the same principal, chosen at random."""
        return self._random.choice([each for each in self.others if each is not self and each.token == self.token])

    @property
    def stranger(self) -> "Client":
        """Return a client of another principal, chosen at random."""
        return self._random.choice([each for each in self.others if each.token != self.token])

    # -- what a listener does

    async def _submit(self, case: Case, act: Act, *, relay: RelayClient | None = None, detach: bool = False) -> bool:
        """Submit, and `act` on the stream; repeat if a draining relay refuses."""
        plan = case.plan
        case.detached = detach
        while True:
            try:
                async with (relay or self.relay).submit(
                    plan.space,
                    plan.params,
                    inputs=plan.inputs | self._text_of(case),
                    group=case.group,
                    retry=plan.retry,
                    queue_timeout_s=plan.queue_timeout_s,
                    detach=detach,
                    request_id=case.request_id,
                ) as stream:
                    self.ledger.note_accepted(case)
                    return await act(stream)
            except RequestRejected as refusal:
                if refusal.code not in AGAIN_AFTER:
                    raise
                self.ledger.counts[f"submits refused with {refusal.code}"] += 1
                await trio.sleep(AGAIN_S)

    def _text_of(self, case: Case) -> dict[str, InputSource]:
        """The input `text` of a plan that is not told its text."""
        if case.source is not None:
            return {"text": From(case.source.request_id)}
        return {"text": case.plan.dictate(self._random)} if case.plan.text and not case.plan.tells else {}

    async def _attach(self, case: Case, reception: Reception, target: Case | None = None) -> None:
        """Attach to the request, which may be the source of another, and listen to the end."""
        async with self.relay.attach(case.request_id, reception.after_seq, attempt=reception.attempt) as stream:
            with suppress(RequestRejected):  # `_receive` raises it again
                await stream.wait_accepted()
            case.unheld_to = min(case.unheld_to, trio.current_time())
            await self._receive(stream, case, reception)
        close = self.ledger.close_reception if target is None else self.ledger.close_source
        close(target or case, reception)

    def _new_reception(self, case: Case, what: str = "", after_seq: int = -1) -> Reception:
        reception = Reception(f"{self.name}{what}", after_seq, began_at=trio.current_time())
        case.receptions.append(reception)
        return reception

    async def _receive(self, stream: Stream, case: Case, reception: Reception, until: int | None = None) -> bool:
        """Process events until the end (True), or until `until` audio frames have arrived."""
        pace_s = CHUNK_MS / 1000 / case.plan.speed * (1.5 if case.plan.space == LOOSE else 1.0)
        since: float | None = None
        try:
            async for event in stream.events():
                if isinstance(event, Restarted):
                    reception.void(event.seq)
                    self.ledger.note(
                        case.plan.name, f"{reception.name} receives attempt {event.attempt} from {event.seq}"
                    )
                elif isinstance(event, Frame):
                    reception.attempt, reception.last_seq = event.attempt, event.seq
                if isinstance(event, Queued):
                    self.ledger.note_position(case, event.position, event.of)
                if isinstance(event, Audio):
                    now = trio.current_time()
                    if since is not None and not case.plan.text:  # otherwise they may be its speaker's
                        self.ledger.record_gap(case, self.name, since, now, pace_s)
                    since = now
                    reception.pieces.append((event.seq, event.pcm))
                    if until is not None and len(reception.pieces) > until:
                        return False
                elif isinstance(event, Output) and case.plan.tells:
                    assert isinstance(event.data, str)
                    reception.pieces.append((event.seq, event.data.encode()))
            reception.end = "completed"
        except RequestCancelled as end:
            reception.end, reception.message = "cancelled", str(end)
        except RequestFailed as end:
            reception.end, reception.message = f"failed {end.code}", end.message
        except RequestRejected as end:
            reception.end, reception.message = f"rejected {end.code}", str(end)
        except (LinkError, ProtocolError) as fault:
            reception.end, reception.message = type(fault).__name__, str(fault)
        return True

    async def _status(self, case: Case) -> StatusReply:
        """Ask for its status, again where the relay cannot tell it yet: on a busy machine its disk takes seconds."""
        while True:
            try:
                return await self.relay.status(case.request_id)
            except RequestRejected as refusal:
                if refusal.code != ErrorCode.STORAGE_FULL:
                    raise
                self.ledger.counts["statuses that waited for the disk"] += 1
                await trio.sleep(AGAIN_S)

    async def _check_status(self, case: Case) -> None:
        """Check that the store reports the same end that the listener received.

        A relay that is killed between reporting an end and storing it resumes the attempt, and receives the same end.
        """
        ends = {reception.end for reception in case.receptions if reception.end}
        state = ""
        with trio.move_on_after(ANSWER_S):
            while ends != {state}:
                status = await self._status(case)
                state = f"failed {status.code}" if status.state == "failed" else status.state
                if state not in LIVE_STATES:
                    break
                await trio.sleep(POLL_S)
        if not state:
            self.ledger.complain(f"no answer to status within {ANSWER_S:g} s", case)
        elif ends != {state} and not self.ledger.may_end_anew(case):
            self.ledger.complain(f"its status is {state!r}, and the ends received are {sorted(ends)}", case)

    # -- the kinds of plans

    async def _plain(self, case: Case) -> None:
        reception = self._new_reception(case)
        await self._submit(case, lambda stream: self._receive(stream, case, reception))
        self.ledger.close_reception(case, reception)

    async def _again(self, case: Case) -> None:
        await self._plain(case)
        await trio.sleep(case.plan.later_s)
        other = self.other
        await other._attach(case, other._new_reception(case, " fetches it again"))

    async def _with_other(
        self, case: Case, deed: Callable[["Client"], Awaitable[None]], other: "Client | None" = None
    ) -> None:
        """Listen to the end, and have another client do something in the middle."""
        reception = self._new_reception(case)
        other = other or self.other

        async def act(stream: Stream) -> bool:
            ended = await self._receive(stream, case, reception, case.plan.at_frame)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(deed, other)
                if not ended:
                    await self._receive(stream, case, reception)
                self.ledger.close_reception(case, reception)
            return True

        await self._submit(case, act)

    async def _second(self, case: Case) -> None:
        await self._with_other(case, lambda other: other._attach(case, other._new_reception(case, " listens in")))

    async def _twin(self, case: Case) -> None:
        async def submit_too(other: "Client") -> None:
            reception = other._new_reception(case, " submits it too")
            await other._submit(case, lambda stream: other._receive(stream, case, reception))
            self.ledger.close_reception(case, reception)

        await self._with_other(case, submit_too)

    async def _pried(self, case: Case) -> None:
        async def pry(stranger: "Client") -> None:
            try:
                status = await stranger.relay.status(case.request_id)
            except RequestRejected:
                return
            self.ledger.complain(f"{stranger.name}, of another principal, was told {status.state}", case)

        await self._with_other(case, pry, self.stranger)

    async def _detached(self, case: Case) -> None:
        await self._submit(case, _leave, detach=True)
        await trio.sleep(case.plan.later_s)
        await self._attach(case, self._new_reception(case, " comes back"))

    async def _by_hand(self, case: Case) -> None:
        first = self._new_reception(case)
        if await self._submit(case, lambda s: self._receive(s, case, first, case.plan.at_frame), detach=True):
            self.ledger.close_reception(case, first)
            return
        await trio.sleep(case.plan.later_s)
        rest = self._new_reception(case, " goes on", first.last_seq)
        rest.pieces, rest.attempt = list(first.pieces), first.attempt
        await self._attach(case, rest)

    async def _cancelled(self, case: Case, other: Case | None = None) -> None:
        """Listen, and cancel it, or another one, in the middle."""
        reception = self._new_reception(case)
        aims = [other or case, *([case.source] if case.source is not None and case.plan.grouped else [])]
        ended = False

        async def cancel(*aims: Case) -> None:
            for each in aims:
                each.cancelled_at = trio.current_time()
            self.ledger.note(aims[0].plan.name, "cancels it")
            await self.relay.cancel(aims[0].request_id, "enough received")

        async def act(stream: Stream) -> bool:
            nonlocal ended
            ended = await self._receive(stream, case, reception, case.plan.at_frame)
            if not ended:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(cancel, *aims)
                    await self._receive(stream, case, reception)
            return True

        await self._submit(case, act)
        self.ledger.close_reception(case, reception)
        if ended and aims[-1] is not case:
            await cancel(aims[-1])  # its source goes on for minutes otherwise

    async def _die(self, case: Case) -> bool:
        """Submit as a client that dies in the middle; True if it received the end before."""
        mortal = self._new_reception(case, " (mortal)")
        ended = False
        name = f"client {case.plan.name} (mortal)"
        async with open_line(name, self.target, self._random) as line:
            with trio.CancelScope() as life:
                async with open_client(line, self.token, self.ledger, self.tls) as relay:

                    async def act(stream: Stream) -> bool:
                        nonlocal ended
                        ended = await self._receive(stream, case, mortal, case.plan.at_frame)
                        if not ended:  # from here on nothing it says comes through: it is as dead as with kill -9
                            fault = self.ledger.begin_fault("killed", "client", cuts=True)
                            line.unplugged = True
                            if self._random.random() < 0.5:
                                line.cut("rst")
                            else:
                                line.lose()
                            self.ledger.heal_fault(fault)
                            case.unheld_from = trio.current_time()
                            life.cancel()
                        return ended

                    await self._submit(case, act, relay=relay)
        if ended:
            self.ledger.close_reception(case, mortal)
        else:
            mortal.left = True
        return ended

    async def _dictated_on(self, case: Case) -> None:
        if await self._die(case):
            return
        await trio.sleep(case.plan.later_s)
        reception = self._new_reception(case, " dictates it from the beginning")

        async def act(stream: Stream) -> bool:
            case.unheld_to = min(case.unheld_to, trio.current_time())
            return await self._receive(stream, case, reception)

        await self._submit(case, act)
        self.ledger.close_reception(case, reception)

    async def _piped(self, case: Case) -> None:
        await self._with_source(case, self._plain)

    async def _piped_on(self, case: Case) -> None:
        await self._with_source(case, self._heir)

    async def _piped_from_cancelled(self, case: Case) -> None:
        await self._with_source(case, lambda case: self._cancelled(case, case.source))

    async def _piped_and_cancelled(self, case: Case) -> None:
        await self._with_source(case, self._cancelled)

    async def _with_source(self, case: Case, deed: Callable[[Case], Awaitable[None]]) -> None:
        """Submit the source of a request, do what its listener does, and then judge the source as well."""
        assert case.plan.source is not None
        source = self.ledger.open_case(case.plan.source, new_request_id(), self.name)
        if case.plan.grouped:
            case.group = source.group = source.request_id
        case.source = source
        try:
            await self._submit(source, _leave, detach=True)
            if case.plan.later_s < 2.0:  # the others are submitted at once
                await trio.sleep(case.plan.later_s)
            await deed(case)
            await self._attach(source, self._new_reception(source, " looks at the source"), case)
            await self._check_status(source)
        finally:
            self.ledger.close_case(source)

    async def _heir(self, case: Case) -> None:
        if await self._die(case):
            return
        await trio.sleep(case.plan.later_s)
        await self._attach(case, self._new_reception(case, " inherits it"))

    async def _abandoned(self, case: Case) -> None:
        if await self._die(case):
            return
        # Whoever attached would hold it, so there is nothing but to ask.
        while (await self._status(case)).state in LIVE_STATES:  # noqa: ASYNC110
            await trio.sleep(ASK_S)
        await self._attach(case, self._new_reception(case, " looks at what became of it"))


async def _leave(stream: Stream) -> bool:
    await trio.lowlevel.checkpoint()
    return stream.ended


_DEEDS: dict[str, Callable[[Client, Case], Awaitable[None]]] = {
    "plain": Client._plain,
    "again": Client._again,
    "second": Client._second,
    "twin": Client._twin,
    "pried": Client._pried,
    "detached": Client._detached,
    "by hand": Client._by_hand,
    "heir": Client._heir,
    "abandoned": Client._abandoned,
    "cancelled": Client._cancelled,
    "poison": Client._plain,
    "dictated": Client._plain,
    "dictated twice": Client._twin,
    "dictated on": Client._dictated_on,
    "piped": Client._piped,
    "piped on": Client._piped_on,
    "piped from cancelled": Client._piped_from_cancelled,
    "piped from broken": Client._piped,
    "piped and cancelled": Client._piped_and_cancelled,
}
