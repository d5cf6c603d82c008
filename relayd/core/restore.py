"""Restores spaces, requests and results from the store when the daemon starts."""

import time
from collections.abc import Collection, Mapping

import attrs
import structlog
import trio

from relayd.core.pipes import open_pipes
from relayd.core.relay import Relay
from relayd.core.space import Space
from relayd.frames.frame_file import Contents
from relayd.frames.frame_log import FrameLog
from relayd.requests.final_frame import make_final_frame
from relayd.requests.outcome import Outcome
from relayd.requests.request import UNHEARD_GRACE_S, Request
from relayd.scheduling.model import ScheduledRequest, State
from relayd.store.base import StoreError
from relayd.store.records import (
    COPIED,
    DeleteRequest,
    DeleteSpace,
    DeleteWorker,
    Loaded,
    PutSpace,
    RequestRecord,
    SpaceRecord,
    StoredInput,
)

log = structlog.get_logger("relayd")

#: The wire allows attempts up to a million, and the first after a restart skips one. No request gets anywhere near it.
LAST_ATTEMPT = 999_990
#: Damaged records that are logged one by one.
MAX_REPORTED = 20


async def restore(relay: Relay, loaded: Loaded) -> None:
    """Open the spaces of the configuration and the store, and restore the requests and the results of ended ones.

    Raises:
        StoreError: the results folder cannot be used.
    """
    for damage in loaded.damaged[:MAX_REPORTED]:
        log.error("store has a damaged record", what=damage)
    if len(loaded.damaged) > MAX_REPORTED:
        log.error("store has more damaged records", records=len(loaded.damaged) - MAX_REPORTED)
    relay.records_set_aside = len(loaded.damaged)
    relay.workers.drained.update(loaded.drains)
    records = {record.name: record for record in loaded.spaces}
    for name, config in relay.config.spaces.items():
        record = records.pop(name, SpaceRecord(name=name, created_at=time.time()))
        await _open(relay, attrs.evolve(record, config=config, made_by="config"))
    for record in records.values():
        kept = any(r.submit.space == record.name and State(r.state).live for r in loaded.requests)
        if record.made_by == "command" or kept:
            await _open(relay, record)
        else:
            log.info("space was removed from relayd.toml", space=record.name)
            relay.store.post(DeleteSpace(record.name))
    known, left_alone = _in_open_spaces(relay, loaded)
    ended = {stored.request_id: stored.created_at for stored in known if not State(stored.state).live}
    # Of these the `Finalizer` may store the end first: a kill in between leaves an unfinished file.
    recorded_first = frozenset(each.request_id for each in known if each.state != State.COMPLETED)
    results = await relay.results.open(ended, left_alone, recorded_first)
    live = []
    for stored in known:
        try:
            fed = loaded.live_inputs.get(stored.request_id, {})
            if _restore_request(relay, stored, results.get(stored.request_id), fed):
                live.append(stored.request_id)
        except Exception:
            log.exception("request cannot be restored, set aside", request_id=stored.request_id)
            relay.set_aside(stored.request_id)
            relay.records_set_aside += 1
    for stored in sorted((each for each in known if each.promoted), key=lambda each: each.promoted):
        relay.scheduler.promote(stored.request_id)
    relay.copies.restore()
    for entry in (relay.requests[key].entry for key in live):
        if entry.state is not State.RUNNING:
            relay.scheduler.state.spaces[entry.space].settling = True
    await _store_highest_attempts(relay, live)
    if live or results:
        log.info("requests restored", requests=len(live), results=len(results))


async def serve_settling(relay: Relay, workers: Collection[tuple[str, str]]) -> None:
    """Hold back what waits until the workers of its space have come back: one of them may have run it before.

    That an attempt starts is stored without anybody waiting for it, and a killed relay may have been faster.

    Args:
        relay: a relay that was restored.
        workers: id and space of those that were connected before; of a space without any, nothing is known.
    """
    settling = {name for name, space in relay.scheduler.state.spaces.items() if space.settling}
    away, known = set(workers), {space for _, space in workers}
    with trio.move_on_after(UNHEARD_GRACE_S):
        while settling:
            await relay.workers.joined.wait()
            away = {(worker_id, space) for worker_id, space in away if worker_id not in relay.workers}
            for name in (settling & known).difference(space for _, space in away):
                settling.discard(name)
                _settle(relay, name)
    for name in settling:
        _settle(relay, name)
    for worker_id in {worker_id for worker_id, _ in away}:
        relay.store.post(DeleteWorker(worker_id))


def _settle(relay: Relay, name: str) -> None:
    """Let requests of a space start. How long they have waited since the restart does not count: none could start."""
    if (space := relay.scheduler.state.spaces.get(name)) is None:
        return  # it was deleted meanwhile
    now = trio.current_time()
    waiting = [relay.requests[entry.request_id] for entry in space.queue]
    for request in waiting:
        request.queued_at += now - max(request.restored_at, request.queued_at)
        request.wake()
    relay.store.post(*map(relay.status_update, waiting))
    relay.apply(relay.scheduler.settle(name, now))


