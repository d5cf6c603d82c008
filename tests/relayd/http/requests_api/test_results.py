"""Results over HTTP: as events and as audio, also after a cut."""

from pathlib import Path
from typing import Any

import attrs
import h11
import pytest
import trio

from protocol.wire.frames import (
    Audio,
    Completed,
    Failed,
    Output,
    Progress,
    Started,
)
from protocol.wire.messages import (
    Ack,
    Attach,
    Done,
    Status,
    StatusReply,
    Steer,
    Submit,
)
from protocol.wire.structs import (
    AudioFormat,
)
from tests.relayd.http.requests_api.answers import ALL, PCM, POST, one, pcm_of
from tests.support.fake_worker import FORMAT, fake_worker, identity
from tests.support.raw_http_client import events_of, visitor
from tests.support.relay import Daemon, daemon, peer, until

# -- events ----------------------------------------------------------------------------------------------------------


@pytest.mark.trio
async def test_events_tell_the_place_and_every_frame_and_go_on_behind_the_last_one_heard(tmp_path: Path) -> None:
    async with daemon(tmp_path) as relay, visitor(relay.url) as http, visitor(relay.url) as other:
        posted = await other.ask("POST", POST, told={"params": {"text": "x"}})
        answer = await http.open("GET", one(posted, "/events"))
        assert answer.headers["x-accel-buffering"] == "no"
        assert answer.headers["content-type"] == "text/event-stream; charset=utf-8"
        await answer.until(b"event: queued")
        async with fake_worker(relay.url) as worker:
            assign = await worker.assigned()
            worker.send(Started(**identity(assign, 0), format=FORMAT))
            worker.send(Progress(**identity(assign, 1), state="generating", fraction=0.5))
            worker.send(Audio(**identity(assign, 2), pcm=PCM[0]))
            await answer.until(b"id: 1.2\n")
            before = events_of(answer.body)
            assert [kind for kind, *_ in before][:3] == ["queued", "started", "progress"]
            assert before[1][2]["format"] == {"encoding": "pcm_s16le", "sample_rate": 24000, "channels": 1}
            async with visitor(relay.url) as resumed:
                tail = await resumed.open("GET", one(posted, "/events"), headers={"last-event-id": "1.1"})
                await tail.until(b"id: 1.2\n")
                worker.speak(assign, [PCM[2], PCM[1], PCM[2]], first=3)
                await answer.rest()
                await tail.rest()
            assert [(kind, name) for kind, name, _ in events_of(tail.body)] == [
                ("audio", "1.2"),
                ("audio", "1.3"),
                ("completed", "1.4"),
            ]
            assert pcm_of(answer.body) == PCM[0] + PCM[2]
            await relay.at_rest()
        again = await http.get(one(posted, "/events"), headers={"last-event-id": "1.4"})
        assert again.status == 204, "all of it was heard"
        replayed = await http.get(one(posted, "/events"))
        assert pcm_of(replayed.body) == PCM[0] + PCM[2]


@pytest.mark.trio
async def test_a_failure_is_told_as_an_event_and_a_bad_last_event_id_is_refused(tmp_path: Path) -> None:
    async with daemon(tmp_path) as relay, fake_worker(relay.url) as worker, visitor(relay.url) as http:
        posted = await http.ask("POST", POST, told={"params": {"text": "x"}})
        assign = await worker.assigned()
        worker.send(Started(**identity(assign, 0), format=FORMAT))
        worker.send(Failed(**identity(assign, 1), code="engine_failed", message="no air", details={"at": 3}))
        told = events_of((await http.get(one(posted, "/events"))).body)
        assert told[-1][0] == "failed"
        assert (told[-1][2]["code"], told[-1][2]["details"]["at"]) == ("engine_failed", 3)
        for bad in ("x", "1", "1.x", "1.99999999999", "-1.0"):
            answer = await http.get(one(posted, "/events"), headers={"last-event-id": bad})
            assert (answer.status, answer.error["code"]) == (422, "invalid_params")
        audio = await http.get(one(posted, "/audio"))
        assert (audio.status, audio.error["code"], audio.error["message"]) == (502, "engine_failed", "no air")


@pytest.mark.trio
async def test_a_silent_stream_is_kept_open_by_comments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("relayd.http.requests_api.event_stream.COMMENT_S", 0.05)
    async with daemon(tmp_path) as relay, visitor(relay.url) as http, visitor(relay.url) as other:
        posted = await other.ask("POST", POST, told={"params": {"text": "x"}})
        answer = await http.open("GET", one(posted, "/events"))
        await answer.until(b":\n\n:\n\n")


