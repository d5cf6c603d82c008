"""A worker that says anything at all: it costs only its own spaces, and whoever runs the relay is told who it is."""

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import attrs
import msgpack
import pytest

from protocol.link.stream_link import StreamLink
from protocol.link.websocket_frames import BINARY, make_frame
from protocol.wire.codec import encode, pack
from protocol.wire.frames import Audio, Cancelled, Completed, Failed, Frame, Output, Progress, Started
from protocol.wire.messages import (
    Ack,
    Assign,
    Cancel,
    Done,
    Error,
    Input,
    Registered,
    Rejected,
    Report,
    Snapshot,
    Status,
    StatusReply,
    Steer,
    Submit,
    Watch,
)
from protocol.wire.structs import AudioFormat, Running
from relayd.connections.input_sender import MAX_UPLOADS
from relayd.core.principals import PROGRESS_S, REGISTRATIONS_AT_ONCE
from relayd.frames.frame_log import FrameLog
from relayd.net.socket_link import SocketLink
from tests.relayd.connections.audio_frames import PCM, heard
from tests.support.fake_worker import FORMAT, FakeWorker, fake_worker, identity, samples
from tests.support.relay import Daemon, Peer, a_submit, an_id, an_input, daemon, kept_logs, new_token, peer, until

#: Most log lines that an attack leaves behind, those of the honest included.
MAX_LINES = 90


@attrs.define(eq=False)
class Scene:
    """A relay on which an honest worker is speaking in the space `check`, and the attacker may serve `tts`."""

    relay: Daemon
    logs: list[Any]
    worker_token: str
    client: Peer
    #: Of the honest: the worker, what it is doing, and who listens.
    honest: FakeWorker
    assign: Assign
    listener: Peer

    @asynccontextmanager
    async def attacker(self, **register: Any) -> AsyncIterator[FakeWorker]:
        """A worker with the token of the principal `mallory`."""
        async with fake_worker(self.relay.url, token=self.worker_token, **register) as worker:
            yield worker

    @asynccontextmanager
    async def assigned(self, **fields: Any) -> AsyncIterator[tuple[FakeWorker, Assign, Submit]]:
        """The attacker, registered, and a request that it was assigned."""
        async with self.attacker() as worker:
            submit = a_submit(**fields)
            self.client.send(submit)
            yield worker, await worker.assigned(), submit

    def lines(self, *events: str) -> list[Any]:
        """What was logged of these events."""
        return [line for line in self.logs if line["event"] in events]


@asynccontextmanager
async def scene(tmp_path: Path, *, max_lines: int = MAX_LINES, **overrides: Any) -> AsyncIterator[Scene]:
    """An attack is made inside the block; afterwards everybody else must have what they would have had without it."""
    with kept_logs() as logs:
        overrides = {"spaces": {"tts": {"max_workers": 2, "max_attempts": 2}}, **overrides}
        async with daemon(tmp_path, **overrides) as relay:
            good = await new_token(relay, "worker", "good", spaces=["check"])
            mallory = await new_token(relay, "worker", "mallory", spaces=["tts"])
            ann, bob = [await new_token(relay, "client", name) for name in ("ann", "bob")]
            async with (
                fake_worker(relay.url, name="honest", token=good, spaces=("check",)) as honest,
                peer(relay.url, "client", bob) as listener,
                peer(relay.url, "client", ann) as client,
            ):
                submit = a_submit(space="check")
                listener.send(submit)
                assign = await honest.assigned()
                honest.speak(assign, PCM[:2], end=False)
                yield Scene(relay, logs, mallory, client, honest, assign, listener)
                honest.speak(assign, PCM, first=3)
                assert heard(await listener.frames(submit)) == b"".join(PCM), "the honest listener's samples"
                assert (await honest.peer.next(Ack)).request_id == submit.request_id
                assert honest.peer.link.gone is None
        assert [line for line in logs if line["log_level"] in ("error", "critical")] == []
        assert len(logs) < max_lines


def nested(key: str, depth: int, inner: dict[str, Any]) -> dict[str, Any]:
    """`inner` in `depth` maps around each other."""
    for _ in range(depth):
        inner = {key: inner}
    return inner


def frame_of(assign: Assign, **other: Any) -> dict[str, Any]:
    """The identity of the next frame of an assignment, with what the attacker says instead."""
    return identity(assign, 0) | other


# -- other people's requests


