"""The official `openai` package, unchanged, against a relay and a worker as a user starts them."""

import hashlib
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import openai
import pytest
import trio

from protocol.audio.encoder import CODINGS
from protocol.wire.structs import AudioFormat
from tests.support.audio_compare import decoded, energy_likeness, of_pcm, spectral_likeness
from tests.support.processes import Place, Proc, a_place, a_relay, a_worker

TEXT = "The relay sends what is spoken while it is being made, and nobody waits for the whole of it."
ESPEAK = AudioFormat(sample_rate=22_050)
EXAMPLE = Path(__file__).parents[2] / "docs" / "examples" / "openai.mjs"
NODE = shutil.which("node")


async def client_of(place: Place, relay: Proc) -> openai.OpenAI:
    """As a user would make it: with the URL that the relay logs, and a token."""
    told = await relay.event("listening")
    token, _ = await place.run("relayd", "token", "create", "--role", "client", "--name", "reader")
    return openai.OpenAI(base_url=told["openai_base_url"], api_key=token.decode().strip(), max_retries=0, timeout=30)


def speak(client: openai.OpenAI, **fields: Any) -> bytes:
    """The whole answer at once."""
    return client.audio.speech.create(**({"model": "tts", "voice": "en-us", "input": TEXT} | fields)).read()


@pytest.mark.trio
async def test_the_openai_package_hears_espeak_in_every_format(tmp_path: Path) -> None:
    place = a_place(tmp_path)
    async with a_relay(place) as relay, a_worker(place, relay, "--engine", "espeak"):
        with await client_of(place, relay) as client:
            said: dict[str, bytes] = {}
            for coding in CODINGS:
                asked = partial(speak, client, response_format=coding)
                said[coding] = await trio.to_thread.run_sync(asked)
            spoken = of_pcm(said["wav"][44:], ESPEAK)
            fast = await trio.to_thread.run_sync(partial(speak, client, speed=2, response_format="wav"))
    assert 3 < spoken.duration_s < 10
    for coding, body in said.items():
        heard = decoded(body, coding)
        assert heard.duration_s == pytest.approx(spoken.duration_s, abs=0.2), coding
        assert energy_likeness(spoken, heard) > 0.9, coding
        assert spectral_likeness(spoken, heard) > 0.9, coding
    heard = decoded(fast, "wav")
    assert heard.duration_s == pytest.approx(spoken.duration_s / 2, abs=0.1)
    assert spectral_likeness(spoken, heard) > 0.9


@pytest.mark.trio
async def test_the_openai_package_hears_the_beginning_while_the_rest_is_made(tmp_path: Path) -> None:
    """The mock would take half a minute for all of it; who has heard enough hangs up, and it is cancelled."""
    place = a_place(tmp_path)
    async with a_relay(place) as relay, a_worker(place, relay, "--engine", "mock", "-o", "speed=0.1"):

        def hear_the_beginning() -> bytes:
            create = client.audio.speech.with_streaming_response.create
            with create(model="tts", voice="default", input=TEXT) as response:
                first = next(response.iter_bytes())
                assert not any('"request completed"' in line for line in relay.lines)
            return first

        with await client_of(place, relay) as client:
            assert await trio.to_thread.run_sync(hear_the_beginning)
        await relay.event("request cancelled")


@pytest.mark.trio
async def test_the_openai_package_hears_events(tmp_path: Path) -> None:
    place = a_place(tmp_path)
    async with a_relay(place) as relay, a_worker(place, relay, "--engine", "espeak"):
        with await client_of(place, relay) as client:
            body = await trio.to_thread.run_sync(partial(speak, client, stream_format="sse"))
    assert body.count(b'"speech.audio.delta"') > 10
    assert body.rstrip().rpartition(b"data: ")[2].startswith(b'{"type": "speech.audio.done", "usage": {')


@pytest.mark.trio
async def test_the_openai_packages_speak_with_their_own_names_and_a_seed_is_the_spaces_own(tmp_path: Path) -> None:
    """Python's and npm's; and what the space declares beside is sent on: the same samples as `relay say` gets."""
    assert NODE is not None, "there is no `node` on PATH; `make test` puts one into .venv/bin"
    place = a_place(tmp_path)
    async with a_relay(place) as relay, a_worker(place, relay, "--engine", "mock", "-o", "speed=0"):
        with await client_of(place, relay) as client:
            for names in ({"model": "tts-1", "voice": "alloy"}, {"model": "gpt-4o-mini-tts", "voice": "marin"}):
                asked = partial(speak, client, **names, instructions="Speak in a cheerful tone.")
                assert decoded(await trio.to_thread.run_sync(asked), "mp3").duration_s > 2
            seeded = partial(speak, client, response_format="pcm", voice="alloy", extra_body={"seed": 7})
            heard = await trio.to_thread.run_sync(seeded)
            url, key = str(client.base_url), client.api_key
            with pytest.raises(openai.UnprocessableEntityError) as refused:
                await trio.to_thread.run_sync(partial(speak, client, extra_body={"seed": "x"}))
            assert refused.value.param == "seed"
        await place.run("relay", "say", TEXT, "-p", "seed=7", "-o", "said.pcm")
        said = (place.folder / "said.pcm").read_bytes()
        environ = place.environ | {"OPENAI_BASE_URL": url, "OPENAI_API_KEY": key}
        command = [NODE, str(EXAMPLE), "Hello.", str(tmp_path / "out.mp3")]
        done = await trio.run_process(command, env=environ, capture_stdout=True)
    assert hashlib.sha256(heard).digest() == hashlib.sha256(said).digest()
    assert done.stdout == b"spoken by tts with voice default\n"
    assert decoded((tmp_path / "out.mp3").read_bytes(), "mp3").duration_s > 2
