"""Pipes through a real daemon: the output of one request becomes the input of another, once and in order."""

import math
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import attrs
import pytest
import trio

from protocol.wire.frames import Audio, Cancelled, Completed, Failed, Frame, Output, Started, Video
from protocol.wire.messages import (
    Accepted,
    Assign,
    Cancel,
    Done,
    Input,
    InputAck,
    Queued,
    Registered,
    Rejected,
    Status,
    StatusReply,
    Steer,
    Submit,
)
from protocol.wire.structs import InputInfo, Running, VideoFormat
from relayd.frames.frame_log import HIGH_WATER_BYTES
from relayd.requests.request import Expiry, Request
from relayd.store.records import AppendInput, ClearInput, DeleteRequest, PutRequest, RequestRecord
from tests.support.fake_worker import FORMAT, FakeWorker, fake_worker, identity, samples
from tests.support.pictures import PICTURES, VIDEO, ivf
from tests.support.relay import Daemon, Peer, a_submit, an_id, an_input, daemon, new_token, peer, until

PCM = [samples(100)]
RULES: dict[str, Any] = {"inputs": {"text": {"live": True}, "audio": {"live": True}, "voice": {}}}
SPACES: dict[str, Any] = {"llm": {}, "tts": {}}
MIB = 1024 * 1024


def piped(source: Submit, *names: str, **fields: Any) -> Submit:
    """A request whose input of each name, or `text`, is the output of `source`."""
    inputs = {name: InputInfo(from_=source.request_id) for name in names or ("text",)}
    return a_submit(**({"params": {}} | fields | {"inputs": inputs | fields.get("inputs", {})}))


def says(worker: FakeWorker, assign: Assign, seq: int, *values: Any) -> int:
    """Send an `output` frame for each value; returns the number of the next frame."""
    for number, value in enumerate(values, seq):
        worker.send(Output(**identity(assign, number), data=value))
    return seq + len(values)


def ends(worker: FakeWorker, assign: Assign, seq: int) -> None:
    worker.send(Completed(**identity(assign, seq), result={}))


async def taken(worker: FakeWorker, assign: Assign, size: int, *, start: int = 0, name: str = "text") -> bytes:
    """What the worker gets of an input up to `size` bytes, from `start` on; its engine takes all of it."""
    data = b""
    while start + len(data) < size:
        piece: Input = await worker.peer.next(Input)
        assert (piece.request_id, piece.name, piece.offset) == (assign.request_id, name, start + len(data))
        data += piece.data
        takes(worker, assign, start + len(data), name)
    return data


async def all_of(worker: FakeWorker, assign: Assign, *, start: int = 0, name: str = "text") -> bytes:
    """What the worker gets of an input until its end."""
    data = b""
    while True:
        piece: Input = await worker.peer.next(Input)
        assert (piece.request_id, piece.name, piece.offset) == (assign.request_id, name, start + len(data))
        data += piece.data
        takes(worker, assign, start + len(data), name)
        if piece.last:
            return data


def takes(worker: FakeWorker, assign: Assign, offset: int, name: str = "text") -> None:
    worker.send(InputAck(request_id=assign.request_id, attempt=assign.attempt, name=name, offset=offset))


def stop(worker: FakeWorker, assign: Assign, seq: int) -> None:
    worker.send(Cancelled(**identity(assign, seq)))


@attrs.define
class Stage:
    """A daemon with a space of writers and one of speakers, a worker in each, and a client."""

    daemon: Daemon
    client: Peer
    writer: FakeWorker
    speaker: FakeWorker

    def request(self, submit: Submit) -> Request:
        return self.daemon.relay.requests[submit.request_id]

    async def write(self, *values: Any, **fields: Any) -> tuple[Submit, Assign, int]:
        """A source that runs and has said this; with the number of its next frame."""
        self.client.send(source := a_submit(**({"space": "llm"} | fields)))
        assign = await self.writer.assigned()
        return source, assign, says(self.writer, assign, 0, *values)

    async def send(self, submit: Submit) -> None:
        """Submit, and wait until it is accepted."""
        self.client.send(submit)
        accepted = await self.client.next(Accepted, Rejected)
        while accepted.request_id != submit.request_id:
            accepted = await self.client.next(Accepted, Rejected)
        assert isinstance(accepted, Accepted), accepted

    async def status(self, submit: Submit) -> StatusReply:
        self.client.send(Status(request_id=submit.request_id))
        reply: StatusReply = await self.client.next(StatusReply)
        return reply

    async def end_of(self, submit: Submit) -> Any:
        """The last frame of a request."""
        while True:
            frame = await self.client.next(Frame)
            if frame.ENDS and frame.request_id == submit.request_id:
                return frame


@asynccontextmanager
async def stage(
    tmp_path: Path, *, writer: dict[str, Any] | None = None, speaker: dict[str, Any] | None = None, **options: Any
) -> AsyncIterator[Stage]:
    spaces = SPACES | options.pop("spaces", {})
    async with AsyncExitStack() as stack:
        relay = await stack.enter_async_context(daemon(tmp_path, spaces=spaces, **options))
        told = {"name": "writer", "spaces": ("llm",)} | RULES | (writer or {})
        writes = await stack.enter_async_context(fake_worker(relay.url, **told))
        speaks = await stack.enter_async_context(fake_worker(relay.url, **RULES | (speaker or {})))
        client = await stack.enter_async_context(peer(relay.url, "client"))
        await until(lambda: len(relay.relay.workers) == 2)
        yield Stage(relay, client, writes, speaks)


