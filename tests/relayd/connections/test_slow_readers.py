"""Readers that take nothing or little, and peers that stand still: what the daemon does, over real sockets."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import attrs
import pytest
import trio

from protocol.client.address import Address
from protocol.link import base
from protocol.link.limits import LinkLimits
from protocol.wire.errors import LinkBroken
from protocol.wire.frames import (
    MAX_MESSAGE_BYTES,
    Audio,
    Cancelled,
    Completed,
)
from protocol.wire.messages import (
    Accepted,
    Attach,
    Cancel,
    Done,
    Error,
    Input,
    Queued,
    Register,
    Registered,
    Steer,
)
from protocol.wire.structs import Running
from relayd.connections.gateway import STALLED
from relayd.frames.frame_log import HIGH_WATER_BYTES
from relayd.views.rows import relay_row
from tests.support.cable import Cable
from tests.support.fake_worker import FORMAT, SCHEMA, FakeWorker, fake_worker, identity, samples
from tests.support.relay import Daemon, Peer, a_submit, an_id, an_input, daemon, kept_logs, new_token, peer, until
from tests.support.tap import Tap

#: Half a MiB each; 12 MiB are more than two kernels and an inbox hold.
LONG = [samples(1_000, seed) * 250 for seed in range(1, 25)]
#: What a client holds the relay to that it hears nothing of, because it reads nothing.
NEVER_DEAD = LinkLimits(dead_after_s=1e6)
TCP: dict[str, Any] = {"listen": "127.0.0.1:0"}
SHORT = {"ping_interval_s": 0.1, "dead_after_s": 0.8, "stall_timeout_s": 1.5}


@asynccontextmanager
async def slow_reader(relay: Daemon, tap: Tap) -> AsyncIterator[Peer]:
    """A client behind a tap; it never takes the relay for dead."""
    async with peer(relay.urls[0], "client", await new_token(relay), connect_to=tap.connect, limits=NEVER_DEAD) as slow:
        yield slow


def heard(frames: list[Any]) -> list[bytes]:
    return [frame.pcm for frame in frames if isinstance(frame, Audio)]


# -- readers ------------------------------------------------------------------------------------------------------


@pytest.mark.trio
async def test_a_reader_that_takes_nothing_is_told_so_and_gets_the_rest_when_it_comes_back(tmp_path: Path) -> None:
    """It answers no ping, as it does not read them; its machine does, so it has the whole `stall_timeout_s`."""
    tap = Tap()
    with kept_logs() as logs:
        async with (
            daemon(tmp_path, **TCP, limits=SHORT) as relay,
            fake_worker(relay.url) as worker,
            slow_reader(relay, tap) as slow,
            peer(relay.url, "operator") as other,
        ):
            submit = a_submit()
            slow.send(submit)
            assign = await worker.assigned()
            await slow.next(Accepted)
            tap.close()
            began = trio.current_time()
            worker.speak(assign, LONG, end=False)
            other.send(Attach(request_id=submit.request_id))
            assert [(await other.next(Audio)).pcm for _ in LONG] == LONG, "others are unaffected"
            request = relay.relay.requests[submit.request_id]
            assert len(request.holders) == 1
            await until(lambda: relay.relay.slow_consumers == 1)
            assert trio.current_time() - began > SHORT["stall_timeout_s"]
            assert request.live
            assert not request.holders
            assert request.abandoned_at is not None, "its resume window has begun"
            tap.open()
            last = -1
            while not isinstance(message := await slow.next(), Error):
                last = message.seq
            assert (message.code, message.message) == ("slow_consumer", STALLED.message)
            with pytest.raises(LinkBroken):
                await slow.next()
            assert slow.link.close_code == 1008
            assert -1 < last < len(LONG)
            async with peer(relay.urls[0], "client", await new_token(relay)) as again:
                again.send(Attach(request_id=submit.request_id, attempt=1, after_seq=last))
                worker.speak(assign, LONG, first=1 + len(LONG))
                assert heard(await again.frames(submit, first=last + 1)) == LONG[last:]
            await relay.at_rest()
            assert relay_row(relay.relay)["slow_consumers"] == 1
    (told,) = [line for line in logs if line["event"] == "disconnected" and line["log_level"] == "warning"]
    assert told["why"].startswith("slow_consumer: 127.0.0.1:")
    assert told["principal"] == "ann"


@pytest.mark.trio
async def test_a_request_whose_only_reader_never_takes_anything_ends_after_its_resume_window(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(base, "CLOSE_S", 0.1)
    tap = Tap()
    async with (
        daemon(tmp_path, **TCP, limits=SHORT | {"resume_window_s": 0.2}) as relay,
        fake_worker(relay.url) as worker,
        slow_reader(relay, tap) as slow,
    ):
        submit = a_submit()
        slow.send(submit)
        assign = await worker.assigned()
        await slow.next(Accepted)
        tap.close()
        worker.speak(assign, LONG, end=False)
        assert (await worker.peer.next(Cancel)).reason == "its client disconnected and did not return"
        worker.send(Cancelled(**identity(assign, 1 + len(LONG))))
        await relay.at_rest()
        assert relay.relay.slow_consumers == 1
        assert not relay.relay.clients
        await relay.goes_on()


@pytest.mark.trio
async def test_a_reader_that_takes_a_little_at_a_time_is_never_cut_off(tmp_path: Path) -> None:
    """All of it takes many times `stall_timeout_s`, and its pongs longer than `dead_after_s`."""
    tap = Tap(lump=16_384)
    limits = SHORT | {"stall_timeout_s": 0.6}
    async with (
        daemon(tmp_path, **TCP, limits=limits) as relay,
        fake_worker(relay.url) as worker,
        slow_reader(relay, tap) as slow,
    ):
        submit = a_submit()
        slow.send(submit)
        assign = await worker.assigned()
        await slow.next(Accepted)
        tap.pause_s = 0.02
        worker.speak(assign, LONG)
        with trio.move_on_after(4):
            await relay_gone(relay)
        tap.pause_s, tap.lump = 0, 2**20
        assert heard(await slow.frames(submit)) == LONG
        assert not relay.relay.slow_consumers
        await relay.at_rest()


async def relay_gone(relay: Daemon) -> None:
    """Wait until a client has been cut off; for ever, if none is."""
    while relay.relay.clients:  # noqa: ASYNC110  what other tasks hold has no event
        await trio.sleep(0.01)
    raise AssertionError("it was cut off")


@pytest.mark.trio
async def test_many_large_frames_for_one_slow_reader_never_fill_its_backlog(tmp_path: Path) -> None:
    large = [samples(1_000, seed) * 500 for seed in range(8)]
    tap = Tap(lump=2**20)
    limits = {"max_backlog_bytes": 2 * MAX_MESSAGE_BYTES}
    async with (
        daemon(tmp_path, **TCP, limits=limits) as relay,
        fake_worker(relay.url, slots=3) as worker,
        slow_reader(relay, tap) as slow,
    ):
        submits = [a_submit() for _ in range(3)]
        for submit in submits:
            slow.send(submit)
        assigns = [await worker.assigned() for _ in submits]
        await slow.settled()
        tap.close()
        for assign in assigns:
            worker.speak(assign, large)
            await worker.peer.link.drained()
        await until(lambda: all(relay.relay.requests[s.request_id].log.ended for s in submits))
        assert max(client.backlog_bytes for client in relay.relay.clients.values()) > HIGH_WATER_BYTES
        tap.open()
        frames: dict[str, list[bytes]] = {submit.request_id: [] for submit in submits}
        while any(len(pcm) < len(large) for pcm in frames.values()):
            frame = await slow.next(Audio)
            frames[frame.request_id].append(frame.pcm)
        assert list(frames.values()) == [large] * 3
        await relay.at_rest()
        assert not relay.relay.slow_consumers


@pytest.mark.trio
async def test_a_client_that_is_behind_hears_only_of_its_last_place(tmp_path: Path) -> None:
    """Places come up to 4 times a second for each request: they must not pile up for a slow reader."""
    tap = Tap(lump=2**20)
    async with (
        daemon(tmp_path, **TCP) as relay,
        fake_worker(relay.url) as worker,
        slow_reader(relay, tap) as slow,
        peer(relay.url, "operator") as operator,
    ):
        submits = [a_submit() for _ in range(5)]
        for submit in submits:
            slow.send(submit)
        assign = await worker.assigned()
        while (place := await slow.next(Queued)).request_id != submits[-1].request_id or place.of != 4:
            pass
        tap.close()
        (client,) = [c for c in relay.relay.clients.values() if c.principal.name == "ann"]
        worker.speak(assign, LONG, end=False)
        await until(lambda: client.backlog_bytes > HIGH_WATER_BYTES)
        for submit in submits[1:4]:
            waiting = len(relay.relay.scheduler.state.spaces["tts"].queue)
            operator.send(Cancel(request_id=submit.request_id))
            last, left = relay.relay.requests[submits[4].request_id], waiting - 1
            await until(lambda last=last, left=left: last.last_position_sent == (left, left))  # type: ignore[misc]
        tap.open()
        place = await slow.next(Queued)
        assert (place.request_id, place.position, place.of) == (submits[4].request_id, 1, 1)
        worker.speak(assign, LONG, first=1 + len(LONG))
        assert isinstance(await slow.next(Queued, Completed), Completed)


# -- peers that stand still ---------------------------------------------------------------------------------------


@attrs.define(eq=False)
class TornCable(Cable):
    """A cable that is pulled in the middle of the next thing that is sent."""

    tears: bool = False

    async def connect(self, address: Address) -> trio.abc.Stream:
        return TornStream(await super().connect(address), self)


@attrs.define(eq=False)
class TornStream(trio.abc.Stream):
    """A stream over a `TornCable`."""

    stream: trio.abc.Stream
    cable: TornCable

    async def receive_some(self, max_bytes: int | None = None) -> bytes | bytearray:
        return await self.stream.receive_some(max_bytes)

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        if self.cable.tears and not self.cable.pulled:
            await self.stream.send_all(memoryview(data)[: len(data) // 2])
            self.cable.pulled = True
        await self.stream.send_all(data)

    async def wait_send_all_might_not_block(self) -> None:
        await self.stream.wait_send_all_might_not_block()

    async def aclose(self) -> None:
        await self.stream.aclose()


@pytest.mark.trio
@pytest.mark.parametrize("torn", [False, True])
async def test_half_open_connections_are_seen_on_both_ends_and_nothing_is_lost(tmp_path: Path, torn: bool) -> None:
    """No FIN, no RST: the client's connection and the worker's go silent, the worker's also in mid-frame."""
    ours, theirs = Cable(), TornCable()
    pcm = LONG[:6]
    instance = an_id()
    dead: dict[str, Any] = {"dead_after_s": 0.5, "ping_interval_s": 0.1}
    async with daemon(tmp_path, limits=dead) as relay:
        async with (
            peer(relay.url, "client", connect_to=ours.connect, limits=LinkLimits(**dead)) as client,
            peer(relay.url, "worker", connect_to=theirs.connect, limits=LinkLimits(**dead)) as raw,
        ):
            registration = a_register(instance)
            raw.send(registration)
            submit = a_submit()
            client.send(submit)
            worker = FakeWorker(raw, registration)
            assign = await worker.assigned()
            worker.speak(assign, pcm[:2], end=False)
            for _ in range(2):
                await client.next(Audio)
            began = trio.current_time()
            ours.pulled = True
            if torn:
                theirs.tears = True
                worker.speak(assign, pcm[:4], first=3, end=False)
            else:
                theirs.pulled = True
            await until(lambda: not relay.relay.workers and not relay.relay.clients)
            await until(lambda: bool(client.link.gone and raw.link.gone))
            assert trio.current_time() - began < dead["dead_after_s"] + 1.0
            assert "nothing received" in client.link.reason
            assert "nothing received" in raw.link.reason
        running = (Running(request_id=submit.request_id, attempt=1, next_seq=5),)
        async with (
            fake_worker(relay.url, instance=instance, running=running) as worker,
            peer(relay.url, "client") as client,
        ):
            (resume,) = (await worker.peer.next(Registered)).resume
            assert resume.next_seq == 3, "half a frame is none"
            client.send(Attach(request_id=submit.request_id, attempt=1, after_seq=2))
            worker.speak(assign, pcm, first=3)
            assert heard(await client.frames(submit, first=3)) == pcm[2:]
            await relay.at_rest()