# -- audio -----------------------------------------------------------------------------------------------------------


@pytest.mark.trio
async def test_audio_is_heard_while_it_is_made(tmp_path: Path) -> None:
    async with daemon(tmp_path) as relay, fake_worker(relay.url) as worker, visitor(relay.url) as http:
        posted = await http.ask("POST", POST, told={"params": {"text": "x"}})
        assign = await worker.assigned()
        await http.begin("GET", one(posted, "/audio"))
        worker.speak(assign, PCM[:1], end=False)
        answer = await http.answer()
        assert (answer.status, answer.headers["content-type"]) == (200, "audio/wav")
        assert answer.headers["accept-ranges"] == "none"
        await answer.until(PCM[0])
        assert relay.relay.requests[assign.request_id].live, "it came before the end"
        worker.speak(assign, PCM, first=2)
        await answer.rest()
        assert answer.body[:4] == b"RIFF"
        assert answer.body[44:] == ALL


@pytest.mark.trio
async def test_a_worker_lost_in_mid_stream_cuts_the_audio_short_and_never_silently(tmp_path: Path) -> None:
    async with daemon(tmp_path, limits={"worker_grace_s": 0.1}) as relay, visitor(relay.url) as http:
        async with fake_worker(relay.url) as worker:
            posted = await http.ask("POST", POST, told={"params": {"text": "x"}})
            worker.speak(await worker.assigned(), PCM[:1], end=False)
            answer = await http.open("GET", one(posted, "/audio"))
            await answer.until(PCM[0])
        with pytest.raises((trio.BrokenResourceError, h11.RemoteProtocolError)):
            await answer.rest()
        assert not answer.whole
        await relay.at_rest()


@pytest.mark.trio
@pytest.mark.parametrize("settings", [{"store": "memory"}, {"store": "sqlite", "results": {"memory_bytes": 1}}])
async def test_finished_audio_has_its_length_and_is_given_in_ranges(tmp_path: Path, settings: dict[str, Any]) -> None:
    async with (
        daemon(tmp_path, **settings) as relay,
        fake_worker(relay.url) as worker,
        visitor(relay.url) as http,
    ):
        posted = await http.ask("POST", POST, told={"params": {"text": "x"}})
        worker.speak(await worker.assigned(), PCM)
        await relay.at_rest()
        path = one(posted, "/audio")
        whole = await http.get(path)
        assert (whole.status, whole.headers["content-length"], whole.body[44:]) == (200, str(44 + len(ALL)), ALL)
        assert int.from_bytes(whole.body[40:44], "little") == len(ALL)
        head = await http.ask("HEAD", path)
        assert (head.status, head.headers["content-length"], head.body) == (200, str(44 + len(ALL)), b"")
        total = 44 + len(ALL)
        for asked, begin, end in (
            ("bytes=0-9", 0, 10),
            ("bytes=40-50", 40, 51),
            ("bytes=2000-3000", 2000, 3001),
            ("bytes=-100", total - 100, total),
            (f"bytes=7000-{total + 5}", 7000, total),
        ):
            part = await http.get(path, headers={"range": asked})
            assert (part.status, part.body) == (206, whole.body[begin:end]), asked
            assert part.headers["content-range"] == f"bytes {begin}-{end - 1}/{total}"
        beyond = await http.get(path, headers={"range": f"bytes={total}-"})
        assert (beyond.status, beyond.headers["content-range"]) == (416, f"bytes */{total}")
        for other in ("bytes=5-2", "lines=1-2", "bytes=0-1,5-6", "bytes=-"):
            assert (await http.get(path, headers={"range": other})).status == 200
        etag = whole.headers["etag"]
        same = await http.get(path, headers={"range": "bytes=0-9", "if-range": etag})
        assert same.status == 206
        assert (await http.get(path, headers={"range": "bytes=0-9", "if-range": '"x"'})).status == 200
        pcm = await http.get(f"{path}?format=pcm", headers={"range": "bytes=2-5"})
        assert (pcm.body, pcm.headers["content-type"]) == (ALL[2:6], "audio/pcm; rate=24000; channels=1")
        assert (await http.get(f"{path}?format=ogg")).status == 422


@pytest.mark.trio
async def test_a_result_that_is_no_audio_says_so(tmp_path: Path) -> None:
    async with daemon(tmp_path) as relay, fake_worker(relay.url, format=None) as worker, visitor(relay.url) as http:
        posted = await http.ask("POST", POST, told={"params": {"text": "x"}})
        assign = await worker.assigned()
        worker.send(Started(**identity(assign, 0), format=None))
        answer = await http.get(one(posted, "/audio"))
        assert (answer.status, answer.error["code"]) == (409, "no_audio")


