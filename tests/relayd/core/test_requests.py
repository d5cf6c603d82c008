"""What a client asks for, and what it is told: submit, inputs, cancel, attach, status, deadlines."""

from pathlib import Path
from typing import Any

import pytest
import trio

from protocol.wire.frames import (
    Audio,
    Cancelled,
    Completed,
    Failed,
)
from protocol.wire.messages import (
    Accepted,
    Attach,
    Cancel,
    Input,
    Queued,
    Registered,
    Rejected,
    Spaces,
    SpacesReply,
    Status,
    StatusReply,
)
from protocol.wire.structs import Running
from relayd.store.records import PutSpace
from tests.support.fake_worker import fake_worker, identity, samples
from tests.support.relay import a_submit, an_id, an_input, daemon, kept_logs, peer, until
from tests.support.tap import Tap

PCM = [samples(1200, seed) for seed in range(3)]


@pytest.mark.trio
async def test_a_request_crosses_the_relay_as_the_bytes_that_came(tmp_path: Path) -> None:
    async with daemon(tmp_path) as relay, fake_worker(relay.url) as worker, peer(relay.url, "client") as client:
        submit = a_submit(run_timeout_s=7.0)
        client.send(submit)
        assert (await client.next()).TYPE == "accepted"
        assign = await worker.assigned()
        assert (assign.params, assign.attempt, assign.from_seq) == (submit.params, 1, 0)
        assert (assign.run_timeout_s, assign.space) == (7.0, "tts")
        worker.speak(assign, PCM)
        frames = await client.frames(submit)
        assert [frame.pcm for frame in frames if isinstance(frame, Audio)] == PCM
        assert frames[-1].result == {"chunks": 3}
        await relay.at_rest()
        client.send(Status(request_id=submit.request_id))
        status = await client.next(StatusReply)
        assert (status.state, status.next_seq) == ("completed", 5)
        request = relay.relay.requests[submit.request_id]
        assert request.ended_at is not None
        assert request.outcome.run_s == pytest.approx(request.ended_at - request.entry.started_at, abs=0.001)


@pytest.mark.trio
async def test_a_failure_is_a_warning_in_the_log_and_all_else_of_a_request_is_not(tmp_path: Path) -> None:
    with kept_logs() as logs:
        async with (
            daemon(tmp_path) as relay,
            fake_worker(relay.url, slots=2) as worker,
            peer(relay.url, "client") as client,
        ):
            good, bad = a_submit(), a_submit()
            for submit in (good, bad):
                client.send(submit)
                assign = await worker.assigned()
                if submit is bad:
                    worker.send(Failed(**identity(assign, 0), code="invalid_params", message="no"))
                else:
                    worker.speak(assign, PCM)
                await client.frames(submit)
            await relay.at_rest()
    told = {
        (log["event"], log["log_level"]) for log in logs if log.get("request_id") in (good.request_id, bad.request_id)
    }
    assert {("request started", "info"), ("request completed", "info"), ("request failed", "warning")} <= told
    assert not {("request completed", "warning"), ("request started", "warning"), ("request failed", "info")} & told


TOO_LARGE = (
    "has 65400 bytes, and for all values together the limit is 65536: "
    "send large values as files, or as bytes of their own"
)


