"""Admits requests: checks them, gathers their inputs, commits them to the store and queues them.

One task commits complete requests in batches, in the order in which they became complete, so that one fsync serves
all waiting requests and the queue keeps the order of arrival.
"""

import time

import attrs
import structlog
import trio

from protocol.wire.codec import encode
from protocol.wire.errors import EncodeError, ErrorCode
from protocol.wire.media_types import MAX_MEDIA_TYPE_CHARS, accepts
from protocol.wire.messages import Assign, Input, Rejected, Submit
from protocol.wire.params_schema import check_params
from protocol.wire.validators import Value
from relayd.auth.tokens import Principal, reject_readonly
from relayd.config.schema import PrincipalLimits
from relayd.core.access import find_request, find_space
from relayd.core.feeds import Feeder
from relayd.core.pipes import open_pipes
from relayd.core.principals import RETRY_S, cap_submit, is_limited, limits_of
from relayd.core.relay import Relay
from relayd.core.space import Space
from relayd.requests.request import Holder, Request
from relayd.scheduling.model import ScheduledRequest, State
from relayd.store.base import StoreError
from relayd.store.records import PutRequest, RequestRecord

log = structlog.get_logger("relayd")

#: Limit for the inputs, announced or received, that the store does not have yet. A single request may exceed it, up to
#: `limits.max_input_bytes`.
MAX_UPLOADING_BYTES = 256 * 1024 * 1024
#: Live and piped inputs of one request: each takes memory as long as the request lives.
MAX_FED = 16
#: Most requests that one fsync commits: each has at most 64 KiB without its inputs, so a batch stays below 4 MiB.
MAX_BATCH = 64
#: The largest values that the wire allows.
MAX_ATTEMPT, MAX_SEQ = 1_000_000, 2**31
#: Lengths at which a field's name and the description of its fault are cut: sixteen of both fit in a message.
MAX_FIELD_CHARS, MAX_FAULT_CHARS = 64, 180


