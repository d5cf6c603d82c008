"""A relay whose worker asks a speech server, which is a second relay: as a user would start them."""

import json
import signal
import wave
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path

import attrs
import openai
import pytest
import trio

from protocol import RelayClient, open_relay
from protocol.wire.structs import AudioFormat
from tests.gpuworker.engines.openai.speech_server import PCM, Places, SpeechServer
from tests.support.processes import PATIENCE_S, Place, Proc, a_place, a_relay, a_worker, engines_of


@attrs.frozen
class Server:
    """The second relay: a speech server to the first."""

    place: Place
    relay: Proc
    url: str
    key_file: Path

    @property
    def options(self) -> list[str]:
        """What a worker in front of it is given."""
        return ["--engine", "openai", "-o", f"url={self.url}", "-o", f"api_key_file={self.key_file}"]

    async def pcm(self, text: str) -> bytes:
        """What it says if it is asked directly."""
        return await pcm_of(self.url, self.key_file.read_text(), "voices", text)


async def pcm_of(url: str, key: str, model: str, text: str) -> bytes:
    """What a relay says to the openai package."""
    with openai.OpenAI(base_url=url, api_key=key.strip(), max_retries=0, timeout=PATIENCE_S) as client:
        create = client.audio.speech.create
        ask = partial(create, model=model, voice="default", input=text, response_format="pcm")
        body: bytes = (await trio.to_thread.run_sync(ask)).read()
        return body


async def a_key(place: Place) -> str:
    token, _ = await place.run("relayd", "token", "create", "--role", "client", "--name", "reader")
    return token.decode()


@asynccontextmanager
async def a_speech_server(folder: Path, *worker: str) -> AsyncIterator[Server]:
    place = a_place(folder, "[spaces.voices]\n")
    mock = ("--engine", "mock", "--space", "voices", *worker)
    async with a_relay(place) as relay, a_worker(place, relay, *mock):
        url = (await relay.event("listening"))["openai_base_url"]
        key_file = folder / "key"
        key_file.write_text(await a_key(place))
        yield Server(place, relay, url, key_file)


def samples(path: Path) -> bytes:
    with wave.open(str(path)) as wav:
        assert (wav.getframerate(), wav.getnchannels(), wav.getsampwidth()) == (24_000, 1, 2)
        return bytes(wav.readframes(wav.getnframes()))


@pytest.fixture
def second(tmp_path: Path) -> Path:
    """The folder of the second relay."""
    folder = tmp_path / "second"
    folder.mkdir()
    return folder


@pytest.mark.trio
async def test_a_chain_of_two_relays_says_what_the_second_says_alone(tmp_path: Path, second: Path) -> None:
    text = "Whoever has a speech server has a queue in front of it now."
    place = a_place(tmp_path)
    async with a_speech_server(second, "-o", "speed=50") as server, a_relay(place) as relay:
        found, _ = await place.run("gpuworker", "doctor", *server.options)
        assert b"answers; models: voices; voices: default" in found
        async with a_worker(place, relay, *server.options):
            await place.run("relay", "say", text, "-o", "chained.wav")
            alone = await server.pcm(text)
            assert samples(tmp_path / "chained.wav") == alone
            assert len(alone) > 100_000
            url = (await relay.event("listening"))["openai_base_url"]
            assert await pcm_of(url, await a_key(place), "tts", text) == alone  # the space is a model itself


@pytest.mark.trio
async def test_a_cancel_goes_through_to_the_second_relay(tmp_path: Path, second: Path) -> None:
    place = a_place(tmp_path)
    async with (
        a_speech_server(second, "-o", "speed=1") as server,
        a_relay(place) as relay,
        a_worker(place, relay, *server.options) as worker,
    ):
        async with place.start("relay", "say", "x" * 300, "-o", "cut.wav", "--json") as client:
            await client.audio_chunks(1)
            client.send_signal(signal.SIGINT)
            assert await client.ended() == 130
        await server.relay.event("request cancelled")
        assert not any("killed" in line for line in worker.lines)


@pytest.mark.trio
async def test_a_server_killed_in_mid_stream_is_told_and_the_next_one_is_waited_for(
    tmp_path: Path, second: Path
) -> None:
    place = a_place(tmp_path)
    async with (
        a_relay(place) as relay,
        a_speech_server(second, "-o", "speed=1") as server,
        a_worker(place, relay, *server.options, "-o", "wait_s=0") as worker,
    ):
        async with place.start("relay", "say", "x" * 300, "-o", "cut.wav", "--json") as client:
            await client.audio_chunks(1)
            server.relay.send_signal(signal.SIGKILL)
            assert await client.ended() == 1
        assert "lost in mid-stream" in json.dumps(await relay.event("request failed"))
        # The next request finds nobody there: the slot leaves, and comes back with the server.
        async with place.start("relay", "say", "Later.", "-o", "later.wav") as client:
            await worker.until(lambda line: "cannot be loaded" in line)
            address = server.url.removeprefix("http://").partition("/")[0]
            async with a_relay(server.place, "--listen", address):
                assert await client.ended() == 0
                assert samples(tmp_path / "later.wav") == await server.pcm("Later.")


@pytest.mark.trio
async def test_sixteen_slots_before_a_server_with_four_places_all_end_well(tmp_path: Path) -> None:
    place = a_place(tmp_path)
    heard: dict[int, bytes] = {}

    async def say(client: RelayClient, number: int) -> None:
        async with client.submit("tts", {"text": f"Sentence {number}"}) as stream:
            heard[number] = b"".join([pcm async for pcm in stream.audio()])
            assert stream.format == AudioFormat(sample_rate=48_000)  # as the answer says, not as was expected

    with SpeechServer(places := Places(4)) as server:
        options = ("--engine", "openai", "-o", f"url={server.url}", "--slots", "16")
        async with a_relay(place) as relay, a_worker(place, relay, *options) as worker:
            await worker.until(lambda line: "slots 0-15: openai loaded in" in line)
            assert len(engines_of(worker)) == 1, "one process for all slots"
            with trio.fail_after(PATIENCE_S):
                async with (
                    open_relay(f"unix:{tmp_path}/state/relayd.sock", token="") as client,
                    trio.open_nursery() as nursery,
                ):
                    for number in range(16):
                        nursery.start_soon(say, client, number)
    assert places.refused.is_set()
    assert heard == dict.fromkeys(range(16), PCM)