@pytest.mark.trio
@pytest.mark.parametrize(
    ("fields", "code", "details"),
    [
        ({"space": "nope"}, "space_not_found", {}),
        ({"params": {}}, "invalid_params", {"text": "is required"}),
        ({"text": 5}, "invalid_params", {"text": "must be a string, not int"}),
        ({"params": {"text": "x", "speed": 1}}, "invalid_params", {"speed": "is unknown; accepted: rate, text"}),
        ({"params": {"text": "x", "rate": "fast"}}, "invalid_params", {"rate": "must be an integer, not string"}),
        ({"params": {"text": "x", "k" * 60_000: 1}}, "invalid_params", {"k" * 64: "is unknown; accepted: rate, text"}),
        ({"text": "x" * 65_400}, "invalid_params", {"text": TOO_LARGE}),
        ({"inputs": {"voice": an_input(b"x")}}, "invalid_params", {"inputs.voice": "is not accepted"}),
        ({"inputs": {"voice": an_input(b"x", size=2**40)}}, "input_too_large", {}),
    ],
)
async def test_a_bad_submit_is_rejected_in_words(
    tmp_path: Path, fields: dict[str, Any], code: str, details: dict[str, str]
) -> None:
    async with daemon(tmp_path) as relay, fake_worker(relay.url), peer(relay.url, "client") as client:
        await until(lambda: bool(relay.relay.workers))
        submit = a_submit(**fields)
        client.send(submit)
        refusal = await client.next(Rejected, Accepted)
        assert (refusal.request_id, refusal.code, refusal.details) == (submit.request_id, code, details)
        assert not refusal.retryable
        assert not relay.relay.requests
        await relay.at_rest()
        await relay.goes_on()


@pytest.mark.trio
async def test_the_largest_request_that_is_taken_can_be_handed_to_a_worker(tmp_path: Path) -> None:
    async with daemon(tmp_path) as relay, peer(relay.url, "client") as client:
        size = 65_300
        while True:
            submit = a_submit("x" * size)
            client.send(submit)
            if isinstance(await client.next(Accepted, Rejected), Rejected):
                break
            size += 25
        assert size > 65_300
        async with fake_worker(relay.url, slots=100) as worker:
            last = [await worker.assigned() for _ in range(len(relay.relay.requests))][-1]
            assert len(last.params["text"]) == size - 25


@pytest.mark.trio
async def test_the_same_request_sent_again_runs_once_and_reattaches(tmp_path: Path) -> None:
    async with daemon(tmp_path) as relay, fake_worker(relay.url) as worker, peer(relay.url, "client") as client:
        submit = a_submit()
        client.send(submit)
        client.send(submit)
        worker.speak(await worker.assigned(), PCM)
        async with peer(relay.url, "client") as second:
            second.send(submit)
            frames = await second.frames(submit)
        assert await client.frames(submit) == frames
        client.send(submit)
        assert (await client.next(Accepted)).request_id == submit.request_id
        assert await client.frames(submit) == frames
        other = a_submit("something else", request_id=submit.request_id)
        client.send(other)
        refusal = await client.next(Rejected)
        assert (refusal.code, refusal.request_id) == ("id_conflict", submit.request_id)
        assert relay.relay.spaces["tts"].ended == {"completed": 1}
        await relay.at_rest()
        await relay.goes_on()


@pytest.mark.trio
async def test_two_clients_ten_requests_one_slot(tmp_path: Path) -> None:
    async with (
        daemon(tmp_path) as relay,
        fake_worker(relay.url) as worker,
        peer(relay.url, "client") as one,
        peer(relay.url, "client") as two,
    ):
        submits = [a_submit(f"number {number}") for number in range(10)]
        for number, submit in enumerate(submits):
            client = (one, two)[number % 2]
            client.send(submit)
            await client.next(Accepted)
        async with trio.open_nursery() as nursery:
            told: dict[str, list[int]] = {}

            async def listen(number: int) -> None:
                ended = 0
                while ended < 5:
                    message = await (one, two)[number].next(Queued, Completed)
                    if isinstance(message, Queued):
                        told.setdefault(message.request_id, []).append(message.position)
                    else:
                        ended += 1

            nursery.start_soon(listen, 0)
            nursery.start_soon(listen, 1)
            await until(lambda: len(told) == 9)
            assert [told[submit.request_id] for submit in submits[1:]] == [[place] for place in range(1, 10)]
            order = []
            for _ in submits:
                assign = await worker.assigned()
                order.append(assign.request_id)
                worker.speak(assign, PCM[:1])
        assert order == [submit.request_id for submit in submits]
        assert all(places == sorted(places, reverse=True) for places in told.values())
        await relay.at_rest()


