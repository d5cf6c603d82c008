"""The Wyoming protocol against a relay: what is asked and answered, and what a peer may do wrong."""

import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import attrs
import pytest
import trio

from protocol.wire.structs import AudioFormat
from relayd.config.schema import Wyoming
from relayd.http.context import HttpContext
from relayd.talk.talks import Talk
from relayd.wyoming import connection, server
from relayd.wyoming.events import MAX_PAYLOAD_BYTES
from tests.support.fake_worker import FORMAT
from tests.support.relay import a_config, kept_logs, new_token, running, until
from tests.support.talking import Stage, Step, speech_of
from tests.support.wyoming_client import WyomingClient, event, line, pcm_of, wyoming_client

PCM = {"rate": 24_000, "width": 2, "channels": 1}
QUIET = bytes(2 * int(0.3 * FORMAT.sample_rate))
LOUD = b"\x00\x40\x00\xc0" * 6_000


@attrs.define(eq=False)
class Home(Stage):
    """A daemon with the protocol, and a client of it."""

    @property
    def url(self) -> str:
        return self.daemon.started.door_urls[-1]

    @property
    def context(self) -> HttpContext:
        return self.daemon.http_context

    async def settled(self) -> None:
        """Nothing of the protocol is left."""
        await until(lambda: not self.daemon.relay.stats.wyoming.connections)
        await until(lambda: not self.context.exchanges and not self.context.streams)
        await self.daemon.at_rest()


@asynccontextmanager
async def home(state_dir: Path, *, talk: bool = True, wyoming: Any = None, **overrides: Any) -> AsyncIterator[Home]:
    spaces = {"tts": {"max_workers": 2}, "llm": {}, "stt": {}, "check": {}}
    settings: dict[str, Any] = {"store": "memory", "spaces": spaces}
    settings["wyoming"] = {"listen": "127.0.0.1:0"} | (wyoming or {})
    if talk:
        settings["talk"] = {"reply": "llm", "speech": "tts", "transcribe": "stt"}
    async with running(a_config(state_dir, **(settings | overrides))) as daemon, trio.open_nursery() as nursery:
        yield Home(daemon, nursery)
        nursery.cancel_scope.cancel()


async def ask(client: WyomingClient, text: str, **data: Any) -> bytes:
    """The samples that are answered, without the silence at their end."""
    await client.send("synthesize", {"text": text, **data})
    events = await client.until("audio-stop")
    assert events[0].type == "audio-start"
    assert {name: events[0].data[name] for name in PCM} == PCM
    pcm = pcm_of(events)
    assert pcm.endswith(QUIET)
    assert events[-1].data["timestamp"] == len(pcm) * 1000 // 48_000
    return pcm.removesuffix(QUIET)


# -- what there is


@pytest.mark.trio
async def test_it_tells_what_there_is_from_memory(tmp_path: Path) -> None:
    async with home(tmp_path) as on, wyoming_client(on.url) as client:
        await on.speaker()
        await on.writer()
        await on.listener()
        await client.send("describe")
        told = await client.expect("info")
        assert [voice["name"] for voice in told["tts"][0]["voices"]] == ["tts"]
        assert [model["name"] for model in told["asr"][0]["models"]] == ["stt"]
        assert [model["name"] for model in told["handle"][0]["models"]] == ["llm"]
        await client.send("ping", {"text": "x"})
        assert await client.expect("pong") == {"text": "x"}
        await client.send("select-program", {"name": "relayd"})
        await client.send("of-a-later-version")
        await client.send("ping")
        assert await client.expect("pong") == {"text": None}


@pytest.mark.trio
async def test_it_needs_no_conversations(tmp_path: Path) -> None:
    async with home(tmp_path, talk=False) as on, wyoming_client(on.url) as client:
        await on.speaker()
        await client.send("describe")
        assert not (await client.expect("info"))["handle"]
        assert await ask(client, "Hello") == speech_of("Hello")
        await client.send("transcript", {"text": "Hello"})
        assert await client.refused() == (
            "unsupported",
            "no conversations are held here; they need a table [talk] in relayd.toml",
        )


