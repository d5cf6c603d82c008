"""Workers connect, disconnect and come back: what their requests and the listeners of those get."""

from functools import partial
from pathlib import Path
from typing import Any

import attrs
import pytest
import trio

from protocol.wire.codec import encode, pack
from protocol.wire.frames import (
    Audio,
    Cancelled,
    Completed,
    Failed,
    Output,
    Started,
    Video,
)
from protocol.wire.messages import (
    Ack,
    Assign,
    Cancel,
    Draining,
    Error,
    Ping,
    Pong,
    Queued,
    Register,
    Registered,
    Rejected,
    Snapshot,
    Watch,
)
from protocol.wire.structs import Running
from protocol.wire.validators import Message
from tests.relayd.connections.audio_frames import PCM, heard
from tests.support.cable import Cable
from tests.support.fake_worker import FORMAT, SCHEMA, FakeWorker, fake_worker, identity
from tests.support.pictures import KEY_PICTURE, VIDEO
from tests.support.relay import a_submit, an_id, daemon, peer, until


@pytest.mark.trio
async def test_a_second_worker_is_told_which_space_is_full(tmp_path: Path) -> None:
    async with daemon(tmp_path) as relay, fake_worker(relay.url, name="first") as first:
        await first.peer.next(Registered)
        async with fake_worker(relay.url, name="second") as second:
            refusal = await second.peer.next(Rejected)
            assert refusal.code == "space_full"
            assert "'tts' already has its 1 worker (first-" in refusal.message
            assert "max_workers" in refusal.message
        async with fake_worker(relay.url, spaces=("nope",)) as lost:
            refusal = await lost.peer.next(Rejected)
            assert refusal.code == "space_not_found"
            assert "'nope'" in refusal.message
        assert len(relay.relay.workers) == len(relay.relay.scheduler.state.workers) == 1
        await relay.goes_on()


