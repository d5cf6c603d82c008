"""What an operator sees of a real daemon: exact queues, rows that say enough, and silence where nothing happens."""

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import attrs
import pytest
import structlog
import trio

from protocol.client.client import RelayClient, open_relay
from protocol.client.watch import Watch
from protocol.wire.errors import RequestRejected
from protocol.wire.frames import Audio, Cancelled, Failed
from protocol.wire.messages import Accepted, Cancel, Delta, Snapshot
from tests.support.cable import Cable
from tests.support.fake_worker import FORMAT, FakeWorker, fake_worker, identity, samples
from tests.support.relay import Daemon, a_submit, an_input, daemon, kept_logs, peer, until

PCM = [samples(2400), samples(1200, seed=2)]


@attrs.define(eq=False)
class Screen:
    """An operator's connection that watches, and all that it was told."""

    operator: RelayClient
    watch: Watch
    told: list[Snapshot | Delta] = attrs.field(factory=list)

    async def follow(self) -> None:
        """Take what comes, for ever."""
        async for change in self.watch:
            self.told.append(change)

    def rows(self, topic: str) -> dict[str, dict[str, Any]]:
        """As they stand now."""
        return self.watch.state.get(topic, {})

    def row(self, topic: str) -> dict[str, Any]:
        """The only one."""
        (row,) = self.rows(topic).values()
        return row

    async def sees(self, true: Callable[[], bool]) -> None:
        """Wait until what was told makes this true; rows and values that are not there do not."""

        def holds() -> bool:
            try:
                return true()
            except (KeyError, TypeError, ValueError):
                return False

        await until(holds)

    def count(self, topic: str) -> int:
        """Rows of a topic that were told in deltas."""
        return sum(len(change.data.get(topic, ())) for change in self.told if isinstance(change, Delta))


@asynccontextmanager
async def screen(relay: Daemon, *topics: str, readonly: bool = False) -> AsyncIterator[Screen]:
    """A screen that has its snapshot."""
    async with (
        open_relay(relay.url, token="", role="operator", readonly=readonly, agent="screen/7") as operator,
        operator.watch(topics) as watch,
        trio.open_nursery() as nursery,
    ):
        shown = Screen(operator, watch)
        nursery.start_soon(shown.follow)
        await until(lambda: bool(shown.told))
        yield shown
        nursery.cancel_scope.cancel()


def queue_of(relay: Daemon, space: str = "tts") -> list[str]:
    return [entry.request_id for entry in relay.relay.scheduler.state.spaces[space].queue]


@pytest.mark.trio
async def test_the_order_of_a_queue_is_exact_whatever_happens_to_it(tmp_path: Path) -> None:
    random = Random(5)
    async with (
        daemon(tmp_path) as relay,
        peer(relay.url, "client") as client,
        screen(relay, "requests") as shown,
        fake_worker(relay.url) as worker,
    ):
        ids: list[str] = []
        client.send(busy := a_submit())
        assign = await worker.assigned()
        for _round in range(12):
            for _ in range(random.randrange(6)):
                submit = a_submit(priority=random.choice([4, 5, 5, 6]))
                client.send(submit)
                await client.next(Accepted)
                ids.append(submit.request_id)
            queued = queue_of(relay)
            for request_id in random.sample(queued, min(len(queued), random.randrange(3))):
                await shown.operator.steer(random.choice(["promote", "cancel"]), request_id)
            if queue_of(relay) and random.randrange(2):
                worker.speak(assign, PCM)
                assign = await worker.assigned()
            await until(lambda: shown.watch.queues.order("tts") == queue_of(relay))
            await until(
                lambda: (
                    {key for key, row in shown.rows("requests").items() if row["state"] == "queued"}
                    == set(queue_of(relay))
                )
            )
        assert len(ids) > 20
        async with screen(relay, "requests") as fresh:
            assert [fresh.rows("requests")[each]["position"] for each in queue_of(relay)] == [
                number for number, _ in enumerate(queue_of(relay), 1)
            ]
        assert busy.request_id in shown.rows("requests")


@pytest.mark.trio
async def test_who_only_moves_up_in_a_queue_is_not_told_again(tmp_path: Path) -> None:
    async with (
        daemon(tmp_path, spaces={"tts": {"max_queued_per_principal": 500}}) as relay,
        peer(relay.url, "client") as client,
        fake_worker(relay.url) as worker,
    ):
        client.send(a_submit())
        assign = await worker.assigned()
        for _ in range(200):
            client.send(a_submit())
        await until(lambda: len(queue_of(relay)) == 200)
        async with screen(relay, "requests") as shown:
            worker.speak(assign, PCM)
            assign = await worker.assigned()
            await until(lambda: shown.watch.queues.order("tts") == queue_of(relay))
            assert len(queue_of(relay)) == 199
            await shown.sees(lambda: shown.rows("requests")[assign.request_id]["state"] == "running")
            assert shown.count("requests") < 10