# -- speech


@pytest.mark.trio
async def test_a_text_is_spoken_with_a_silence_at_its_end(tmp_path: Path) -> None:
    async with home(tmp_path) as on, wyoming_client(on.url) as client:
        voices = {"properties": {"text": {"type": "string"}, "voice": {"enum": ["amy", "bob"]}}, "required": ["text"]}
        speaker = await on.speaker(params=voices)
        assert await ask(client, "Hello") == speech_of("Hello")
        assert await ask(client, "again and again", voice={"name": "tts/bob"}) == speech_of("againandagain")
        assert [assign.params.get("voice") for assign in speaker.assigns] == [None, "bob"]
        assert {request.principal for request in on.daemon.relay.requests.values()} == {"home"}
        await client.send("synthesize", {"text": " ... "})
        assert [each.type for each in await client.until("audio-stop")] == ["audio-start", "audio-stop"]
        assert len(speaker.assigns) == 2
        assert await ask(client, "one") == speech_of("one")
    assert on.daemon.relay.stats.wyoming.asked == {"synthesize": 4}


@pytest.mark.trio
async def test_long_audio_is_sent_in_pieces_of_whole_samples(tmp_path: Path) -> None:
    async with home(tmp_path) as on, wyoming_client(on.url) as client:
        await on.speaker(AudioFormat(sample_rate=24_000, channels=2))
        text = "word" * 5_000
        await client.send("synthesize", {"text": text})
        events = await client.until("audio-stop")
        assert pcm_of(events).removesuffix(2 * QUIET) == speech_of(text)
        chunks = [each for each in events if each.type == "audio-chunk"]
        assert len(chunks) > 10
        assert all(0 < len(each.payload) <= 32_768 and len(each.payload) % 4 == 0 for each in chunks)
        assert chunks[1].data["timestamp"] == len(chunks[0].payload) * 1000 // 96_000


@pytest.mark.trio
async def test_a_text_is_spoken_while_it_is_written(tmp_path: Path) -> None:
    async with home(tmp_path) as on, wyoming_client(on.url) as client:
        speaker = await on.speaker()
        await client.send("synthesize-start", {"voice": {"name": "tts"}})
        await client.send("synthesize-chunk", {"text": " "})
        await client.send("synthesize-chunk", {"text": "Über"})
        await client.expect("audio-start")
        heard = (await client.until("audio-chunk"))[-1].payload
        assert heard == speech_of(" Über"), "the text is not even whole"
        await client.send("synthesize-chunk", {"text": " alles"})
        heard += (await client.until("audio-chunk"))[-1].payload
        await client.send("synthesize", {"text": "Über alles"})  # as Home Assistant does, for other servers
        await client.send("synthesize-stop")
        heard += pcm_of(await client.until("synthesize-stopped"))
        assert heard == speech_of(" Über alles") + QUIET
        (assign,) = speaker.assigns
        assert assign.inputs["text"].live
        for texts in ((), (" ", "\n")):
            await client.send("synthesize-start")
            for text in texts:
                await client.send("synthesize-chunk", {"text": text})
            await client.send("synthesize-stop")
            assert await client.expect("synthesize-stopped") == {}
        assert len(speaker.assigns) == 1


@pytest.mark.trio
async def test_a_space_that_needs_the_whole_text_gets_it(tmp_path: Path) -> None:
    async with home(tmp_path) as on, wyoming_client(on.url) as client:
        speaker = await on.speaker(inputs={}, params={"properties": {"text": {"type": "string"}}})
        await client.send("synthesize-start")
        await client.send("synthesize-chunk", {"text": "one "})
        await client.send("synthesize-chunk", {"text": "two"})
        await client.send("synthesize-stop")
        assert pcm_of(await client.until("synthesize-stopped")) == speech_of("onetwo") + QUIET
        assert speaker.assigns[0].params["text"] == "one two"


# -- transcripts