# -- cancelling ------------------------------------------------------------------------------------------------------


@pytest.mark.trio
async def test_cancelling_what_waits_and_what_runs(tmp_path: Path) -> None:
    async with daemon(tmp_path) as relay, fake_worker(relay.url) as worker, peer(relay.url, "client") as client:
        runs, waits = a_submit(), a_submit()
        client.send(runs)
        assign = await worker.assigned()
        client.send(waits)
        client.send(Cancel(request_id=waits.request_id, reason="changed my mind"))
        (frame,) = await client.frames(waits)
        assert isinstance(frame, Cancelled)
        assert frame.reason == "changed my mind"
        client.send(Cancel(request_id=runs.request_id))
        client.send(Cancel(request_id=runs.request_id))
        assert (await worker.peer.next(Cancel)).request_id == runs.request_id
        worker.send(Cancelled(**identity(assign, 0), reason="as asked"))
        (frame,) = await client.frames(runs)
        assert isinstance(frame, Cancelled)
        await relay.at_rest()
        client.send(Cancel(request_id=an_id()))
        assert (await client.next(Rejected)).code == "request_not_found"
        await relay.goes_on()


@pytest.mark.trio
async def test_a_cancel_that_the_worker_does_not_answer_ends_the_request_and_holds_the_slot(tmp_path: Path) -> None:
    limits = {"cancel_grace_s": 0.05}
    async with (
        daemon(tmp_path, limits=limits) as relay,
        fake_worker(relay.url) as worker,
        peer(relay.url, "client") as client,
    ):
        stuck, after = a_submit(), a_submit()
        client.send(stuck)
        assign = await worker.assigned()
        client.send(Cancel(request_id=stuck.request_id))
        (frame,) = await client.frames(stuck)
        assert isinstance(frame, Cancelled)
        client.send(after)
        await client.next(Accepted)
        await client.settled()
        assert relay.relay.requests[after.request_id].entry.state == "queued"
        worker.speak(assign, PCM)  # fenced, and only then is the slot free
        worker.speak(await worker.assigned(), PCM)
        assert [frame.pcm for frame in (await client.frames(after))[1:-1]] == PCM
        assert relay.relay.fenced_frames == 5
        await relay.at_rest()


@pytest.mark.trio
async def test_a_cancelled_request_whose_engine_crashes_is_not_tried_again(tmp_path: Path) -> None:
    async with daemon(tmp_path) as relay, fake_worker(relay.url) as worker, peer(relay.url, "client") as client:
        submit = a_submit()
        client.send(submit)
        assign = await worker.assigned()
        client.send(Cancel(request_id=submit.request_id, reason="enough"))
        await worker.peer.next(Cancel)
        worker.send(Failed(**identity(assign, 0), code="engine_failed", message="killed", retryable=True))
        (frame,) = await client.frames(submit)
        assert isinstance(frame, Cancelled)
        assert frame.reason == "enough"
        await relay.at_rest()


# -- a client goes away ----------------------------------------------------------------------------------------------


@pytest.mark.trio
async def test_a_request_that_nobody_holds_is_cancelled_and_its_slot_is_free(tmp_path: Path) -> None:
    async with daemon(tmp_path, limits={"resume_window_s": 0.1}) as relay, fake_worker(relay.url) as worker:
        async with peer(relay.url, "client") as client:
            runs, waits = a_submit(), a_submit()
            client.send(runs)
            assign = await worker.assigned()
            client.send(waits)
            await client.next(Queued)
            await client.cut()
        began = trio.current_time()
        assert (await worker.peer.next(Cancel)).request_id == runs.request_id
        assert 0.05 < trio.current_time() - began < 1
        worker.send(Cancelled(**identity(assign, 0)))
        await relay.at_rest()
        assert relay.relay.spaces["tts"].ended == {"cancelled": 2}
        await relay.goes_on()


