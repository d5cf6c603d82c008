"""docs/examples/client.mjs, a client in another language that was written from docs/protocol.md alone."""

import shutil
import signal
import wave
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import attrs
import pytest
import trio

from protocol.wire.errors import LinkError
from protocol.wire.messages import Attach
from tests.protocol.client.live_relay import LiveRelay
from tests.support.processes import Place, Proc, a_place, a_relay, a_worker
from tests.support.scripted_relay import Connection, FakeRelay, failed, frames, serve

CLIENT = Path(__file__).parents[2] / "docs" / "examples" / "client.mjs"
NODE = shutil.which("node")
MOCK = ("--engine", "mock")
PCM = (b"\1\0" * 2_400, b"\2\0" * 2_400, b"\3\0" * 2_400)


@attrs.frozen
class JavaScriptPlace(Place):
    """A place where `client.mjs` is a command as well."""

    def command(self, name: str, *args: str) -> list[str]:
        if name != CLIENT.name:
            return super().command(name, *args)
        assert NODE is not None, "there is no `node` on PATH; `make test` puts one into .venv/bin"
        assert (CLIENT.parent / "node_modules").is_dir(), "`make test` installs what client.mjs needs"
        return [NODE, str(CLIENT), *args]


def a_javascript_place(folder: Path) -> JavaScriptPlace:
    place = a_place(folder)
    return JavaScriptPlace(place.folder, place.environ)


async def access(place: Place, relay: Proc) -> tuple[str, str]:
    """The URL of a relay, and a token for it."""
    token, _ = await place.run("relayd", "token", "create", "--role", "client", "--name", "js")
    return (await relay.event("listening"))["urls"][0], token.decode().strip()


def sound_of(path: Path) -> tuple[int, int, int, bytes]:
    with wave.open(str(path)) as wav:
        sound = (wav.getnchannels(), wav.getsampwidth(), wav.getframerate(), wav.readframes(wav.getnframes()))
    assert path.stat().st_size == 44 + len(sound[-1])  # the sizes of the header are those of the file
    return sound


@attrs.define(eq=False)
class Line:
    """TCP connections to a relay, of which the first is cut when so many bytes have come from there."""

    port: int
    cut_after: int
    connections: int = 0
    cuts: int = 0
    _came: int = 0

    async def carry(self, client: trio.SocketStream) -> None:
        self.connections += 1
        relay = await trio.open_tcp_stream("127.0.0.1", self.port)
        async with client, relay, trio.open_nursery() as both:
            both.start_soon(self._pump, client, relay, both.cancel_scope)
            both.start_soon(self._pump, relay, client, both.cancel_scope)

    async def _pump(self, source: trio.SocketStream, sink: trio.SocketStream, line: trio.CancelScope) -> None:
        with suppress(trio.BrokenResourceError):
            async for data in source:
                await sink.send_all(data)
                self._came += len(data)
                if self._came >= self.cut_after and not self.cuts:
                    self.cuts += 1
                    break
        line.cancel()


@asynccontextmanager
async def a_line(url: str, cut_after: int) -> AsyncIterator[tuple[str, Line]]:
    """A URL that leads to the relay at `url`, and what carries it there."""
    line = Line(int(url.rpartition(":")[2]), cut_after)
    [listener] = await trio.open_tcp_listeners(0, host="127.0.0.1")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(trio.serve_listeners, line.carry, [listener])
        yield f"ws://127.0.0.1:{listener.socket.getsockname()[1]}", line
        nursery.cancel_scope.cancel()


@pytest.mark.trio
async def test_it_writes_the_samples_that_relay_say_writes(tmp_path: Path) -> None:
    place = a_javascript_place(tmp_path)
    async with a_relay(place) as relay, a_worker(place, relay, *MOCK):
        url, token = await access(place, relay)
        await place.run("relay", "say", "A tune, 一首歌.", "-p", "duration_s=0.73", "-o", "python.wav")
        spoken = (url, "tts", "A tune, 一首歌.", "js.wav", "duration_s=0.73")
        _, said = await place.run("client.mjs", *spoken, RELAY_TOKEN=token)
    assert "first audio after" in said
    assert sound_of(tmp_path / "js.wav") == sound_of(tmp_path / "python.wav")
    assert len(sound_of(tmp_path / "js.wav")[-1]) == 2 * round(0.73 * 24_000)