@pytest.mark.trio
async def test_what_one_request_says_is_the_input_of_the_next_while_both_run(tmp_path: Path) -> None:
    async with stage(tmp_path, store="sqlite") as at:
        source, writing, seq = await at.write("Grüße, ")
        await at.send(submit := piped(source))
        speaking = await at.speaker.assigned()
        assert speaking.inputs["text"].media_type == "text/plain; charset=utf-8"
        assert await taken(at.speaker, speaking, 9) == "Grüße, ".encode()
        seq = says(at.writer, writing, seq, {"not": "text"}, 7, None)
        at.writer.send(Output(**identity(writing, seq), mark={"text_end": 1, "sample": 1}))
        seq = says(at.writer, writing, seq + 1, "wor", "ld.")
        assert await taken(at.speaker, speaking, 15, start=9) == b"world."
        ends(at.writer, writing, seq)
        assert await all_of(at.speaker, speaking, start=15) == b""
        at.speaker.speak(speaking, PCM)
        assert (await at.end_of(submit)).TYPE == "completed"
        await at.daemon.at_rest()
        assert not at.daemon.relay.scheduler.state.piped
        assert not at.daemon.relay.scheduler.state.input_bytes
        assert at.daemon.relay.feeds.pending_bytes == 0


@pytest.mark.trio
async def test_a_chain_of_three_passes_on_text_then_sound(tmp_path: Path) -> None:
    async with (
        stage(tmp_path, spaces={"ears": {}}) as at,
        fake_worker(
            at.daemon.url, name="ears", spaces=("ears",), inputs={"audio": {"live": True, "media_types": ["audio/L16"]}}
        ) as ears,
    ):
        source, writing, seq = await at.write()
        await at.send(spoken := piped(source))
        await at.send(heard := piped(spoken, "audio", space="ears", params={"text": "x"}))
        says(at.writer, writing, seq, "hello")
        speaking = await at.speaker.assigned()
        assert await taken(at.speaker, speaking, 5) == b"hello"
        at.speaker.speak(speaking, [samples(50), samples(60, seed=2)], end=False)
        hearing = await ears.assigned()
        assert hearing.inputs["audio"].media_type == "audio/L16;rate=24000;channels=1"
        assert await taken(ears, hearing, 220, name="audio") == samples(50) + samples(60, seed=2)
        ends(at.writer, writing, seq + 1)
        await all_of(at.speaker, speaking, start=5)
        ends(at.speaker, speaking, 3)
        assert await all_of(ears, hearing, start=220, name="audio") == b""
        says(ears, hearing, 0, "hello")
        ends(ears, hearing, 1)
        assert (await at.end_of(heard)).TYPE == "completed"
        await at.daemon.at_rest()


@pytest.mark.trio
@pytest.mark.parametrize("has_audio", [True, False])
async def test_of_a_source_with_video_each_input_gets_what_it_accepts(tmp_path: Path, has_audio: bool) -> None:
    kinds = {"video": ["video/*"], "any": [], "audio": ["audio/L16"]}
    inputs = {name: {"live": True, "media_types": types} for name, types in kinds.items()}
    async with (
        stage(tmp_path, spaces={"screen": {}}) as at,
        fake_worker(at.daemon.url, name="screen", spaces=("screen",), inputs=inputs) as screen,
    ):
        source, writing, _ = await at.write()
        submits = {name: piped(source, name, space="screen", params={"text": "x"}) for name in inputs}
        told = InputInfo(from_=source.request_id, media_type="video/x-ivf")
        submits["told"] = a_submit(space="screen", params={"text": "x"}, inputs={"any": told})
        for submit in submits.values():
            await at.send(submit)
        at.writer.send(Started(**identity(writing, 0), format=FORMAT if has_audio else None, video=VIDEO))
        if has_audio:
            at.writer.send(Audio(**identity(writing, 1), pcm=PCM[0]))
        else:
            says(at.writer, writing, 1, "words, and no picture")
        for seq, (data, pts) in enumerate(PICTURES, 2):
            at.writer.send(Video(**identity(writing, seq), data=data, pts=pts, key=seq == 2))
        ends(at.writer, writing, 7)
        if not has_audio:
            failed = await at.end_of(submits.pop("audio"))
            assert "is 'video/x-ivf', as its source makes it; accepted are audio/L16" in failed.message
        got: dict[str, tuple[str, bytes]] = {}
        for _ in submits:
            assign = await screen.assigned()
            (name,) = [name for name, each in submits.items() if each.request_id == assign.request_id]
            (put,) = assign.inputs
            got[name] = assign.inputs[put].media_type, await all_of(screen, assign, name=put)
            ends(screen, assign, 0)
        video, audio = ("video/x-ivf", ivf(PICTURES)), ("audio/L16;rate=24000;channels=1", PCM[0])
        either = {"any": audio, "audio": audio} if has_audio else {"any": video}
        assert got == {"video": video, "told": video} | either
        await at.daemon.at_rest()