@pytest.mark.trio
async def test_nothing_is_told_while_nothing_happens(tmp_path: Path) -> None:
    async with (
        daemon(tmp_path, limits={"ping_interval_s": 0.2}) as relay,
        fake_worker(relay.url),
        peer(relay.url, "client"),
        screen(relay) as first,
        screen(relay) as second,
    ):
        await first.sees(lambda: len(first.rows("clients")) == 3)
        await second.sees(lambda: all(row["rtt_ms"] is not None for row in second.rows("clients").values()))
        await second.sees(lambda: second.row("workers")["rtt_ms"] is not None)
        told = len(first.told), len(second.told)
        await trio.sleep(2.5)  # two looks, a dozen pings and ten rounds that had something to tell
        for shown, before in zip((first, second), told, strict=True):
            # On a busy machine a round trip may be many times as long as the last, which a look tells.
            late = shown.told[before:]
            assert len(late) <= 3
            assert all(change.data.keys() <= {"workers", "clients"} for change in late)


@pytest.mark.trio
async def test_the_relays_and_a_spaces_row_tell_how_it_has_been_doing(tmp_path: Path) -> None:
    async with (
        daemon(tmp_path) as relay,
        fake_worker(relay.url) as worker,
        peer(relay.url, "client") as client,
        screen(relay) as shown,
    ):
        row = shown.row("relay")
        assert (row["requests_min"], row["first_audio_p50_s"], row["out_bytes_s"]) == (0, None, 0)
        assert row["urls"] == relay.urls
        assert row["state"] == "serving"
        for _ in range(3):
            client.send(submit := a_submit())
            worker.speak(await worker.assigned(), PCM)
            await client.frames(submit)
        client.send(submit := a_submit())
        assign = await worker.assigned()
        worker.speak(assign, PCM, end=False)
        await client.next(Audio)
        await shown.operator.steer("cancel", submit.request_id)
        await worker.peer.next(Cancel)
        worker.send(Cancelled(**identity(assign, 3), reason="stopped"))
        client.send(a_submit())
        assign = await worker.assigned()
        worker.send(Failed(**identity(assign, 0), code="invalid_params", message="no such voice"))
        await shown.sees(lambda: shown.row("relay")["errors_min"] == 1)
        await shown.sees(lambda: shown.row("relay")["requests_min"] == shown.row("relay")["requests_total"] == 5)
        await shown.sees(lambda: shown.row("relay")["audio_s_min"] == shown.row("relay")["audio_s_total"] == 0.6)
        await shown.sees(lambda: shown.row("relay")["out_bytes_s"] > 0 < shown.row("relay")["in_bytes_s"])
        row = shown.row("relay")
        assert 0 < row["first_audio_p50_s"] <= row["first_audio_p95_s"]
        space = shown.rows("spaces")["tts"]
        assert space["requests_min"] == 5
        assert space["rtf"] > 0
        assert space["error_percent"] == 25
        assert shown.rows("spaces")["check"]["error_percent"] is None
        assert shown.row("workers")["rtf"] == space["rtf"]
        async with screen(relay, "history") as fresh:
            history = fresh.row("history")
            assert (len(history["requests"]), len(history["audio_s"])) == (60, 60)
            assert sum(history["requests"]) == 5
            assert sum(history["audio_s"]) == pytest.approx(0.6)


@pytest.mark.trio
async def test_the_longest_wait_of_a_queue_is_told_when_another_waits_longest(tmp_path: Path) -> None:
    async with daemon(tmp_path) as relay, peer(relay.url, "client") as client, screen(relay, "spaces") as shown:
        assert shown.rows("spaces")["tts"]["oldest_wait_s"] is None
        client.send(first := a_submit())
        await client.next(Accepted)
        relay.relay.requests[first.request_id].queued_at -= 100
        client.send(a_submit())
        await shown.sees(lambda: shown.rows("spaces")["tts"]["oldest_wait_s"] >= 100)
        assert shown.rows("spaces")["tts"]["state"] == "no worker"
        await shown.operator.steer("pause_space", "tts")
        await shown.sees(lambda: shown.rows("spaces")["tts"]["paused"])
        await shown.operator.steer("cancel", first.request_id)
        await shown.sees(lambda: shown.rows("spaces")["tts"]["oldest_wait_s"] < 100)


