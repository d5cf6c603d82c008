"""The client for programs without Trio: same promises, no thread left behind, Ctrl-C in order."""

import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from protocol import ConnectError, InputClosed, Live, RequestFailed, RequestRejected, blocking
from protocol.wire.frames import Completed, Started, Video
from protocol.wire.messages import Cancel, Rejected, Spaces, SpacesReply, Status, StatusReply, Submit
from tests.protocol.client.live_relay import LiveRelay
from tests.support.pictures import PICTURES, VIDEO
from tests.support.scripted_relay import ID, Connection, RelayThread, failed, frames, speak


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    before = set(threading.enumerate())
    yield
    # Trio's cached worker threads end by themselves, after ten idle seconds.
    left = {thread for thread in threading.enumerate() if not thread.name.startswith("Trio ")} - before
    assert left == set()


def test_a_request_is_followed_without_trio(tmp_path: Path) -> None:
    with RelayThread(tmp_path, speak) as url, blocking.open_relay(url) as relay:
        assert relay.welcome.principal == "tester"
        with relay.submit("tts", {"text": "hi"}, priority=3) as stream:
            assert [frame.seq for frame in stream] == [0, 1, 2, 3, 4]
            assert stream.result()["samples"] == 7200
        with relay.submit("tts", {"text": "hi"}) as stream:
            assert sum(map(len, stream.audio())) == 14_400
            assert stream.format is not None
        with relay.submit("tts", {"text": "hi"}) as stream:
            assert len(list(stream.events())) == 7


def test_pictures_are_followed_without_trio(tmp_path: Path) -> None:
    async def script(connection: Connection) -> None:
        request_id = (await connection.accept()).request_id
        connection.send(Started(request_id=request_id, attempt=1, seq=0, video=VIDEO))
        for seq, (data, pts) in enumerate(PICTURES, 1):
            connection.send(Video(request_id=request_id, attempt=1, seq=seq, data=data, pts=pts, key=not pts))
        connection.send(Completed(request_id=request_id, attempt=1, seq=6))
        await connection.hold()

    with RelayThread(tmp_path, script) as url, blocking.open_relay(url) as relay, relay.submit("face") as stream:
        assert [(picture.data, picture.pts) for picture in stream.video()] == PICTURES
        assert stream.video_format == VIDEO


def test_faults_come_out_as_they_are(tmp_path: Path) -> None:
    async def script(connection: Connection) -> None:
        submit = await connection.expect(Submit)
        connection.send(Rejected(request_id=submit.request_id, code="space_not_found", message="no space 'x'"))
        submit = await connection.accept()
        connection.send(*frames(submit.request_id, b"\1\0", ends=False), failed(submit.request_id, seq=2))
        await connection.hold()

    with RelayThread(tmp_path, script) as url, blocking.open_relay(url) as relay:
        with pytest.raises(RequestRejected, match="no space"), relay.submit("x"):
            pytest.fail("entered")
        with relay.submit("tts") as stream, pytest.raises(RequestFailed, match="it broke"):
            list(stream)
        with pytest.raises(ValueError, match="space"), relay.submit("no spaces"):
            pytest.fail("entered")
    with pytest.raises(ConnectError, match="no relay listens"), blocking.open_relay(f"unix:{tmp_path}/none"):
        pytest.fail("entered")


def test_questions_are_answered(tmp_path: Path) -> None:
    async def script(connection: Connection) -> None:
        await connection.expect(Status)
        connection.send(StatusReply(request_id=ID, space="tts", state="running"))
        await connection.expect(Spaces)
        connection.send(SpacesReply(spaces=[{"name": "tts"}]))
        await connection.expect(Cancel)
        await connection.expect(Status)
        connection.send(StatusReply(request_id=ID, space="tts", state="cancelled"))
        await connection.hold()

    with RelayThread(tmp_path, script) as url, blocking.open_relay(url) as relay:
        assert relay.status(ID).state == "running"
        assert relay.spaces() == [{"name": "tts"}]
        assert relay.cancel(ID).state == "cancelled"


