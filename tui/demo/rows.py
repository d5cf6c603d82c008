"""The operator rows of the simulated relay, with the keys of docs/protocol.md §9."""

from typing import Any

from protocol.wire.validators import Value
from tui.demo.simulation import BYTES_PER_AUDIO_S, Client, Play, Request, Space, Talk, Worker, an_id

Row = dict[str, Value]
TOPICS = ("spaces", "workers", "requests", "talks", "clients", "log", "audit")
#: Rates are averaged over this many seconds.
MINUTE_S = 60


def everything(play: Play) -> dict[str, list[Row]]:
    """All rows of all topics."""
    return {
        "relay": [relay(play)],
        "spaces": [_space(play, one) for one in play.spaces.values()],
        "workers": [_worker(play, one) for one in play.workers.values()],
        "requests": [_request(play, one) for one in play.requests.values()],
        "talks": [_talk(play, one) for one in play.talks.values()],
        "clients": [_client(play, one) for one in play.clients.values()],
        "history": [_history(play)],
        "log": list(play.log)[-200:],
        "audit": list(play.audit),
    }


def row(play: Play, topic: str, key: str) -> Row | None:
    """One row, or None where it no longer exists."""
    found: Any
    match topic:
        case "spaces":
            return _space(play, play.spaces[key])
        case "workers":
            return _worker(play, found) if (found := play.workers.get(key)) else None
        case "requests":
            return _request(play, found) if (found := play.requests.get(key)) else None
        case "talks":
            return _talk(play, play.talks[key])
        case "clients":
            return _client(play, found) if (found := play.clients.get(key)) else None
        case _:
            lines = play.log if topic == "log" else play.audit
            return next((line for line in reversed(lines) if line["id"] == key), None)


def relay(play: Play, *, still: bool = False) -> Row:
    """The row of the daemon; `still` leaves out fields that always change, so that rows can be compared."""
    states = [request.state for request in play.requests.values()]
    first = sorted(value for space in play.spaces.values() for value in space.first_audio)
    requests, audio_s, errors = (sum(play.last_seconds(MINUTE_S, at)) for at in range(3))
    row: Row = {
        "name": "relay",
        "version": "0.2.0",
        "host": "relay.example.org",
        "pid": 4711,
        "urls": ["wss://relay.example.org:443", "unix:/run/relayd/relayd.sock"],
        "state": "serving",
        "workers": sum(worker.connected for worker in play.workers.values()),
        "spaces": len(play.spaces),
        "connections": len(play.clients) + len(play.workers) + 1,
        "queued": states.count("queued"),
        "running": states.count("running"),
        "requests_min": int(requests),
        "errors_min": int(errors),
        "audio_s_min": round(audio_s, 1),
        "out_bytes_s": int(sum(play.last_seconds(5, 1)) * BYTES_PER_AUDIO_S / 5),
        "in_bytes_s": int(sum(play.last_seconds(5, 1)) * BYTES_PER_AUDIO_S / 5),
        "first_audio_p50_s": _quantile(first, 0.5),
        "first_audio_p95_s": _quantile(first, 0.95),
        "slow_consumers": 0,
        "requests_total": play.requests_total,
        "audio_s_total": round(play.audio_s_total, 2),
        "frames": int(play.audio_s_total * 10),
        "frame_bytes": int(play.audio_s_total * BYTES_PER_AUDIO_S),
        "fenced_frames": 0,
        "result_memory_bytes": int(sum(one.audio_s for one in play.requests.values()) * BYTES_PER_AUDIO_S),
        "result_disk_bytes": 0,
        "results_unsaved": 0,
    }
    return row if still else {**row, "uptime_s": round(play.scene.uptime_s + play.now, 1)}


def _space(play: Play, space: Space) -> Row:
    part = space.part
    serving = [one for one in play.workers.values() if one.connected and part.name in one.part.spaces]
    first = sorted(space.first_audio)
    ended = space.ended["completed"] + space.ended["failed"]
    waits = [play.now - play.requests[one].created for one in space.queue]
    return {
        "name": part.name,
        "state": "paused" if space.paused else "ready" if serving else "no worker",
        "paused": space.paused,
        "workers": len(serving),
        "draining": sum(one.draining for one in serving),
        "max_workers": 4,
        "slots": sum(one.part.slots for one in serving),
        "busy": sum(len(one.held) for one in serving),
        "queued": len(space.queue),
        "running": space.running,
        "oldest_wait_s": round(max(waits), 1) if waits else None,
        "requests_min": sum(at > play.now - MINUTE_S for at in space.arrivals),
        "first_audio_p50_s": _quantile(first, 0.5),
        "first_audio_p95_s": _quantile(first, 0.95),
        "rtf": part.rtf if ended and part.engine != "function" else None,
        "error_percent": round(100 * space.ended["failed"] / ended, 1) if ended else None,
        "engine": part.engine,
        "format": None,
        "completed": space.ended["completed"],
        "failed": space.ended["failed"],
        "cancelled": space.ended["cancelled"],
        "description": part.description,
    }