@pytest.mark.trio
async def test_a_worker_that_falls_silent_is_stale_and_then_away_and_its_row_keeps_its_name(tmp_path: Path) -> None:
    cable = Cable()
    async with (
        daemon(tmp_path, limits={"ping_interval_s": 0.1, "dead_after_s": 60.0}) as relay,
        screen(relay, "workers", "requests") as shown,
        peer(relay.url, "client") as client,
        fake_worker(relay.url, cable=cable, engine="mock") as worker,
    ):
        client.send(submit := a_submit())
        assign = await worker.assigned()
        worker.speak(assign, PCM, end=False)
        await shown.sees(lambda: shown.row("workers")["state"] == "busy")
        row = shown.row("workers")
        assert (row["name"], row["last_seen_s"], row["draining"]) == ("box", None, False)
        assert row["connection_id"] in relay.relay.connections
        cable.pulled = True
        await shown.sees(lambda: shown.row("workers")["state"] == "stale")
        assert shown.row("workers")["last_seen_s"] > 0.2
        relay.relay.connections[row["connection_id"]].link.received_at -= 60.0
        await shown.sees(lambda: shown.row("workers")["state"] == "away")
        row = shown.row("workers")
        assert (row["name"], row["engine"], row["connection_id"]) == ("box", "mock", "")
        assert row["last_seen_s"] >= 60.0
        assert row["principal"] == "root"
        steps = await shown.operator.steer("describe", submit.request_id)
        assert [step["event"] for step in steps["timeline"]][-1] == "worker_away"


@pytest.mark.trio
async def test_the_row_of_a_worker_says_whether_it_drains_and_how_many_slots_it_has_now(tmp_path: Path) -> None:
    async with daemon(tmp_path) as relay, screen(relay, "workers", "spaces") as shown, fake_worker(relay.url) as worker:
        await shown.sees(lambda: shown.row("workers")["draining"] is False)
        (worker_id,) = shown.rows("workers")
        for action, drains in (("drain_worker", True), ("undrain_worker", False)):
            await shown.operator.steer(action, worker_id)
            await shown.sees(partial(lambda drains: shown.row("workers")["draining"] is drains, drains))
            await shown.sees(partial(lambda drains: shown.rows("spaces")["tts"]["draining"] is drains, int(drains)))
        worker.send(attrs.evolve(worker.registration, slots=7))
        await shown.sees(lambda: shown.row("workers")["slots"] == 7)
        assert relay.relay.scheduler.state.workers[worker_id].slots == 7


@pytest.mark.trio
async def test_a_worker_is_disconnected_by_the_connection_that_its_row_names(tmp_path: Path) -> None:
    async with daemon(tmp_path) as relay, fake_worker(relay.url) as worker, screen(relay, "workers") as shown:
        await shown.operator.steer("disconnect", shown.row("workers")["connection_id"])
        await until(lambda: worker.peer.link.gone is not None)
        await shown.sees(lambda: not shown.rows("workers"))


@pytest.mark.trio
async def test_a_client_that_does_not_read_is_told_as_slow_and_what_waits_for_it(tmp_path: Path) -> None:
    cable = Cable()
    async with (
        daemon(tmp_path, limits={"dead_after_s": 30.0}) as relay,
        fake_worker(relay.url) as worker,
        screen(relay, "requests", "clients") as shown,
    ):
        async with peer(relay.url, "client", connect_to=cable.connect) as client:
            client.send(submit := a_submit())
            assign = await worker.assigned()
            cable.pulled = True
            worker.speak(assign, [samples(200_000)] * 5)
            name = submit.request_id
            await shown.sees(lambda: shown.rows("requests")[name]["buffered_bytes"] > 500_000)
            await shown.sees(lambda: any(row["slow"] for row in shown.rows("clients").values()))
            (row,) = (row for row in shown.rows("clients").values() if row["slow"])
            assert row["pending_bytes"] > 256 * 1024
            assert (row["role"], row["readers"]) == ("client", 1)
            described = await shown.operator.steer("describe", name)
            assert [reader["connection_id"] for reader in described["readers"]] == [row["connection_id"]]
            assert described["readers"][0]["behind_frames"] > 0
            await shown.operator.steer("disconnect", row["connection_id"])
        await shown.sees(lambda: shown.rows("requests")[name]["buffered_bytes"] == 0)
        assert shown.rows("requests")[name]["readers"] == 0


