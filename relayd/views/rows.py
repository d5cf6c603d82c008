"""Spaces, workers, requests and clients as rows, which are flat maps, for `spaces` and `watch`."""

import importlib.metadata
import os
import socket
from collections.abc import Iterable, Iterator

import msgpack
import trio

from protocol.wire.codec import encode
from protocol.wire.errors import EncodeError
from protocol.wire.messages import SpacesReply
from protocol.wire.structs import KIB
from protocol.wire.validators import Value
from relayd.core.relay import Relay
from relayd.frames.frame_log import HIGH_WATER_BYTES
from relayd.requests.live_input import PipedInput
from relayd.requests.request import Request
from relayd.requests.summary import MAX_INPUTS
from relayd.scheduling.model import State
from relayd.views.token_rows import Row

#: Limit for the rows of one message, well below the 64 KiB of a control message.
PAGE_BYTES = 24 * KIB
PAGE_ROWS = 200
TOPICS = ("relay", "spaces", "workers", "requests", "talks", "clients", "history", "log", "audit")
VERSION = importlib.metadata.version("relayd")
HOST = socket.gethostname()
#: Number of ping intervals without a sign of life after which a worker is shown as stale.
STALE_PINGS = 2


def pages(rows: Iterable[Row]) -> Iterator[tuple[list[Row], bool]]:
    """Yield the rows in pages that fit in a message, each with whether more follow; one empty page if there are none.

    A page is yielded as soon as it is full and there is another row, so rows can be made while pages are sent.
    """
    page: list[Row] = []
    size = 0
    for row in rows:
        cost = len(msgpack.packb(row))
        if page and (size + cost > PAGE_BYTES or len(page) >= PAGE_ROWS):
            yield page, True
            page, size = [], 0
        page.append(row)
        size += cost
    yield page, False


def _listable(row: Row) -> bool:
    """Whether a row fits in a page; its schema may be too large, or nested too deep, by one level more than before."""
    try:
        return len(encode(SpacesReply(spaces=[row]))) <= PAGE_BYTES
    except EncodeError:
        return False


def relay_row(relay: Relay) -> Row:
    """Return the row of the daemon."""
    now, stats = trio.current_time(), relay.stats
    spaces = relay.scheduler.state.spaces.values()
    return {
        "name": "relay",
        "version": VERSION,
        "host": HOST,
        "pid": os.getpid(),
        "urls": relay.urls[:16],
        "uptime_s": round(now - relay.started_at, 1),
        "state": "draining" if relay.draining.is_set() else "serving",
        "spaces": len(relay.spaces),
        "workers": len(relay.workers),
        "connections": len(relay.connections),
        "queued": sum(len(space.queue) for space in spaces),
        "running": relay.running_count,
        "requests_total": int(stats.accepted.total),
        "requests_min": int(stats.accepted.sum(now)),
        "errors_min": int(stats.errors.sum(now)),
        "audio_s_total": round(stats.audio_s, 1),
        "audio_s_min": round(stats.audio.sum(now), 1),
        "first_audio_p50_s": stats.first_audio.percentile(now, 0.5),
        "first_audio_p95_s": stats.first_audio.percentile(now, 0.95),
        "out_bytes_s": stats.out.per_s,
        "in_bytes_s": stats.frames_in.per_s,
        "frames": stats.frames,
        "frame_bytes": stats.frame_bytes,
        "fenced_frames": relay.fenced_frames,
        "slow_consumers": relay.slow_consumers,
        "result_memory_bytes": relay.results.memory.held_bytes,
        "result_disk_bytes": relay.results.disk_bytes,
        "results_unsaved": relay.results.unsaved_count,
    }


def history_row(relay: Relay) -> Row:
    """Return requests and seconds of audio for each of the last sixty seconds, oldest first, for a screen's graph."""
    now, stats = trio.current_time(), relay.stats
    return {
        "name": "relay",
        "requests": [int(count) for count in stats.accepted.by_second(now)],
        "audio_s": [round(audio_s, 2) for audio_s in stats.audio.by_second(now)],
    }