@pytest.mark.trio
@pytest.mark.parametrize("is_fed", [True, False])
async def test_a_video_that_begins_anew_is_a_whole_stream_again(tmp_path: Path, is_fed: bool) -> None:
    def shows(assign: Assign, pictures: list[tuple[bytes, int]], video: VideoFormat) -> int:
        at.writer.send(Started(**identity(assign, 0), video=video))
        for seq, (data, pts) in enumerate(pictures, 1):
            at.writer.send(Video(**identity(assign, seq), data=data, pts=pts, key=seq == 1))
        return len(pictures) + 1

    screen: dict[str, Any] = {"inputs": {"video": {"live": True, "media_types": ["video/x-ivf"]}}}
    async with (
        stage(tmp_path, spaces={"screen": {}}) as at,
        fake_worker(at.daemon.url, name="screen", spaces=("screen",), **screen) as shown,
    ):
        source, writing, _ = await at.write(retry="always")
        await at.send(piped(source, "video", space="screen", params={"text": "x"}))
        seq = shows(writing, PICTURES[: 2 * is_fed], attrs.evolve(VIDEO, fps=10))
        first = await shown.assigned() if is_fed else None
        if first is not None:
            size = len(ivf(PICTURES[:2]))
            assert await taken(shown, first, size, name="video") == ivf(PICTURES[:2])
        at.writer.send(Failed(**identity(writing, seq), code="engine_failed", message="oh", retryable=True))
        writing = await at.writer.assigned()
        ends(at.writer, writing, shows(writing, PICTURES, VIDEO))
        if first is not None:
            await shown.peer.next(Cancel)
            stop(shown, first, 0)
        second = await shown.assigned()
        assert await all_of(shown, second, name="video") == ivf(PICTURES)
        ends(shown, second, 0)
        await at.daemon.at_rest()


@pytest.mark.trio
async def test_binary_output_in_parts_is_passed_on_as_it_is(tmp_path: Path) -> None:
    async with stage(tmp_path) as at:
        source, writing, _ = await at.write()
        await at.send(piped(source))
        for seq, part in enumerate((b"\0\1", b"\xff", b"")):
            at.writer.send(Output(**identity(writing, seq), data=part, media_type="image/png", more=seq < 2 or None))
        ends(at.writer, writing, 3)
        speaking = await at.speaker.assigned()
        assert speaking.inputs["text"].media_type == "image/png"
        assert await all_of(at.speaker, speaking) == b"\0\1\xff"


@pytest.mark.trio
@pytest.mark.parametrize("store", ["memory", "sqlite"])
async def test_a_request_may_read_a_source_that_has_ended(tmp_path: Path, store: str) -> None:
    async with stage(tmp_path, store=store) as at:
        source, writing, seq = await at.write("one ", "two")
        ends(at.writer, writing, seq)
        await at.end_of(source)
        await at.send(submit := piped(source))
        speaking = await at.speaker.assigned()
        assert await all_of(at.speaker, speaking) == b"one two"
        at.speaker.speak(speaking, PCM)
        await at.end_of(submit)
        await at.daemon.at_rest()


@pytest.mark.trio
async def test_a_source_without_a_word_makes_an_empty_input(tmp_path: Path) -> None:
    async with stage(tmp_path) as at:
        source, writing, _ = await at.write()
        await at.send(piped(source))
        ends(at.writer, writing, 0)
        assert await all_of(at.speaker, await at.speaker.assigned()) == b""


@pytest.mark.trio
async def test_a_request_waits_for_the_first_byte_of_each_source_without_a_slot_a_place_or_a_timeout(
    tmp_path: Path,
) -> None:
    async with stage(tmp_path, writer={"slots": 2}) as at:
        first, writing_first, _ = await at.write()
        second, writing_second, _ = await at.write()
        submit = piped(first)
        submit = attrs.evolve(submit, inputs=submit.inputs | {"audio": InputInfo(from_=second.request_id)})
        await at.send(submit)
        request = at.request(submit)
        at.writer.send(Started(**identity(writing_first, 0)))
        says(at.writer, writing_first, 1, "first")
        await until(lambda: request.entry.silent_sources == {second.request_id})
        assert request.deadline(30.0, 5.0)[0] == math.inf
        assert (await at.status(submit)).state == "uploading"
        await at.client.settled()
        assert not at.daemon.relay.scheduler.state.uploads
        assert at.daemon.relay.scheduler.queued_count(request.principal) == 1
        says(at.writer, writing_second, 0, "second")
        speaking = await at.speaker.assigned()
        assert speaking.request_id == submit.request_id


@pytest.mark.trio
async def test_its_queue_timeout_begins_when_it_is_queued(tmp_path: Path) -> None:
    async with stage(tmp_path) as at:
        at.client.send(a_submit())
        await at.speaker.assigned()
        source, writing, _ = await at.write()
        await at.send(submit := piped(source, queue_timeout_s=60.0))
        request, waited_until = at.request(submit), trio.current_time()
        says(at.writer, writing, 0, "word")
        while (queued := await at.client.next(Queued)).request_id != submit.request_id:
            pass
        assert queued.position == 1
        assert request.queued_at > waited_until
        assert request.deadline(30.0, 5.0) == (request.queued_at + 60.0, Expiry.QUEUE_TIMEOUT)


@pytest.mark.trio
async def test_a_request_is_stored_after_its_source_and_rejected_with_it(tmp_path: Path) -> None:
    async with stage(tmp_path) as at:
        for data in (b"whole", b"other"):
            source = a_submit(space="llm", inputs={"voice": an_input(b"whole")})
            at.client.send(source)
            at.client.send(submit := piped(source))
            await at.client.settled()
            at.client.send(Input(request_id=source.request_id, name="voice", offset=0, data=data))
            answers = [await at.client.next(Accepted, Rejected) for _ in range(2)]
            assert {each.request_id for each in answers} == {source.request_id, submit.request_id}
            if data == b"whole":
                assert [each.request_id for each in answers] == [source.request_id, submit.request_id]
                assert all(isinstance(each, Accepted) for each in answers)
            else:
                assert {each.code for each in answers} == {"input_mismatch", "request_not_found"}
        assert len(at.daemon.relay.requests) == 2