@pytest.mark.trio
async def test_a_clients_row_says_who_it_is(tmp_path: Path) -> None:
    async with daemon(tmp_path) as relay, screen(relay, "clients", readonly=True) as shown:
        row = shown.row("clients")
        assert (row["agent"], row["role"], row["readonly"]) == ("screen/7", "operator", True)
        assert 0 <= row["connected_s"] < 10
        async with fake_worker(relay.url) as worker, peer(relay.url, "client") as client:
            client.send(submit := a_submit())
            worker.speak(await worker.assigned(), PCM)
            await client.frames(submit)
            await shown.sees(
                lambda: any(row["bytes_sent"] > 7200 and row["bytes_s"] for row in shown.rows("clients").values())
            )
        await shown.sees(lambda: len(shown.rows("clients")) == 1)


async def lost_and_spoken(relay: Daemon, worker: FakeWorker, other: FakeWorker) -> None:
    """The first assignment is lost with its worker; the second one is carried out."""
    lost, left = (worker, other)
    with trio.move_on_after(0.5):
        await worker.assigned()
    if not any(held.held for held in relay.relay.scheduler.state.workers.values() if held.instance == worker.instance):
        lost, left = other, worker
        await other.assigned()
    await lost.peer.cut()
    left.speak(await left.assigned(), PCM)


@pytest.mark.trio
async def test_a_request_is_described_with_all_that_became_of_it(tmp_path: Path) -> None:
    async with (
        daemon(tmp_path, spaces={"tts": {"max_workers": 2}}, limits={"worker_grace_s": 0.05}) as relay,
        fake_worker(relay.url, name="a") as worker,
        fake_worker(relay.url, name="b") as other,
        peer(relay.url, "client") as client,
        screen(relay, readonly=True) as shown,
    ):
        voice = an_input(b"RIFF")
        with pytest.raises(RequestRejected) as refused:
            await shown.operator.steer("describe", "0" * 32)
        assert refused.value.code == "request_not_found"
        client.send(submit := a_submit(text="word " * 1_000))
        await lost_and_spoken(relay, worker, other)
        await client.frames(submit)
        told = await shown.operator.steer("describe", submit.request_id)
        events = [step["event"] for step in told["timeline"]]
        assert events == [
            "created",
            "accepted",
            "started",
            "worker_away",
            "lost",
            "requeued",
            "started",
            "first_frame",
            "ended",
        ]
        times = [step["at_s"] for step in told["timeline"]]
        assert times == sorted(times)
        assert told["timeline"][2]["attempt"] == 1
        assert told["timeline"][4]["code"] == "worker_lost"
        assert told["timeline"][6]["worker_id"] == told["request"]["worker_id"]
        assert told["timeline"][-1]["state"] == "completed"
        assert told["timeline_left_out"] == 0
        assert told["request"]["state"] == "completed"
        assert told["params_cut"]
        assert told["params"]["text"].startswith("word word")
        assert len(told["params"]["text"]) <= 500
        assert told["format"] == FORMAT.to_map()
        assert told["request"]["ended_s"] >= 0
        assert told["request"]["run_s"] + told["request"]["queued_s"] <= told["request"]["age_s"] + 0.002
        client.send(waiting := a_submit(space="check", inputs={"voice": voice}, detach=True, retry="always"))
        await until(lambda: waiting.request_id in relay.relay.requests)
        told = await shown.operator.steer("describe", waiting.request_id)
        assert told["inputs"] == [{"name": "voice", "media_type": "audio/wav", "size": 4}]
        assert (told["detach"], told["retry"], told["holders"]) == (True, "always", 1)
        assert (told["params"], told["params_cut"]) == ({"text": "hello"}, False)


@pytest.mark.trio
async def test_what_is_queued_is_described_with_its_position(tmp_path: Path) -> None:
    async with daemon(tmp_path) as relay, peer(relay.url, "client") as client, screen(relay, "requests") as shown:
        submits = [a_submit() for _ in range(3)]
        for submit in submits:
            client.send(submit)
            await client.next(Accepted)
        described = await shown.operator.steer("describe", submits[2].request_id)
        assert described["request"]["position"] == 3


@pytest.mark.trio
async def test_what_a_relay_has_from_an_earlier_run_is_described_as_taken_up(tmp_path: Path) -> None:
    async with daemon(tmp_path, store="sqlite") as relay, peer(relay.url, "client") as client:
        client.send(submit := a_submit())
        await client.next(Accepted)
        client.send(ended := a_submit())
        await client.next(Accepted)
        client.send(Cancel(request_id=ended.request_id))
        await client.next(Cancelled)
    async with daemon(tmp_path, store="sqlite") as relay, screen(relay) as shown:
        told = await shown.operator.steer("describe", submit.request_id)
        assert [step["event"] for step in told["timeline"]] == ["taken_up"]
        assert (told["params"], told["request"]["position"]) == ({"text": "hello"}, 1)
        assert shown.watch.queues.order("tts") == [submit.request_id]
        row = shown.rows("requests")[ended.request_id]
        assert (row["state"], row["run_s"], row["queued_s"]) == ("cancelled", None, 0)