def space_row(relay: Relay, name: str, *, with_params: bool = False) -> Row | None:
    """Return the row of a space, with `state` `ready`, `no worker` or `paused`; None if it does not exist."""
    space = relay.spaces.get(name)
    if space is None:
        return None
    scheduled = relay.scheduler.state.spaces[name]
    workers = relay.scheduler.state.workers_of(name)
    busy, slots = relay.scheduler.state.slots_of(name)
    row: Row = {
        "name": name,
        "state": "paused" if scheduled.paused else "ready" if workers else "no worker",
        "workers": len(workers),
        "draining": sum(worker.draining for worker in workers),
        "max_workers": space.config.max_workers,
        "slots": slots,
        "busy": busy,
        "queued": len(scheduled.queue),
        "running": len(scheduled.running),
        "engine": space.engine,
        "format": space.format.to_map() if space.format else None,
        "completed": space.ended.get(State.COMPLETED, 0),
        "failed": space.ended.get(State.FAILED, 0),
        "cancelled": space.ended.get(State.CANCELLED, 0),
        "description": space.config.description,
    }
    if with_params:
        row["inputs"] = {key: rule.to_map() for key, rule in space.inputs.items()}
        row["params"] = space.params
        if not _listable(row):  # a worker may register a schema of 30 KiB, which is too large for a list
            row["params"] = {"description": "too large to be listed"}
    return row


def watched_space_row(relay: Relay, name: str) -> Row | None:
    """Return the row of a space with the fields that only operators get; None if it does not exist."""
    row = space_row(relay, name)
    if row is None:
        return None
    now, stats = trio.current_time(), relay.stats.space(name)
    scheduled = relay.scheduler.state.spaces[name]
    since = min(
        (relay.requests[entry.request_id].queued_at for entry in scheduled.queue.oldest_candidates()), default=None
    )
    return row | {
        "paused": scheduled.paused,
        "oldest_wait_s": round(now - since, 1) if since is not None else None,
        "requests_min": int(stats.accepted.sum(now)),
        "first_audio_p50_s": stats.first_audio.percentile(now, 0.5),
        "first_audio_p95_s": stats.first_audio.percentile(now, 0.95),
        "rtf": stats.ends.rtf(now),
        "error_percent": stats.ends.error_percent(now),
    }


def worker_row(relay: Relay, worker_id: str) -> Row | None:
    """Return the row of a worker; None if it is unknown.

    Its `state` is `idle`, `busy`, `draining`, `cordoned`, `resting`, `stale` (connected, but silent) or `away`.
    """
    worker = relay.scheduler.state.workers.get(worker_id)
    if worker is None:
        return None
    port, stats = relay.workers.get(worker_id), relay.stats.worker(worker_id)
    now = trio.current_time()
    silent_s = now - (port.received_at if port else stats.heard_at)
    if port is None:
        state = "away"
    elif silent_s > STALE_PINGS * relay.config.limits.ping_interval_s:
        state = "stale"
    elif worker.draining:
        state = "cordoned" if relay.workers.drained.get(worker_id) else "draining"
    elif relay.scheduler.state.is_resting(worker):
        state = "resting"
    else:
        state = "busy" if worker.held else "idle"
    return {
        "worker_id": worker_id,
        "name": stats.name,
        "connection_id": port.connection_id if port else "",
        "state": state,
        "draining": worker.draining,
        "spaces": list(worker.spaces)[:64],
        "engine": stats.engine,
        "agent": stats.agent,
        "version": stats.agent.partition("/")[2],
        "principal": stats.principal,
        "peer": stats.peer,
        "rtt_ms": round(port.rtt_s * 1000, 1) if port and port.rtt_s is not None else None,
        "last_seen_s": round(silent_s, 1) if state in ("stale", "away") else None,
        "rtf": stats.ends.rtf(now),
        "bytes_s": stats.rate.per_s,
        "slots": worker.slots,
        "busy": len(worker.held),
        "requests": sorted(worker.held)[:16],
    }