@pytest.mark.trio
async def test_a_listener_beside_the_http_client_hears_the_same(tmp_path: Path) -> None:
    async with (
        daemon(tmp_path) as relay,
        fake_worker(relay.url) as worker,
        visitor(relay.url) as http,
        peer(relay.url, "client") as client,
    ):
        posted = await http.ask("POST", POST, told={"params": {"text": "x"}})
        request_id = posted.json["request_id"]
        assign = await worker.assigned()
        client.send(Attach(request_id=request_id))
        worker.speak(assign, PCM)
        frames = await client.frames(Submit(request_id=request_id, space="tts"))
        assert b"".join(frame.pcm for frame in frames if isinstance(frame, Audio)) == ALL


# -- cuts ------------------------------------------------------------------------------------------------------------


@pytest.mark.trio
async def test_a_reproducible_worker_lost_in_mid_stream_is_a_pause_and_nothing_else(tmp_path: Path) -> None:
    same: dict[str, Any] = {"reproducible": True, "fingerprint": "a"}
    async with daemon(tmp_path, limits={"worker_grace_s": 0.1}) as relay, visitor(relay.url) as http:
        async with fake_worker(relay.url, name="one", **same) as worker:
            posted = await http.ask("POST", POST, told={"params": {"text": "x"}})
            worker.speak(await worker.assigned(), PCM[:1], end=False)
            answer = await http.open("GET", one(posted, "/audio?format=pcm"))
            await answer.until(PCM[0])
        async with fake_worker(relay.url, name="two", **same) as worker:
            assign = await worker.assigned()
            assert (assign.attempt, assign.from_seq) == (2, 2)
            worker.speak(assign, PCM, first=2)
            assert await answer.rest() == ALL
            events = events_of((await http.get(one(posted, "/events"), headers={"last-event-id": "1.1"})).body)
            assert [name for _, name, _ in events] == ["2.2", "2.3", "2.4"]
        await relay.at_rest()


@pytest.mark.trio
async def test_an_attempt_lost_before_its_first_audio_is_not_heard_of(tmp_path: Path) -> None:
    async with daemon(tmp_path, limits={"worker_grace_s": 0.1}) as relay, visitor(relay.url) as http:
        async with fake_worker(relay.url, name="one") as worker:
            posted = await http.ask("POST", POST, told={"params": {"text": "x"}})
            await http.begin("GET", one(posted, "/audio"))
            worker.speak(await worker.assigned(), [], end=False)  # it has `started`
            await until(lambda: relay.relay.requests[posted.json["request_id"]].log.next_seq == 1)
        other = AudioFormat(sample_rate=16_000)
        async with fake_worker(relay.url, name="two", format=other) as worker:
            assign = await worker.assigned()
            worker.send(Started(**identity(assign, 0), format=other))
            worker.send(Audio(**identity(assign, 1), pcm=PCM[0]))
            worker.send(Completed(**identity(assign, 2)))
            answer = await http.answer()
            await answer.rest()
        assert answer.status == 200
        assert int.from_bytes(answer.body[24:28], "little") == 16_000
        assert answer.body[44:] == PCM[0]


@pytest.mark.trio
async def test_a_result_outlives_the_relay_that_made_it(tmp_path: Path) -> None:
    async with daemon(tmp_path, store="sqlite") as relay, visitor(relay.url) as http, fake_worker(relay.url) as worker:
        posted = await http.ask("POST", POST, told={"params": {"text": "x"}, "detach": True})
        worker.speak(await worker.assigned(), PCM)
        await worker.peer.next(Ack)
        await relay.at_rest()
    async with daemon(tmp_path, store="sqlite") as relay, visitor(relay.url) as http:
        assert (await http.get(one(posted))).json["state"] == "completed"
        assert pcm_of((await http.get(one(posted, "/events"))).body) == ALL
        part = await http.get(one(posted, "/audio"), headers={"range": "bytes=44-143"})
        assert (part.status, part.body) == (206, ALL[:100])
        again = await http.ask("PUT", f"{one(posted)}?space=tts", told={"params": {"text": "x"}, "detach": True})
        assert (again.status, again.json["state"]) == (200, "completed")


# -- status ----------------------------------------------------------------------------------------------------------


