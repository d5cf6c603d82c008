"""Equal requests, of which a worker runs one."""

import hashlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from protocol.wire.frames import Audio, Frame
from protocol.wire.messages import Accepted, Assign, Rejected, Submit
from protocol.wire.structs import InputRule
from tests.support.fake_worker import FakeWorker, fake_worker, samples
from tests.support.relay import Daemon, Peer, a_submit, daemon, peer

PCM = [samples(1_000, seed) for seed in (1, 2, 3)]
CACHE: dict[str, Any] = {"cache_s": 600.0}
#: What its samples depend on, besides the request.
ONE: dict[str, Any] = {"reproducible": True, "fingerprint": "one"}
ANY = InputRule(media_types=["audio/*", "text/plain"], max_bytes=1_000)


@asynccontextmanager
async def a_relay(folder: Path, space: dict[str, Any] = CACHE, **overrides: Any) -> AsyncIterator[Daemon]:
    async with daemon(folder, spaces={"tts": space, "other": space}, **overrides) as relay:
        yield relay


@asynccontextmanager
async def a_stage(
    folder: Path, space: dict[str, Any] = CACHE, **overrides: Any
) -> AsyncIterator[tuple[Daemon, FakeWorker, Peer]]:
    """A relay that keeps results, a worker with one slot, and a client."""
    async with (
        a_relay(folder, space, **overrides) as relay,
        fake_worker(relay.url, **ONE) as worker,
        peer(relay.url, "client") as client,
    ):
        yield relay, worker, client


async def spoken(worker: FakeWorker, client: Peer, submit: Submit, pcm: list[bytes] = PCM) -> list[Any]:
    """A request that the worker runs; its frames."""
    client.send(submit)
    accepted = await client.next(Accepted)
    assign = await worker.assigned()
    assert (assign.request_id, accepted.cached) == (submit.request_id, None)
    worker.speak(assign, pcm)
    return await client.frames(submit)


async def cached(client: Peer, submit: Submit, pcm: list[bytes] = PCM) -> list[Any]:
    """A request that no worker runs; its frames."""
    client.send(submit)
    assert (await client.next(Accepted, Rejected)) == Accepted(request_id=submit.request_id, cached=True)
    frames = await client.frames(submit)
    assert frames[-1].cached
    assert digest(frames) == hashlib.sha256(b"".join(pcm)).hexdigest()
    assert {(frame.request_id, frame.attempt) for frame in frames} == {(submit.request_id, 1)}
    return frames


async def missed(worker: FakeWorker, client: Peer, submit: Submit) -> None:
    assert not (await spoken(worker, client, submit))[-1].cached


def digest(frames: list[Frame]) -> str:
    return hashlib.sha256(b"".join(frame.pcm for frame in frames if isinstance(frame, Audio))).hexdigest()


def hits(relay: Daemon) -> tuple[int, int]:
    stats = relay.relay.stats.space("tts")
    return stats.cache_hits, stats.cache_misses


@asynccontextmanager
async def joined(relay: Daemon, worker: FakeWorker, **fields: Any) -> AsyncIterator[tuple[Peer, Assign, Peer, Submit]]:
    """A request of which half is spoken, and one that has joined it: both their clients."""
    async with peer(relay.url, "client") as one, peer(relay.url, "client") as other:
        one.send(a_submit())
        assign = await worker.assigned()
        worker.speak(assign, PCM[:2], end=False)
        await one.next(Audio)
        other.send(submit := a_submit(**fields))
        assert (await other.next(Accepted)).cached
        assert [(await other.next(Frame)).seq for _ in range(3)] == [0, 1, 2]
        yield one, assign, other, submit