@pytest.mark.trio
async def test_it_tells_its_place_while_another_is_served(tmp_path: Path) -> None:
    place = a_javascript_place(tmp_path)
    async with a_relay(place) as relay, a_worker(place, relay, *MOCK):
        url, token = await access(place, relay)
        async with place.start("relay", "say", "first", "-p", "duration_s=1", "-o", "first.wav"):
            await relay.event("request started")
            spoken = (url, "tts", "second", "second.wav", "duration_s=0.1")
            _, said = await place.run("client.mjs", *spoken, RELAY_TOKEN=token)
    assert "place 1 of 1" in said


@pytest.mark.trio
async def test_a_refusal_ends_with_1_and_what_is_wrong(tmp_path: Path) -> None:
    place = a_javascript_place(tmp_path)
    async with a_relay(place) as relay, a_worker(place, relay, *MOCK):
        url, token = await access(place, relay)
        _, said = await place.run("client.mjs", url, "nowhere", "hi", "no.wav", code=1, RELAY_TOKEN=token)
        assert "space 'nowhere' does not exist" in said
        wrong = (url, "tts", "hi", "no.wav", "speed=fast", "colour=red")
        _, said = await place.run("client.mjs", *wrong, code=1, RELAY_TOKEN=token)
        assert "\n  speed: must be a number" in said
        assert "\n  colour: is unknown" in said
        failing = (url, "tts", "hi", "part.wav", 'fail={"how": "raise", "at": 2}')
        _, said = await place.run("client.mjs", *failing, code=1, RELAY_TOKEN=token)
        assert "the request asked for this failure" in said
    assert not (tmp_path / "no.wav").exists()
    assert len(sound_of(tmp_path / "part.wav")[-1]) == 2 * 4_800  # two chunks came before it


@pytest.mark.trio
async def test_without_a_connection_it_ends_with_3_and_wrongly_called_with_2(tmp_path: Path) -> None:
    place = a_javascript_place(tmp_path)
    async with a_relay(place) as relay:
        url, token = await access(place, relay)
        wrong = token[:-4] + ("AAAA" if token[-4:] != "AAAA" else "BBBB")
        _, said = await place.run("client.mjs", url, "tts", "hi", "no.wav", code=3, RELAY_TOKEN=wrong)
        assert "token" in said
        assert "(unauthenticated)" in said
        _, said = await place.run("client.mjs", f"{url}/elsewhere", "tts", "hi", "no.wav", code=3, RELAY_TOKEN=token)
        assert "HTTP 404" in said
    _, said = await place.run("client.mjs", url, "tts", "hi", "no.wav", code=3, RELAY_TOKEN=token)
    assert "cannot connect" in said
    _, said = await place.run("client.mjs", url, "tts", "hi", code=2)
    assert "usage:" in said


@pytest.mark.trio
async def test_a_cut_in_mid_stream_costs_no_sample(tmp_path: Path) -> None:
    place = a_javascript_place(tmp_path)
    async with a_relay(place) as relay, a_worker(place, relay, *MOCK):
        url, token = await access(place, relay)
        await place.run("relay", "say", "cut", "-p", "duration_s=2", "-o", "whole.wav")
        async with a_line(url, cut_after=30_000) as (cut_url, line):
            spoken = (cut_url, "tts", "cut", "cut.wav", "duration_s=2")
            _, said = await place.run("client.mjs", *spoken, RELAY_TOKEN=token)
    assert (line.cuts, line.connections) == (1, 2)
    assert "trying again" in said
    assert sound_of(tmp_path / "cut.wav") == sound_of(tmp_path / "whole.wav")