@pytest.mark.trio
async def test_without_a_resume_window_a_request_goes_with_its_client(tmp_path: Path) -> None:
    async with daemon(tmp_path, limits={"resume_window_s": 0}) as relay, fake_worker(relay.url) as worker:
        async with peer(relay.url, "client") as client:
            client.send(a_submit())
            assign = await worker.assigned()
        await worker.peer.next(Cancel)
        worker.send(Cancelled(**identity(assign, 0)))
        await relay.at_rest()


@pytest.mark.trio
async def test_a_client_that_comes_back_misses_nothing_and_gets_nothing_twice(tmp_path: Path) -> None:
    async with daemon(tmp_path, limits={"resume_window_s": 5}) as relay, fake_worker(relay.url) as worker:
        submit = a_submit()
        async with peer(relay.url, "client") as client:
            client.send(submit)
            assign = await worker.assigned()
            worker.speak(assign, PCM[:1], end=False)
            assert (await client.next(Audio)).pcm == PCM[0]
            await client.cut()
        worker.send(Audio(**identity(assign, 2), pcm=PCM[1]))
        async with peer(relay.url, "client") as client:
            client.send(Attach(request_id=submit.request_id, attempt=1, after_seq=1))
            worker.speak(assign, PCM, first=3)
            frames = await client.frames(submit, first=2)
            assert [frame.pcm for frame in frames[:-1]] == PCM[1:]
        await relay.at_rest()


@pytest.mark.trio
async def test_a_detached_request_goes_on_without_its_client(tmp_path: Path) -> None:
    async with daemon(tmp_path, limits={"resume_window_s": 0}) as relay, fake_worker(relay.url) as worker:
        submit = a_submit(detach=True)
        async with peer(relay.url, "client") as client:
            client.send(submit)
            await client.next(Accepted)
        await until(lambda: not relay.relay.clients)
        worker.speak(await worker.assigned(), PCM)
        async with peer(relay.url, "client") as client:
            client.send(Attach(request_id=submit.request_id))
            assert [frame.pcm for frame in (await client.frames(submit))[1:-1]] == PCM
        await relay.at_rest()


@pytest.mark.trio
async def test_a_second_listener_gets_the_same_frames(tmp_path: Path) -> None:
    async with (
        daemon(tmp_path) as relay,
        fake_worker(relay.url) as worker,
        peer(relay.url, "client") as client,
        peer(relay.url, "client") as listener,
    ):
        submit = a_submit()
        client.send(submit)
        assign = await worker.assigned()
        worker.speak(assign, PCM[:1], end=False)
        await client.next(Audio)
        listener.send(Attach(request_id=submit.request_id))
        await listener.next(Audio)
        worker.speak(assign, PCM, first=2)
        listener.send(Attach(request_id=submit.request_id))  # from the beginning again, instead of twice
        frames = [await listener.next() for _ in range(1)]
        while frames[-1].TYPE != "completed":
            frames.append(await listener.next())
        assert [frame.TYPE for frame in frames].count("completed") == 1
        assert (await client.next(Completed)).seq == 4
        await relay.at_rest()


@pytest.mark.trio
async def test_a_slow_reader_holds_up_nobody_and_still_gets_it_all(tmp_path: Path) -> None:
    pcm = [samples(100_000, seed) for seed in range(40)]  # 8 MB: more than two sockets hold
    tap = Tap()
    async with (
        daemon(tmp_path) as relay,
        fake_worker(relay.url) as worker,
        peer(relay.url, "client") as client,
        peer(relay.url, "client", connect_to=tap.connect) as slow,
    ):
        submit = a_submit()
        tap.close()
        client.send(submit)
        assign = await worker.assigned()
        slow.send(Attach(request_id=submit.request_id))
        worker.speak(assign, pcm)
        assert [frame.pcm for frame in (await client.frames(submit))[1:-1]] == pcm
        (reader,) = relay.relay.requests[submit.request_id].log.readers
        assert not reader.done
        tap.open()
        assert [frame.pcm for frame in (await slow.frames(submit))[1:-1]] == pcm
        await relay.at_rest()