@pytest.mark.trio
async def test_a_source_that_others_may_not_read_is_not_found(tmp_path: Path) -> None:
    async with stage(tmp_path, listen="127.0.0.1:0") as at:
        source, _, _ = await at.write("secret")
        token = await new_token(at.daemon, name="eve")
        async with peer(at.daemon.urls[0], "client", token) as eve:
            for submit in (piped(source), piped(a_submit())):
                eve.send(submit)
                refusal = await eve.next(Rejected, Accepted)
                assert (refusal.code, refusal.request_id) == ("request_not_found", submit.request_id)
                assert "inputs.text" in refusal.details
        itself = an_id()
        at.client.send(a_submit(request_id=itself, params={}, inputs={"text": InputInfo(from_=itself)}))
        refusal = await at.client.next(Rejected)
        assert (refusal.code, refusal.request_id) == ("request_not_found", itself)


@pytest.mark.trio
async def test_nobody_else_feeds_a_piped_input(tmp_path: Path) -> None:
    async with stage(tmp_path) as at:
        source, _, _ = await at.write("mine")
        await at.send(submit := piped(source))
        at.client.send(Input(request_id=submit.request_id, name="text", offset=0, data=b"mine"))
        refusal = await at.client.next(Rejected)
        assert (refusal.code, refusal.request_id) == ("input_mismatch", submit.request_id)
        assert "the relay feeds it" in refusal.message
        assert await taken(at.speaker, await at.speaker.assigned(), 4) == b"mine"


@pytest.mark.trio
async def test_a_space_of_which_no_worker_has_said_what_it_takes_takes_what_the_source_makes(tmp_path: Path) -> None:
    async with stage(tmp_path, spaces={"later": {}}) as at:
        source, writing, seq = await at.write("words")
        await at.send(submit := piped(source, space="later"))
        await until(lambda: at.request(submit).fed["text"].size == 5)
        async with fake_worker(at.daemon.url, name="late", spaces=("later",), **RULES) as worker:
            assign = await worker.assigned()
            assert assign.inputs["text"].media_type == "text/plain; charset=utf-8"
            ends(at.writer, writing, seq)
            assert await all_of(worker, assign) == b"words"


@pytest.mark.trio
async def test_a_space_that_does_not_take_what_the_source_makes_says_so(tmp_path: Path) -> None:
    async with (
        stage(tmp_path, spaces={"ears": {}}) as at,
        fake_worker(
            at.daemon.url, name="ears", spaces=("ears",), inputs={"audio": {"live": True, "media_types": ["audio/*"]}}
        ),
    ):
        await until(lambda: len(at.daemon.relay.workers) == 3)
        source, _, _ = await at.write("words")
        await at.send(submit := piped(source, "audio", space="ears", params={"text": "x"}))
        failed = await at.end_of(submit)
        assert (failed.code, failed.retryable) == ("invalid_params", False)
        what = "is 'text/plain; charset=utf-8', as its source makes it; accepted are audio/*"
        assert failed.details == {"inputs.audio": what}


@pytest.mark.trio
@pytest.mark.parametrize("waits", [True, False])
@pytest.mark.parametrize("how", ["fails", "is cancelled", "had failed"])
async def test_a_source_that_gives_no_result_fails_the_request(tmp_path: Path, waits: bool, how: str) -> None:
    async with stage(tmp_path) as at:
        source, writing, seq = await at.write(*([] if waits else ["word"]))
        failed = Failed(**identity(writing, seq), code="invalid_params", message="a bad word", retryable=False)
        if how == "had failed":
            at.writer.send(failed)
            await at.end_of(source)
        await at.send(submit := piped(source))
        speaking = await at.speaker.assigned() if not waits and how != "had failed" else None
        if how == "fails":
            at.writer.send(failed)
        elif how == "is cancelled":
            at.client.send(Cancel(request_id=source.request_id, reason="no more"))
            await at.writer.peer.next(Cancel)
            stop(at.writer, writing, seq)
        end = await at.end_of(submit)
        assert (end.code, end.retryable) == ("source_failed", False)
        code, message = ("cancelled", "") if how == "is cancelled" else ("invalid_params", "a bad word")
        told = {name: end.details[name] for name in ("request_id", "code", "message")}
        assert told == {"request_id": source.request_id, "code": code, "message": message}
        assert source.request_id in end.message
        if speaking is not None:
            await at.speaker.peer.next(Cancel)
            stop(at.speaker, speaking, 0)
        await at.daemon.at_rest()
        await at.daemon.goes_on()


@pytest.mark.trio
@pytest.mark.parametrize("waits", [True, False])
async def test_cancelling_a_request_leaves_its_source_alone(tmp_path: Path, waits: bool) -> None:
    async with stage(tmp_path) as at:
        source, writing, seq = await at.write(*([] if waits else ["word"]))
        await at.send(submit := piped(source))
        speaking = None if waits else await at.speaker.assigned()
        at.client.send(Cancel(request_id=submit.request_id))
        if speaking is not None:
            await at.speaker.peer.next(Cancel)
            stop(at.speaker, speaking, 0)
        assert (await at.end_of(submit)).TYPE == "cancelled"
        assert at.request(source).live
        await until(lambda: len(at.request(source).log.readers) == 1)
        ends(at.writer, writing, seq)
        assert (await at.end_of(source)).TYPE == "completed"
        await at.daemon.at_rest()


@pytest.mark.trio
async def test_a_waiting_request_that_nobody_holds_is_cancelled_after_its_resume_window(tmp_path: Path) -> None:
    async with stage(tmp_path, limits={"resume_window_s": 0.05}) as at, peer(at.daemon.url, "client") as other:
        source, _, _ = await at.write()
        other.send(submit := piped(source))
        await other.next(Accepted)
        await other.cut()
        await until(lambda: at.request(submit).entry.state == "cancelled")
        assert at.request(source).live