@pytest.mark.trio
async def test_what_is_said_is_written_down(tmp_path: Path) -> None:
    async with home(tmp_path) as on, wyoming_client(on.url) as client:
        listener = await on.listener(" Turn on ", "the light.", "Off.")
        await client.send("transcribe", {"language": "en-US", "name": "stt"})
        await client.send("audio-start", PCM)
        for start in range(0, len(LOUD), 4_001):
            await client.send("audio-chunk", PCM, LOUD[start : start + 4_001])
        await client.send("audio-stop")
        events = await client.until("transcript-stop")
        assert [each.type for each in events] == [
            *("transcript-start", "transcript-chunk", "transcript", "transcript-stop")
        ]
        assert events[2].data == {"text": "Turn on", "language": "en-US"}
        (assign,) = listener.assigns
        assert assign.params == {"turn_detection": "none", "language": "en"}
        assert assign.inputs["audio"].media_type == "audio/L16;rate=24000;channels=1"
        await client.send("audio-chunk", PCM, LOUD)  # without a beginning
        await client.send("audio-stop")
        assert (await client.until("transcript"))[-1].data == {"text": "the light."}
        assert await client.expect("transcript-stop") == {}
        await client.send("audio-start", PCM)
        await client.send("audio-stop")
        assert await client.expect("transcript") == {"text": ""}
        assert len(listener.assigns) == 2


@pytest.mark.trio
async def test_a_language_that_a_model_does_not_know_is_left_to_it(tmp_path: Path) -> None:
    schema = {"properties": {"turn_detection": {}, "language": {"enum": ["en", "fr"]}}}
    async with home(tmp_path) as on, wyoming_client(on.url) as client:
        listener = await on.listener("a", "b", params=schema)
        for language in ("sv", "fr-CA"):
            await client.send("transcribe", {"language": language})
            await client.send("audio-chunk", PCM, LOUD)
            await client.send("audio-stop")
            await client.until("transcript-stop")
        assert [assign.params.get("language") for assign in listener.assigns] == [None, "fr"]


# -- conversations


@pytest.mark.trio
async def test_it_converses(tmp_path: Path) -> None:
    async with home(tmp_path) as on, wyoming_client(on.url) as client:
        writer = await on.writer()
        context = {"conversation_id": "01JABC", "device_id": "kitchen"}
        await client.send("transcript", {"text": "Hello", "context": context, "language": "en"})
        events = await client.until("handled-stop")
        assert events[0].data == {"context": context}
        assert "".join(each.data["text"] for each in events if each.type == "handled-chunk") == "You said: Hello."
        assert events[-2].data == {"text": "You said: Hello.", "context": context}
        await client.send("transcript", {"text": "again", "context": context})
        await client.until("handled-stop")
        assert [each["content"] for each in writer.prompts[-1]] == ["Hello", "You said: Hello.", "again"]
        await client.send("transcript", {"text": "alone"})
        made = (await client.until("handled-stop"))[-2].data["context"]["conversation_id"]
        assert made != "01JABC"
        assert len(writer.prompts[-1]) == 1
        talk = await on.talks.open(server_principal(on), made, create=False)
        assert isinstance(talk, Talk)
        assert not [turn for turn in talk.turns if turn.speech_request]


def server_principal(on: Home) -> Any:
    return on.daemon.tokens.principal_named("home", 0.0)


@pytest.mark.trio
async def test_a_reply_that_cannot_be_made_is_told_and_the_connection_goes_on(tmp_path: Path) -> None:
    async with home(tmp_path) as on, wyoming_client(on.url) as client:
        await client.send("transcript", {"text": "Hello", "context": {"conversation_id": "no-digit"}})
        assert "not an id of a session" in (await client.expect("not-handled"))["text"]
        await on.writer(lambda messages: [("invalid_params",)])
        await client.send("transcript", {"text": "Hello", "context": {"conversation_id": "a1"}})
        assert await client.expect("not-handled") == {
            "text": "as the test says",
            "context": {"conversation_id": "a1"},
        }