@attrs.define(eq=False)
class Admission:
    """Admits requests and holds them for the connections that sent them."""

    relay: Relay
    _send_uploaded: trio.MemorySendChannel[Request] = attrs.field(init=False)
    _send_changes: trio.MemoryReceiveChannel[Request] = attrs.field(init=False)

    def __attrs_post_init__(self) -> None:
        # Unbounded: every space bounds its admitted requests by max_queued, and all their inputs are bounded together.
        self._send_uploaded, self._send_changes = trio.open_memory_channel[Request](float("inf"))

    def submit(self, submit: Submit, principal: Principal, holder: Holder) -> Request | Rejected:
        """Admit the request of a `submit` and let `holder` hold it.

        Returns:
            The new request; the known request if the same one was sent again (the caller makes `holder` hold it); or
            why it was refused.
        """
        relay = self.relay
        if principal.readonly:
            return self._count(submit, reject_readonly(submit.request_id))
        limits = limits_of(principal, relay.config.limits.principal)
        if is_limited(principal) and submit.space in relay.spaces:
            submit = cap_submit(submit, limits, relay.spaces[submit.space].config)
        known = relay.requests.get(submit.request_id)
        if known is not None:
            if known.principal != principal.name or not known.same_content(submit):
                message = f"request {submit.request_id} already exists with different content; use a new id"
                conflict = Rejected.because(ErrorCode.ID_CONFLICT, message, request_id=submit.request_id)
                return self._count(submit, conflict)
            return known
        if refused := self._refuse(submit, principal, limits):
            return self._count(submit, refused)
        relay.scheduler.limit_running(principal.name, limits.max_running)
        usage = relay.principals.usage_of(principal.name)
        usage.max_retained, usage.max_input_bytes = limits.max_retained, limits.max_input_bytes
        sources = {info.from_ for info in submit.inputs.values() if info.from_ is not None}
        entry = ScheduledRequest(
            request_id=submit.request_id,
            space=submit.space,
            principal=principal.name,
            priority=submit.priority,
            ticket=relay.next_ticket(),
            retry=submit.retry,
            input_bytes=sum(info.size for info in submit.inputs.values()),
            sources={source_id for source_id in sources if relay.requests[source_id].live},
            silent_sources=sources,
        )
        if refused := relay.scheduler.admit(entry, answered=self.has_answer(submit, principal)):
            return self._count(submit, refused)
        request = Request.of(submit, principal.name, entry, relay.spaces[submit.space].config, time.time())
        relay.feeds.open(request)
        relay.add_request(request)
        open_pipes(relay, request)
        if refusal := self._enqueue_if_uploaded(request):
            return refusal
        request.hold(holder)
        return request

    def has_answer(self, submit: Submit, principal: Principal) -> bool:
        """Whether a result that is kept answers a request, so that it needs neither a worker nor a place in a queue."""
        return self.relay.copies.has_answer(submit, principal.name)

    def _count(self, submit: Submit, refusal: Rejected) -> Rejected:
        """Count a refusal and return it."""
        self.relay.stats.count_rejected(submit.space if submit.space in self.relay.spaces else None, refusal.code)
        return refusal

    def _refuse(self, submit: Submit, principal: Principal, limits: PrincipalLimits) -> Rejected | None:
        request_id = submit.request_id
        if self.relay.draining.is_set():
            message = "the relay is shutting down; send the request again when it has restarted"
            return Rejected.because(ErrorCode.SHUTTING_DOWN, message, request_id=request_id, retry_after_s=5.0)
        space = find_space(self.relay, principal, submit.space)
        if isinstance(space, Rejected):
            return attrs.evolve(space, request_id=request_id)
        most = limits.max_queued
        if self.relay.scheduler.queued_count(principal.name) >= most and not self.has_answer(submit, principal):
            message = f"{principal.name!r} may have {most} queued requests over all spaces; wait for one to start"
            return Rejected.because(ErrorCode.QUEUE_FULL, message, request_id=request_id)
        if faults := check_params(space.params, submit.params, submit.inputs.keys()):
            # They contain names from the client and limits from the worker, which can have any length.
            faults = {field[:MAX_FIELD_CHARS]: what[:MAX_FAULT_CHARS] for field, what in faults.items()}
            summary = "; ".join(f"{field or 'params'} {what}" for field, what in faults.items())
            return Rejected.because(
                ErrorCode.INVALID_PARAMS,
                f"space {space.name!r} does not accept these params: {summary}",
                request_id=request_id,
                details=dict(faults),
            )
        try:
            encode(_largest_assign(submit, principal))
        except EncodeError as fault:
            faults = fault.fields_in("params")
            message = f"the request cannot be sent to a worker: {fault.describe_in('params')}"
            return Rejected.because(ErrorCode.INVALID_PARAMS, message, request_id=request_id, details=dict(faults))
        for check in (
            self._refuse_sources(submit, principal),
            self._refuse_share(submit, principal, limits),
            self._refuse_inputs(submit, space),
        ):
            if check is not None:
                return check
        return None

    def _refuse_sources(self, submit: Submit, principal: Principal) -> Rejected | None:
        """Refuse a pipe from a request that the principal may not read, or that has no result to read any more."""
        for name, info in submit.inputs.items():
            if info.from_ is None:
                continue
            source = find_request(self.relay, principal, info.from_)
            if isinstance(source, Rejected):
                message = f"input {name!r}: {source.message}"
            elif not source.has_result:
                message = f"input {name!r}: request {info.from_} has ended, and its result is no longer kept"
            else:
                continue
            details: dict[str, Value] = {f"inputs.{name}": "is from a request that is not known"}
            return Rejected.because(ErrorCode.REQUEST_NOT_FOUND, message, request_id=submit.request_id, details=details)
        return None

    def _refuse_share(self, submit: Submit, principal: Principal, limits: PrincipalLimits) -> Rejected | None:
        """Refuse inputs beyond the principal's share of the relay's memory and disk."""
        total = sum(info.size for info in submit.inputs.values())
        state, name = self.relay.scheduler.state, principal.name
        is_live = any(info.is_fed for info in submit.inputs.values())
        if not (total or is_live) or total > self.relay.config.limits.max_input_bytes:  # which has its own refusal
            return None
        message = None
        would = state.input_bytes[name] + max(total, 1)  # a live one has at least one byte
        if total and state.uploads[name] >= limits.max_uploads:
            message = f"{name!r} may upload the inputs of {limits.max_uploads} requests at once; wait for one of them"
        elif state.input_bytes[name] and would > limits.max_input_bytes:
            message = (
                f"the inputs of the live requests of {name!r} would have {would} bytes, and "
                f"it may have {limits.max_input_bytes}; wait until one of its requests has ended"
            )
        if message is None:
            return None
        return Rejected.because(ErrorCode.RATE_LIMITED, message, request_id=submit.request_id, retry_after_s=RETRY_S)

    def _refuse_inputs(self, submit: Submit, space: Space) -> Rejected | None:
        request_id = submit.request_id
        if sum(info.is_fed for info in submit.inputs.values()) > MAX_FED:
            message = f"a request may have {MAX_FED} live or piped inputs; join some of them, or send them whole"
            return Rejected.because(ErrorCode.INVALID_PARAMS, message, request_id=request_id)
        total = sum(info.size for info in submit.inputs.values())
        most = self.relay.config.limits.max_input_bytes
        if total > most:
            message = f"the inputs have {total} bytes; the relay accepts at most {most} per request"
            return Rejected.because(ErrorCode.INPUT_TOO_LARGE, message, request_id=request_id)
        if total and total + self.relay.scheduler.state.uploading_bytes.total() > max(MAX_UPLOADING_BYTES, most):
            message = "too many inputs are being uploaded at this moment; send the request again in a little while"
            return Rejected.because(ErrorCode.RATE_LIMITED, message, request_id=request_id, retry_after_s=2.0)
        if not space.engine:
            return None  # no worker has registered yet, so its inputs are unknown; the worker checks them itself
        for name, rule in space.inputs.items():
            if rule.required and name not in submit.inputs:
                message = f"space {space.name!r} needs input {name!r}; send it with --input {name}=FILE"
                return Rejected.because(ErrorCode.INPUT_MISSING, message, request_id=request_id)
        for name, info in submit.inputs.items():
            input_rule = space.inputs.get(name)
            if input_rule is None:
                accepted = ", ".join(sorted(space.inputs)) or "none"  # at most 64 names of 32 characters
                message = f"space {space.name!r} does not accept input {name!r}; it accepts {accepted}"
                return Rejected.because(
                    ErrorCode.INVALID_PARAMS,
                    message,
                    request_id=request_id,
                    details={f"inputs.{name}": "is not accepted"},
                )
            if info.is_fed and not input_rule.live:
                what = "must be sent whole, with its size and sha256"
                message = f"space {space.name!r}: input {name!r} {what}"
                return Rejected.because(
                    ErrorCode.INVALID_PARAMS, message, request_id=request_id, details={f"inputs.{name}": what}
                )
            if info.size > input_rule.max_bytes:
                message = (
                    f"input {name!r} has {info.size} bytes; space {space.name!r} accepts {input_rule.max_bytes} at most"
                )
                return Rejected.because(ErrorCode.INPUT_TOO_LARGE, message, request_id=request_id)
            if info.media_type and not accepts(input_rule.media_types, info.media_type):
                what = f"is {info.media_type!r}; accepted are {', '.join(input_rule.media_types)}"[:MAX_FAULT_CHARS]
                message = f"space {space.name!r}: input {name!r} {what}"
                return Rejected.because(
                    ErrorCode.INVALID_PARAMS, message, request_id=request_id, details={f"inputs.{name}": what}
                )
        return None

    def add_input(self, request: Request, piece: Input, feeder: Feeder) -> None:
        """Add a piece of an input; the request is rejected if the piece does not match the announcement.

        Args:
            request: a request that `feeder` holds.
            piece: of one of its inputs.
            feeder: who sent it; see `Feeds.add` for a live input.
        """
        if request.live and piece.name in request.fed:
            self.relay.feeds.add(request, piece, feeder)
            return
        if request.uploaded or not request.live:
            return  # a client that has reconnected may send a piece again
        if fault := request.add_input(piece.name, piece.offset, piece.data):
            have = len(request.inputs.get(piece.name, b""))
            info = request.submit.inputs.get(piece.name)
            announced = f"{info.size} were announced" if info else "it was not announced"
            message = f"input {piece.name!r} at offset {piece.offset}: {have} bytes have been received, and {announced}"
            self._reject(request, fault, message)
        else:
            self._enqueue_if_uploaded(request)

    def _enqueue_if_uploaded(self, request: Request) -> Rejected | None:
        """Pass a request to the store if all of its inputs have arrived; reject it if one is damaged."""
        if request.missing_input() is not None:
            return None
        if damaged := request.damaged_input():
            message = f"input {damaged!r} does not match its announced sha256; send the request again with a new id"
            return self._reject(request, ErrorCode.INPUT_MISMATCH, message)
        request.uploaded = True
        if all(source.accepted for source in self._sources_of(request)):
            self._send_uploaded.send_nowait(request)
        else:
            self.relay.nursery.start_soon(self._store_after_sources, request)
        return None

    def _sources_of(self, request: Request) -> list[Request]:
        """Return the live requests that a new request is piped from."""
        return [self.relay.requests[source_id] for source_id in request.entry.sources]

    async def _store_after_sources(self, request: Request) -> None:
        """Pass a request to the store once its sources are accepted: a relay that is killed must not forget only them.

        A source that is rejected meanwhile takes it along.
        """
        try:
            for source in self._sources_of(request):
                while request.live and source.live and not source.accepted:
                    changed = source.changed
                    await changed.wait()
                if request.live and self.relay.requests.get(source.request_id) is not source:
                    message = f"request {source.request_id}, its source, was rejected; submit both again"
                    self._reject(request, ErrorCode.REQUEST_NOT_FOUND, message)
            if request.live:
                self._send_uploaded.send_nowait(request)
        except Exception:
            log.exception("internal error in request", request_id=request.request_id)
            self.relay.fail_internal(request)

    def _reject(self, request: Request, code: ErrorCode, message: str) -> Rejected:
        """Reject a request that was never accepted; its id can be used again."""
        refusal = Rejected.because(code, message, request_id=request.request_id)
        for holder in tuple(request.holders):
            holder.on_rejected(request, refusal)
        self._count(request.submit, refusal)
        relay = self.relay
        decisions = relay.scheduler.end(request.request_id, State.FAILED, trio.current_time())
        request.wake()
        relay.remove_request(request)
        relay.apply(decisions)
        return refusal

    async def serve(self) -> None:
        """Commit complete requests to the store and queue them, batch by batch, until cancelled."""
        async for first in self._send_changes:
            batch = [first]
            while len(batch) < MAX_BATCH:
                try:
                    batch.append(self._send_changes.receive_nowait())
                except trio.WouldBlock:
                    break
            batch = [request for request in batch if request.live]
            faults: dict[str, StoreError] = {}
            async with trio.open_nursery() as nursery:
                for request in batch:
                    nursery.start_soon(self._commit, request, faults)
            for request in batch:
                try:
                    self._on_committed(request, faults.get(request.request_id))
                except Exception:
                    log.exception("internal error in request", request_id=request.request_id)
                    self.relay.fail_internal(request)

    async def _commit(self, request: Request, faults: dict[str, StoreError]) -> None:
        """Commit one request; the store combines a batch into one transaction and fails only the faulty commits."""
        if not request.live:
            return  # cancelled, and reported to the client as such: a request stored now would run after the next start
        try:
            await self.relay.store.commit(_put(request, self.relay.clock.of(trio.current_time())))
            request.accepted = True
        except StoreError as fault:
            log.error("store failed", why=str(fault), request_id=request.request_id)
            faults[request.request_id] = fault
        except Exception:
            log.exception("internal error in request", request_id=request.request_id)
            faults[request.request_id] = StoreError("internal error; see the relay's log")

    def _on_committed(self, request: Request, fault: StoreError | None) -> None:
        """Queue a request that the store has committed, or reject it if the commit failed."""
        relay = self.relay
        if fault is not None:
            if request.live:
                self._reject(request, fault.code, _cannot_store(fault.code))  # the fault may name local files
            return
        request.drop_inputs()
        if not request.live:  # cancelled while the store was writing
            relay.save_status(request)
            return
        request.queued_at = trio.current_time()
        request.add_timeline("accepted")
        source = relay.copies.begin(request)
        for holder in tuple(request.holders):
            holder.on_accepted(request)
        relay.stats.count_accepted(request)
        log.info(
            "request accepted",
            request_id=request.request_id,
            space=request.submit.space,
            principal=request.principal,
        )
        if source is not None:
            relay.copies.follow(request, source)
        else:
            relay.apply(relay.scheduler.enqueue(request.entry, request.queued_at))
        request.wake()
        relay.mark_changed("requests", request.request_id)