@pytest.mark.trio
@pytest.mark.parametrize("kind", [Started, Progress, Audio, Output, Completed, Failed, Cancelled])
@pytest.mark.parametrize("attempt", [0, 1, 2, 1_000_000])
async def test_no_frame_reaches_a_request_of_another_worker(tmp_path: Path, kind: type, attempt: int) -> None:
    frames: dict[type, dict[str, Any]] = {
        Started: {"format": FORMAT},
        Audio: {"pcm": samples(10, 7)},
        Failed: {"code": "engine_failed", "message": "no", "retryable": True},
    }
    more = frames.get(kind, {})
    async with scene(tmp_path) as at, at.attacker() as worker:
        await worker.peer.next(Registered)
        queued = a_submit(space="check")
        at.listener.send(queued)
        for request_id in (at.assign.request_id, queued.request_id, an_id()):
            for seq in (0, 3, 2**31):
                worker.send(kind(request_id=request_id, attempt=attempt, seq=seq, **more))
            worker.send(Report(request_id=request_id, attempt=attempt, output="nobody's words"))
        await worker.peer.settled()
        entries = at.relay.relay.scheduler.state.entries
        assert entries[at.assign.request_id].state == "running"
        running = at.relay.relay.requests[at.assign.request_id]
        assert (running.log.next_seq, running.report) == (3, "")
        assert entries[queued.request_id].state == "queued"
        at.listener.send(Cancel(request_id=queued.request_id))


@pytest.mark.trio
async def test_a_worker_takes_no_request_of_another_space_by_naming_it_as_running(tmp_path: Path) -> None:
    async with scene(tmp_path) as at:
        queued, known = a_submit(space="check"), at.assign.request_id
        at.listener.send(queued)
        running = [
            Running(request_id=request_id, attempt=attempt, next_seq=seq)
            for request_id in (known, queued.request_id, an_id())
            for attempt in (0, 1, 2, 1_000_000)
            for seq in (0, 2**31)
        ]
        async with at.attacker(running=running) as worker:
            registered = await worker.peer.next(Registered)
            assert registered.resume == ()
            assert set(registered.abandon) >= {known, queued.request_id}
        at.listener.send(Cancel(request_id=queued.request_id))


@pytest.mark.trio
@pytest.mark.parametrize("gone", ["connected", "away", "away with nothing to do"])
async def test_a_worker_id_of_another_principal_cannot_be_taken(tmp_path: Path, gone: str) -> None:
    async with scene(tmp_path) as at:
        token = await new_token(at.relay, "worker", "owner", spaces=["other"])
        async with peer(at.relay.url, "operator") as operator:
            operator.send(Steer(action="create_space", target="other", options={"max_workers": 2}))
            await operator.next(Done)
        submit, instance = a_submit(space="other", detach=True), an_id()
        owner: dict[str, Any] = {"name": "box", "instance": instance, "token": token, "spaces": ("other",)}
        assign: Assign | None = None
        async with fake_worker(at.relay.url, **owner) as worker:
            registered = await worker.peer.next(Registered)
            if gone != "away with nothing to do":
                at.listener.send(submit)
                assign = await worker.assigned()
                worker.speak(assign, PCM[:1], end=False)
                await worker.peer.settled()
            if gone != "connected":
                await worker.peer.cut()
                await until(lambda: not at.relay.relay.workers.get(registered.worker_id))
            async with at.attacker(name="box", instance=instance) as thief:
                refusal = await thief.peer.next(Rejected)
                assert (refusal.code, "another principal" in refusal.message) == ("forbidden", True)
                if gone == "connected":
                    assert assign is not None
                    worker.speak(assign, PCM, first=2)
                    await worker.peer.next(Ack)
        if gone != "connected":
            running = [Running(request_id=submit.request_id, attempt=1, next_seq=2)]
            async with fake_worker(at.relay.url, **owner, running=running) as worker:
                back = await worker.peer.next(Registered)
                assert back.worker_id == registered.worker_id
                assert len(back.resume) == (gone == "away")
                if gone == "away":
                    assert assign is not None
                    worker.speak(assign, PCM, first=2)
                    await until(lambda: not at.relay.relay.requests[submit.request_id].live)
        if gone != "away with nothing to do":
            assert at.relay.relay.requests[submit.request_id].entry.state == "completed"