def test_leaving_early_cancels_and_so_does_an_exception(tmp_path: Path) -> None:
    cancels: list[Cancel] = []

    async def script(connection: Connection) -> None:
        for _ in range(2):
            submit = await connection.accept()
            connection.send(*frames(submit.request_id, b"\1\0", ends=False))
            cancels.append(await connection.expect(Cancel))
        await connection.hold()

    with RelayThread(tmp_path, script) as url, blocking.open_relay(url) as relay:
        with relay.submit("tts") as stream:
            next(iter(stream))
        with pytest.raises(KeyError), relay.submit("tts"):
            raise KeyError
    assert len(cancels) == 2


def test_ctrl_c_ends_the_waiting_call_and_cancels_the_request(tmp_path: Path) -> None:
    cancels: list[Cancel] = []
    main = threading.main_thread().ident
    assert main is not None

    async def script(connection: Connection) -> None:
        await connection.accept()
        signal.pthread_kill(main, signal.SIGINT)
        cancels.append(await connection.expect(Cancel))
        await connection.hold()

    def wait_for_ever(url: str) -> None:
        with blocking.open_relay(url) as relay, relay.submit("tts") as stream:
            list(stream)

    with RelayThread(tmp_path, script) as url, pytest.raises(KeyboardInterrupt):
        wait_for_ever(url)
    assert len(cancels) == 1


def test_live_inputs_are_fed_from_an_ordinary_iterator_and_by_hand(tmp_path: Path) -> None:
    def words() -> Iterator[str]:
        yield "Hello"
        first_stored.wait()
        yield " world"

    first_stored = threading.Event()
    peer = LiveRelay(on_message=first_stored.set)
    inputs: dict[str, blocking.InputSource] = {
        "text": words(),
        "audio": ([b"\1\0", b"\2\0"], "audio/pcm"),
        "more": Live(),
    }
    with (
        RelayThread(tmp_path, peer.script()) as url,
        blocking.open_relay(url) as relay,
        relay.submit("tts", inputs=inputs) as stream,
    ):
        stream.feed("more", "by ")
        stream.feed("more", b"hand")
        stream.end_input("more")
        stream.result()
        with pytest.raises(InputClosed):
            stream.feed("more", "?")
    assert peer.stored == {"text": b"Hello world", "audio": b"\1\0\2\0", "more": b"by hand"}
    assert peer.infos["audio"].media_type == "audio/pcm"


@pytest.mark.parametrize("source", ["a whole text", ("a whole text", "text/plain")])
def test_a_text_is_not_taken_for_its_characters(tmp_path: Path, source: blocking.InputSource) -> None:
    peer = LiveRelay()
    with (
        RelayThread(tmp_path, peer.script()) as url,
        blocking.open_relay(url) as relay,
        pytest.raises(ValueError, match="encode a text"),
        relay.submit("tts", inputs={"text": source}),
    ):
        raise AssertionError("it was submitted")
    assert not peer.stored


def test_an_exception_of_the_iterator_reaches_whoever_reads_the_stream(tmp_path: Path) -> None:
    def breaks() -> Iterator[str]:
        yield "Hello"
        raise KeyError("the model failed")

    cancelled = threading.Event()
    first, second = LiveRelay(), LiveRelay()
    second.on_message = lambda: cancelled.set() if second.cancels else None
    with RelayThread(tmp_path, first.script(), second.script()) as url:
        with (
            pytest.raises(KeyError, match="the model failed"),
            blocking.open_relay(url) as relay,
            relay.submit("tts", inputs={"text": breaks()}) as stream,
        ):
            list(stream)
        with (
            pytest.raises(KeyError, match="the model failed"),
            blocking.open_relay(url) as relay,
            relay.submit("tts", inputs={"text": breaks()}),
        ):
            cancelled.wait()
    assert len(first.cancels) == 1


def test_several_threads_may_share_a_relay(tmp_path: Path) -> None:
    with RelayThread(tmp_path, speak) as url, blocking.open_relay(url) as relay:
        sizes: list[int] = []

        def work() -> None:
            with relay.submit("tts", {"text": "hi"}) as stream:
                sizes.append(sum(map(len, stream.audio())))

        threads = [threading.Thread(target=work) for _ in range(5)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sizes == [14_400] * 5