@pytest.mark.trio
async def test_a_relay_killed_in_mid_stream_costs_no_sample(tmp_path: Path) -> None:
    place = a_javascript_place(tmp_path)
    async with a_relay(place) as relay, a_worker(place, relay, *MOCK):
        url, token = await access(place, relay)
        await place.run("relay", "say", "killed", "-p", "duration_s=2", "-o", "whole.wav")
        spoken = (url, "tts", "killed", "killed.wav", "duration_s=2")
        async with place.start("client.mjs", *spoken, RELAY_TOKEN=token) as client:
            await client.until(lambda line: "first audio" in line)
            relay.send_signal(signal.SIGKILL)
            await relay.ended()
            async with a_relay(place, "--listen", url.removeprefix("ws://")):
                assert await client.ended() == 0
    assert sound_of(tmp_path / "killed.wav") == sound_of(tmp_path / "whole.wav")


@pytest.mark.trio
async def test_it_hears_of_an_end_that_a_new_relay_made_while_it_was_away(tmp_path: Path) -> None:
    place = a_javascript_place(tmp_path)
    async with a_relay(place) as relay, a_worker(place, relay, *MOCK) as worker:
        url, token = await access(place, relay)
        spoken = (url, "tts", "long", "part.wav", "duration_s=100")
        async with place.start("client.mjs", *spoken, RELAY_TOKEN=token) as client:
            await client.until(lambda line: "first audio" in line)
            request_id = (await relay.event("request started"))["request_id"]
            client.send_signal(signal.SIGSTOP)
            for gone in (relay, worker):
                gone.send_signal(signal.SIGKILL)
                await gone.ended()
            async with a_relay(place, "--listen", url.removeprefix("ws://")) as relay:
                # Its last frame has seq 0, and the client is past that.
                await place.run("relay", "cancel", request_id, "--role", "operator", "--reason", "nobody wants it")
                client.send_signal(signal.SIGCONT)
                assert await client.ended() == 1
        assert any("nobody wants it (cancelled)" in line for line in client.lines)
    assert len(sound_of(tmp_path / "part.wav")[-1]) >= 4_800


@pytest.mark.trio
async def test_a_message_that_breaks_the_rules_has_it_come_back_for_the_rest(tmp_path: Path) -> None:
    place = a_javascript_place(tmp_path)
    closed_with: list[int | None] = []

    async def misspeak(connection: Connection) -> None:
        submit = await connection.accept()
        first, second, *_rest = frames(submit.request_id, *PCM)
        connection.send(first, second)
        connection.link.send_nowait(b"\xc1")
        with pytest.raises(LinkError):
            await connection.link.receive()
        closed_with.append(connection.link.close_code)

    async def go_on(connection: Connection) -> None:
        attach = await connection.expect(Attach)
        assert (attach.attempt, attach.after_seq) == (1, 1)
        connection.send(*frames(attach.request_id, *PCM, seq=2))
        await connection.hold()

    async with trio.open_nursery() as nursery:
        fake = FakeRelay(nursery, misspeak, go_on)
        [listener] = await trio.open_tcp_listeners(0, host="127.0.0.1")
        nursery.start_soon(trio.serve_listeners, lambda stream: serve(stream, fake.next_script()), [listener])
        url = f"ws://127.0.0.1:{listener.socket.getsockname()[1]}"
        _, said = await place.run("client.mjs", url, "tts", "hi", "whole.wav", RELAY_TOKEN="any")
        nursery.cancel_scope.cancel()
    assert "the relay broke a rule" in said
    assert closed_with == [1002]
    assert sound_of(tmp_path / "whole.wav")[-1] == b"".join(PCM)