@pytest.mark.trio
async def test_a_worker_that_stops_reading_while_inputs_are_fed_to_it_loses_its_request_to_another(
    tmp_path: Path,
) -> None:
    """A worker is not given the time of a reader: who hears nothing does nothing."""
    voice = bytes(12_000_000)
    tap = Tap()
    limits = {"dead_after_s": 0.5, "ping_interval_s": 0.1, "worker_grace_s": 0.05, "stall_timeout_s": 60}
    async with (
        daemon(tmp_path, **TCP, limits=limits) as relay,
        peer(relay.url, "client") as client,
        peer(relay.url, "operator") as operator,
    ):
        operator.send(Steer(action="create_token", target="box", options={"role": "worker"}))
        token = (await operator.next(Done)).data["token"]
        async with peer(relay.urls[0], "worker", token, connect_to=tap.connect, limits=NEVER_DEAD) as raw:
            raw.send(a_register(an_id(), inputs={"voice": {}}))
            await raw.next(Registered)
            tap.close()
            submit = a_submit(inputs={"voice": an_input(voice)})
            client.send(submit)
            for offset in range(0, len(voice), 262_144):
                piece = voice[offset : offset + 262_144]
                client.send(Input(request_id=submit.request_id, name="voice", offset=offset, data=piece))
                await client.link.drained(1_000_000)
            await until(lambda: bool(relay.relay.scheduler.state.spaces["tts"].running))
            await until(lambda: not relay.relay.workers)
            async with fake_worker(relay.url, name="other", inputs={"voice": {}}) as worker:
                assign = await worker.assigned()
                assert assign.attempt == 2
                size = 0
                while size < len(voice):
                    size += len((await worker.peer.next(Input)).data)
                worker.speak(assign, LONG[:1])
                assert heard(await client.frames(submit)) == LONG[:1]
        await relay.at_rest()


def a_register(instance: str, **fields: Any) -> Register:
    plain: dict[str, Any] = {"engine": "fake", "params": SCHEMA, "format": FORMAT}
    return Register(worker="box", instance=instance, spaces=["tts"], **(plain | fields))
