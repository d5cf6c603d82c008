"""What is told of spaces, workers, requests and clients: one flat map each, for `spaces` and `watch`."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

import attrs
import msgpack
import trio

from protocol.codec import encode
from protocol.errors import EncodeError
from protocol.fields import Value
from protocol.messages import KIB, SpacesReply
from relayd.auth import iso_time
from relayd.states import State
from relayd.store.base import TokenRecord

if TYPE_CHECKING:
    from relayd.relay import Relay

Row = dict[str, Value]
#: Rows in one message: safely below the 64 KiB of a control message together with one last row.
PAGE_BYTES = 24 * KIB
PAGE_ROWS = 200
TOPICS = ("relay", "spaces", "workers", "requests", "clients")


def pages(rows: list[Row]) -> Iterator[tuple[list[Row], bool]]:
    """The rows in pages that fit a message, with whether more follow; one empty page where there are none."""
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
    """Whether a row fits a page; one level deeper than in `register`, a schema may also be nested too deep."""
    try:
        return len(encode(SpacesReply(spaces=[row]))) <= PAGE_BYTES
    except EncodeError:
        return False


def relay_row(relay: "Relay") -> Row:
    """The daemon itself."""
    states = [request.entry.state for request in relay.requests.values()]
    return {
        "name": "relay",
        "uptime_s": round(relay.now_unix() - relay.started_unix, 1),
        "state": "draining" if relay.draining.is_set() else "serving",
        "workers": len(relay.workers),
        "queued": states.count(State.QUEUED),
        "running": states.count(State.RUNNING),
        "frames": relay.frames,
        "frame_bytes": relay.frame_bytes,
        "fenced_frames": relay.fenced_frames,
        "result_memory_bytes": relay.results.memory.held_bytes,
        "result_disk_bytes": relay.results.disk_bytes,
        "results_unsaved": len(relay.results.unsealed),
    }


def space_row(relay: "Relay", name: str, *, with_params: bool = False) -> Row | None:
    """A space; `state` is `ready`, `no worker` or `paused`."""
    space = relay.spaces.get(name)
    if space is None:
        return None
    scheduled = relay.scheduler.spaces[name]
    workers = relay.scheduler.workers_of(name)
    busy, slots = relay.scheduler.slots_of(name)
    row: Row = {
        "name": name,
        "state": "paused" if scheduled.paused else "ready" if workers else "no worker",
        "workers": len(workers),
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
        if not _listable(row):  # a schema of 30 KiB is a worker's right, and no listing's
            row["params"] = {"description": "too large to be listed"}
    return row


def worker_row(relay: "Relay", worker_id: str) -> Row | None:
    """A worker; `state` is `idle`, `busy`, `draining` or `away`."""
    worker = relay.scheduler.workers.get(worker_id)
    if worker is None:
        return None
    port = relay.workers.get(worker_id)
    if port is None:
        state = "away"
    elif worker.draining:
        state = "draining"
    else:
        state = "busy" if worker.held else "idle"
    return {
        "worker_id": worker_id,
        "state": state,
        "spaces": list(worker.spaces)[:64],
        "engine": port.engine if port else "",
        "agent": port.agent if port else "",
        "principal": port.principal if port else "",
        "peer": port.peer if port else "",
        "rtt_ms": round(port.rtt_s * 1000, 1) if port and port.rtt_s is not None else None,
        "slots": worker.slots,
        "busy": len(worker.held),
        "requests": sorted(worker.held)[:16],
    }


def request_row(relay: "Relay", request_id: str) -> Row | None:
    """A request, live or ended."""
    request = relay.requests.get(request_id)
    if request is None:
        return None
    now = trio.current_time()
    end = request.ended_at if request.ended_at is not None else now
    first = request.first_frame_at
    return {
        "request_id": request_id,
        "principal": request.principal,
        "space": request.submit.space,
        "state": str(request.entry.state),
        "priority": request.submit.priority,
        "position": request.told_place[0] if request.told_place and request.entry.state is State.QUEUED else None,
        "age_s": round(end - request.created_at, 3),
        "attempt": request.entry.attempt,
        "worker_id": request.entry.worker_id,
        "first_frame_s": round(first - request.created_at, 3) if first is not None else None,
        "fraction": request.fraction,
        "frames": request.log.next_seq,
        "bytes": request.log.size_bytes,
        "audio_s": request.audio_s,
        "readers": len(request.log.readers),
        "code": request.code,
        "message": request.message,
    }


def client_row(relay: "Relay", connection_id: str) -> Row | None:
    """A client's connection."""
    client = relay.clients.get(connection_id)
    if client is None:
        return None
    return {
        "connection_id": connection_id,
        "principal": client.principal.name,
        "role": client.principal.role,
        "peer": client.link.peer,
        "pending_bytes": client.link.backlog_bytes,
        "frames_sent": client.frames_sent,
        "bytes_sent": client.bytes_sent,
        "requests": len(client.held),
    }


def token_row(record: TokenRecord, now: float) -> Row:
    """A token as listed; its text is known to nobody."""
    state = "live" if record.live(now) else "revoked" if record.revoked_at is not None else "expired"
    return {
        "token_id": record.token_id,
        "principal": record.principal,
        "role": record.role,
        "spaces": list(record.spaces),
        "state": state,
        "created": iso_time(record.created_at),
        "expires": iso_time(record.expires_at) if record.expires_at is not None else None,
        "limits": {name: most for name, most in attrs.asdict(record.limits).items() if most is not None},
    }