# -- deadlines -------------------------------------------------------------------------------------------------------


@pytest.mark.trio
async def test_deadlines_have_names(tmp_path: Path) -> None:
    spaces = {"tts": {"idle_timeout_s": 0.15, "max_attempts": 1}}
    async with (
        daemon(tmp_path, spaces=spaces) as relay,
        fake_worker(relay.url) as worker,
        peer(relay.url, "client") as client,
    ):
        slow, waits = a_submit(run_timeout_s=0.1), a_submit(queue_timeout_s=0.05)
        client.send(slow)
        assign = await worker.assigned()
        client.send(waits)
        (frame,) = await client.frames(waits)
        assert (frame.code, frame.retryable) == ("queue_timeout", True)
        (frame,) = await client.frames(slow)
        assert (frame.code, frame.attempt) == ("run_timeout", 1)
        assert (await worker.peer.next(Cancel)).request_id == slow.request_id
        worker.send(Cancelled(**identity(assign, 0)))
        idle = a_submit()
        client.send(idle)
        assign = await worker.assigned()
        began = trio.current_time()
        for seq in range(4):  # each frame moves the deadline that its task sleeps for
            worker.speak(assign, PCM[:seq], first=seq, end=False)
            await trio.sleep(0.06)
        frames = await client.frames(idle)
        assert frames[-1].code == "idle_timeout"
        assert trio.current_time() - began > 0.3
        await worker.peer.next(Cancel)
        worker.send(Cancelled(**identity(assign, 4)))
        await relay.at_rest()
        await relay.goes_on()


@pytest.mark.trio
async def test_an_engine_that_does_not_stream_may_be_silent_for_as_long_as_it_runs(tmp_path: Path) -> None:
    spaces = {"tts": {"idle_timeout_s": 0.05, "run_timeout_s": 5.0}}
    instance = an_id()
    async with daemon(tmp_path, spaces=spaces) as relay, peer(relay.url, "client") as client:
        first, second = a_submit(), a_submit()
        async with fake_worker(relay.url, streams=False, instance=instance) as worker:
            client.send(first)
            assign = await worker.assigned()
            await trio.sleep(0.2)
            worker.speak(assign, PCM)
            last = (await client.frames(first))[-1]
            assert (last.TYPE, last.attempt) == ("completed", 1), "it was not tried again"
            client.send(second)
            assign = await worker.assigned()
            await worker.peer.cut()
        running = (Running(request_id=second.request_id, attempt=1, next_seq=0),)
        async with fake_worker(relay.url, streams=False, instance=instance, running=running) as worker:
            await worker.peer.next(Registered)
            await trio.sleep(0.2)
            worker.speak(assign, PCM)
            last = (await client.frames(second))[-1]
            assert (last.TYPE, last.attempt) == ("completed", 1), "after a cut neither"
            await relay.at_rest()


@pytest.mark.trio
async def test_an_upload_that_stops_is_given_up_by_the_queue_deadline(tmp_path: Path) -> None:
    async with daemon(tmp_path) as relay, peer(relay.url, "client") as client:
        submit = a_submit(inputs={"voice": an_input(b"abc")}, queue_timeout_s=0.05)
        client.send(submit)
        (frame,) = await client.frames(submit)
        assert frame.code == "queue_timeout"
        await relay.at_rest()


# -- inputs ----------------------------------------------------------------------------------------------------------

VOICE = samples(200_000)
RULES = {"voice": {"media_types": ["audio/wav"], "max_bytes": 500_000, "required": True}, "extra": {}}


def pieces(submit: Any, name: str, data: bytes, size: int = 150_000) -> list[Input]:
    return [
        Input(request_id=submit.request_id, name=name, offset=offset, data=data[offset : offset + size])
        for offset in range(0, len(data), size)
    ]