async def _store_highest_attempts(relay: Relay, live: list[str]) -> None:
    """Store which numbers this relay may give out before it stores that it did: it may be killed in between, too."""
    updates = [relay.status_update(relay.requests[request_id]) for request_id in live]
    try:
        if updates:
            await relay.store.commit(*updates)
    except StoreError as fault:
        log.warning("the numbers of attempts are not stored", why=str(fault))


def _in_open_spaces(relay: Relay, loaded: Loaded) -> tuple[list[RequestRecord], frozenset[str]]:
    """Return the requests whose spaces are open, and the ids of those that are left in the store as they are.

    A space may be missing because its record is damaged: its requests wait until it is created again. A deleted space
    has only ended requests, which are deleted with it.
    """
    left_alone = {key for table, key in loaded.damaged_keys if table == "requests" and isinstance(key, str)}
    known = []
    for stored in loaded.requests:
        name = stored.submit.space
        if name in relay.spaces:
            known.append(stored)
        elif State(stored.state).live or ("spaces", name) in loaded.damaged_keys:
            log.error("request without its space, set aside", request_id=stored.request_id, space=name)
            relay.records_set_aside += 1
            left_alone.add(stored.request_id)
        else:
            relay.store.post(DeleteRequest(stored.request_id))
    return known, frozenset(left_alone)


def _restore_request(
    relay: Relay, stored: RequestRecord, result: Contents | None, fed: Mapping[str, StoredInput]
) -> bool:
    """Add a stored request to the relay again; returns whether it is live."""
    if max(stored.attempt, stored.highest_attempt) > LAST_ATTEMPT:
        raise ValueError(f"attempt {stored.attempt} leaves no number for another attempt on the wire")
    request = _make_request(relay, stored, result)
    if request.live:
        relay.feeds.open(request, fed)
        relay.scheduler.restore(request.entry, trio.current_time())
    relay.add_request(request)
    if request.live:
        open_pipes(relay, request)
    if stored.stopping is not None and request.live:
        relay.cancel(request, stored.stopping)  # its worker may never have received the cancel message
    return request.live


async def _open(relay: Relay, record: SpaceRecord) -> None:
    space = Space(
        name=record.name,
        config=record.config,
        made_by=record.made_by,
        created_at=record.created_at,
        engine=record.engine,
        params=dict(record.params),
        inputs=dict(record.inputs),
        format=record.format,
    )
    await relay.spaces.open(space, paused=record.paused)
    relay.store.post(PutSpace(relay.spaces.record(space)))


def _make_request(relay: Relay, record: RequestRecord, result: Contents | None) -> Request:
    """Make a request from its record. Its deadlines continue: the relay's clock did not run meanwhile."""
    now, state = trio.current_time(), State(record.state)
    since = min(now, relay.clock.trio_time(record.since))
    submit = record.submit
    sources = {info.from_ for info in submit.inputs.values() if info.from_ is not None} if state.live else set()
    entry = ScheduledRequest(
        request_id=record.request_id,
        space=submit.space,
        principal=record.principal,
        priority=submit.priority,
        ticket=record.ticket,
        retry=submit.retry,
        state=state,
        attempt=record.attempt,
        worker_id=record.worker_id if state is State.RUNNING and record.worker_id != COPIED else None,
        copied=record.worker_id == COPIED,
        attempt_may_be_newer=state.live,
        highest_attempt=max(record.attempt, record.highest_attempt) + 1,
        losses=record.losses,
        started_at=since,
        worker_lost_at=None if record.away_since is None else min(now, relay.clock.trio_time(record.away_since)),
        reproducible=record.reproducible,
        has_output=record.has_output,
        input_bytes=sum(info.size for info in submit.inputs.values()),
        promoted=record.promoted,
        sources={each for each in sources if each in relay.scheduler.state.entries},
        silent_sources=sources,
    )
    request = Request.of(
        submit,
        record.principal,
        entry,
        relay.spaces[submit.space].config,
        record.created_at,
        uploaded=True,
        accepted=True,
        abandoned_at=now,
        restored_at=now,
        worker_grace_s=relay.config.limits.worker_grace_s,
        ended_at=None if state.live else since,
        code=record.code,
        message=record.message,
        outcome=Outcome.unpack(record.outcome),
    )
    if state is State.RUNNING:
        request.attempt_started_at = since
    request.details, request.report = request.outcome.details, request.outcome.report
    request.created_at = request.queued_at = since
    if not state.live:
        request.release_run_data()
        if result is not None:
            request.log = FrameLog.of_file(record.request_id, result)
        elif state is State.COMPLETED:
            request.has_result = False
        else:  # its frames are lost, but its record says how it ended
            request.log.append(make_final_frame(request), ends=True)
    return request