@pytest.mark.trio
async def test_a_lost_attempt_gets_the_input_from_the_beginning(tmp_path: Path) -> None:
    async with stage(tmp_path) as at:
        source, writing, seq = await at.write("one ")
        await at.send(submit := piped(source))
        speaking = await at.speaker.assigned()
        assert await taken(at.speaker, speaking, 4) == b"one "
        at.speaker.send(Failed(**identity(speaking, 0), code="engine_failed", message="oh", retryable=True))
        speaking = await at.speaker.assigned()
        assert speaking.attempt == 2
        ends(at.writer, writing, says(at.writer, writing, seq, "two"))
        assert await all_of(at.speaker, speaking) == b"one two"
        at.speaker.speak(speaking, PCM)
        assert (await at.end_of(submit)).TYPE == "completed"


@pytest.mark.trio
@pytest.mark.parametrize("retry", ["before_output", "never"])
async def test_a_source_that_begins_anew_lets_the_request_begin_anew(tmp_path: Path, retry: str) -> None:
    async with stage(tmp_path) as at:
        source, writing, seq = await at.write("old words", retry="always")
        await at.send(submit := piped(source, retry=retry))
        first = await at.speaker.assigned()
        assert await taken(at.speaker, first, 9) == b"old words"
        at.speaker.speak(first, PCM, end=False)
        await at.client.next(Audio)
        at.writer.send(Failed(**identity(writing, seq), code="engine_failed", message="oh", retryable=True))
        writing = await at.writer.assigned()
        says(at.writer, writing, 0, "new")
        await at.speaker.peer.next(Cancel)
        stop(at.speaker, first, 2)
        if retry == "never":
            end = await at.end_of(submit)
            assert end.code == "source_failed"
            assert "retry is 'never'" in end.message
            assert end.details["request_id"] == source.request_id
            ends(at.writer, writing, 1)
            await at.daemon.at_rest()
            return
        second = await at.speaker.assigned()
        assert second.attempt > first.attempt
        assert second.from_seq == 0
        assert await taken(at.speaker, second, 3) == b"new"
        assert at.daemon.relay.scheduler.state.input_bytes.total() == 3
        ends(at.writer, writing, 1)
        assert await all_of(at.speaker, second, start=3) == b""
        at.speaker.speak(second, PCM)
        started = await at.client.next(Started)
        assert (started.request_id, started.attempt, started.seq) == (submit.request_id, second.attempt, 0)
        assert (await at.end_of(submit)).TYPE == "completed"
        assert at.request(submit).entry.losses == 0
        await at.daemon.at_rest()


@pytest.mark.trio
async def test_a_reproducible_source_that_is_interrupted_costs_the_request_nothing_but_time(tmp_path: Path) -> None:
    told = {"reproducible": True, "fingerprint": "1"}
    async with stage(tmp_path, writer=told) as at:
        source, writing, seq = await at.write("one ")
        await at.send(submit := piped(source))
        speaking = await at.speaker.assigned()
        assert await taken(at.speaker, speaking, 4) == b"one "
        at.writer.send(Failed(**identity(writing, seq), code="engine_failed", message="oh", retryable=True))
        writing = await at.writer.assigned()
        assert (writing.attempt, writing.from_seq) == (2, 1)
        ends(at.writer, writing, says(at.writer, writing, 1, "two"))
        assert await all_of(at.speaker, speaking, start=4) == b"two"
        at.speaker.speak(speaking, PCM)
        end = await at.end_of(submit)
        assert (end.TYPE, end.attempt) == ("completed", 1)


@pytest.mark.trio
async def test_a_slot_is_given_back_while_the_source_waits_for_one(tmp_path: Path) -> None:
    told = {"reproducible": True, "fingerprint": "1"}
    async with (
        daemon(tmp_path, spaces={"tts": {"max_workers": 2}}, limits={"worker_grace_s": 0.05}) as relay,
        peer(relay.url, "client") as client,
        fake_worker(relay.url, name="two", **RULES | told) as two,
    ):
        async with fake_worker(relay.url, name="one", **RULES | told) as one:
            await until(lambda: len(relay.relay.workers) == 2)
            client.send(source := a_submit())
            workers = {"one": one, "two": two}
            await client.next(Accepted)
            await until(lambda: bool(relay.relay.requests[source.request_id].entry.worker_id))
            name = str(relay.relay.requests[source.request_id].entry.worker_id).rpartition("-")[0]
            if name == "two":  # the one that stays has to be the second
                one, two = two, one
            writing = await workers[name].assigned()
            says(workers[name], writing, 0, "one ")
            client.send(submit := piped(source))
            speaking = await two.assigned()
            assert await taken(two, speaking, 4) == b"one "
            await one.peer.cut()
            await two.peer.next(Cancel)
            request = relay.relay.requests[submit.request_id]
            assert request.waits_for_source
            stop(two, speaking, 0)
            writing = await two.assigned()
            assert (writing.request_id, writing.from_seq) == (source.request_id, 1)
            ends(two, writing, says(two, writing, 1, "two"))
            speaking = await two.assigned()
            assert (speaking.request_id, request.entry.losses) == (submit.request_id, 0)
            assert await all_of(two, speaking) == b"one two"
            two.speak(speaking, PCM)
            await client.next(Completed)
            await client.next(Completed)
        await relay.at_rest()


