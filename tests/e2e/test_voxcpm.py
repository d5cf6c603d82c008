"""VoxCPM speech with real processes and the real package, on a tiny checkpoint: relay, worker, slots, command line."""

import json
import os
import signal
import subprocess
import threading
import wave
from collections.abc import Callable, Iterator
from contextlib import closing
from hashlib import sha256
from pathlib import Path
from typing import Any

import attrs
import numpy as np
import pytest
import trio

from gpuworker.engines.voxcpm.crossfade import pcm16
from protocol import RequestError, RequestFailed, RequestRejected, open_relay
from protocol.wire.validators import Value
from tests.gpuworker.engines.voxcpm.conftest import encoded, voiced
from tests.gpuworker.engines.voxcpm.engine_runs import a_loaded, speech_of
from tests.support.processes import PATIENCE_S, Place, a_place, a_relay, a_worker, engines_of
from tests.support.voxcpm_checkpoint.checkpoint import quiet_voxcpm, write_checkpoint

STEP_SAMPLES = 7_680
#: With 1 timestep the tiny model's diffusion gives its noise back, whatever it was asked for.
QUICK = ("-p", "inference_timesteps=2", "-p", "retry_badcase_ratio_threshold=1")
QUICK_PARAMS: dict[str, Value] = {"inference_timesteps": 2, "retry_badcase_ratio_threshold": 1}
#: 220 tokens of the tiny tokenizer, in a context of 128.
LONG = "The quick brown fox jumps over the lazy dog. So it does. " * 2 + "今天天气很好。我们去公园散步吧。"
#: A lost worker has so long to come back before another one takes over what it streamed.
TWO_WORKERS = "[limits]\nworker_grace_s = 0.5\n[spaces.tts]\nmax_workers = 2\n"


def samples_of(path: Path) -> bytes:
    """The samples of a WAV as VoxCPM2 makes it."""
    with wave.open(str(path)) as wav:
        assert (wav.getnchannels(), wav.getsampwidth(), wav.getframerate()) == (1, 2, 48_000)
        return bytes(wav.readframes(wav.getnframes()))


@attrs.frozen
class Model:
    """A checkpoint, a folder of voices, the options of a worker that has both, and what plain voxcpm makes with it.

    `batched` is what the last of eight rows makes with it, beside nobody.
    """

    options: tuple[str, ...]
    voice: Path
    direct: Callable[..., bytes]
    batched: Callable[..., bytes]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    """A tiny VoxCPM2 that never stops by itself: a text of n tokens has n + 10 steps at ratio 1."""
    folder = tmp_path_factory.mktemp("voxcpm2")
    write_checkpoint(folder, "voxcpm2", context=128)
    voices = tmp_path_factory.mktemp("voices")
    (voices / "amy.wav").write_bytes(encoded(voiced(0.7)))
    (voices / "amy.txt").write_text("Ah ah.")
    loaded: list[Any] = []

    def direct(text: str, *, seed: int, streaming: bool = True, **more: Any) -> bytes:
        with quiet_voxcpm():
            import torch
            from voxcpm import VoxCPM

            torch.set_num_threads(1)
            if not loaded:
                loaded.append(VoxCPM.from_pretrained(str(folder), load_denoiser=False, optimize=False, device="cpu"))
            given = {"retry_badcase": not streaming, **QUICK_PARAMS, **more}
            torch.manual_seed(seed)
            if streaming:
                return b"".join(map(pcm16, loaded[0].generate_streaming(text, **given)))
            return pcm16(loaded[0].generate(text, **given))

    def batched(text: str, *, seed: int) -> bytes:
        import torch

        torch.set_num_threads(1)
        with closing(a_loaded(folder, "batch=8", "check_memory=false")) as engine:
            return speech_of(engine.seats(8)[-1], text, seed=seed, **QUICK_PARAMS)

    options = ("--engine", "voxcpm", "-o", f"model={folder}", "-o", "device=cpu", "-o", f"voices={voices}")
    return Model((*options, "-o", "offline=true", "-o", "check_memory=false"), voices / "amy.wav", direct, batched)