@pytest.mark.trio
async def test_an_id_stays_its_principals_however_many_others_came_before_its_worker_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("relayd.core.workers.MAX_OWNERS", 3)
    async with scene(tmp_path) as at:
        token = await new_token(at.relay, "worker", "owner", spaces=["tts"])
        submit, instance = a_submit(detach=True), an_id()
        async with fake_worker(at.relay.url, name="box", instance=instance, token=token) as worker:
            at.client.send(submit)
            worker.speak(await worker.assigned(), PCM[:1], end=False)
            for _ in range(3):
                async with at.attacker() as other:
                    await other.peer.next(Registered)
                await until(lambda: len(at.relay.relay.workers) == 2)
            await worker.peer.cut()
            await until(lambda: len(at.relay.relay.workers) == 1)
            async with at.attacker(name="box", instance=instance) as thief:
                assert (await thief.peer.next(Rejected)).code == "forbidden"
        at.client.send(Cancel(request_id=submit.request_id))


@pytest.mark.trio
async def test_a_namesake_of_another_principal_does_not_end_what_it_waits_for(tmp_path: Path) -> None:
    async with scene(tmp_path, spaces={"tts": {}, "other": {}}) as at:
        token = await new_token(at.relay, "worker", "owner", spaces=["tts", "other"])
        submit = a_submit(space="other", detach=True)
        async with fake_worker(at.relay.url, name="box", token=token, spaces=("tts", "other")) as worker:
            at.listener.send(submit)
            worker.speak(await worker.assigned(), PCM[:1], end=False)
            await worker.peer.settled()
            await worker.peer.cut()
        async with at.attacker(name="box") as namesake:
            await namesake.peer.next(Registered)
            await namesake.peer.settled()
            assert at.relay.relay.scheduler.state.entries[submit.request_id].state == "running"
        at.listener.send(Cancel(request_id=submit.request_id))


@pytest.mark.trio
async def test_after_a_restart_only_who_may_serve_its_spaces_is_the_worker_that_was_away(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"store": "sqlite", "spaces": {"tts": {}, "other": {}}}
    instance, submit = an_id(), a_submit(space="other", detach=True)
    owner: dict[str, Any] = {"name": "box", "instance": instance, "spaces": ("other",)}
    async with daemon(tmp_path, **settings) as relay, peer(relay.url, "client") as client:
        mallory = await new_token(relay, "worker", "mallory", spaces=["tts"])
        async with fake_worker(relay.url, **owner) as worker:
            client.send(submit)
            assign = await worker.assigned()
            worker.speak(assign, PCM[:1], end=False)
            await client.next(Audio)
    async with daemon(tmp_path, **settings) as relay:
        async with fake_worker(relay.url, name="box", instance=instance, token=mallory) as thief:
            assert (await thief.peer.next(Rejected)).code == "forbidden"
        running = [Running(request_id=submit.request_id, attempt=1, next_seq=2)]
        async with fake_worker(relay.url, **owner, running=running) as worker:
            assert len((await worker.peer.next(Registered)).resume) == 1
            worker.speak(assign, PCM[:1])
            await relay.at_rest()
            assert relay.relay.requests[submit.request_id].entry.state == "completed"


# -- numbers, formats and frames of its own request


def _after_end(assign: Assign) -> list[Any]:
    ended = [Started(**identity(assign, 0), format=FORMAT), Completed(**identity(assign, 1))]
    return [
        *ended,
        Audio(**identity(assign, 2), pcm=b"ab"),
        Completed(**identity(assign, 1)),
        Failed(**identity(assign, 2), code="engine_failed", message="after the end", retryable=True),
    ]