@pytest.mark.trio
async def test_inputs_arrive_whole_at_the_worker(tmp_path: Path) -> None:
    async with (
        daemon(tmp_path, store="sqlite") as relay,
        fake_worker(relay.url, inputs=RULES) as worker,
        peer(relay.url, "client") as client,
    ):
        await until(lambda: bool(relay.relay.workers))
        submit = a_submit(inputs={"voice": an_input(VOICE), "extra": an_input(b"")})
        client.send(submit)
        for piece in pieces(submit, "voice", VOICE):
            client.send(piece)
            client.send(piece)  # again, as after a cut
        assign = await worker.assigned()
        assert assign.inputs == submit.inputs
        data = b""
        while len(data) < len(VOICE):
            piece = await worker.peer.next(Input)
            assert (piece.name, piece.offset) == ("voice", len(data))
            data += piece.data
        assert data == VOICE
        worker.speak(assign, PCM)
        assert [frame.pcm for frame in (await client.frames(submit))[1:-1]] == PCM
        await relay.at_rest()
        assert relay.relay.spaces["tts"].ended == {"completed": 1}, "and only once"


@pytest.mark.trio
@pytest.mark.parametrize(
    ("inputs", "sent", "code"),
    [
        ({"voice": an_input(VOICE, sha256="0" * 64)}, VOICE, "input_mismatch"),
        ({"voice": an_input(b"", sha256="0" * 64)}, b"", "input_mismatch"),
        ({"voice": an_input(VOICE[:1000])}, VOICE[:1001], "input_too_large"),
        ({"voice": an_input(VOICE, size=500_001)}, b"", "input_too_large"),
        ({"voice": an_input(VOICE, media_type="text/html")}, b"", "invalid_params"),
        ({}, b"", "input_missing"),
        ({"voice": an_input(VOICE), "song": an_input(b"x")}, b"", "invalid_params"),
    ],
)
async def test_bad_inputs_are_refused_and_leave_nothing(
    tmp_path: Path, inputs: dict[str, Any], sent: bytes, code: str
) -> None:
    async with (
        daemon(tmp_path) as relay,
        fake_worker(relay.url, inputs=RULES),
        peer(relay.url, "client") as client,
    ):
        await until(lambda: bool(relay.relay.workers))
        submit = a_submit(inputs=inputs)
        client.send(submit)
        for piece in pieces(submit, "voice", sent):
            client.send(piece)
        refusal = await client.next(Rejected)
        assert (refusal.request_id, refusal.code) == (submit.request_id, code)
        await client.settled()
        assert not relay.relay.requests, "its id is free again"
        await relay.at_rest()
        await relay.goes_on()


@pytest.mark.trio
async def test_a_gap_or_an_unknown_name_in_an_upload_is_refused(tmp_path: Path) -> None:
    async with daemon(tmp_path) as relay, peer(relay.url, "client") as client:
        for name, offset in (("voice", 3), ("song", 0)):
            submit = a_submit(inputs={"voice": an_input(VOICE)})
            client.send(submit)
            client.send(Input(request_id=submit.request_id, name=name, offset=offset, data=b"abc"))
            assert (await client.next(Rejected)).code == "input_mismatch"
        await relay.at_rest()


# -- asking ----------------------------------------------------------------------------------------------------------


@pytest.mark.trio
async def test_status_and_spaces(tmp_path: Path) -> None:
    async with daemon(tmp_path) as relay, peer(relay.url, "client") as client:
        submits = [a_submit() for _ in range(2)]
        for submit in submits:
            client.send(submit)
            await client.next(Accepted)
        client.send(Status(request_id=submits[1].request_id))
        status = await client.next(StatusReply)
        assert (status.state, status.position, status.of) == ("queued", 2, 2)
        client.send(Spaces())
        rows = {row["name"]: row for row in (await client.next(SpacesReply)).spaces}
        assert rows["tts"]["state"] == "no worker"
        assert rows["tts"]["queued"] == 2
        for unknown in (Status(request_id=an_id()), Attach(request_id=an_id())):
            client.send(unknown)
            refusal = await client.next(Rejected)
            assert (refusal.code, refusal.request_id) == ("request_not_found", unknown.request_id)


