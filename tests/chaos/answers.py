"""Kills a relay right behind each kind of answer, starts it again, and looks whether it has forgotten what it told.

`python -m tests.chaos.answers --kills 300` prints a table; exit code 1 where an answer was forgotten.
"""

import argparse
import signal
import sys
import tempfile
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import attrs
import trio

from protocol.wire.frames import Cancelled, Frame
from protocol.wire.messages import (
    Accepted,
    Cancel,
    Drain,
    Registered,
    Status,
    StatusReply,
)
from tests.chaos.operator_view import OperatorView, steered
from tests.chaos.processes import Actor, clear
from tests.support.fake_worker import fake_worker, identity
from tests.support.raw_http_client import visitor
from tests.support.relay import Peer, a_submit, an_id, peer

_CONFIG = """\
listen = ""
state_dir = "{folder}/state"

[log]
format = "json"

[spaces.tts]
max_queued = 100000
max_queued_per_principal = 100000
queue_timeout_s = 100000.0

[spaces.drains]
max_workers = 1000

[spaces.served]
max_queued_per_principal = 100000
queue_timeout_s = 100000.0
"""


@attrs.define(eq=False)
class Stage(OperatorView):
    """A relay on a slow disk, which is killed and started again."""

    relay: Actor = attrs.field(kw_only=True)
    kills: Counter[str] = attrs.field(factory=Counter)
    forgotten: Counter[str] = attrs.field(factory=Counter)

    def kill(self) -> None:
        """kill -9, in the turn in which the answer was read."""
        self.relay.signal(signal.SIGKILL)

    async def queued(self, client: Peer, **fields: Any) -> str:
        """A request that was accepted."""
        submit = a_submit(detach=True, **fields)
        client.send(submit)
        await client.next(Accepted)
        return submit.request_id


#: Looks, on the relay that was started again, whether what was answered holds.
Look = Callable[[], Awaitable[bool]]
#: Has something answered, and kills the relay in the same turn.
Scene = Callable[[Stage], Awaitable[Look]]


async def accepted(stage: Stage) -> Look:
    """A request was accepted."""
    async with peer(stage.url, "client") as client:
        request_id = await stage.queued(client)
        stage.kill()

    async def look() -> bool:
        return await stage.state(request_id) == "queued"

    return look


def _is_cancelled(stage: Stage, request_id: str) -> Look:
    async def look() -> bool:
        return await stage.state(request_id) == "cancelled"

    return look


async def cancelled(stage: Stage) -> Look:
    """A client received `cancelled` for a request that waited."""
    async with peer(stage.url, "client") as client:
        request_id = await stage.queued(client)
        client.send(Cancel(request_id=request_id))
        await client.next(Cancelled)
        stage.kill()
    return _is_cancelled(stage, request_id)


async def status(stage: Stage) -> Look:
    """A client cancelled a request that waited, and asked how it stands."""
    async with peer(stage.url, "client") as client:
        request_id = await stage.queued(client)
        client.send(Cancel(request_id=request_id))
        client.send(Status(request_id=request_id))
        assert (await client.next(StatusReply)).state == "cancelled"
        stage.kill()
    return _is_cancelled(stage, request_id)


@asynccontextmanager
async def running(stage: Stage, client: Peer) -> AsyncIterator[tuple[str, Any, Any]]:
    """A request that runs on a worker of the test's own, which does not come back."""
    async with fake_worker(stage.url, spaces=("served",), instance=an_id(), slots=64) as worker:
        request_id = await stage.queued(client, space="served", retry="always")
        while (assign := await worker.assigned()).request_id != request_id:
            pass  # one that an earlier relay has forgotten was cancelled
        yield request_id, worker, assign


async def status_of_running(stage: Stage) -> Look:
    """A client cancelled a request that ran, and asked how it stands."""
    async with peer(stage.url, "client") as client, running(stage, client) as (request_id, _worker, _assign):
        client.send(Cancel(request_id=request_id))
        client.send(Status(request_id=request_id))
        await client.next(StatusReply)
        stage.kill()
    return _is_cancelled(stage, request_id)


async def cancelled_by_worker(stage: Stage) -> Look:
    """A client received `cancelled` for a request that ran."""
    async with peer(stage.url, "client") as client, running(stage, client) as (request_id, worker, assign):
        client.send(Cancel(request_id=request_id))
        await worker.peer.next(Cancel)
        worker.send(Cancelled(**identity(assign, 0), reason="stopped"))
        frame: Frame = await client.next(Frame)
        assert isinstance(frame, Cancelled), frame
        stage.kill()
    return _is_cancelled(stage, request_id)


async def http_cancel(stage: Stage) -> Look:
    """DELETE was answered with `cancelled`."""
    async with peer(stage.url, "client") as client, visitor(stage.url) as http:
        request_id = await stage.queued(client)
        answer = await http.open("DELETE", f"/v1/requests/{request_id}")
        stage.kill()
        assert answer.status == 200
    return _is_cancelled(stage, request_id)


async def http_submit(stage: Stage) -> Look:
    """A request that was posted was answered."""
    request_id = an_id()
    async with visitor(stage.url) as http:
        answer = await http.open("PUT", f"/v1/requests/{request_id}?space=tts", told={"params": {"text": "hello"}})
        stage.kill()
        assert answer.status == 202, answer.status

    async def look() -> bool:
        return await stage.state(request_id) == "queued"

    return look