@pytest.mark.trio
@pytest.mark.parametrize(
    ("frames", "error"),
    [
        pytest.param(lambda a: [Started(**frame_of(a, attempt=n)) for n in (0, 2, 1_000_000)], None, id="attempts"),
        pytest.param(lambda a: [Started(**frame_of(a, seq=1))], "expected frame 0", id="a gap"),
        pytest.param(lambda a: [Started(**frame_of(a, seq=2**31))], "expected frame 0", id="a huge seq"),
        pytest.param(lambda a: [Audio(**frame_of(a), pcm=b"ab")], "before `started`", id="audio before started"),
        pytest.param(
            lambda a: [Started(**frame_of(a), format=None), Audio(**frame_of(a, seq=1), pcm=b"ab")],
            "before `started`",
            id="audio without a format",
        ),
        pytest.param(
            lambda a: [Started(**frame_of(a), format=FORMAT), Audio(**frame_of(a, seq=1), pcm=b"abc")],
            "whole samples",
            id="half a sample",
        ),
        pytest.param(
            lambda a: [
                Started(**frame_of(a), format=FORMAT),
                Audio(**frame_of(a, seq=1), pcm=b"ab"),
                Audio(**frame_of(a, seq=1), pcm=b"other"),
                Audio(**frame_of(a, seq=0), pcm=b"x" * 10_000),
            ],
            None,
            id="other bytes under a seq that is there",
        ),
        pytest.param(
            lambda a: [
                Started(**frame_of(a), format=FORMAT),
                Audio(**frame_of(a, seq=1), pcm=b"ab"),
                Started(**frame_of(a, seq=2), format=AudioFormat(sample_rate=8_000, channels=2)),
            ],
            "second `started`",
            id="another format in mid-stream",
        ),
        pytest.param(
            lambda a: [Started(**frame_of(a), format=FORMAT), Started(**frame_of(a, seq=1), format=None)],
            "second `started`",
            id="no format after all",
        ),
        pytest.param(_after_end, None, id="after the end"),
        pytest.param(lambda a: [Cancelled(**frame_of(a), reason="I would rather not")], None, id="nobody cancelled"),
    ],
)
async def test_frames_out_of_place_cost_only_their_request(
    tmp_path: Path, frames: Callable[[Assign], list[Any]], error: str | None
) -> None:
    async with (
        scene(tmp_path, limits={"worker_grace_s": 0.01}) as at,
        at.assigned(retry="never") as (worker, assign, _),
    ):
        for frame in frames(assign):
            worker.send(frame)
        if error is None:
            await worker.peer.settled()
        else:
            told = await worker.peer.next(Error)
            assert (told.code, error in told.message) == ("protocol_error", True)
            await until(lambda: at.lines("peer violated the protocol") != [])
            (line,) = at.lines("peer violated the protocol")
            assert (line["principal"], error in line["why"]) == ("mallory", True)


@pytest.mark.trio
async def test_a_new_attempt_names_its_format_before_its_audio(tmp_path: Path) -> None:
    async with (
        scene(tmp_path, limits={"worker_grace_s": 0.01}) as at,
        at.assigned(retry="always") as (worker, assign, _),
    ):
        worker.speak(assign, PCM[:1], end=False)
        worker.send(Failed(**identity(assign, 2), code="engine_failed", message="once more", retryable=True))
        second = await worker.assigned()
        worker.send(Started(**identity(second, 0), format=AudioFormat(sample_rate=8_000, channels=2)))
        worker.send(Audio(**identity(second, 1), pcm=b"abcd"))
        await worker.peer.settled()
        submit = a_submit(retry="always")
        async with at.attacker(name="other") as other:
            worker.send(Completed(**identity(second, 2)))
            at.client.send(submit)
            third = await other.assigned()
            other.speak(third, PCM[:1], end=False)
            other.send(Failed(**identity(third, 2), code="engine_failed", message="once more", retryable=True))
            worker.send(Audio(**identity(await worker.assigned(), 0), pcm=b"ab"))
            assert "before `started`" in (await worker.peer.next(Error)).message


