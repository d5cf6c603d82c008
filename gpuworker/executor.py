"""Runs attempts in slots, and keeps them until the relay has their frames. It knows nothing of links."""

import logging
from collections.abc import Callable, Sequence

import attrs
import trio

from gpuworker.attempt import Attempt
from gpuworker.engines.base import Capabilities, RequestContext, error_text
from gpuworker.slots.run_engine import RunResult
from gpuworker.slots.slot import Job, Slot
from protocol.wire.errors import ErrorCode
from protocol.wire.frames import MAX_TEXT_CHARS, RUN_TIMEOUT_ADVICE
from protocol.wire.messages import Ack, Assign, Input
from protocol.wire.params_schema import check_params, integers_as_int
from protocol.wire.structs import Running

#: How long an assigned attempt waits for a slot. The relay counts slots, so this covers races: a slot
#: that died, or whose last attempt was abandoned but has not stopped yet.
SLOT_WAIT_S = 10.0
#: Time past `run_timeout_s` after which the worker enforces it, in case the relay, whose task it is, is unreachable.
RUN_TIMEOUT_MARGIN_S = 5.0

log = logging.getLogger("gpuworker")


@attrs.define
class Totals:
    """Counts of ended attempts, by outcome."""

    completed: int = 0
    failed: int = 0
    cancelled: int = 0


class Executor:
    """Runs the assigned attempts.

    Args:
        slots: the slots to run in; they are served elsewhere.
        nursery: for the attempts, which outlive any link.

    Attributes:
        attempts: the newest attempt of each request, by request id, until the relay has acknowledged its end.
        on_frames: called with an attempt that has new frames.
        on_taken: called with an attempt whose engine has taken more of a live input, its name, and how much.
        on_change: called when an attempt arrived, ended or left, or a slot changed.
    """

    def __init__(self, slots: Sequence[Slot], nursery: trio.Nursery) -> None:
        self.slots = slots
        self.attempts: dict[str, Attempt] = {}
        self.tally = Totals()
        self.on_frames: Callable[[Attempt], None] = lambda _attempt: None
        self.on_taken: Callable[[Attempt, str, int], None] = lambda _attempt, _name, _taken: None
        self.on_change: Callable[[], None] = lambda: None
        self._nursery = nursery
        self._changed = trio.lowlevel.ParkingLot()

    def changed(self) -> None:
        """Wake everyone who waits for a change, and call `on_change`."""
        self._changed.unpark_all()
        self.on_change()

    async def change(self) -> None:
        """Wait for the next change."""
        await self._changed.park()

    @property
    def ready_slots(self) -> int:
        """Slots with a live engine, busy ones included: the number that the relay may count on."""
        return sum(slot.ready for slot in self.slots)

    @property
    def running(self) -> list[Attempt]:
        """Attempts that have not ended."""
        return [attempt for attempt in self.attempts.values() if not attempt.ended]

    def running_attempts(self) -> tuple[Running, ...]:
        """Every attempt with its next seq, for `register`."""
        return tuple(attempt.running for attempt in self.attempts.values())

    # -- what the relay says

    def accept(self, assign: Assign, capabilities: Capabilities, max_bytes: int) -> None:
        """Run an attempt. A repeated assignment is ignored; a higher attempt replaces the one before."""
        held = self.attempts.get(assign.request_id)
        if held is not None:
            if assign.attempt <= held.number:
                log.warning("request %s: attempt %d was assigned again", assign.request_id[:8], assign.attempt)
                return
            self.drop(held, "superseded by a new attempt")
        attempt = Attempt(
            assign,
            reproducible=capabilities.reproducible,
            max_bytes=max_bytes,
            on_frames=lambda attempt: self.on_frames(attempt),
            on_taken=lambda attempt, name, taken: self.on_taken(attempt, name, taken),
        )
        self.attempts[attempt.request_id] = attempt
        self.changed()
        log.info(
            "request %s of %s: attempt %d in space %r",
            attempt.request_id[:8],
            assign.principal,
            attempt.number,
            assign.space,
        )
        if fault := _params_fault(capabilities, assign):
            self._finish(attempt, fault)
            return
        attempt.params = integers_as_int(capabilities.params, assign.params)
        attempt.uploads.refuse_by(capabilities.inputs)
        self._nursery.start_soon(self._run, attempt)

    def upload(self, piece: Input) -> None:
        """Take a piece of an input; ignored for an attempt that has ended or is unknown."""
        attempt = self.attempts.get(piece.request_id)
        if attempt is None or attempt.ended:
            return
        attempt.uploads.add(piece)
        if attempt.uploads.fault is not None:
            attempt.fail(attempt.uploads.fault)

    def cancel(self, request_id: str, reason: str) -> None:
        """Stop an attempt; `cancelled` follows. Ignored if it has ended or is unknown."""
        if (attempt := self.attempts.get(request_id)) is not None:
            attempt.cancel(reason or "cancelled")

    def acknowledge(self, ack: Ack) -> None:
        """Forget an attempt that has ended and whose frames the relay has received."""
        attempt = self.attempts.get(ack.request_id)
        if attempt is not None and attempt.number == ack.attempt and attempt.ended and ack.seq >= attempt.next_seq - 1:
            del self.attempts[ack.request_id]
            self.changed()

    def drop(self, attempt: Attempt, reason: str) -> None:
        """Stop and forget an attempt whose frames are no longer wanted."""
        log.info("request %s: attempt %d dropped: %s", attempt.request_id[:8], attempt.number, reason)
        attempt.cancel(reason)
        attempt.dropped = True
        if self.attempts.get(attempt.request_id) is attempt:
            del self.attempts[attempt.request_id]
        self.changed()

    def on_link_lost(self) -> None:
        """Drop attempts whose whole inputs are incomplete: the relay starts such requests again."""
        for attempt in list(self.attempts.values()):
            if not attempt.uploads.settled.is_set():
                self.drop(attempt, "the link was lost before its inputs had arrived")

    # -- running

    async def _run(self, attempt: Attempt) -> None:
        end = RunResult(outcome="cancelled")
        with attempt.scope:
            try:
                await attempt.uploads.settled.wait()
                end = attempt.uploads.fault or await self._run_in_slot(attempt)
            except Exception:  # the one broad catch for a request: the worker and its other slots carry on
                log.exception(
                    "request %s: attempt %d raised an unexpected error", attempt.request_id[:8], attempt.number
                )
                end = RunResult.failed(ErrorCode.INTERNAL, "internal error in the worker; see its log", retryable=True)
        self._finish(attempt, end)

    async def _run_in_slot(self, attempt: Attempt) -> RunResult:
        slot = await self._free_slot()
        if slot is None:
            message = f"no slot of the worker came free within {SLOT_WAIT_S:g} s"
            end = RunResult.failed(ErrorCode.ENGINE_FAILED, message, retryable=True)
            # Assigned as the process of all slots ended: nothing of it has run.
            return attrs.evolve(end, details={"innocent": True}) if self.slots[0].shared else end
        if attempt.uploads.fault is not None:  # of a live input, while it waited
            return attempt.uploads.fault
        attempt.stop_engine = slot.cancel
        attempt.begin(trio.current_time())
        assign = attempt.assign
        context = RequestContext(
            request_id=assign.request_id,
            attempt=assign.attempt,
            space=assign.space,
            principal=assign.principal,
            run_timeout_s=assign.run_timeout_s,
        )
        job = Job(attempt.params, attempt.uploads.pop_all(), context, attempt.uploads.feeds)
        limit_s = attempt.assign.run_timeout_s
        async with trio.open_nursery() as nursery:
            if limit_s > 0:
                nursery.start_soon(self._stop_overdue, attempt, limit_s + RUN_TIMEOUT_MARGIN_S)
            try:
                end = await slot.run(job, attempt.add_chunk)
            finally:  # immediately: the next attempt may get the slot at any later checkpoint
                attempt.stop_engine = None
            nursery.cancel_scope.cancel()
        return end

    @staticmethod
    async def _stop_overdue(attempt: Attempt, limit_s: float) -> None:
        await trio.sleep(limit_s)
        attempt.fail(
            RunResult.failed(
                ErrorCode.RUN_TIMEOUT,
                f"it ran for more than {limit_s:g} s; {RUN_TIMEOUT_ADVICE}",
            )
        )

    async def _free_slot(self) -> Slot | None:
        with trio.move_on_after(SLOT_WAIT_S):
            while True:
                for slot in self.slots:
                    if slot.free:
                        return slot
                await self._changed.park()
        return None

    def _finish(self, attempt: Attempt, end: RunResult) -> None:
        if attempt.dropped:
            return
        end = attempt.finish(end)
        setattr(self.tally, attempt.outcome, getattr(self.tally, attempt.outcome) + 1)
        log.log(
            logging.WARNING if attempt.outcome == "failed" else logging.INFO,
            "request %s: %s",
            attempt.request_id[:8],
            _describe_end(attempt, end),
        )
        self.changed()