@pytest.mark.trio
@pytest.mark.parametrize("ends", ["failed", "completed"])
async def test_what_a_killed_relay_forgot_of_it_ends_it_or_is_read_from_the_start(tmp_path: Path, ends: str) -> None:
    place = a_javascript_place(tmp_path)

    async def speak_attempt_2(connection: Connection) -> None:
        request_id = (await connection.accept()).request_id
        connection.send(*frames(request_id, PCM[2], PCM[2], attempt=2, ends=False))
        await connection.cut()

    async def know_attempt_1(connection: Connection) -> None:
        attach = await connection.expect(Attach)
        assert (attach.attempt, attach.after_seq) == (2, 2)
        if ends == "failed":
            connection.send(failed(attach.request_id, attempt=1))
        else:
            connection.send(*frames(attach.request_id, *PCM)[3:])
            attach = await connection.expect(Attach)
            assert (attach.attempt, attach.after_seq) == (0, -1)
            connection.send(*frames(attach.request_id, *PCM))
        await connection.hold()

    async with trio.open_nursery() as nursery:
        fake = FakeRelay(nursery, speak_attempt_2, know_attempt_1)
        [listener] = await trio.open_tcp_listeners(0, host="127.0.0.1")
        nursery.start_soon(trio.serve_listeners, lambda stream: serve(stream, fake.next_script()), [listener])
        url = f"ws://127.0.0.1:{listener.socket.getsockname()[1]}"
        code = 1 if ends == "failed" else 0
        await place.run("client.mjs", url, "tts", "hi", "heard.wav", code=code, RELAY_TOKEN="any")
        nursery.cancel_scope.cancel()
    heard = sound_of(tmp_path / "heard.wav")[-1]
    assert heard == (PCM[2] + PCM[2] if ends == "failed" else b"".join(PCM))


@pytest.mark.trio
async def test_a_text_from_standard_input_is_fed_once_and_in_order_over_cuts(tmp_path: Path) -> None:
    place = a_javascript_place(tmp_path)
    text = "".join(f"Sentence {number}, 第{number}句。" for number in range(30_000)).encode()
    peer = LiveRelay()
    scripts = [peer.script(cut_after=1), peer.script(cut_after=0), peer.script(cut_after=2, ack_every=2), peer.script()]
    async with trio.open_nursery() as nursery:
        fake = FakeRelay(nursery, *scripts)
        [listener] = await trio.open_tcp_listeners(0, host="127.0.0.1")
        nursery.start_soon(trio.serve_listeners, lambda stream: serve(stream, fake.next_script()), [listener])
        url = f"ws://127.0.0.1:{listener.socket.getsockname()[1]}"
        spoken = (url, "tts", "-", "fed.wav", "speed=1.5")
        _, said = await place.run("client.mjs", *spoken, stdin=text, RELAY_TOKEN="any")
        nursery.cancel_scope.cancel()
    assert said.count("trying again") >= 3
    assert peer.stored == {"text": text}
    assert peer.submit is not None
    assert peer.submit.params == {"speed": 1.5}
    assert len(sound_of(tmp_path / "fed.wav")[-1]) == 4_800


@pytest.mark.trio
async def test_what_is_spoken_from_standard_input_has_the_samples_of_the_whole_text(tmp_path: Path) -> None:
    place = a_javascript_place(tmp_path)
    text = "A tune, 一首歌."
    async with a_relay(place) as relay, a_worker(place, relay, *MOCK):
        url, token = await access(place, relay)
        await place.run("relay", "say", text, "-o", "python.wav")
        await place.run("client.mjs", url, "tts", "-", "js.wav", stdin=text.encode(), RELAY_TOKEN=token)
    assert sound_of(tmp_path / "js.wav") == sound_of(tmp_path / "python.wav")


@pytest.mark.trio
async def test_an_interrupt_cancels_and_leaves_a_valid_file(tmp_path: Path) -> None:
    place = a_javascript_place(tmp_path)
    async with a_relay(place) as relay, a_worker(place, relay, *MOCK):
        url, token = await access(place, relay)
        spoken = (url, "tts", "long", "cut.wav", "duration_s=100")
        async with place.start("client.mjs", *spoken, RELAY_TOKEN=token) as client:
            await client.until(lambda line: "first audio" in line)
            client.send_signal(signal.SIGINT)
            assert await client.ended() == 130
        await relay.event("request cancelled")
    assert len(sound_of(tmp_path / "cut.wav")[-1]) >= 4_800