REGISTER: dict[str, Any] = {"type": "register", "worker": "box", "instance": "0" * 32, "spaces": ["tts"]}
#: Messages with a value that no worker may send.
OUT_OF_RANGE: list[dict[str, Any]] = [
    {"type": "started", "format": {"sample_rate": 1}},
    {"type": "started", "format": {"sample_rate": 2**31}},
    {"type": "started", "format": {"sample_rate": 24_000, "channels": 0}},
    {"type": "started", "format": {"sample_rate": 24_000, "channels": 255}},
    {"type": "started", "format": {"sample_rate": 24_000, "encoding": "mp3"}},
    {"type": "started", "seq": -1},
    {"type": "started", "seq": 2**31 + 1},
    {"type": "started", "attempt": -1},
    {"type": "started", "attempt": 1_000_001},
    {"type": "progress", "fraction": float("nan")},
    {"type": "progress", "fraction": 2.0},
    {"type": "progress", "message": "x" * 4_097},
    {"type": "progress", "state": "dreaming"},
    {"type": "audio", "pcm": "text"},
    {"type": "audio", "pcm": b"x" * 1_048_000},
    {"type": "output", "data": 1, "media_type": "image/png\r\nset-cookie: a=b"},
    {"type": "output", "data": 1, "media_type": "image/" + "x" * 10_000},
    {"type": "output", "data": [0] * 2_000},
    {"type": "output", "data": b"x" * 70_000, "media_type": {}},
    {"type": "failed", "code": "x" * 65, "message": ""},
    {"type": "failed", "code": "x", "message": "x" * 4_097},
    {"type": "failed", "code": "x", "message": "x" * 1_000_000},
    {"type": "failed", "code": "x", "message": "", "details": {str(n): n for n in range(65)}},
    {"type": "failed", "code": "x", "message": "", "details": nested("d", 20, {})},
    {"type": "completed", "result": {"figures": b"x" * 66_000}},
    {"type": "cancelled", "reason": "x" * 4_097},
    {"type": "ping", "timestamp": -1.0},
    {"type": "report", "output": "x" * 4_097},
    REGISTER | {"slots": -1},
    REGISTER | {"slots": 10**9},
    REGISTER | {"spaces": []},
    REGISTER | {"spaces": ["a\nb"]},
    REGISTER | {"spaces": [f"s{n}" for n in range(10_000)]},
    REGISTER | {"instance": "../../etc/passwd"},
    REGISTER | {"worker": "x" * 129},
    REGISTER | {"fingerprint": "x" * 201},
    REGISTER | {"inputs": {"a" * 33: {}}},
    REGISTER | {"inputs": {"a": {"max_bytes": 2**63}}},
    REGISTER | {"running": [{"request_id": "x", "attempt": 1, "next_seq": 0}]},
    REGISTER | {"params": {"enum": list(range(10_000))}},
]


@pytest.mark.trio
async def test_a_value_out_of_range_is_refused_by_the_name_of_its_field(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"limits": {"worker_grace_s": 0.0}, "spaces": {"tts": {}}}
    async with scene(tmp_path, max_lines=10 * len(OUT_OF_RANGE), **settings) as at:
        for fields in OUT_OF_RANGE:
            async with at.assigned(retry="never") as (worker, assign, _):
                worker.peer.link.send_nowait(msgpack.packb(identity(assign, 0) | fields))
                told = await worker.peer.next(Error)
                assert told.code == "protocol_error"
                assert fields["type"] in told.message or "limit" in told.message or "nested" in told.message, told
                assert len(told.message) < 1_000
                assert told.message.isprintable()
            assert (await at.client.next(Failed)).code == "worker_lost"
        lines = at.lines("peer violated the protocol")
        assert {line["principal"] for line in lines} == {"mallory"}
        assert sum(1 + line.get("left_out", 0) for line in lines) <= len(OUT_OF_RANGE)


@pytest.mark.trio
@pytest.mark.parametrize(
    ("fields", "code"),
    [
        ({"name": "box\x1b[2J"}, "invalid_params"),
        ({"name": "\u202exob"}, "invalid_params"),
        ({"engine": "a\r\nset-cookie: b"}, "invalid_params"),
        ({"params": {"pattern": "(a+)+$"}}, "invalid_params"),
        ({"params": {"$ref": "#"}}, "invalid_params"),
        ({"params": {"properties": {"text": {"$defs": {}}}}}, "invalid_params"),
        ({"params": nested("items", 12, {})}, "invalid_params"),
        ({"params": {"anyOf": [{}] * 9}}, "invalid_params"),
        ({"params": {"allOf": [{"enum": list(range(1_000))}] * 3}}, "invalid_params"),
        ({"params": {"properties": {"x" * 300: {"type": "\x1b[2J"}}}}, "invalid_params"),
        ({"params": {"required": [0]}}, "invalid_params"),
        ({"spaces": ("check",)}, "forbidden"),
        ({"spaces": ("tts", "check")}, "forbidden"),
    ],
    ids=lambda value: repr(value)[:40] if isinstance(value, dict) else value,
)
async def test_a_registration_that_cannot_be_served_is_refused_and_logged_with_its_principal(
    tmp_path: Path, fields: dict[str, Any], code: str
) -> None:
    async with scene(tmp_path) as at, at.attacker(**fields) as worker:
        refusal = await worker.peer.next(Rejected)
        assert refusal.code == code
        assert len(refusal.message) < 1_000
        assert refusal.message.isprintable()
        (line,) = at.lines("worker refused")
        assert (line["principal"], line["code"]) == ("mallory", code)
        async with at.attacker() as worker:
            await worker.peer.next(Registered)