@pytest.mark.trio
async def test_a_slow_speaker_does_not_hold_up_the_writer_nor_fill_the_memory(tmp_path: Path) -> None:
    text = "x" * 60_000
    async with stage(tmp_path, store="sqlite") as at:
        source, writing, seq = await at.write()
        await at.send(submit := piped(source))
        request, count = at.request(submit), 60
        for _ in range(count):
            seq = says(at.writer, writing, seq, text)
        ends(at.writer, writing, seq)
        speaking = await at.speaker.assigned()
        await until(lambda: request.fed["text"].ended)
        assert not at.request(source).log.readers or at.request(source).log.ended
        assert at.daemon.relay.feeds.pending_bytes == 0
        assert await all_of(at.speaker, speaking) == text.encode() * count


def stop_store(at: Stage, monkeypatch: pytest.MonkeyPatch) -> tuple[trio.Event, trio.Event]:
    """Let the store stand still at the next piece of an input; the events that it does, and that it may go on."""
    commit, stands, goes_on = at.daemon.relay.store.commit, trio.Event(), trio.Event()

    async def slow(*changes: Any) -> None:
        if changes and isinstance(changes[0], AppendInput):
            stands.set()
            await goes_on.wait()
        await commit(*changes)

    monkeypatch.setattr(at.daemon.relay.store, "commit", slow)
    return stands, goes_on


@pytest.mark.trio
async def test_while_the_store_stands_still_a_pipe_keeps_no_more_than_a_slice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "x" * 60_000
    async with stage(tmp_path) as at:
        source, writing, seq = await at.write()
        await at.send(submit := piped(source))
        stands, goes_on = stop_store(at, monkeypatch)
        for _ in range(40):
            seq = says(at.writer, writing, seq, text)
        ends(at.writer, writing, seq)
        await at.end_of(source)
        await stands.wait()
        (reader,) = at.request(source).log.readers
        slice_bytes = HIGH_WATER_BYTES + len(text) + 100
        assert reader.sink.backlog_bytes <= slice_bytes
        assert at.daemon.relay.feeds.pending_bytes <= slice_bytes
        goes_on.set()
        speaking = await at.speaker.assigned()
        assert await all_of(at.speaker, speaking) == text.encode() * 40
        at.speaker.speak(speaking, PCM)
        await at.end_of(submit)
        await at.daemon.at_rest()


@pytest.mark.trio
@pytest.mark.parametrize("how", ["dropped", "dropped, and more comes", "unreadable"])
async def test_a_source_whose_frames_are_lost_while_they_are_read_fails_the_request_in_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    async with stage(tmp_path) as at:
        source, writing, seq = await at.write()
        await at.send(submit := piped(source))
        stands, goes_on = stop_store(at, monkeypatch)
        for _ in range(20):
            seq = says(at.writer, writing, seq, "x" * 60_000)
        if how != "dropped, and more comes":
            ends(at.writer, writing, seq)
            await at.end_of(source)
        await stands.wait()
        await until(lambda: at.request(source).log.next_seq >= 20)
        reader = next(each for each in at.request(source).log.readers if each.key == submit.request_id)
        if how.startswith("dropped"):
            at.request(source).log.drop()
            says(at.writer, writing, seq, "more")
        else:
            reader.close()
            reader.sink.on_read_error(reader)
        goes_on.set()
        failed = await at.end_of(submit)
        assert failed.code == "source_failed"
        assert failed.details["request_id"] == source.request_id
        assert failed.details["code"] == "request_not_found"
        assert failed.details["message"] in (
            "its result is no longer kept",
            "its frames were dropped",
            "its frames cannot be read back from the relay's disk",
        )


@pytest.mark.trio
async def test_a_source_may_be_larger_than_what_clients_may_send(tmp_path: Path) -> None:
    async with stage(tmp_path, limits={"max_input_bytes": 1_000}) as at:
        source, writing, seq = await at.write("x" * 3_000)
        await at.send(submit := piped(source))
        ends(at.writer, writing, says(at.writer, writing, seq, "x" * 3_000))
        speaking = await at.speaker.assigned()
        assert await all_of(at.speaker, speaking) == b"x" * 6_000
        at.speaker.speak(speaking, PCM)
        assert (await at.end_of(submit)).TYPE == "completed"


@pytest.mark.trio
async def test_a_source_larger_than_an_input_may_be_fails_the_request_alone(tmp_path: Path) -> None:
    async with stage(tmp_path, speaker={"inputs": {"text": {"live": True, "max_bytes": 1_000}}}) as at:
        source, writing, seq = await at.write("x" * 600)
        await at.send(submit := piped(source))
        says(at.writer, writing, seq, "x" * 600)
        failed = await at.end_of(submit)
        assert failed.code == "input_too_large"
        assert at.request(source).live
        stop(at.speaker, await at.speaker.assigned(), 0)
        assert at.daemon.relay.feeds.pending_bytes == 0


@pytest.mark.trio
async def test_an_engine_that_waits_for_a_silent_source_is_not_stopped(tmp_path: Path) -> None:
    async with stage(tmp_path) as at:
        source, writing, seq = await at.write("word")
        await at.send(submit := piped(source))
        speaking, request = await at.speaker.assigned(), at.request(submit)
        assert request.deadline(30.0, 5.0, 30.0)[1] is Expiry.IDLE_TIMEOUT
        await taken(at.speaker, speaking, 4)
        await until(lambda: request.deadline(30.0, 5.0, 30.0)[1] is Expiry.RUN_TIMEOUT)
        ends(at.writer, writing, seq)
        await all_of(at.speaker, speaking, start=4)
        await until(lambda: request.deadline(30.0, 5.0, 30.0)[1] is Expiry.IDLE_TIMEOUT)


