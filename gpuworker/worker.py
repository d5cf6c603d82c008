"""The worker: it connects to the relay, registers its spaces, and reconnects whenever the link is lost."""

import importlib.metadata
import logging
import ssl
from collections.abc import Callable, Sequence
from typing import Any

import attrs
import trio

from gpuworker.attempt import MAX_RESULT_BYTES, Attempt
from gpuworker.engines.base import Capabilities
from gpuworker.executor import Executor
from gpuworker.frame_sender import FrameSender
from gpuworker.identity import Identity as Identity
from gpuworker.slots.slot import Slot
from gpuworker.status import State, WorkerStatus
from gpuworker.status import WorkerError as WorkerError
from protocol.client.address import Address
from protocol.link.backoff import Backoff
from protocol.link.base import Link
from protocol.link.dial import Connect, run_with_reconnect
from protocol.wire.codec import decode
from protocol.wire.errors import ErrorCode, LinkError, LoginRefused, ProtocolError, UnknownType
from protocol.wire.messages import (
    FROM_RELAY,
    PROTOCOL_VERSION,
    Ack,
    Assign,
    Cancel,
    Drain,
    Draining,
    Error,
    Hello,
    Input,
    InputAck,
    Ping,
    Pong,
    Register,
    Registered,
    Rejected,
    Undrain,
    Welcome,
)
from protocol.wire.validators import Message

#: The version that operators see.
AGENT = f"gpuworker/{importlib.metadata.version('relayd')}"
#: How long a draining worker lets requests run: the relay's default for `drain_timeout_s`.
DRAIN_TIMEOUT_S = 120.0
#: How long a draining worker waits for the relay to acknowledge its last frames.
ACK_S = 10.0
#: Time between attempts to register if the relay refused but may accept later.
REGISTER_AGAIN_FIRST_S = 1.0
REGISTER_AGAIN_LONGEST_S = 30.0

log = logging.getLogger("gpuworker")