@pytest.mark.trio
@pytest.mark.parametrize(("name", "dead_after_s"), [("other", 1.0), ("box", 600.0)])
async def test_a_worker_whose_place_a_silent_one_holds_is_told_to_ask_again_and_gets_it(
    tmp_path: Path, name: str, dead_after_s: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("relayd.core.workers.TAKE_OVER_S", 0.5)
    limits = {"ping_interval_s": 0.5, "dead_after_s": dead_after_s}
    async with daemon(tmp_path, limits=limits) as relay:
        cable = Cable()
        async with fake_worker(relay.url, name="box", cable=cable) as old:
            await old.peer.next(Registered)
            cable.pulled = True
            async with fake_worker(relay.url, name=name) as new:
                refusal = await new.peer.next(Rejected)
                assert (refusal.code, refusal.retry_after_s) == ("space_full", 1.0)
                with trio.fail_after(10):
                    while True:
                        await trio.sleep(0.1)
                        new.send(new.registration)
                        answer = await new.peer.next(Rejected, Registered)
                        if isinstance(answer, Registered):
                            break
                        assert answer.retry_after_s == 1.0, "it may still be gone"
        await relay.goes_on()


@pytest.mark.trio
async def test_one_of_several_that_drains_is_enough_to_ask_again(tmp_path: Path) -> None:
    async with (
        daemon(tmp_path, spaces={"tts": {"max_workers": 2}}) as relay,
        fake_worker(relay.url, name="one") as one,
        fake_worker(relay.url, name="two") as two,
    ):
        for worker in (one, two):
            await worker.peer.next(Registered)
        one.send(Draining())
        await one.peer.settled()
        async with fake_worker(relay.url, name="three") as new:
            assert (await new.peer.next(Rejected)).retry_after_s == 1.0
            for worker in (one, two):
                await worker.peer.next(Ping)
                worker.send(Pong(timestamp=0.0))
                await worker.peer.settled()
            new.send(new.registration)
            assert (await new.peer.next(Rejected)).retry_after_s == 1.0


@pytest.mark.trio
async def test_a_worker_whose_place_is_held_is_told_to_stop_once_the_other_has_answered(tmp_path: Path) -> None:
    async with daemon(tmp_path) as relay, fake_worker(relay.url) as old:
        await old.peer.next(Registered)
        async with fake_worker(relay.url) as new:
            assert (await new.peer.next(Rejected)).retry_after_s == 1.0
            await old.peer.next(Ping)
            old.send(Pong(timestamp=0.0))
            await old.peer.settled()
            new.send(new.registration)
            assert (await new.peer.next(Rejected)).retry_after_s is None
            old.send(Draining())
            await until(lambda: next(iter(relay.relay.scheduler.state.workers.values())).draining)
            new.send(new.registration)
            assert (await new.peer.next(Rejected)).retry_after_s == 1.0
        await relay.goes_on()


@pytest.mark.trio
@pytest.mark.parametrize(
    ("fields", "code"),
    [({"params": {"type": 5}}, "invalid_params"), ({"params": {"$ref": "http://example.org/"}}, "invalid_params")],
)
async def test_a_bad_registration_is_refused(tmp_path: Path, fields: dict[str, Any], code: str) -> None:
    async with daemon(tmp_path) as relay, fake_worker(relay.url, **fields) as worker:
        assert (await worker.peer.next(Rejected)).code == code
        await relay.goes_on()


@pytest.mark.trio
async def test_a_long_name_registers(tmp_path: Path) -> None:
    async with daemon(tmp_path) as relay, fake_worker(relay.url, name="x" * 128) as worker:
        assert (await worker.peer.next(Registered, Error)).TYPE == "registered"
        assert relay.relay.workers


@pytest.mark.trio
async def test_a_worker_that_is_cut_off_goes_on_and_the_listener_hears_the_same_samples(tmp_path: Path) -> None:
    async with daemon(tmp_path) as relay, peer(relay.url, "client") as client:
        submit, instance = a_submit(), an_id()
        async with fake_worker(relay.url, instance=instance) as worker:
            client.send(submit)
            assign = await worker.assigned()
            worker.speak(assign, PCM[:2], end=False)
            await client.next(Audio)
            await client.next(Audio)
            await worker.peer.cut()
        running = (Running(request_id=submit.request_id, attempt=1, next_seq=4),)
        async with fake_worker(relay.url, instance=instance, running=running) as worker:
            registered = await worker.peer.next(Registered)
            assert [(r.attempt, r.next_seq) for r in registered.resume] == [(1, 3)]
            worker.speak(assign, PCM, first=1)  # more than is missing: what is there already is passed over
            assert heard(await client.frames(submit, first=3)) == b"".join(PCM[2:])
            assert (await worker.peer.next(Ack)).seq == 5
        await relay.at_rest()
        await relay.goes_on()


@pytest.mark.trio
async def test_a_worker_that_connects_anew_before_the_cut_was_seen_takes_its_own_place(tmp_path: Path) -> None:
    instance = an_id()
    async with (
        daemon(tmp_path) as relay,
        peer(relay.url, "client") as client,
        fake_worker(relay.url, instance=instance) as old,
    ):
        submit = a_submit()
        client.send(submit)
        assign = await old.assigned()
        running = (Running(request_id=submit.request_id, attempt=1, next_seq=0),)
        async with fake_worker(relay.url, instance=instance, running=running) as new:
            assert len((await new.peer.next(Registered)).resume) == 1
            await until(lambda: old.peer.link.gone is not None)
            new.speak(assign, PCM)
            assert heard(await client.frames(submit)) == b"".join(PCM)
            await relay.at_rest()
            assert len(relay.relay.workers) == 1


@pytest.mark.trio
async def test_a_refused_reconnection_leaves_the_worker_that_is_there_alone(tmp_path: Path) -> None:
    instance = an_id()
    async with daemon(tmp_path) as relay, fake_worker(relay.url, instance=instance) as worker:
        await worker.peer.next(Registered)
        async with fake_worker(relay.url, instance=instance, spaces=("tts", "nope")) as other:
            assert (await other.peer.next(Rejected)).code == "space_not_found"
        async with peer(relay.url, "client") as client:
            submit = a_submit()
            client.send(submit)
            worker.speak(await worker.assigned(), PCM)
            assert heard(await client.frames(submit)) == b"".join(PCM)
            await relay.at_rest()
    async with daemon(tmp_path / "2"):
        pass


@pytest.mark.trio
async def test_a_worker_gone_before_its_first_output_is_replaced_in_silence(tmp_path: Path) -> None:
    limits = {"worker_grace_s": 0.05}
    async with daemon(tmp_path, limits=limits) as relay, peer(relay.url, "client") as client:
        submit = a_submit()
        async with fake_worker(relay.url) as worker:
            client.send(submit)
            assign = await worker.assigned()
            worker.send(Started(**identity(assign, 0), format=FORMAT))
            await client.next(Started)
            await worker.peer.cut()
        async with fake_worker(relay.url, name="other") as worker:
            second = await worker.assigned()
            assert (second.attempt, second.from_seq) == (2, 0)
            worker.speak(second, PCM)
            frames = await client.frames(submit)
            assert {frame.attempt for frame in frames} == {2}
            assert heard(frames) == b"".join(PCM)
        await relay.at_rest()


@pytest.mark.trio
@pytest.mark.parametrize(
    ("reproducible", "retry", "from_seq"),
    [(False, "before_output", None), (False, "always", 0), (True, "before_output", 3), (True, "never", None)],
)
async def test_a_worker_gone_in_mid_stream_is_never_a_silent_cut(
    tmp_path: Path, reproducible: bool, retry: str, from_seq: int | None
) -> None:
    limits = {"worker_grace_s": 0.05}
    async with daemon(tmp_path, limits=limits) as relay, peer(relay.url, "client") as client:
        submit = a_submit(retry=retry)
        async with fake_worker(relay.url, reproducible=reproducible) as worker:
            client.send(submit)
            worker.speak(await worker.assigned(), PCM[:2], end=False)
            await client.next(Audio)
            await client.next(Audio)
            await worker.peer.cut()
        async with fake_worker(relay.url, reproducible=reproducible) as worker:
            if from_seq is None:
                failed = await client.next(Failed)
                assert (failed.code, failed.seq, failed.attempt) == ("worker_lost", 3, 1)
                assert "3 frames were delivered" in failed.message or "'never'" in failed.message
                assert failed.details["delivered_frames"] == 3
            else:
                assign = await worker.assigned()
                assert (assign.attempt, assign.from_seq) == (2, from_seq)
                worker.speak(assign, PCM, first=from_seq)
                frames = await client.frames(submit, first=from_seq)
                assert heard(frames) == b"".join(PCM[max(0, from_seq - 1) :])
            await relay.at_rest()
            await relay.goes_on()


@pytest.mark.trio
@pytest.mark.parametrize(("first", "second"), [("a", "a"), ("a", "b"), ("a", ""), ("", "")])
async def test_only_a_worker_of_the_same_fingerprint_goes_on_in_mid_stream(
    tmp_path: Path, first: str, second: str
) -> None:
    async with daemon(tmp_path, limits={"worker_grace_s": 0.05}) as relay, peer(relay.url, "client") as client:
        submit = a_submit()
        async with fake_worker(relay.url, reproducible=True, fingerprint=first) as worker:
            client.send(submit)
            worker.speak(await worker.assigned(), PCM[:2], end=False)
            await client.next(Audio)
            await client.next(Audio)
            await worker.peer.cut()
        async with fake_worker(relay.url, reproducible=True, fingerprint=second) as worker:
            if first == second:
                assign = await worker.assigned()
                assert assign.from_seq == 3
                worker.speak(assign, PCM, first=3)
                assert heard(await client.frames(submit, first=3)) == b"".join(PCM[2:])
            else:
                failed = await client.next(Failed)
                assert (failed.code, failed.details["delivered_frames"]) == ("worker_lost", 3)
            await relay.at_rest()


@pytest.mark.trio
async def test_a_worker_that_registers_again_as_another_does_not_go_on_in_mid_stream(tmp_path: Path) -> None:
    spaces = {"tts": {"max_workers": 2}}
    async with (
        daemon(tmp_path, spaces=spaces, limits={"worker_grace_s": 0.05}) as relay,
        peer(relay.url, "client") as client,
        fake_worker(relay.url, name="other", slots=0, reproducible=True, fingerprint="a") as other,
    ):
        await other.peer.next(Registered)
        submit = a_submit()
        async with fake_worker(relay.url, reproducible=True, fingerprint="a") as worker:
            client.send(submit)
            worker.speak(await worker.assigned(), PCM[:2], end=False)
            await client.next(Audio)
            await client.next(Audio)
            other.send(
                Register(
                    worker="other",
                    instance=other.instance,
                    spaces=["tts"],
                    engine="fake",
                    slots=1,
                    format=FORMAT,
                    reproducible=False,
                    fingerprint="a",
                )
            )
            await other.peer.settled()
            await worker.peer.cut()
        assert (await client.next(Failed)).code == "worker_lost"
        await relay.at_rest()


@pytest.mark.trio
async def test_a_worker_started_anew_is_not_waited_for(tmp_path: Path) -> None:
    async with daemon(tmp_path, limits={"worker_grace_s": 60}) as relay, peer(relay.url, "client") as client:
        submit = a_submit()
        async with fake_worker(relay.url, reproducible=True) as worker:
            client.send(submit)
            worker.speak(await worker.assigned(), PCM[:1], end=False)
            await client.next(Audio)
        async with fake_worker(relay.url, reproducible=True) as worker:
            assert (await worker.assigned()).from_seq == 2


@pytest.mark.trio
async def test_a_namesake_with_room_beside_it_takes_nothing_away(tmp_path: Path) -> None:
    spaces = {"tts": {"max_workers": 2}}
    instance = an_id()
    async with (
        daemon(tmp_path, spaces=spaces, limits={"worker_grace_s": 60}) as relay,
        peer(relay.url, "client") as client,
    ):
        submit = a_submit()
        async with fake_worker(relay.url, instance=instance) as worker:
            client.send(submit)
            assign = await worker.assigned()
            worker.speak(assign, PCM[:1], end=False)
            await client.next(Audio)
        async with fake_worker(relay.url) as twin:
            await twin.peer.next(Registered)
            running = (Running(request_id=submit.request_id, attempt=1, next_seq=2),)
            async with fake_worker(relay.url, instance=instance, running=running) as worker:
                assert len((await worker.peer.next(Registered)).resume) == 1
                worker.speak(assign, PCM[:1], first=2)
                assert isinstance(await client.next(Completed, Failed), Completed)
        await relay.at_rest()


@pytest.mark.trio
async def test_frames_of_an_attempt_that_is_over_are_fenced(tmp_path: Path) -> None:
    spaces = {"tts": {"max_workers": 2, "idle_timeout_s": 0.1}}
    async with (
        daemon(tmp_path, spaces=spaces) as relay,
        fake_worker(relay.url, name="hung") as hung,
        peer(relay.url, "client") as client,
    ):
        submit = a_submit()
        client.send(submit)
        old = await hung.assigned()
        async with fake_worker(relay.url, name="good") as good:
            assert (await hung.peer.next(Cancel)).request_id == submit.request_id
            assign = await good.assigned()
            assert assign.attempt == 2
            hung.speak(old, PCM[:2])
            assert (await hung.peer.next(Ack)).attempt == 1
            good.speak(assign, PCM)
            frames = await client.frames(submit)
            assert heard(frames) == b"".join(PCM)
            assert relay.relay.fenced_frames == 4
            await relay.at_rest()


@pytest.mark.trio
@pytest.mark.parametrize("retry", ["before_output", "always"])
async def test_a_worker_that_fails_at_once_does_not_eat_the_queue_beside_one_that_works(
    tmp_path: Path, retry: str
) -> None:
    async def serve(worker: FakeWorker, *, works: bool) -> None:
        while True:
            assign = await worker.assigned()
            if works:
                await trio.sleep(0.02)
                worker.speak(assign, PCM)
            else:
                worker.send(Failed(**identity(assign, 0), code="engine_failed", message="RuntimeError: no GPU"))

    async with (
        daemon(tmp_path, spaces={"tts": {"max_workers": 2}}) as relay,
        fake_worker(relay.url, name="bad") as bad,
        fake_worker(relay.url, name="good") as good,
        peer(relay.url, "client") as client,
        peer(relay.url, "operator") as operator,
        trio.open_nursery() as nursery,
    ):
        nursery.start_soon(partial(serve, bad, works=False))
        nursery.start_soon(partial(serve, good, works=True))
        for _ in range(20):
            client.send(a_submit(retry=retry))
        ends = [(await client.next(Completed, Failed)).TYPE for _ in range(20)]
        assert ends.count("failed") == (0 if retry == "always" else 3)
        operator.send(Watch(topics=["workers"]))
        rows = (await operator.next(Snapshot)).data["workers"]
        assert {row["name"]: row["state"] for row in rows} == {"bad": "resting", "good": "idle"}
        await relay.at_rest()
        nursery.cancel_scope.cancel()


def half_an_emoji(message: Message, at: bytes = b"BAD") -> bytes:
    """The message with what JavaScript makes of half an emoji in place of `at`."""
    data = encode(message)
    assert data.count(at) == 1
    return data.replace(at, b"\xed\xa0\xbd")


@pytest.mark.trio
async def test_half_an_emoji_in_one_submit_costs_no_other_request_of_the_connection(tmp_path: Path) -> None:
    async with (
        daemon(tmp_path) as relay,
        fake_worker(relay.url, params={}) as worker,
        peer(relay.url, "client") as client,
    ):
        submit = a_submit()
        client.send(submit)
        assign = await worker.assigned()
        for params, field in (
            ({"text": "Hi BAD"}, "text"),
            ({"a": {"b": [1, "BAD"]}}, "a.b.1"),
            ({"BAD": 1}, "???"),
        ):
            bad = a_submit(params=params)
            client.link.send_nowait(half_an_emoji(bad))
            refusal = await client.next(Rejected)
            assert (refusal.request_id, refusal.code) == (bad.request_id, "invalid_params")
            assert refusal.details == {field: "holds bytes that are no UTF-8"}
        client.link.send_nowait(half_an_emoji(Cancel(request_id=an_id(), reason="BAD")))
        client.link.send_nowait(pack({"type": "wish", "text": "BAD"}).replace(b"BAD", b"\xed\xa0\xbd"))
        assert (await client.next(Error)).code == "unknown_type"
        await client.settled()
        worker.speak(assign, PCM)
        assert heard(await client.frames(submit)) == b"".join(PCM)
        await relay.at_rest()


@pytest.mark.trio
@pytest.mark.parametrize("kind", [Output, Failed])
async def test_words_of_an_engine_that_are_no_utf_8_do_not_cut_off_its_worker(tmp_path: Path, kind: type) -> None:
    async with daemon(tmp_path) as relay, fake_worker(relay.url) as worker, peer(relay.url, "client") as client:
        submit = a_submit()
        client.send(submit)
        assign = await worker.assigned()
        worker.send(Started(**identity(assign, 0), format=None))
        if kind is Output:
            worker.peer.link.send_nowait(half_an_emoji(Output(**identity(assign, 1), data={"text": "BAD"})))
            worker.send(Completed(**identity(assign, 2)))
        else:
            failed = Failed(**identity(assign, 1), code="engine_failed", message="BAD")
            worker.peer.link.send_nowait(half_an_emoji(failed))
        *_, output, last = await client.frames(submit)
        if kind is Output:
            assert (output.data, last.TYPE) == ({"text": "???"}, "completed")
        else:
            assert (last.TYPE, last.message) == ("failed", "???")
        await relay.at_rest()


@pytest.mark.trio
async def test_a_hung_attempt_waits_for_its_slot_on_the_same_worker(tmp_path: Path) -> None:
    async with (
        daemon(tmp_path, spaces={"tts": {"idle_timeout_s": 0.1}}) as relay,
        fake_worker(relay.url, slots=2) as worker,
        peer(relay.url, "client") as client,
    ):
        submit = a_submit()
        client.send(submit)
        old = await worker.assigned()
        await worker.peer.next(Cancel)
        await client.settled()
        assert relay.relay.requests[submit.request_id].entry.state == "queued"
        worker.send(Cancelled(**identity(old, 0)))
        assert (await worker.peer.next(Ack, Assign)).TYPE == "ack", "before the next attempt"
        worker.speak(await worker.assigned(), PCM)
        assert heard(await client.frames(submit)) == b"".join(PCM)
        await relay.at_rest()


@pytest.mark.trio
async def test_an_attempt_that_was_given_up_taken_up_and_then_stopped_is_tried_again(tmp_path: Path) -> None:
    async with (
        daemon(tmp_path, spaces={"tts": {"idle_timeout_s": 0.1}}) as relay,
        peer(relay.url, "client") as client,
    ):
        submit = a_submit()
        instance = an_id()
        async with fake_worker(relay.url, instance=instance) as worker:
            client.send(submit)
            old = await worker.assigned()
            await worker.peer.next(Cancel)
            await worker.peer.cut()
        running = [Running(request_id=old.request_id, attempt=1, next_seq=0)]
        async with fake_worker(relay.url, instance=instance, running=running) as worker:
            assert [one.request_id for one in (await worker.peer.next(Registered)).resume] == [submit.request_id]
            assert relay.relay.requests[submit.request_id].entry.losses == 0, "it is not lost yet"
            worker.send(Cancelled(**identity(old, 0), reason="its worker sent nothing for 0.1 s"))
            await worker.peer.next(Ack)
            assign = await worker.assigned()
            assert assign.attempt == 2
            assert relay.relay.requests[submit.request_id].entry.losses == 1
            worker.speak(assign, PCM)
            assert heard(await client.frames(submit)) == b"".join(PCM)
            await relay.at_rest()


@pytest.mark.trio
async def test_registering_again_changes_the_slots(tmp_path: Path) -> None:
    async with daemon(tmp_path) as relay, fake_worker(relay.url) as worker, peer(relay.url, "client") as client:
        first, second = a_submit(), a_submit()
        client.send(first)
        client.send(second)
        await worker.assigned()
        worker.send(Register(worker="box", instance=worker.instance, spaces=["tts"], slots=2, params=SCHEMA))
        assert (await worker.assigned()).request_id == second.request_id


@pytest.mark.trio
async def test_a_worker_that_drains_gets_nothing_new(tmp_path: Path) -> None:
    async with (
        daemon(tmp_path) as relay,
        fake_worker(relay.url, slots=2) as worker,
        peer(relay.url, "client") as client,
    ):
        first, second = a_submit(), a_submit()
        client.send(first)
        assign = await worker.assigned()
        worker.send(Draining())
        await worker.peer.settled()
        client.send(second)
        assert (await client.next(Queued)).request_id == second.request_id
        worker.speak(assign, PCM)
        await client.frames(first)
        assert relay.relay.requests[second.request_id].entry.state == "queued"


@pytest.mark.trio
@pytest.mark.parametrize("fault", ["gap", "odd", "no format", "no video", "another started"])
async def test_a_worker_that_breaks_the_rules_is_cut_off_by_their_name(tmp_path: Path, fault: str) -> None:
    async with daemon(tmp_path, limits={"worker_grace_s": 0.01}) as relay, peer(relay.url, "client") as client:
        submit = a_submit(retry="never")
        async with fake_worker(relay.url) as worker:
            client.send(submit)
            assign = await worker.assigned()
            if fault == "another started":
                worker.send(Started(**identity(assign, 0), video=VIDEO))
            elif fault != "no format":
                worker.send(Started(**identity(assign, 0), format=FORMAT))
            if fault == "no video":
                worker.send(Video(**identity(assign, 1), data=KEY_PICTURE, pts=0, key=True))
            elif fault == "another started":
                worker.send(Started(**identity(assign, 1)))
            else:
                seq = {"gap": 2, "odd": 1, "no format": 0}[fault]
                worker.send(Audio(**identity(assign, seq), pcm=b"abc" if fault == "odd" else b"ab"))
            assert (await worker.peer.next(Error)).code == "protocol_error"
        assert (await client.next(Failed)).code == "worker_lost"
        await relay.at_rest()
        await relay.goes_on()


@pytest.mark.trio
async def test_outputs_of_functions_cross_as_well(tmp_path: Path) -> None:
    async with (
        daemon(tmp_path) as relay,
        fake_worker(relay.url, format=None) as worker,
        peer(relay.url, "client") as client,
    ):
        submit = a_submit()
        client.send(submit)
        assign = await worker.assigned()
        worker.send(Output(**identity(assign, 0), data={"words": ["a", 1, None]}))
        worker.send(Completed(**identity(assign, 1)))
        frames = await client.frames(submit)
        assert frames[0].data == {"words": ["a", 1, None]}
        await relay.at_rest()


@pytest.mark.trio
async def test_a_request_whose_worker_calls_it_innocent_is_tried_again_without_a_loss(tmp_path: Path) -> None:
    async with (
        daemon(tmp_path) as relay,
        fake_worker(relay.url, slots=2, shared=True, reproducible=True) as worker,
        peer(relay.url, "client") as ann,
        peer(relay.url, "client") as bob,
    ):
        submits = {ann: a_submit(), bob: a_submit()}
        for client, submit in submits.items():
            client.send(submit)
        first, second = [await worker.assigned() for _ in submits]
        worker.speak(first, PCM[:1], end=False)
        worker.send(attrs.evolve(worker.registration, slots=0))
        for assign, seq, innocent in ((first, 2, True), (second, 0, False)):
            details = {"innocent": innocent}
            worker.send(
                Failed(**identity(assign, seq), code="engine_failed", message="x", details=details, retryable=True)
            )
        worker.send(worker.registration)
        again = await worker.assigned()
        assert again.request_id == second.request_id, "it may be to blame, so it runs alone"
        entries = [relay.relay.requests[assign.request_id].entry for assign in (first, second)]
        assert [(entry.losses, entry.innocent_losses) for entry in entries] == [(0, 1), (1, 0)]
        worker.send(Started(**identity(again, 0), format=FORMAT))
        await worker.peer.settled()
        assert not entries[0].worker_id
        worker.speak(again, PCM, first=1)
        resumed = await worker.assigned()
        assert (resumed.request_id, resumed.from_seq) == (first.request_id, 2)
        worker.speak(resumed, PCM, first=2)
        for client, submit in submits.items():
            frames = [frame for frame in await client.frames(submit) if isinstance(frame, Audio)]
            assert b"".join(frame.pcm for frame in frames) == b"".join(PCM)
        await relay.at_rest()


@pytest.mark.trio
async def test_what_an_engine_says_of_its_innocence_counts_only_where_slots_share_a_process(tmp_path: Path) -> None:
    async with (
        daemon(tmp_path) as relay,
        fake_worker(relay.url) as worker,
        peer(relay.url, "client") as client,
    ):
        client.send(a_submit())
        assign = await worker.assigned()
        failed = Failed(
            **identity(assign, 0), code="engine_failed", message="x", details={"innocent": True}, retryable=True
        )
        worker.send(failed)
        await worker.assigned()
        entry = relay.relay.requests[assign.request_id].entry
        assert (entry.losses, entry.innocent_losses, entry.alone) == (1, 0, False)