# -- restarts of the relay


async def came_back(relay: Daemon, stack: AsyncExitStack, submit: Submit, instance: str, **running: Any) -> FakeWorker:
    """The worker of a request is back after a restart of the relay, with its first attempt."""
    spaces, name = (submit.space,), f"of-{submit.space}"
    runs = (Running(request_id=submit.request_id, attempt=1, **({"next_seq": 0} | running)),)
    worker = await stack.enter_async_context(
        fake_worker(relay.url, name=name, instance=instance, spaces=spaces, running=runs, **RULES)
    )
    assert (await worker.peer.next(Registered)).resume
    return worker


@asynccontextmanager
async def before_the_restart(tmp_path: Path, instances: tuple[str, str]) -> AsyncIterator[Stage]:
    async with (
        daemon(tmp_path, store="sqlite", spaces=SPACES) as relay,
        fake_worker(relay.url, name="of-llm", instance=instances[0], spaces=("llm",), **RULES) as writer,
        fake_worker(relay.url, name="of-tts", instance=instances[1], spaces=("tts",), **RULES) as speaker,
        peer(relay.url, "client") as client,
    ):
        await until(lambda: len(relay.relay.workers) == 2)
        yield Stage(relay, client, writer, speaker)
        await relay.relay.store.flush()


@pytest.mark.trio
@pytest.mark.parametrize("phase", ["waits", "runs", "input ended", "runs, and nothing is left"])
async def test_a_relay_that_is_restarted_goes_on_in_every_phase(tmp_path: Path, phase: str) -> None:
    instances = an_id(), an_id()
    async with before_the_restart(tmp_path, instances) as at:
        source, writing, seq = await at.write(*([] if phase == "waits" else ["one ", "two "]))
        await at.send(submit := piped(source))
        speaking = writing  # until there is one
        if phase != "waits":
            speaking = await at.speaker.assigned()
            assert await taken(at.speaker, speaking, 8) == b"one two "
        if phase in ("input ended", "runs, and nothing is left"):
            ends(at.writer, writing, seq)
            await all_of(at.speaker, speaking, start=8)
            await at.end_of(source)
            await at.daemon.relay.finalizer.wait_finalized()
    async with (
        daemon(tmp_path, store="sqlite", spaces=SPACES) as relay,
        peer(relay.url, "client") as client,
        AsyncExitStack() as stack,
    ):
        client.send(submit)
        request = relay.relay.requests[submit.request_id]
        if phase == "waits":
            assert request.waits_for_source
        if phase in ("waits", "runs"):
            writer = await came_back(relay, stack, source, instances[0], next_seq=2 if phase == "runs" else 0)
            says(writer, writing, 0, "one ", "two ", "three")
            ends(writer, writing, 3)
        whole = b"one two three" if phase in ("waits", "runs") else b"one two "
        if phase == "waits":
            speaker = await stack.enter_async_context(fake_worker(relay.url, **RULES))
            speaking = await speaker.assigned()
            start = 0
        else:
            start = 8
            speaker = await came_back(relay, stack, submit, instances[1], inputs={"text": start})
            takes(speaker, speaking, start)
        if phase in ("waits", "runs"):
            assert await all_of(speaker, speaking, start=start) == whole[start:]
        speaker.speak(speaking, PCM)
        await client.frames(submit)
        await relay.at_rest()


@pytest.mark.trio
async def test_a_source_that_says_something_else_after_a_restart_lets_the_request_begin_anew(tmp_path: Path) -> None:
    instances = an_id(), an_id()
    async with before_the_restart(tmp_path, instances) as at:
        source, _, _ = await at.write("one two", retry="always")
        await at.send(submit := piped(source))
        first = await at.speaker.assigned()
        assert await taken(at.speaker, first, 7) == b"one two"
        at.speaker.speak(first, PCM, end=False)
        await at.client.next(Audio)
    async with (
        daemon(tmp_path, store="sqlite", spaces=SPACES) as relay,
        peer(relay.url, "client") as client,
        AsyncExitStack() as stack,
    ):
        client.send(submit)
        speaker = await came_back(relay, stack, submit, instances[1], next_seq=2, inputs={"text": 7})
        told: dict[str, Any] = {"name": "of-llm", "instance": instances[0], "spaces": ("llm",)}
        writer = await stack.enter_async_context(fake_worker(relay.url, **told | RULES))  # it has lost the attempt
        writing = await writer.assigned()
        says(writer, writing, 0, "one ", "four")
        await speaker.peer.next(Cancel)
        stop(speaker, first, 2)
        second = await speaker.assigned()
        assert (second.attempt > 1, second.from_seq) == (True, 0)
        assert await taken(speaker, second, 8) == b"one four"
        ends(writer, writing, 2)
        await all_of(speaker, second, start=8)
        speaker.speak(second, PCM)
        while not isinstance(await client.next(Frame), Completed):
            pass
        assert relay.relay.requests[submit.request_id].entry.losses == 0
        await relay.at_rest()
        await relay.relay.finalizer.wait_finalized()
        assert (await relay.relay.store.load()).live_inputs == {}