def _worker(play: Play, worker: Worker) -> Row:
    part, silent = worker.part, worker.silent_since is not None
    if not worker.connected:
        state = "away"
    elif silent:
        state = "stale"
    else:
        state = "draining" if worker.draining else "busy" if worker.held else "idle"
    rtf = play.spaces[part.spaces[0]].part.rtf
    speaking = 0 if silent else sum(play.requests[one].first_frame is not None for one in worker.held)
    return {
        "worker_id": worker.worker_id,
        "name": part.name,
        "connection_id": worker.connection_id if worker.connected else "",
        "state": state,
        "draining": worker.draining,
        "spaces": list(part.spaces),
        "engine": part.engine,
        "agent": part.version,
        "version": part.version.partition("/")[2],
        "principal": "gpu",
        "peer": part.peer,
        "rtt_ms": part.rtt_ms if worker.connected else None,
        "last_seen_s": None if worker.silent_since is None else round(play.now - worker.silent_since, 1),
        "rtf": rtf if worker.held else None,
        "bytes_s": int(speaking * BYTES_PER_AUDIO_S / rtf),
        "slots": part.slots,
        "busy": len(worker.held),
        "requests": sorted(worker.held),
    }


def _request(play: Play, request: Request) -> Row:
    until = request.ended if request.ended is not None else play.now
    started = request.started
    slow = any(one.slow and one.principal == request.principal for one in play.clients.values())
    return {
        "request_id": request.request_id,
        "principal": request.principal,
        "space": request.space,
        "state": request.state,
        "stopping": request.stopping and request.ended is None,
        "priority": request.priority,
        "position": play.position(request),
        "age_s": round(until - request.created, 3),
        "queued_s": round((until if started is None else started) - request.created, 3),
        "run_s": None if started is None else round(until - started, 3),
        "ended_s": None if request.ended is None else round(play.now - request.ended, 3),
        "created_at": round(play.unix - play.now + request.created, 3),
        "attempt": request.attempt,
        "worker_id": request.worker_id,
        "first_frame_s": None if request.first_frame is None else round(request.first_frame - request.created, 3),
        "fraction": request.fraction,
        "frames": int(request.audio_s * 10),
        "bytes": int(request.audio_s * BYTES_PER_AUDIO_S),
        "audio_s": round(request.audio_s, 2) if request.audio_s else None,
        "readers": 1,
        "buffered_bytes": int(request.audio_s * BYTES_PER_AUDIO_S) if slow else 0,
        "code": request.code,
        "message": request.message,
    }


def _talk(play: Play, talk: Talk) -> Row:
    state, said_s = talk.state(play.now), round(play.now - talk.said, 1)
    code, message = talk.failed
    is_idle = state == "idle"
    return {
        "talk_id": talk.talk_id,
        "principal": talk.part.principal,
        "user": talk.part.user,
        "session": talk.part.session,
        "state": state,
        "turns": talk.turns,
        "waiting": talk.waiting,
        "reply_s": None if is_idle else said_s,
        "said_s": said_s,
        "text_request": None if is_idle else an_id(talk.turns),
        "speech_request": None if is_idle else an_id(talk.turns + 1),
        "code": code,
        "message": message,
    }


def _client(play: Play, client: Client) -> Row:
    held = [one for one in play.requests.values() if one.principal == client.principal and one.ended is None]
    speaking = [one for one in held if one.state == "running" and one.first_frame is not None]
    return {
        "connection_id": client.connection_id,
        "principal": client.principal,
        "role": "client",
        "readonly": False,
        "agent": "relay/0.2.0 (Python 3.11)",
        "peer": f"192.0.2.{sum(map(ord, client.principal)) % 250 + 1}:{40_000 + len(client.principal)}",
        "connected_s": round(play.now + play.scene.past_s, 1),
        "rtt_ms": 24.0,
        "pending_bytes": client.pending_bytes,
        "slow": client.slow and client.pending_bytes > 0,
        "bytes_s": 0 if client.slow else int(sum(one.speed for one in speaking) * BYTES_PER_AUDIO_S),
        "frames_sent": client.bytes_sent // (BYTES_PER_AUDIO_S // 10),
        "bytes_sent": client.bytes_sent,
        "requests": len(held),
        "readers": len(held),
    }


def _history(play: Play) -> Row:
    requests, audio_s = play.last_seconds(MINUTE_S, 0), play.last_seconds(MINUTE_S, 1)
    return {"name": "relay", "requests": [int(one) for one in requests], "audio_s": [round(one, 2) for one in audio_s]}


def describe(play: Play, request: Request) -> Row:
    """The answer to `describe`: everything known about one request."""
    return {
        "request": _request(play, request),
        "timeline": [dict(event) for event in request.timeline],
        "timeline_left_out": 0,
        "params": {"text": request.text, "seed": 7, "cfg_value": 2.0},
        "params_cut": False,
        "inputs": [],
        "details": {"code": request.code} if request.code else {},
        "report": f"RuntimeError: {request.message}\n" if request.code == "engine_failed" else "",
        "queue_timeout_s": 120.0,
        "run_timeout_s": 120.0,
        "idle_timeout_s": 30.0,
        "holders": 1,
        "retry": "before_output",
        "group": None,
        "detach": False,
        "format": {"encoding": "pcm_s16le", "sample_rate": 48_000, "channels": 1},
        "video": None,
        "readers": [
            {"connection_id": one.connection_id, "principal": one.principal, "behind_frames": 0}
            for one in play.clients.values()
            if one.principal == request.principal
        ],
    }


def _quantile(ordered: list[float], share: float) -> float | None:
    return round(ordered[min(len(ordered) - 1, int(share * len(ordered)))], 3) if ordered else None