@pytest.mark.trio
async def test_a_schema_whose_defaults_do_not_fit_and_that_never_fits_costs_only_its_space(tmp_path: Path) -> None:
    deep: dict[str, Any] = {"type": "integer"}
    for _ in range(4):
        deep = {"anyOf": [deep] * 4}
    schema = {"properties": {"text": {"type": "string", "default": 5}, "list": {"items": deep}}}
    async with scene(tmp_path) as at, at.attacker(params=schema) as worker:
        await worker.peer.next(Registered)
        at.client.send(a_submit(params={"list": ["no"] * 1_000}))
        refusal = await at.client.next(Rejected)
        assert (refusal.code, refusal.details) == (
            "invalid_params",
            {"": "could not be checked: it takes more than 8,000 steps; send fewer values"},
        )


@pytest.mark.trio
async def test_a_space_named_a_thousand_times_is_served_and_stored_once(tmp_path: Path) -> None:
    async with scene(tmp_path) as at, at.attacker(spaces=("tts",) * 1_000, slots=1_000) as worker:
        await worker.peer.next(Registered)
        assert [state.spaces for state in at.relay.relay.scheduler.state.workers_of("tts")] == [("tts",)]
        (line,) = [line for line in at.lines("worker registered") if line["principal"] == "mallory"]
        assert line["spaces"] == ["tts"]


# -- floods


@pytest.mark.trio
async def test_registrations_are_limited_for_each_principal(tmp_path: Path) -> None:
    async with scene(tmp_path, max_lines=500) as at, at.attacker(params={"pattern": ""}) as worker:
        again = worker.registration
        for _ in range(1_000):
            worker.send(again)
        codes = [(await worker.peer.next(Rejected)).code for _ in range(1_001)]
        assert codes[: int(REGISTRATIONS_AT_ONCE)] == ["invalid_params"] * int(REGISTRATIONS_AT_ONCE)
        assert codes.count("rate_limited") > 500
        worker.send(again)
        refusal = await worker.peer.next(Rejected)
        if refusal.code == "rate_limited":
            assert refusal.retryable
            assert refusal.retry_after_s is not None
            assert "'mallory'" in refusal.message
        token = await new_token(at.relay, "worker", "other", spaces=["tts"])
        async with fake_worker(at.relay.url, token=token) as other:
            await other.peer.next(Registered)


@pytest.mark.trio
async def test_a_worker_that_connects_again_and_again_fills_no_log_and_no_memory(tmp_path: Path) -> None:
    async with scene(tmp_path) as at:
        at.relay.relay.principals.usage_of("mallory").log_flood.per_s = 0  # this second's lines are used up
        for _ in range(100):
            async with at.attacker() as worker:
                await worker.peer.next(Registered)
        await until(lambda: len(at.relay.relay.workers) == 1)
        await until(lambda: len(at.relay.relay.scheduler.state.workers) == 1)


@pytest.mark.trio
async def test_progress_costs_its_principal_a_share_of_the_relay(tmp_path: Path) -> None:
    count = 500
    async with scene(tmp_path) as at, at.assigned() as (worker, assign, submit):
        usage = at.relay.relay.principals.usage_of("mallory")
        before_s = usage.charged_s
        for seq in range(count):
            worker.send(Progress(**identity(assign, seq), message="x" * 4_096))
        worker.send(Completed(**identity(assign, count)))
        frames = await at.client.frames(submit)
        assert len(frames) == count + 1
        assert usage.charged_s - before_s >= count * PROGRESS_S


@pytest.mark.trio
@pytest.mark.parametrize("slow", [(FrameLog, "extend"), (SocketLink, "flush")], ids=lambda slow: slow[1])
async def test_audio_that_is_due_costs_its_principal_nothing_but_its_parsing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, slow: tuple[type, str]
) -> None:
    spent_s = [0.0]
    monkeypatch.setattr("time.thread_time", lambda: spent_s[0])
    async with scene(tmp_path) as at, at.assigned() as (worker, assign, submit):
        worker.speak(assign, PCM[:1], end=False)
        await worker.peer.settled()
        real = getattr(*slow)
        frame_log = at.relay.relay.requests[submit.request_id].log

        def spend(*args: Any) -> None:
            spent_s[0] += 1.0
            real(*args)

        async def send_in_one_piece(seqs: range) -> None:
            assert isinstance(worker.peer.link, StreamLink)
            frames = [encode(Audio(**identity(assign, seq), pcm=PCM[0])) for seq in seqs]
            await worker.peer.link.stream.send_all(b"".join(make_frame(BINARY, each, masked=True) for each in frames))
            await until(lambda: frame_log.next_seq == seqs.stop)

        with monkeypatch.context() as patch:
            patch.setattr(*slow, spend)
            await send_in_one_piece(range(2, 3))
            await send_in_one_piece(range(3, 7))
        assert spent_s[0] >= 1.0
        assert at.relay.relay.principals.usage_of("mallory").cpu.level > 0.0