@pytest.mark.trio
async def test_a_request_with_very_many_steps_keeps_the_first_and_the_latest(tmp_path: Path) -> None:
    async with daemon(tmp_path) as relay, peer(relay.url, "client") as client, screen(relay, "requests") as shown:
        client.send(submit := a_submit())
        await client.next(Accepted)
        for number in range(100):
            relay.relay.requests[submit.request_id].add_timeline("worker_back", attempt=number)
        told = await shown.operator.steer("describe", submit.request_id)
        attempts = [step.get("attempt") for step in told["timeline"]]
        assert attempts == [None, None, *range(10), *range(64, 100)]
        assert told["timeline_left_out"] == 54


@pytest.mark.trio
async def test_events_of_the_relay_come_as_rows_the_old_ones_too(tmp_path: Path) -> None:
    async with daemon(tmp_path) as relay:
        log = structlog.get_logger("test")
        for number in range(1_000):
            log.info("earlier", number=number)
        async with peer(relay.url, "client") as client, screen(relay, "log") as shown:
            assert len(shown.told[0].data["log"]) == 200
            client.send(submit := a_submit())
            await client.next(Accepted)
            log.warning("token rly_o_" + "x" * 40, worker="box")
            await shown.sees(lambda: len(shown.rows("log")) == relay.relay.events.last >= 1_003)
            rows = [shown.rows("log")[key] for key in sorted(shown.rows("log"), key=int)]
            assert [row["id"] for row in rows] == [str(number) for number in range(1, len(rows) + 1)]
            accepted = [row for row in rows if row["event"] == "request accepted"]
            assert [row["request_id"] for row in accepted] == [submit.request_id]
            assert (accepted[0]["space"], accepted[0]["principal"], accepted[0]["level"]) == ("tts", "root", "info")
            assert accepted[0]["time"] > 1.7e9
            numbers = [row["details"] for row in rows if row["event"] == "earlier"]
            assert numbers == [f"number={number}" for number in range(1_000)]
            (secret,) = [row for row in rows if row["level"] == "warning"]
            assert (secret["event"], secret["worker_id"]) == ("token rly_o_[secret]", "box")


@pytest.mark.trio
async def test_who_steered_what_is_told_and_logged_and_questions_are_not(tmp_path: Path) -> None:
    with kept_logs() as logs:
        async with daemon(tmp_path) as relay, screen(relay) as shown, screen(relay, "log", readonly=True) as looks:
            assert shown.rows("audit") == {}
            await shown.operator.steer("pause_space", "tts")
            with pytest.raises(RequestRejected):
                await shown.operator.steer("resume_space", "bogus")
            for action, target in [("cancel", "0" * 32), ("drain", ""), ("pause_space", "check")]:
                with pytest.raises(RequestRejected, match="read-only"):
                    await looks.operator.steer(action, target)
            await looks.operator.steer("list_tokens")
            with pytest.raises(RequestRejected, match="is unknown"):
                await looks.operator.steer("describe", "0" * 32)
            await shown.sees(lambda: len(shown.rows("audit")) == 5)
            rows = list(shown.rows("audit").values())
            assert [(row["action"], row["target"], row["outcome"]) for row in rows] == [
                ("pause_space", "tts", "done"),
                ("resume_space", "bogus", "space_not_found"),
                ("cancel", "0" * 32, "forbidden"),
                ("drain", "", "forbidden"),
                ("pause_space", "check", "forbidden"),
            ]
            assert "does not exist" in rows[1]["message"]
            assert {row["principal"] for row in rows} == {"root"}
            assert {row["connection_id"] for row in rows} == set(shown.rows("clients"))
            assert not relay.relay.draining.is_set()
    assert [event["answer"] for event in logs if event["event"] == "operator action"] == [
        row["outcome"] for row in rows
    ]


@pytest.mark.trio
async def test_rounds_that_cost_much_are_further_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("relayd.views.watch.MAX_SHARE", 1e-9)
    monkeypatch.setattr("relayd.views.watch.MAX_PAUSE_S", 0.6)
    async with daemon(tmp_path) as relay, peer(relay.url, "client") as client, screen(relay, "requests") as shown:
        times: list[float] = []
        for _ in range(3):
            told = len(shown.told)
            client.send(a_submit())
            await until(lambda told=told: len(shown.told) > told)  # type: ignore[misc]
            times.append(trio.current_time())
        assert times[2] - times[1] > 0.5