def request_row(relay: Relay, request_id: str, position: int | None = None) -> Row | None:
    """Return the row of a live or ended request; None if it is unknown. `position` in the queue counts from 1."""
    request = relay.requests.get(request_id)
    if request is None:
        return None
    now, entry = trio.current_time(), request.entry
    end = request.ended_at if request.ended_at is not None else now
    first = request.first_frame_at
    started_at = _started_at(request)
    has_queued = request.accepted and not request.waits_for_source
    row: Row = {
        "request_id": request_id,
        "principal": request.principal,
        "space": request.submit.space,
        "state": str(entry.state),
        "stopping": request.live and entry.cancel_reason is not None,
        "priority": request.submit.priority,
        "position": position,
        "created_at": round(request.created_unix, 3),
        "age_s": round(end - request.created_at, 3),
        "queued_s": round(max(0.0, (started_at or end) - request.queued_at), 3) if has_queued else None,
        "run_s": round(end - started_at, 3) if started_at is not None else None,
        "ended_s": round(now - request.ended_at, 1) if request.ended_at is not None else None,
        "attempt": entry.attempt,
        "worker_id": entry.worker_id,
        "first_frame_s": round(first - request.created_at, 3) if first is not None else None,
        "fraction": request.fraction,
        "frames": request.log.next_seq,
        "bytes": request.log.size_bytes,
        "audio_s": request.audio_s,
        "readers": len(request.log.readers),
        "buffered_bytes": buffered_bytes(request),
        "code": request.code,
        "message": request.message,
    }
    return row | ({"inputs": fed_inputs(request)} if request.fed else {})


def found_row(request: Request) -> Row:
    """Return the row of a request for `find`: what whoever submitted it may know, and is cheap to tell of many."""
    entry = request.entry
    end = request.ended_at if request.ended_at is not None else trio.current_time()
    return {
        "request_id": request.request_id,
        "space": entry.space,
        "principal": request.principal,
        "state": str(entry.state),
        "priority": request.submit.priority,
        "created_at": round(request.created_unix, 3),
        "age_s": round(end - request.created_at, 3),
        "attempt": entry.attempt,
        "audio_s": request.audio_s,
        "code": request.code,
        "message": request.message,
    }


def fed_inputs(request: Request) -> dict[str, Value]:
    """Return what there is of each live or piped input of a live request, and how it comes."""
    now = trio.current_time()
    return {
        name: {
            "bytes": fed.size,
            "bytes_s": fed.bytes_s(now),
            "age_s": round(now - max(fed.received_at, request.created_at), 1),
            "ended": fed.ended,
            **({"from": fed.source_id} if isinstance(fed, PipedInput) else {}),
        }
        for name, fed in list(request.fed.items())[:MAX_INPUTS]
    }


def _started_at(request: Request) -> float | None:
    """Return when its last attempt was assigned; None if it is not running and did not end while running."""
    entry = request.entry
    ran = entry.worker_id is not None and not request.live
    return entry.started_at if ran or entry.state is State.RUNNING else None


def buffered_bytes(request: Request) -> int:
    """Estimate the bytes that the slowest reader has not received, as if all frames had the same size."""
    frames = request.log
    waiting = [
        (frames.next_seq - reader.seq) * frames.size_bytes // max(1, frames.next_seq) + reader.sink.backlog_bytes
        for reader in frames.readers
    ]
    return max(waiting, default=0)


def talk_row(relay: Relay, talk_id: str) -> Row | None:
    """Return the row of a conversation; None if it is not in use, or there are none."""
    return relay.talks.row(talk_id) if relay.talks is not None else None


def client_row(relay: Relay, connection_id: str) -> Row | None:
    """Return the row of a client's or operator's connection; None if it does not exist."""
    client = relay.clients.get(connection_id)
    if client is None:
        return None
    connection, rate = relay.connections[connection_id], relay.stats.clients.get(connection_id)
    rtt_s = client.link.rtt_s
    return {
        "connection_id": connection_id,
        "principal": client.principal.name,
        "role": client.principal.role,
        "readonly": client.principal.readonly,
        "agent": connection.agent,
        "peer": client.link.peer,
        "connected_s": round(trio.current_time() - connection.connected_at, 1),
        "rtt_ms": round(rtt_s * 1000, 1) if rtt_s is not None else None,
        "pending_bytes": client.link.backlog_bytes,
        "slow": client.link.backlog_bytes >= HIGH_WATER_BYTES,
        "bytes_s": rate.per_s if rate else 0,
        "frames_sent": client.frames_sent,
        "bytes_sent": client.bytes_sent,
        "requests": len(client.held_requests),
        "readers": len(client.readers),
    }