@pytest.mark.trio
@pytest.mark.parametrize("kind", ["ping", "unknown", "draining", "register", "fenced", "last frames"])
async def test_a_flood_of_small_messages_is_answered_or_cut_and_nothing_grows(tmp_path: Path, kind: str) -> None:
    async with scene(tmp_path) as at, at.attacker() as worker:
        await worker.peer.next(Registered)
        fenced: dict[str, Any] = {"request_id": an_id(), "attempt": 1, "seq": 0}
        data = {
            "ping": pack({"type": "ping", "timestamp": 1.0}),
            "unknown": pack({"type": "x" * 5_000}),
            "draining": pack({"type": "draining"}),
            "register": encode(attrs.evolve(worker.registration, slots=1_000)),
            "fenced": encode(Progress(**fenced, message="x" * 4_000)),
            "last frames": encode(Failed(**fenced, code="engine_failed", message="x", retryable=True)),
        }[kind]
        for _ in range(1_000):
            worker.peer.link.send_nowait(data)
        await worker.peer.settled()
        assert len(at.relay.relay.scheduler.state.workers) == 2
        assert not at.relay.relay.scheduler.state.workers_of("tts")[0].held


# -- results that do not end


@pytest.mark.trio
@pytest.mark.parametrize("kind", ["audio", "output", "progress", "empty audio"])
async def test_a_stream_without_end_is_ended_at_its_limit_and_leaves_no_more_behind(tmp_path: Path, kind: str) -> None:
    limit = 200_000
    settings: dict[str, Any] = {
        "store": "sqlite",
        "limits": {"max_result_bytes": limit},
        "results": {"memory_bytes": 1_000_000, "disk_bytes": 4_000_000},
    }
    async with scene(tmp_path, **settings) as at, at.assigned() as (worker, assign, submit):
        worker.send(Started(**identity(assign, 0), format=FORMAT))
        frames: dict[str, Callable[[int], Frame]] = {
            "audio": lambda seq: Audio(**identity(assign, seq), pcm=b"ab" * 500),
            "output": lambda seq: Output(**identity(assign, seq), data=b"x" * 1_000, more=True),
            "progress": lambda seq: Progress(**identity(assign, seq), message="x" * 1_000),
            "empty audio": lambda seq: Audio(**identity(assign, seq), pcm=b""),
        }
        for seq in range(1, 3_000):
            worker.send(frames[kind](seq))
        failed = (await at.client.frames(submit))[-1]
        assert (failed.TYPE, failed.code) == ("failed", "result_too_large")
        assert str(limit) in failed.message
        assert (await worker.peer.next(Cancel)).request_id == submit.request_id
        await worker.peer.settled()
        request = at.relay.relay.requests[submit.request_id]
        assert request.log.size_bytes < 2 * limit
        assert at.relay.relay.fenced_frames > 0
        (line,) = [line for line in at.lines("request failed") if line["request_id"] == submit.request_id]
        assert (line["space"], line["code"]) == ("tts", "result_too_large")


@pytest.mark.trio
async def test_streams_that_fill_the_disk_end_before_anybody_elses_results_go(tmp_path: Path) -> None:
    settings: dict[str, Any] = {
        "store": "sqlite",
        "limits": {"max_result_bytes": 2_000_000},
        "results": {"memory_bytes": 1_000_000, "disk_bytes": 4_000_000},
    }
    count, pcm = 8, b"ab" * 50_000
    async with scene(tmp_path, **settings) as at, at.attacker(slots=count) as worker:
        results = at.relay.relay.results
        kept = a_submit()
        at.listener.send(kept)
        worker.speak(await worker.assigned(), [pcm])
        await worker.peer.next(Ack)
        assigns = []
        for _ in range(count):
            at.client.send(a_submit(detach=True))
            assigns.append(await worker.assigned())
        for assign in assigns:
            worker.send(Started(**identity(assign, 0), format=FORMAT))
        for seq in range(1, 10):
            for assign in assigns:
                worker.send(Audio(**identity(assign, seq), pcm=pcm))
            await worker.peer.settled()
            await until(lambda: not results.memory.over)
        lost = [line for line in at.logs if line.get("code") == "storage_full"]
        assert {line["principal"] for line in lost} == {"ann"}
        assert results.disk_bytes <= 4_000_000
        assert at.relay.relay.requests[kept.request_id].has_result
        assert at.relay.relay.requests[kept.request_id].log.is_complete
        at.logs[:] = [line for line in at.logs if not line["event"].startswith(("no space for", "results cannot"))]