def _cannot_store(code: ErrorCode) -> str:
    if code is ErrorCode.STORAGE_FULL:
        return "the relay has no space left to store the request; try again later"
    return "the relay could not store the request (its log says why); send it again with a new id"


def _largest_assign(submit: Submit, principal: Principal) -> Assign:
    """Return the largest `assign` that a request can lead to; it can be larger than the `submit` itself."""
    unknown = "x" * MAX_MEDIA_TYPE_CHARS
    inputs = {
        name: attrs.evolve(info, media_type=unknown) if info.is_fed and not info.media_type else info
        for name, info in submit.inputs.items()
    }
    return Assign(
        request_id=submit.request_id,
        attempt=MAX_ATTEMPT,
        from_seq=MAX_SEQ,
        space=submit.space,
        principal=principal.name,
        params=submit.params,
        inputs=inputs,
        run_timeout_s=1.0,
    )


def _put(request: Request, now: float) -> PutRequest:
    record = RequestRecord(
        request_id=request.request_id,
        principal=request.principal,
        ticket=request.entry.ticket,
        submit=request.submit,
        state=State.QUEUED,
        since=now,
        created_at=request.created_unix,
    )
    # An empty input has no pieces, but it is an input all the same.
    whole = (name for name, info in request.submit.inputs.items() if not info.is_fed)
    return PutRequest(record, {name: bytes(request.inputs.get(name, b"")) for name in whole})