async def steer_cancel(stage: Stage) -> Look:
    """An operator cancelled a request."""
    async with peer(stage.url, "operator") as operator:
        request_id = await stage.queued(operator)
        await steered(operator, "cancel", request_id)
        stage.kill()
    return _is_cancelled(stage, request_id)


async def promote(stage: Stage) -> Look:
    """An operator put a request to the front."""
    async with peer(stage.url, "operator") as operator:
        _other, request_id = await stage.queued(operator, priority=9), await stage.queued(operator)
        await steered(operator, "promote", request_id)
        stage.kill()

    async def look() -> bool:
        async with peer(stage.url, "operator") as again:
            again.send(Status(request_id=request_id))
            return bool((await again.next(StatusReply)).position == 1)

    return look


async def pause(stage: Stage) -> Look:
    """An operator paused a space, or, where it was paused, resumed it."""
    space = await stage.space("idle")
    if space is None:
        async with peer(stage.url, "operator") as operator:
            await steered(operator, "create_space", "idle")
    before = bool(space and space["paused"])
    async with peer(stage.url, "operator") as operator:
        await steered(operator, "resume_space" if before else "pause_space", "idle")
        stage.kill()

    async def look() -> bool:
        after = await stage.space("idle")
        return after is not None and after["paused"] is not before

    return look


async def create_space(stage: Stage) -> Look:
    """An operator made a space, or, where it was there, deleted it."""
    before = await stage.space("fresh")
    async with peer(stage.url, "operator") as operator:
        await steered(operator, "create_space" if before is None else "delete_space", "fresh")
        stage.kill()

    async def look() -> bool:
        return (await stage.space("fresh") is None) is not (before is None)

    return look


async def create_token(stage: Stage) -> Look:
    """An operator made a token."""
    name = f"p{an_id()}"
    async with peer(stage.url, "operator") as operator:
        made = await steered(operator, "create_token", name, role="client")
        stage.kill()

    async def look() -> bool:
        return await stage.live_tokens(name) == [made["token_id"]]

    return look


async def revoke_token(stage: Stage) -> Look:
    """An operator revoked a token."""
    name = f"p{an_id()}"
    async with peer(stage.url, "operator") as operator:
        await steered(operator, "create_token", name, role="client")
        await steered(operator, "revoke_token", name)
        stage.kill()

    async def look() -> bool:
        return await stage.live_tokens(name) == []

    return look


async def drain_worker(stage: Stage) -> Look:
    """An operator drained a worker, which had not received the drain when the relay was killed."""
    async with peer(stage.url, "operator") as operator, fake_worker(stage.url, spaces=("drains",)) as worker:
        registered = await worker.peer.next(Registered)
        await steered(operator, "drain_worker", registered.worker_id)
        stage.kill()

    async def look() -> bool:
        async with fake_worker(stage.url, spaces=("drains",), instance=worker.instance) as again:
            await again.peer.next(Drain)
            (row,) = [row for row in await stage.rows("workers") if row["worker_id"] == registered.worker_id]
            return bool(row["state"] == "draining")

    return look


SCENES: Mapping[str, Scene] = {
    scene.__name__: scene
    for scene in (
        accepted,
        cancelled,
        status,
        status_of_running,
        cancelled_by_worker,
        http_cancel,
        http_submit,
        steer_cancel,
        promote,
        drain_worker,
        pause,
        create_space,
        create_token,
        revoke_token,
    )
}


async def kill_behind_answers(folder: Path, kills: int) -> Stage:
    """Play the scenes in turn until the relay was killed so often; what it forgot is in `forgotten`."""
    (folder / "relayd.toml").write_text(_CONFIG.format(folder=folder))
    command = ("tests.chaos.slow_disk", "serve", "--config", str(folder / "relayd.toml"))
    relay = Actor("relay", command, {}, folder, lambda _name, _line: None, '"event": "listening"')
    stage = Stage(f"unix:{folder}/state/relayd.sock", relay=relay)
    async with trio.open_nursery() as nursery:
        try:
            await relay.start(nursery)
            await relay.wait_ready()
            for number in range(kills):
                name, scene = list(SCENES.items())[number % len(SCENES)]
                look = await scene(stage)
                await relay.ended()
                await relay.start(nursery)
                await relay.wait_ready()
                stage.kills[name] += 1
                stage.forgotten[name] += not await look()
        finally:
            await relay.kill()
        nursery.cancel_scope.cancel()
    return stage


def report(stage: Stage) -> str:
    """The table, as Markdown."""
    rows = [f"| {name} | {times} | {stage.forgotten[name]} |" for name, times in stage.kills.items()]
    total = f"| all | {stage.kills.total()} | {stage.forgotten.total()} |"
    return "\n".join(["| killed behind | times | forgotten |", "| --- | ---: | ---: |", *rows, total])


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.chaos.answers", description=__doc__)
    parser.add_argument("--kills", type=int, default=300, help="how often the relay is killed (300)")
    folder = Path(tempfile.mkdtemp(prefix="relayd-answers-"))
    stage = trio.run(kill_behind_answers, folder, parser.parse_args().kills)
    print(report(stage), flush=True)
    if stage.forgotten.total():
        return 1
    clear(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