@pytest.mark.trio
async def test_a_relay_that_is_killed_before_it_stored_that_a_request_begins_anew_finds_out_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    instances = an_id(), an_id()
    async with before_the_restart(tmp_path, instances) as at:
        source, writing, seq = await at.write("old words", retry="always")
        await at.send(piped(source))
        first = await at.speaker.assigned()
        await taken(at.speaker, first, 9)
        await at.daemon.relay.store.flush()
        commit, cleared = at.daemon.relay.store.commit, trio.Event()

        async def killed(*changes: Any) -> None:
            if changes and isinstance(changes[0], ClearInput):
                cleared.set()
                await trio.sleep_forever()
            await commit(*changes)

        monkeypatch.setattr(at.daemon.relay.store, "commit", killed)
        at.writer.send(Failed(**identity(writing, seq), code="engine_failed", message="oh", retryable=True))
        says(at.writer, await at.writer.assigned(), 0, "new words!")
        await cleared.wait()
    async with daemon(tmp_path, store="sqlite", spaces=SPACES) as relay, AsyncExitStack() as stack:
        writer = await stack.enter_async_context(
            fake_worker(
                relay.url,
                name="of-llm",
                instance=instances[0],
                spaces=("llm",),
                **RULES,
                running=(Running(request_id=source.request_id, attempt=2, next_seq=1),),
            )
        )
        resumed = (await writer.peer.next(Registered)).resume
        assert resumed
        speaker = await stack.enter_async_context(fake_worker(relay.url, **RULES))
        says(writer, attrs.evolve(writing, attempt=resumed[0].attempt), 0, "new words!")
        speaking = await speaker.assigned()
        assert await taken(speaker, speaking, 10) == b"new words!"


@pytest.mark.trio
@pytest.mark.parametrize("is_whole", [False, True])
async def test_a_source_that_is_unknown_after_a_restart_fails_the_request_unless_it_has_all_of_it(
    tmp_path: Path, is_whole: bool
) -> None:
    instances = an_id(), an_id()
    async with before_the_restart(tmp_path, instances) as at:
        source, writing, seq = await at.write("one two")
        await at.send(submit := piped(source))
        speaking = await at.speaker.assigned()
        await taken(at.speaker, speaking, 7)
        if is_whole:
            ends(at.writer, writing, seq)
            await all_of(at.speaker, speaking, start=7)
        await at.daemon.relay.finalizer.wait_finalized()
        await at.daemon.relay.store.commit(DeleteRequest(source.request_id))
    async with daemon(tmp_path, store="sqlite", spaces=SPACES) as relay, peer(relay.url, "client") as client:
        client.send(submit)
        if is_whole:
            async with AsyncExitStack() as stack:
                speaker = await came_back(relay, stack, submit, instances[1], inputs={"text": 7})
                speaker.speak(speaking, PCM)
                assert (await client.frames(submit))[-1].TYPE == "completed"
        else:
            failed = await client.next(Failed)
            assert failed.code == "source_failed"
            assert failed.details["request_id"] == source.request_id
            assert "no longer kept" in failed.message


@pytest.mark.trio
async def test_a_later_request_with_the_id_of_a_source_is_not_taken_for_it(tmp_path: Path) -> None:
    instances = an_id(), an_id()
    async with before_the_restart(tmp_path, instances) as at:
        source, _, _ = await at.write("one two")
        await at.send(submit := piped(source))
        await taken(at.speaker, await at.speaker.assigned(), 7)
        await at.daemon.relay.store.flush()
        later = piped(submit, request_id=source.request_id)  # a circle
        record = RequestRecord(
            request_id=later.request_id, principal="root", ticket=1_000, submit=later, created_at=time.time()
        )
        await at.daemon.relay.store.commit(DeleteRequest(source.request_id), PutRequest(record))
    async with daemon(tmp_path, store="sqlite", spaces=SPACES) as relay, peer(relay.url, "client") as client:
        client.send(submit)
        assert (await client.next(Failed)).code == "source_failed"
        await until(lambda: relay.relay.requests[source.request_id].code == "source_failed")


# -- groups


@pytest.mark.trio
@pytest.mark.parametrize("how", ["cancel", "operator"])
async def test_a_cancel_of_one_request_of_a_group_ends_those_of_its_principal(tmp_path: Path, how: str) -> None:
    async with stage(tmp_path, listen="127.0.0.1:0", spaces={"other": {}}) as at:
        token = await new_token(at.daemon, name="bob")
        async with peer(at.daemon.urls[0], "client", token) as bob, peer(at.daemon.url, "operator") as operator:
            bob.send(his := a_submit(space="other", group="turn"))
            await bob.next(Accepted)
            source, writing, seq = await at.write(group="turn")
            await at.send(waits := piped(source, group="turn"))
            await at.send(queued := a_submit(space="other", group="turn"))
            await at.send(alone := a_submit(space="other", group="another turn"))
            if how == "cancel":
                at.client.send(Cancel(request_id=waits.request_id))
            else:
                operator.send(Steer(action="cancel", target=waits.request_id))
                await operator.next(Done)
            await at.writer.peer.next(Cancel)
            stop(at.writer, writing, seq)
            for submit in (source, waits, queued):
                await until(lambda submit=submit: at.request(submit).entry.state == "cancelled")  # type: ignore[misc]
            assert at.request(his).live
            assert at.request(alone).live


@pytest.mark.trio
async def test_a_cancel_of_an_ended_request_ends_the_rest_of_its_group(tmp_path: Path) -> None:
    async with stage(tmp_path) as at:
        source, writing, seq = await at.write("word", group="turn")
        ends(at.writer, writing, seq)
        await at.end_of(source)
        await at.send(submit := piped(source, group="turn"))
        speaking = await at.speaker.assigned()
        at.client.send(Cancel(request_id=source.request_id))
        await at.speaker.peer.next(Cancel)
        stop(at.speaker, speaking, 0)
        assert (await at.end_of(submit)).TYPE == "cancelled"
        assert at.request(source).entry.state == "completed"