def _params_fault(capabilities: Capabilities, assign: Assign) -> RunResult | None:
    """The failure of an attempt whose params do not fit the engine's schema, or whose schema is faulty."""
    try:
        faults = check_params(capabilities.params, assign.params, assign.inputs.keys())
    except Exception as fault:  # the schema is the engine's: it may have an invalid pattern or a dangling `$ref`
        log.exception("request %s: its params cannot be checked", assign.request_id[:8])
        message = (
            f"the params cannot be checked against the engine's schema: {type(fault).__name__}: {error_text(fault)}"
        )
        return RunResult.failed(ErrorCode.ENGINE_FAILED, message)
    if not faults:
        return None
    message = "; ".join(f"{name or 'params'} {fault}" for name, fault in faults.items())
    return RunResult(
        outcome="failed",
        code=ErrorCode.INVALID_PARAMS.value,
        message=message[:MAX_TEXT_CHARS],
        details=dict(faults),
    )


def _describe_end(attempt: Attempt, end: RunResult) -> str:
    if attempt.outcome == "failed":
        return f"failed: {end.code}: {end.message}"
    if attempt.outcome == "cancelled":
        return f"cancelled: {attempt.cancel_reason or 'the worker stopped it'}"
    figures = attempt.result(trio.current_time())
    run_s = figures["run_s"]
    if not figures.get("duration_s"):
        return f"done in {run_s:.2f} s, {figures['chunks']} chunks"
    speed = figures["duration_s"] / max(run_s, 1e-6)
    return (
        f"done in {run_s:.2f} s: {figures['duration_s']:.2f} s of audio ({speed:.1f} times real time), "
        f"first after {figures['first_frame_s'] * 1000:.0f} ms"
    )