# -- leaving


@pytest.mark.trio
@pytest.mark.parametrize("what", ["synthesize", "synthesize-start", "audio-start", "transcript"])
async def test_a_client_that_leaves_ends_its_request(what: str, tmp_path: Path) -> None:
    never = trio.Event()

    def stall(messages: list[dict[str, str]]) -> list[Step]:
        return ["Well", never]

    async with home(tmp_path) as on:
        speaker, writer, listener = await on.speaker(), await on.writer(stall), await on.listener("x")
        speaker.lingers = listener.ponders = never
        engine = {"transcript": writer, "audio-start": listener}.get(what, speaker)
        async with wyoming_client(on.url) as client:
            await client.send(what, {"text": "Hello"} | (PCM if what == "audio-start" else {}))
            if what == "synthesize-start":
                await client.send("synthesize-chunk", {"text": "Hello"})
            if what == "audio-start":
                await client.send("audio-chunk", PCM, LOUD)
            await until(lambda: bool(engine.assigns))
        await until(lambda: not on.daemon.relay.running_count)
        await on.settled()
        assert {request.entry.state for request in on.daemon.relay.requests.values()} == {"cancelled"}
        await on.daemon.goes_on()


@pytest.mark.trio
async def test_a_client_that_reads_nothing_is_cut_off(tmp_path: Path) -> None:
    with kept_logs() as logs:
        async with home(tmp_path, limits={"stall_timeout_s": 0.05}) as on:
            await on.speaker()
            async with wyoming_client(on.url) as client:
                client.stream.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4_096)
                with suppress(trio.BrokenResourceError):
                    for _ in range(40):
                        await client.send("synthesize", {"text": "word" * 10_000})
                await until(lambda: not on.daemon.relay.stats.wyoming.connections)
                assert on.daemon.relay.slow_consumers == 1
            await on.settled()
    assert any(each["event"] == "connection closed: it reads nothing" for each in logs)


@pytest.mark.trio
async def test_one_that_is_silent_while_nothing_is_asked_is_closed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection, "IDLE_S", 0.05)
    async with home(tmp_path) as on, wyoming_client(on.url) as client:
        assert await client.next() is None


@pytest.mark.trio
async def test_an_event_that_is_never_whole_is_not_waited_for(tmp_path: Path) -> None:
    limits = {"ping_interval_s": 0.01, "dead_after_s": 0.05}
    async with home(tmp_path, limits=limits) as on, wyoming_client(on.url) as client:
        await client.stream.send_all(event("ping", {"text": "x"})[:-1])
        assert await client.refused() == (
            "bad_event",
            "an event was not whole after 0.05 s; connect again, and send it",
        )


@pytest.mark.trio
@pytest.mark.parametrize("begin", ["synthesize-start", "audio-start"])
async def test_what_is_begun_and_not_continued_ends(begin: str, tmp_path: Path) -> None:
    async with home(tmp_path, limits={"feed_idle_timeout_s": 0.05}) as on, wyoming_client(on.url) as client:
        await on.speaker()
        await client.send(begin, PCM)
        code, text = await client.refused()
        assert (code, text) == (
            "feed_timeout",
            "nothing more came for 0.05 s; connect again, and end with its stop event",
        )
        await on.settled()


# -- what is wrong