def quiet(place: Place) -> Place:
    """One thread a process: sums depend on their number, and the machine's cores are few."""
    return attrs.evolve(place, environ=place.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"})


@pytest.fixture(scope="module")
def served(model: Model, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    """A relay and a worker with one slot, for all tests that kill neither."""
    place = quiet(a_place(tmp_path_factory.mktemp("served")))

    def start(name: str, *args: str) -> "subprocess.Popen[str]":
        return subprocess.Popen(
            place.command(name, *args), stderr=subprocess.PIPE, env=place.environ, cwd=place.folder, text=True
        )

    with (
        start("relayd", "serve") as relay,
        start_after(relay, '"listening"', lambda: start("gpuworker", "run", *model.options)) as worker,
    ):
        try:
            until(relay, '"worker registered"')
            for process in (relay, worker):  # one that nobody listens to would block
                threading.Thread(target=process.stderr.read, daemon=True).start()  # type: ignore[union-attr]  # a pipe
            yield place
        finally:
            worker.kill()
            relay.kill()


def start_after(
    process: "subprocess.Popen[str]", words: str, start: Callable[[], "subprocess.Popen[str]"]
) -> "subprocess.Popen[str]":
    until(process, words)
    return start()


def until(process: "subprocess.Popen[str]", words: str) -> None:
    """Read what a process says up to a line with these words."""
    assert process.stderr is not None
    said = []
    for line in process.stderr:
        said.append(line)
        if words in line:
            return
    raise AssertionError("it never said that; it said:\n" + "".join(said))


async def say(place: Place, text: str, *args: str, output: str = "out.wav") -> bytes:
    """The samples of `relay say`."""
    await place.run("relay", "say", text, *QUICK, "-o", output, *args)
    return samples_of(place.folder / output)


# -- speech ------------------------------------------------------------------------------------------------------


@pytest.mark.trio
async def test_relay_say_gives_48_khz_speech_with_the_samples_of_plain_voxcpm(served: Place, model: Model) -> None:
    streamed = await say(served, "Hello world.", "-p", "seed=7")
    assert streamed == model.direct("Hello world.", seed=7)
    whole = await say(served, "Hello world.", "-p", "seed=7", "-p", "mode=non_streaming")
    assert whole == model.direct("Hello world.", seed=7, streaming=False)
    assert await say(served, "你好，世界。") == model.direct("你好，世界。", seed=0)


@pytest.mark.trio
async def test_the_space_lists_the_params_voices_and_inputs(served: Place) -> None:
    out, _ = await served.run("relay", "spaces", "--json")
    (space,) = json.loads(out)
    assert (space["engine"], space["format"]["sample_rate"]) == ("voxcpm", 48_000)
    assert space["params"]["properties"]["voice"]["enum"] == ["amy"]
    assert space["params"]["properties"]["inference_timesteps"]["maximum"] == 50
    assert set(space["inputs"]) == {"prompt_wav", "reference_wav", "text"}


@pytest.mark.trio
async def test_audio_is_on_its_way_while_the_rest_is_made(served: Place) -> None:
    args = ("say", LONG, *QUICK, "-o", "stream.wav", "--json")
    async with served.start("relay", *args) as client:
        await client.audio_chunks(1)
        out, _ = await served.run("relayd", "requests", "--json")
        assert [row["state"] for row in json.loads(out) if row["state"] not in ("completed", "failed")] == ["running"]
        client.send_signal(signal.SIGINT)
        assert await client.ended() == 130


@pytest.mark.trio
async def test_voices_come_as_inputs_and_by_name(served: Place, model: Model, tmp_path: Path) -> None:
    path = str(model.voice)
    cloned = await say(served, "Cloned.", "--input", f"reference_wav={path}")
    assert cloned == model.direct("Cloned.", seed=0, reference_wav_path=path)
    goes_on = await say(served, "On.", "--input", f"prompt_wav={path}", "-p", "prompt_text=Ah ah.")
    assert goes_on == model.direct("On.", seed=0, prompt_wav_path=path, prompt_text="Ah ah.")
    both = model.direct("By name.", seed=0, prompt_wav_path=path, prompt_text="Ah ah.", reference_wav_path=path)
    assert await say(served, "By name.", "-p", "voice=amy") == both
    flac = tmp_path / "same.flac"
    flac.write_bytes(encoded(voiced(0.7), container="FLAC"))
    from_flac = await say(served, "Cloned.", "--input", f"reference_wav={flac}")
    assert from_flac == model.direct("Cloned.", seed=0, reference_wav_path=str(flac))


@pytest.mark.trio
async def test_a_long_text_is_one_request_and_one_stream(served: Place) -> None:
    samples = np.frombuffer(await say(served, LONG), "<i2").astype(int)
    edges = np.flatnonzero(np.diff((samples == 0).astype(int), prepend=0, append=0)).reshape(-1, 2)
    pauses = [(start, stop) for start, stop in edges if stop - start >= 7_200]
    assert len(pauses) >= 4
    for start, stop in pauses:
        assert max(np.abs(np.diff(samples[start - 48 : start + 1])).max(), abs(samples[stop : stop + 12]).max()) < 400


# -- faults ------------------------------------------------------------------------------------------------------

REFUSED_BY_THE_RELAY: dict[str, dict[str, Value]] = {
    "text": {"text": ""},
    "cfg_value": {"cfg_value": 0.05},
    "inference_timesteps": {"inference_timesteps": 51},
    "normalize": {"normalize": "yes"},
    "denoise": {"denoise": True},
    "retry_badcase": {"retry_badcase": 1},
    "retry_badcase_max_times": {"retry_badcase_max_times": 11},
    "retry_badcase_ratio_threshold": {"retry_badcase_ratio_threshold": 21},
    "mode": {"mode": "both"},
    "seed": {"seed": 2**32},
    "voice": {"voice": "nobody"},
    "prompt_text": {"prompt_text": ""},
    "prompt_wav_url": {"prompt_wav_url": "https://a.example/b.wav"},
    "reference_wav_url": {"reference_wav_url": "https://a.example/b.wav"},
    "voice_description": {"voice_description": "x" * 301},
    "prompt_wav": {"prompt_wav": "a.wav"},
}


async def refusal(place: Place, params: dict[str, Value], inputs: Any = None) -> RequestError:
    """How a request ended that is not to be spoken."""
    given = {"text": "hi", **QUICK_PARAMS, **params}
    with trio.fail_after(PATIENCE_S), pytest.raises((RequestRejected, RequestFailed)) as caught:
        async with (
            open_relay(f"unix:{place.folder}/state/relayd.sock", token="") as relay,
            relay.submit("tts", given, inputs=inputs) as stream,
        ):
            await stream.result()
    return caught.value


@pytest.mark.trio
async def test_each_param_fault_is_refused_by_the_relay_by_its_field_before_it_is_queued(served: Place) -> None:
    before, _ = await served.run("relayd", "requests", "--json")
    for field, params in REFUSED_BY_THE_RELAY.items():
        fault = await refusal(served, params)
        assert isinstance(fault, RequestRejected), field
        assert (fault.code, set(fault.details)) == ("invalid_params", {field})
    fault = await refusal(
        served, {name: value for each in REFUSED_BY_THE_RELAY.values() for name, value in each.items()}
    )
    assert set(fault.details) == set(REFUSED_BY_THE_RELAY)
    assert "without a denoiser" in str(fault.details["denoise"])
    fault = await refusal(served, {}, {"voice_wav": b"x"})
    assert (fault.code, set(fault.details)) == ("invalid_params", {"inputs.voice_wav"})
    fault = await refusal(served, {}, {"prompt_wav": bytes(16 * 1024 * 1024 + 1)})
    assert (fault.code, type(fault)) == ("input_too_large", RequestRejected)
    after, _ = await served.run("relayd", "requests", "--json")
    assert [row["request_id"] for row in json.loads(after)] == [row["request_id"] for row in json.loads(before)]


@pytest.mark.trio
async def test_bad_audio_and_params_that_do_not_go_together_fail_by_their_field(served: Place) -> None:
    fault = await refusal(served, {}, {"reference_wav": b"this is no audio at all"})
    assert (fault.code, set(fault.details), fault.retryable) == ("invalid_params", {"reference_wav"}, False)
    assert "is not audio that can be read" in str(fault.details["reference_wav"])
    fault = await refusal(served, {"prompt_text": "Ah.", "voice": "amy"})
    assert (fault.code, set(fault.details)) == ("invalid_params", {"prompt_wav", "voice"})
    (served.folder / "no.wav").write_bytes(b"RIFF")
    args = ("say", "hi", "--input", "prompt_wav=no.wav", "-p", "prompt_text=Ah.", "-o", "never.wav")
    _, said = await served.run("relay", *args, code=1)
    assert "prompt_wav is not audio" in said or "prompt_wav: is not audio" in said


# -- one slot ----------------------------------------------------------------------------------------------------


@pytest.mark.trio
async def test_a_cancel_in_mid_stream_frees_the_slot_and_the_next_request_is_right(served: Place, model: Model) -> None:
    cut = ("say", LONG, *QUICK, "-o", "cut.wav", "--json")
    async with served.start("relay", *cut) as client:
        await client.audio_chunks(5)
        client.send_signal(signal.SIGINT)
        assert await client.ended() == 130
    assert await say(served, "Right.", "-p", "seed=3") == model.direct("Right.", seed=3)
    assert 0 < len(samples_of(served.folder / "cut.wav")) // 2 // STEP_SAMPLES < 100


@pytest.mark.trio
async def test_requests_at_once_on_one_slot_never_overlap(served: Place, model: Model) -> None:
    texts = ("The first of them.", "第二个。", "And a third.")
    made: dict[str, bytes] = {}

    async def ask(number: int, text: str) -> None:
        made[text] = await say(served, text, "-p", f"seed={number}", output=f"{number}.wav")

    async with trio.open_nursery() as nursery:
        for number, text in enumerate(texts):
            nursery.start_soon(ask, number, text)
    for number, text in enumerate(texts):
        assert made[text] == model.direct(text, seed=number)


# -- what is killed ----------------------------------------------------------------------------------------------


@pytest.mark.trio
async def test_a_slot_and_then_a_worker_killed_in_mid_stream_cost_a_pause_and_no_sample(
    model: Model, tmp_path: Path
) -> None:
    place = quiet(a_place(tmp_path, TWO_WORKERS))
    text = LONG[:80]  # two pieces and more: what is made again goes on from its first one, too
    async with a_relay(place) as relay, a_worker(place, relay, *model.options, "--name", "a") as first:
        workers = {(await relay.event("worker registered"))["worker"]: first}
        heard = len(relay.lines)
        whole = await say(place, text, "-p", "seed=1", output="whole.wav")
        async with a_worker(place, relay, *model.options, "--name", "b") as second:
            workers[(await relay.event("worker registered", after=heard))["worker"]] = second
            for cut in ("slot", "worker"):
                heard = len(relay.lines)
                say_it = ("say", text, *QUICK, "-p", "seed=1", "-o", f"{cut}.wav", "--json")
                async with place.start("relay", *say_it) as client:
                    proc = workers[(await relay.event("request started", after=heard))["worker"]]
                    await client.audio_chunks(5)
                    if cut == "slot":
                        (slot,) = engines_of(proc)
                        os.kill(slot, signal.SIGKILL)
                    else:
                        proc.send_signal(signal.SIGKILL)
                    await client.audio_chunks(None)
                    assert await client.ended() == 0, client.lines
                assert sha256(samples_of(tmp_path / f"{cut}.wav")).digest() == sha256(whole).digest()
                attempts = [
                    json.loads(line).get("attempt") for line in relay.lines[heard:] if "request started" in line
                ]
                assert attempts == [1, 2]


# -- a batch -----------------------------------------------------------------------------------------------------


async def eight_listen(place: Place, at_all_speaking: Callable[[], None]) -> list[str]:
    """The digests of what eight clients hear at once, of equal texts with different seeds."""
    made: dict[int, bytes] = dict.fromkeys(range(8), b"")

    async def listen(seed: int) -> None:
        params: dict[str, Value] = {"text": LONG[:60], "seed": seed, **QUICK_PARAMS}
        async with (
            open_relay(f"unix:{place.folder}/state/relayd.sock", token="") as relay,
            relay.submit("tts", params) as stream,
        ):
            async for chunk in stream.audio():
                speak_before = all(made.values())
                made[seed] += chunk
                if all(made.values()) and not speak_before:
                    at_all_speaking()

    with trio.fail_after(2 * PATIENCE_S):
        async with trio.open_nursery() as nursery:
            for seed in made:
                nursery.start_soon(listen, seed)
    return [sha256(samples).hexdigest() for samples in made.values()]


@pytest.mark.trio
async def test_eight_listeners_of_one_batch_hear_what_each_hears_alone_and_a_killed_engine_costs_no_sample(
    model: Model, tmp_path: Path
) -> None:
    place = quiet(a_place(tmp_path))
    async with a_relay(place) as relay, a_worker(place, relay, *model.options, "-o", "batch=8") as worker:
        out, _ = await place.run("relay", "spaces", "--json")
        assert json.loads(out)[0]["slots"] == 8
        alone = await say(place, LONG[:60], "-p", "seed=7")
        assert alone == model.batched(LONG[:60], seed=7)
        undisturbed = await eight_listen(place, lambda: None)
        assert undisturbed[7] == sha256(alone).hexdigest()
        assert len(set(undisturbed)) == 8
        (engine,) = engines_of(worker)
        disturbed = await eight_listen(place, lambda: os.kill(engine, signal.SIGKILL))
        assert engines_of(worker) != [engine]
        assert disturbed == undisturbed