@pytest.mark.trio
async def test_a_space_that_the_settings_no_longer_name_goes_unless_something_waits_in_it(tmp_path: Path) -> None:
    async with daemon(tmp_path, store="sqlite", spaces={"old": {}, "used": {}, "made": {}}) as relay:
        spaces, store = relay.relay.spaces, relay.relay.store
        spaces["made"].made_by = "command"
        store.post(PutSpace(spaces.record(spaces["made"])))
        async with peer(relay.url, "client") as client:
            client.send(a_submit(space="used", detach=True))
            await client.next(Queued)
        await store.flush()
    async with daemon(tmp_path, store="sqlite") as relay:
        assert set(relay.relay.spaces) == {"tts", "check", "used", "made"}
        await relay.relay.store.flush()
        assert {record.name for record in (await relay.relay.store.load()).spaces} == set(relay.relay.spaces)


@pytest.mark.trio
async def test_a_schema_too_large_to_be_listed_does_not_break_the_listing(tmp_path: Path) -> None:
    voices = [f"{number:040}" for number in range(1_000)]
    async with (
        daemon(tmp_path) as relay,
        fake_worker(relay.url, params={"properties": {"voice": {"enum": voices}}}),
        peer(relay.url, "client") as client,
    ):
        await until(lambda: bool(relay.relay.workers))
        client.send(Spaces())
        rows = {row["name"]: row for row in (await client.next(SpacesReply)).spaces}
        assert rows["tts"]["params"] == {"description": "too large to be listed"}


@pytest.mark.trio
async def test_a_retried_engine_crash_is_told_by_a_new_attempt(tmp_path: Path) -> None:
    async with daemon(tmp_path) as relay, fake_worker(relay.url) as worker, peer(relay.url, "client") as client:
        submit = a_submit()
        client.send(submit)
        for attempt in (1, 2):
            assign = await worker.assigned()
            assert assign.attempt == attempt
            worker.send(Failed(**identity(assign, 0), code="engine_failed", message="x" * 4096, retryable=True))
        assign = await worker.assigned()
        worker.send(Failed(**identity(assign, 0), code="engine_failed", message="x" * 4096, retryable=True))
        (frame,) = await client.frames(submit)
        assert (frame.code, frame.attempt) == ("engine_failed", 3)
        await relay.at_rest()
        bad = a_submit()
        client.send(bad)
        assign = await worker.assigned()
        worker.send(Failed(**identity(assign, 0), code="engine_failed", message="bad text", retryable=False))
        (frame,) = await client.frames(bad)
        assert (frame.message, frame.attempt) == ("bad text", 1)
        await relay.goes_on()


@pytest.mark.trio
async def test_a_result_that_is_too_large_fails_the_request_alone(tmp_path: Path) -> None:
    async with (
        daemon(tmp_path, limits={"max_result_bytes": 5000}) as relay,
        fake_worker(relay.url, slots=2) as worker,
        peer(relay.url, "client") as client,
    ):
        large, small = a_submit(), a_submit()
        client.send(large)
        first = await worker.assigned()
        client.send(small)
        second = await worker.assigned()
        worker.speak(first, PCM)
        worker.speak(second, PCM[:1])
        done: dict[str, Any] = {}
        while len(done) < 2:
            frame = await client.next(Failed, Completed)
            done[frame.request_id] = frame
        assert done[large.request_id].code == "result_too_large"
        assert isinstance(done[small.request_id], Completed)
        assert (await worker.peer.next(Cancel)).request_id == large.request_id
        await relay.at_rest()