BAD: list[tuple[list[bytes], str, str]] = [
    ([b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"], "bad_event", "not JSON"),
    ([line(type="x", payload_length=MAX_PAYLOAD_BYTES + 1)], "bad_event", "send events of at most"),
    ([event("synthesize")], "bad_event", "data must have 'text'"),
    ([event("synthesize", {"text": "x" * 70_000})], "bad_event", "send 65536 at most"),
    ([event("synthesize", {"text": "x", "voice": 3})], "bad_event", "'voice' must be an object"),
    ([event("synthesize", {"text": "x", "voice": {"name": "none"}})], "invalid_params", "there is no voice 'none'"),
    ([event("synthesize", {"text": "<p/>", "text_format": "ssml"})], "unsupported", "only plain text"),
    ([event("synthesize-start", {"text_format": "ssml"})], "unsupported", "only plain text"),
    ([event("synthesize-start"), event("describe")], "bad_event", "send synthesize-stop first"),
    ([event("synthesize-start"), event("synthesize-chunk", {"text": 1})], "bad_event", "data must have 'text'"),
    ([event("synthesize-start"), *[event("synthesize-chunk", {"text": " " * 60_000})] * 2], "bad_event", "longer than"),
    ([event("audio-start", PCM | {"width": 1})], "bad_event", "width 2"),
    ([event("audio-start", PCM | {"channels": [1]})], "bad_event", "width 2"),
    ([event("audio-start", PCM | {"rate": 1e99})], "bad_event", "a rate of"),
    ([event("audio-start", PCM), event("describe")], "bad_event", "send audio-stop first"),
    ([event("audio-start", PCM), event("audio-chunk", PCM | {"rate": 8_000}, b"x")], "bad_event", "keep to them"),
    ([event("transcribe", {"name": "none"}), event("audio-chunk", PCM, LOUD)], "invalid_params", "no model 'none'"),
    ([event("transcribe", {"language": ["en"]})], "bad_event", "data must have 'language'"),
    ([event("transcript", {"text": "x", "context": []})], "bad_event", "'context' must be an object"),
    ([event("transcript", {"text": "x", "context": {"conversation_id": 3}})], "bad_event", "must be a string"),
    ([event("detect")], "unsupported", "relayd does not answer 'detect'"),
]


@pytest.mark.trio
async def test_what_is_wrong_ends_its_connection_with_a_word_and_no_other(tmp_path: Path) -> None:
    with kept_logs() as logs:
        async with home(tmp_path) as on, wyoming_client(on.url) as other:
            await on.speaker()
            await on.listener("x")
            await on.writer()
            for sent, code, told in BAD:
                async with wyoming_client(on.url) as client:
                    await client.stream.send_all(b"".join(sent))
                    refused = await client.refused()
                    assert refused[0] == code, sent
                    assert told in refused[1], sent
            assert await ask(other, "Hello") == speech_of("Hello")
            assert sum(on.daemon.relay.stats.wyoming.errors.values()) == len(BAD)
    assert not [each for each in logs if each["log_level"] == "error"], logs


@pytest.mark.trio
async def test_a_failure_amid_a_text_ends_the_connection_with_its_reason(tmp_path: Path) -> None:
    async with home(tmp_path, http={"no_worker_wait_s": 0.05}) as on:
        async with wyoming_client(on.url) as client:
            await client.send("synthesize", {"text": "Hello"})
            assert (await client.refused())[0] == "no_worker"
        speaker, listener = await on.speaker(), await on.listener("x")
        speaker.fails_with = listener.fails_with = "engine_failed"
        begun = {"synthesize": b"", "synthesize-start": event("synthesize-chunk", {"text": "Hello"})}
        begun |= {"audio-start": event("audio-chunk", PCM, LOUD) + event("audio-stop")}
        for what, more in begun.items():
            async with wyoming_client(on.url) as client:
                await client.send(what, {"text": "Hello"} | PCM)
                await client.stream.send_all(more)
                assert await client.refused() == ("engine_failed", "as the test says"), what
        await on.settled()


SPOKEN = event("synthesize-start") + event("synthesize-chunk", {"text": "Hello"})
HEARD = event("audio-chunk", PCM, LOUD)


@pytest.mark.trio
@pytest.mark.parametrize(
    ("sent", "wrong", "code"),
    [
        (SPOKEN, b"nonsense\n", "bad_event"),
        (SPOKEN, event("describe"), "bad_event"),
        (SPOKEN, b"", "feed_timeout"),
        (HEARD, b"nonsense\n", "bad_event"),
        (HEARD, event("audio-start", PCM), "bad_event"),
        (HEARD, b"", "feed_timeout"),
    ],
)
async def test_what_is_wrong_amid_a_request_ends_it_with_a_word(
    sent: bytes, wrong: bytes, code: str, tmp_path: Path
) -> None:
    with kept_logs() as logs:
        limits = {} if wrong else {"feed_idle_timeout_s": 0.5}
        async with home(tmp_path, limits=limits) as on:
            engines = await on.speaker(), await on.listener()
            async with wyoming_client(on.url) as client:
                await client.stream.send_all(sent)
                if wrong:
                    await until(lambda: any(engine.assigns for engine in engines))
                    await client.stream.send_all(wrong)
                assert (await client.refused())[0] == code
            await on.settled()
    assert not [each for each in logs if each["log_level"] == "error"], logs


@pytest.mark.trio
async def test_a_fault_of_ours_ends_one_connection(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def fall_over(*_: Any) -> None:
        raise RuntimeError("fell over")

    monkeypatch.setitem(server.ANSWERS, "ping", fall_over)
    with kept_logs() as logs:
        async with home(tmp_path) as on, wyoming_client(on.url) as client:
            await client.send("ping")
            assert await client.refused() == ("internal", "internal error; see the relay's log")
            await on.settled()
    assert [each["event"] for each in logs if each["log_level"] == "error"] == ["internal error in connection"]


# -- who may


@pytest.mark.trio
async def test_an_address_has_a_limit_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "MAX_PER_ADDRESS", 2)
    async with home(tmp_path) as on:
        async with wyoming_client(on.url) as first, wyoming_client(on.url) as second:
            for client in (first, second):
                await client.send("ping")
                await client.expect("pong")
            async with wyoming_client(on.url) as third:
                assert await third.refused() == (
                    "refused",
                    "2 connections of this address are open; close one first",
                )
        await on.settled()
        async with wyoming_client(on.url) as client:
            await client.send("ping")
            await client.expect("pong")


@pytest.mark.trio
async def test_the_principal_has_its_limit_of_connections(tmp_path: Path) -> None:
    async with home(tmp_path, limits={"principal": {"max_connections": 1}}) as on, wyoming_client(on.url) as client:
        await client.send("ping")
        await client.expect("pong")
        async with wyoming_client(on.url) as another:
            assert "'home' may have 1 connections at once" in (await another.refused())[1]


@pytest.mark.trio
async def test_the_rights_are_those_of_a_token_of_that_name(tmp_path: Path) -> None:
    async with home(tmp_path) as on:
        await on.speaker()
        await new_token(on.daemon, name="home", spaces=["llm"])
        async with wyoming_client(on.url) as client:
            await client.send("describe")
            assert not (await client.expect("info"))["tts"]
            await client.send("synthesize", {"text": "Hello"})
            assert (await client.refused())[0] == "no_worker"


@pytest.mark.parametrize(
    ("peer", "allow", "allowed"),
    [
        ("127.0.0.1:1", (), True),
        ("[::1]:1", (), True),
        ("[::ffff:127.0.0.1]:1", (), True),
        ("192.168.1.7:1", (), False),
        ("192.168.1.7:1", ("192.168.0.0/16",), True),
        ("10.0.0.1:1", ("192.168.0.0/16", "10.0.0.1"), True),
        ("[fd00::7]:1", ("fd00::/8",), True),
        ("[fe80::1%eth0]:1", ("fd00::/8",), False),
        ("8.8.8.8:1", ("192.168.0.0/16",), False),
    ],
)
def test_who_may_connect(peer: str, allow: tuple[str, ...], allowed: bool) -> None:
    assert server.is_allowed(peer, Wyoming(allow=allow)) is allowed


@pytest.mark.trio
async def test_a_relay_that_stops_says_so(tmp_path: Path) -> None:
    async with home(tmp_path) as on, wyoming_client(on.url) as client:
        await client.send("ping")
        await client.expect("pong")
        on.context.begin_shutdown()
        code, text = await client.refused()
        assert (code, text) == ("shutting_down", "the relay is shutting down; connect again in some seconds")