class Worker:
    """A worker. `run` is its whole life.

    Args:
        identity: the identity to register with.
        address: the relay's address.
        slots: at least one.
        drain_timeout_s: how long requests may run once it drains.
        connect_to: makes the transport; for tests and tunnels.
        ssl_context: for wss://.
        on_status: called in the Trio thread after each change of `status`.
        on_leave: called once the worker stops, for whatever reason, before its slots are ended.
    """

    def __init__(
        self,
        identity: Identity,
        address: Address,
        slots: Sequence[Slot],
        *,
        drain_timeout_s: float = DRAIN_TIMEOUT_S,
        connect_to: Connect | None = None,
        ssl_context: ssl.SSLContext | None = None,
        on_status: Callable[[], None] = lambda: None,
        on_leave: Callable[[], None] = lambda: None,
    ) -> None:
        self._identity = identity
        self._address = address
        self._slots = slots
        self._drain_timeout_s = drain_timeout_s
        self._connect_to = connect_to
        self._ssl_context = ssl_context
        self._on_status = on_status
        self._on_leave = on_leave
        self._executor: Executor | None = None
        self._scope = trio.CancelScope()
        self._link: Link | None = None
        self._sender: FrameSender | None = None
        #: The values last sent that a repeated `register` may change: slots, reproducible, fingerprint.
        self._announced: tuple[int, bool, str] | None = None
        self._registered_once = False
        self._register_again = Backoff(REGISTER_AGAIN_FIRST_S, REGISTER_AGAIN_LONGEST_S)
        self._refused = trio.Event()
        #: When the relay wants to be asked again; None leaves it to the backoff.
        self._retry_after_s: float | None = None
        self._max_result_bytes = MAX_RESULT_BYTES
        self._drain_asked = trio.Event()
        self._drains = False
        self._leave = trio.Event()
        self._failure: WorkerError | None = None
        self._fault = ""
        self._stopped = False
        self._handlers: dict[type[Message], Callable[[Any], None]] = {
            Registered: self._on_registered,
            Rejected: self._on_rejected,
            Assign: self._on_assign,
            Input: lambda piece: self._executor_or_fail.upload(piece),
            Cancel: lambda cancel: self._executor_or_fail.cancel(cancel.request_id, cancel.reason),
            Ack: lambda ack: self._executor_or_fail.acknowledge(ack),
            Drain: lambda drain: self.drain(drain.reason or "the relay asked for it"),
            Undrain: lambda _undrain: self._undrain(),
            Ping: lambda ping: self._send(Pong(timestamp=ping.timestamp)),
            Pong: lambda _pong: None,
            Error: self._on_error,
        }

    # -- for the program around it

    async def run(self) -> None:
        """Load, connect and serve; returns once drained or stopped.

        Raises:
            WorkerError: the engine cannot be loaded, or the relay refuses this worker permanently.

        Cancellation: running requests are killed; the relay gives them to another worker, or reports `worker_lost`.
        """
        try:
            with self._scope:
                async with trio.open_nursery() as nursery:
                    self._executor = Executor(self._slots, nursery)
                    self._executor.on_frames = self._on_frames
                    self._executor.on_taken = self._on_taken
                    self._executor.on_change = self._on_status
                    for slot in self._slots:
                        slot.on_change = self._slot_changed
                        nursery.start_soon(slot.serve)
                    nursery.start_soon(self._leave_when_drained)
                    try:
                        await self._keep_linked()
                    finally:
                        self._on_leave()
                    nursery.cancel_scope.cancel()
        finally:
            self._stopped = True
            self._on_status()
        if self._failure is not None:
            raise self._failure

    def drain(self, reason: str) -> None:
        """Accept no more requests; once the running ones have been finished and delivered, `run` returns."""
        if self._drains:
            return
        self._drains = True
        running = len(self._executor.running) if self._executor else 0
        log.info("draining (%s): %s", reason, f"{running} running" if running else "no requests running")
        if self._announced is not None:
            self._send(Draining())
        self._drain_asked.set()
        self._on_status()

    def stop(self) -> None:
        """Stop immediately; running requests are killed."""
        self._scope.cancel()

    @property
    def status(self) -> WorkerStatus:
        """The current status."""
        work = self._executor
        state: State = "connecting"
        if self._stopped:
            state = "stopped"
        elif self._drains:
            state = "draining"
        elif not self._registered_once and (work is None or not work.ready_slots):
            state = "loading"
        elif self._sender is not None:
            state = "registered"
        return WorkerStatus(
            state=state,
            relay=str(self._address),
            spaces=self._identity.spaces,
            slots=work.ready_slots if work else 0,
            running=len(work.running) if work else 0,
            completed=work.tally.completed if work else 0,
            failed=work.tally.failed if work else 0,
            cancelled=work.tally.cancelled if work else 0,
            fault=self._fault or next((f"{s.name}: {s.load_fault}" for s in self._slots if s.load_fault), ""),
        )

    # -- the link

    @property
    def _executor_or_fail(self) -> Executor:
        assert self._executor is not None
        return self._executor

    @property
    def _capabilities(self) -> Capabilities | None:
        """The capabilities of the slots' engines; not reproducible if two of them make different samples."""
        loaded = [slot.capabilities for slot in self._slots if slot.capabilities is not None]
        if not loaded:
            return None
        alike = len({(str(its.format), its.fingerprint, its.reproducible) for its in loaded}) == 1
        return loaded[0] if alike else attrs.evolve(loaded[0], reproducible=False)

    async def _keep_linked(self) -> None:
        hello = Hello(version=PROTOCOL_VERSION, role="worker", token=self._identity.token, agent=AGENT)
        try:
            await run_with_reconnect(
                self._address,
                hello,
                self._serve,
                on_down=self._on_disconnected,
                ssl_context=self._ssl_context,
                connect_to=self._connect_to,
            )
        except LoginRefused as refusal:
            self._fail(refusal.code, f"the relay at {self._address} refused the login: {refusal}")

    def _on_disconnected(self, fault: LinkError, delay_s: float) -> None:
        self._fault = str(fault)
        if self._leave.is_set():  # the link was lost while leaving: do not connect again
            self._scope.cancel()
            return
        log.warning("no link to %s: %s; next attempt in %.1f s", self._address, fault, delay_s)
        self._on_status()

    async def _serve(self, link: Link, welcome: Welcome) -> None:
        """Serve one link from its login to its end; also returns, with the link alive, when the worker leaves."""
        log.info("connected to %s as %r", link.peer, welcome.principal)
        limit = welcome.limits.get("max_result_bytes")
        self._max_result_bytes = limit if type(limit) is int and limit > 0 else MAX_RESULT_BYTES
        self._link, self._announced = link, None
        self._refused = trio.Event()
        broken_rule: ProtocolError | None = None
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._register, link)
                nursery.start_soon(self._send_frames, link)
                nursery.start_soon(self._cancel_at_leave, nursery.cancel_scope)
                try:
                    async for data in link:
                        self._on_message(data)
                except ProtocolError as fault:  # stored, because a nursery would wrap it in a group
                    broken_rule = fault
                nursery.cancel_scope.cancel()
        finally:
            self._link, self._sender, self._announced = None, None, None
            self._executor_or_fail.on_link_lost()
            self._on_status()
        if broken_rule is not None:
            raise broken_rule

    async def _cancel_at_leave(self, scope: trio.CancelScope) -> None:
        await self._leave.wait()
        scope.cancel()

    def _on_message(self, data: bytes) -> None:
        try:
            message = decode(data, FROM_RELAY)
            handler = self._handlers[type(message)]
        except (UnknownType, KeyError) as fault:
            log.warning("the relay sent a message that a worker does not accept: %s", fault)  # perhaps a newer relay
            return
        handler(message)

    def _send(self, message: Message) -> None:
        """Send a message; the reader of the link notices if the link is lost."""
        if self._link is not None:
            try:
                self._link.send(message)
            except LinkError:
                return

    # -- registering

    async def _register(self, link: Link) -> None:
        """Send `register` once an engine is loaded, and again after a refusal that may be temporary."""
        while True:
            while (capabilities := self._capabilities) is None or not (
                self._registered_once or self._executor_or_fail.ready_slots
            ):
                await self._executor_or_fail.change()
            self._refused = trio.Event()
            self._announced = self._running_attempts(capabilities)
            self._send(self._registration(capabilities))
            await self._refused.wait()
            delay_s = self._register_again.next_s() if self._retry_after_s is None else self._retry_after_s
            await trio.sleep(delay_s)

    def _running_attempts(self, capabilities: Capabilities) -> tuple[int, bool, str]:
        return self._executor_or_fail.ready_slots, capabilities.reproducible, capabilities.fingerprint

    def _registration(self, capabilities: Capabilities) -> Register:
        return Register(
            worker=self._identity.name,
            instance=self._identity.instance,
            spaces=list(self._identity.spaces),
            slots=self._executor_or_fail.ready_slots,
            engine=self._identity.engine,
            params=capabilities.params,
            inputs=capabilities.inputs,
            format=capabilities.format,
            streams=capabilities.streams,
            shared=any(slot.shared for slot in self._slots),
            reproducible=capabilities.reproducible,
            fingerprint=capabilities.fingerprint,
            running=self._executor_or_fail.running_attempts(),
        )

    def _slot_changed(self) -> None:
        work = self._executor_or_fail
        work.changed()
        capabilities = self._capabilities
        if self._sender is not None and self._announced is not None and capabilities is not None:
            before, self._announced = self._announced, self._running_attempts(capabilities)
            if before[1] and not self._announced[1]:
                log.warning(
                    "the slots do not make equal samples: an interrupted request cannot continue in another slot"
                )
            if before != self._announced:
                self._send(self._registration(capabilities))
        if capabilities is None and (fault := next((s.load_fault for s in self._slots if s.load_fault), "")):
            self._fail(ErrorCode.MODEL_NOT_LOADED.value, f"engine {self._identity.engine!r} cannot be loaded: {fault}")
        if self._failure is None and (broken := next((s.broken for s in self._slots if s.broken), "")):
            log.error("%s", broken)
            self._failure, self._fault = WorkerError(ErrorCode.ENGINE_FAILED.value, broken), broken
            self.drain("its GPU failed")  # frames that the relay does not have yet are delivered first
        self._on_status()

    def _on_registered(self, registered: Registered) -> None:
        if self._sender is not None or self._link is None:
            return
        work = self._executor_or_fail
        self._registered_once = True
        self._fault = ""
        self._sender = FrameSender(self._link)
        self._register_again = Backoff(REGISTER_AGAIN_FIRST_S, REGISTER_AGAIN_LONGEST_S)
        spaces = ", ".join(map(repr, self._identity.spaces))
        slots = self._announced[0] if self._announced is not None else 0
        plural = "" if slots == 1 else "s"
        log.info("registered space %s with %d slot%s as %s", spaces, slots, plural, registered.worker_id)
        resume = {(entry.request_id, entry.attempt): entry.next_seq for entry in registered.resume}
        for attempt in list(work.attempts.values()):
            seq = resume.get((attempt.request_id, attempt.number))
            if seq is None:  # listed in `abandon`, or unknown to the relay
                work.drop(attempt, "the relay no longer waits for it")
            else:
                attempt.resume_from(seq)
                self._sender.add(attempt)
                for name, feed in attempt.uploads.feeds.items():  # what was told over the old link may be lost
                    self._on_taken(attempt, name, feed.taken)
        self._slot_changed()  # a slot may have changed since `register` was sent
        if self._drains:
            self._send(Draining())
        work.changed()

    def _on_rejected(self, rejected: Rejected) -> None:
        # If the worker has never served, the person who started it is there to read this: report it and end.
        # `space_full` is mostly a second worker started by mistake, unless the relay says when to ask again: it does
        # not know yet whether the worker that has the place is still there. Later, the relay may have been
        # reconfigured, or still count an old connection of this worker; both may pass.
        mistake = rejected.code == ErrorCode.SPACE_FULL and rejected.retry_after_s is None
        final = self._sender is None and not self._registered_once and (not rejected.retryable or mistake)
        if self._fault != rejected.message:  # logged once, however often it is asked again
            later = "" if final or self._sender is not None else "; registering again until it is accepted"
            log.error("the relay refused this worker: %s: %s%s", rejected.code, rejected.message, later)
        self._fault = rejected.message
        if self._sender is not None:
            return
        if final:
            self._fail(rejected.code, rejected.message)
        else:
            self._retry_after_s = rejected.retry_after_s
            self._refused.set()
        self._on_status()

    def _fail(self, code: str, message: str) -> None:
        if self._failure is None:
            self._failure = WorkerError(code, message)
            self._fault = message
        self._scope.cancel()

    # -- work

    def _on_frames(self, attempt: Attempt) -> None:
        if self._sender is not None:
            self._sender.add(attempt)

    def _on_taken(self, attempt: Attempt, name: str, taken: int) -> None:
        if self._sender is not None and not attempt.ended:
            self._send(InputAck(request_id=attempt.request_id, attempt=attempt.number, name=name, offset=taken))

    def _on_assign(self, assign: Assign) -> None:
        capabilities = self._capabilities
        if capabilities is None or self._sender is None:
            raise ProtocolError("assign before registered")
        self._executor_or_fail.accept(assign, capabilities, self._max_result_bytes)

    def _on_error(self, error: Error) -> None:
        self._fault = f"{error.code}: {error.message}"
        log.error("the relay reported an error: %s", self._fault)

    async def _send_frames(self, link: Link) -> None:
        while self._sender is None:
            await self._executor_or_fail.change()
        try:
            await self._sender.run()
        except LinkError:  # the reader of the link ends too, and reports it
            return

    # -- leaving

    def _undrain(self) -> None:
        if self._drains and self._failure is None:
            log.info("no longer draining: the relay asked to continue")
            self._drains = False
            self._drain_asked = trio.Event()
            self._executor_or_fail.changed()
            self._on_status()

    async def _leave_when_drained(self) -> None:
        work = self._executor_or_fail
        while True:
            await self._drain_asked.wait()
            with trio.move_on_after(self._drain_timeout_s):
                while self._drains and work.running:
                    await work.change()
            with trio.move_on_after(ACK_S):
                while self._drains and work.attempts:
                    await work.change()
            if self._drains:
                break
        if work.attempts:
            log.warning("leaving with %d undelivered requests", len(work.attempts))
        self._leave.set()
        if self._link is None:
            self._scope.cancel()