@pytest.mark.trio
async def test_a_client_that_only_asks_gets_its_result_also_after_a_restart(tmp_path: Path) -> None:
    values: list[Any] = [{"label": "cat", "p": [0.5, 0.25]}, "text", None, b"\x00\xff"]
    async with daemon(tmp_path, store="sqlite") as relay, fake_worker(relay.url) as worker, visitor(relay.url) as http:
        posted = await http.ask("POST", POST, told={"params": {"text": "x"}})
        assign = await worker.assigned()
        worker.speak(assign, PCM[:1], end=False)
        running = (await http.get(one(posted))).json
        assert (running["outputs"], running["result"], running["run_s"]) == (None, None, None)
        for seq, value in enumerate(values, start=2):
            worker.send(Output(**identity(assign, seq), data=value))
        worker.send(Completed(**identity(assign, 6), result={"chunks": 5}))
        await worker.peer.next(Ack)
        told = [(await http.get(one(posted))).json]
    async with daemon(tmp_path, store="sqlite") as relay, visitor(relay.url) as http:
        told.append((await http.get(one(posted))).json)
        relay.relay.results._evict(relay.relay.requests[posted.json["request_id"]])
        dropped = (await http.get(one(posted))).json
    for status in told:
        assert status["outputs"] == [*values[:-1], {"base64": "AP8="}]
        assert (status["result"], status["audio_s"]) == ({"chunks": 5}, 0.05)
        assert status["run_s"] > 0
    assert (dropped["outputs"], dropped["result"]) == (None, {"chunks": 5})


@pytest.mark.trio
async def test_a_status_holds_no_large_outputs_and_says_that_of_audio_there_are_none(tmp_path: Path) -> None:
    async with daemon(tmp_path) as relay, fake_worker(relay.url) as worker, visitor(relay.url) as http:
        for outputs in (["x" * 60_000] * 2, [b"\0" * 100_000], []):
            posted = await http.ask("POST", POST, told={"params": {"text": "x"}})
            assign = await worker.assigned()
            worker.send(Started(**identity(assign, 0), format=FORMAT))
            for seq, value in enumerate(outputs, start=1):
                worker.send(Output(**identity(assign, seq), data=value))
            worker.send(Completed(**identity(assign, 1 + len(outputs))))
            await worker.peer.next(Ack)
            status = (await http.get(one(posted))).json
            assert status["outputs"] == (None if outputs else [])
            assert status["links"]["events"] == one(posted, "/events")


# -- failures --------------------------------------------------------------------------------------------------------


async def reasons_of(relay: Daemon, request_id: str) -> list[dict[str, Any]]:
    """Why a request failed, as every face tells it."""
    named = ("code", "message", "details", "retryable")
    async with visitor(relay.url) as http, peer(relay.url, "client") as client, peer(relay.url, "operator") as operator:
        client.send(Status(request_id=request_id))
        told: list[Any] = [attrs.asdict(await client.next(StatusReply))]
        client.send(Attach(request_id=request_id))
        told.append(attrs.asdict(await client.next(Failed)))
        told.append((await http.get(f"/v1/requests/{request_id}")).json)
        told.append(events_of((await http.get(f"/v1/requests/{request_id}/events")).body)[-1][2])
        told += [(await http.get(f"/v1/requests/{request_id}/audio?format={name}")).error for name in ("wav", "mp3")]
        operator.send(Steer(action="describe", target=request_id))
        row = (await operator.next(Done)).data
        assert row["details"] == told[0]["details"]
    return [{name: each[name] for name in named} for each in told]


@pytest.mark.trio
@pytest.mark.parametrize("has_output", [False, True])
async def test_a_failure_has_the_same_reason_on_every_face_and_after_a_restart(
    tmp_path: Path, has_output: bool
) -> None:
    details = {"text": "is too long", "at": {"chars": [1, 2]}}
    reason: dict[str, Any] = {"code": "invalid_params", "message": "no air", "details": details, "retryable": True}
    async with daemon(tmp_path, store="sqlite") as relay, fake_worker(relay.url) as worker, visitor(relay.url) as http:
        posted = await http.ask("POST", POST, told={"params": {"text": "x"}})
        assign = await worker.assigned()
        if has_output:
            worker.speak(assign, PCM[:1], end=False)
        worker.send(Failed(**identity(assign, 2 * has_output), **reason))
        await worker.peer.next(Ack)
        assert await reasons_of(relay, posted.json["request_id"]) == [reason] * 6
    async with daemon(tmp_path, store="sqlite") as relay:
        assert await reasons_of(relay, posted.json["request_id"]) == [reason] * 6
        request = relay.relay.requests[posted.json["request_id"]]
        relay.relay.results._evict(request)
        assert await reasons_of(relay, posted.json["request_id"]) == [reason] * 6