@pytest.mark.trio
async def test_when_the_disk_is_full_one_stream_ends_at_a_time_and_only_of_who_has_most(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"store": "sqlite", "results": {"memory_bytes": 1_000_000, "disk_bytes": 4_000_000}}
    pcm = b"ab" * 52_500
    async with scene(tmp_path, **settings) as at, at.attacker(slots=3) as worker:
        requests, results = at.relay.relay.requests, at.relay.relay.results
        assigns = []
        for client in (at.client, at.client, at.listener):
            client.send(a_submit(detach=True))
            assigns.append(await worker.assigned())
            worker.send(Started(**identity(assigns[-1], 0), format=FORMAT))
        for seqs in (range(1, 10), range(10, 19)):  # nearly all that the disk takes
            for assign in assigns[:2]:
                for seq in seqs:
                    worker.send(Audio(**identity(assign, seq), pcm=pcm))
            await worker.peer.settled()
            await until(lambda: not results.memory.over)
        for seq in range(1, 13):
            worker.send(Audio(**identity(assigns[2], seq), pcm=pcm))
        await worker.peer.settled()
        await until(lambda: not results.memory.over)
        assert sorted(requests[assign.request_id].live for assign in assigns) == [False, True, True]
        assert requests[assigns[2].request_id].live
        at.logs[:] = [line for line in at.logs if not line["event"].startswith(("no space for", "results cannot"))]


@pytest.mark.trio
async def test_only_a_few_inputs_are_in_memory_for_a_worker_that_does_not_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("relayd.connections.input_sender.FEED_BYTES", -1)  # the worker never catches up
    count, data = 12, b"x" * 1_000
    read: list[str] = []
    async with scene(tmp_path) as at, at.attacker(slots=count, inputs={"voice": {}}) as worker:
        await worker.peer.next(Registered)
        real = at.relay.relay.store.read_input

        async def read_input(request_id: str, name: str) -> bytes:
            read.append(request_id)
            return await real(request_id, name)

        monkeypatch.setattr(at.relay.relay.store, "read_input", read_input)
        for _ in range(count):
            submit = a_submit(inputs={"voice": an_input(data)})
            at.client.send(submit)
            at.client.send(Input(request_id=submit.request_id, name="voice", offset=0, data=data))
        for _ in range(count):
            await worker.assigned()
        await at.client.settled()
        assert len(read) == MAX_UPLOADS


# -- words that are shown to people


@pytest.mark.trio
async def test_the_last_words_of_an_engine_are_told_whole_and_shown_in_part(tmp_path: Path) -> None:
    details: dict[str, Any] = nested("d", 13, {"n": float("nan")})
    details |= {f"\u202e{n}": "\x1b[2J" * 20 for n in range(60)}
    async with scene(tmp_path) as at, at.assigned() as (worker, assign, submit):
        for _ in range(10):
            worker.send(Report(request_id=assign.request_id, attempt=1, output="\x1b[2J" * 1_000))
        worker.send(Failed(**identity(assign, 0), code="x\x1b[2J\r\n", message="\x1b]0;\u202e" * 800, details=details))
        failed = (await at.client.frames(submit))[-1]
        assert len(failed.details) == len(details)
        at.client.send(Status(request_id=submit.request_id))
        assert (await at.client.next(StatusReply)).code == failed.code
        async with peer(at.relay.url, "operator") as operator:
            operator.send(Steer(action="describe", target=submit.request_id))
            assert (await operator.next(Done)).data["request"]["state"] == "failed"
            operator.send(Watch(topics=["requests", "log", "workers"]))
            await operator.next(Snapshot)
        assert at.relay.relay.stats.space("tts").failed == {"other": 1}
