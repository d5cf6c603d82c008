"""Engine `indextts2` on a class of upstream's signature (`indextts_stand_in.py`); upstream itself is on no registry."""

import array
import importlib
import io
import json
import logging
import math
import os
import re
import shutil
import signal
import struct
import sys
import wave
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import attrs
import numpy as np
import pytest
import trio

from gpuworker.engines.base import (
    AudioChunk,
    Chunk,
    EngineError,
    EngineInput,
    FormatChunk,
    LiveInput,
    MarkChunk,
    ProgressChunk,
)
from gpuworker.engines.indextts2.engine import CHUNK_BYTES, IndexTTS2Engine
from gpuworker.engines.indextts2.params import EMOTIONS
from gpuworker.slots.process_slot import EngineHost, ProcessSlot
from gpuworker.slots.run_engine import RunResult, run_engine
from gpuworker.slots.slot import Job
from protocol.wire.params_schema import check_schema
from protocol.wire.structs import AudioFormat
from protocol.wire.validators import Value
from tests.support.processes import Place, a_place, a_relay, a_worker

DOCS = Path(__file__).parents[3] / "docs"
STAND_IN = Path(__file__).with_name("indextts_stand_in.py")
#: A slot imports torch: 2 to 10 s.
PATIENCE_S = 90
RATE = 22_050
WORD_SAMPLES = int(0.05 * RATE)


def recording(loud: float = 0.5, *, seconds: float = 1.0, rate: int = 16_000) -> bytes:
    """A WAV of a tone whose loudest sample is `loud`."""
    file = io.BytesIO()
    with wave.open(file, "wb") as wav:
        wav.setnchannels(1)
        wav.setsampwidth(2)
        wav.setframerate(rate)
        tone = (round(32_767 * loud * math.sin(math.tau * 200 * n / rate)) for n in range(int(seconds * rate)))
        wav.writeframes(b"".join(struct.pack("<h", sample) for sample in tone))
    return file.getvalue()


def said(loud: float = 0.5, **more: float) -> EngineInput:
    return EngineInput(recording(loud, **more))  # type: ignore[arg-type]  # seconds and rate


@attrs.frozen
class Upstream:
    """The stand-in, installed in a folder that is on the path of this process and of those it starts."""

    folder: Path
    calls: Path

    def called(self, what: str) -> list[dict[str, Any]]:
        """What it was called with, in turn."""
        told = self.calls.read_text().splitlines() if self.calls.exists() else []
        return [call for call in map(json.loads, told) if call["what"] == what]

    def model(self, version: str = "2") -> Any:
        """One in this process."""
        name = {"2": "indextts.infer_v2", "2.5": "indextts.infer_v2_5"}[version]
        return importlib.import_module(name).IndexTTS2(str(self.folder / "checkpoints" / "config.yaml"))


@pytest.fixture
def upstream(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Upstream:
    package = tmp_path / "upstream" / "indextts"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    shutil.copy(STAND_IN, package / "infer_v2.py")
    (package / "infer_v2_5.py").write_text("from indextts.infer_v2 import IndexTTS25 as IndexTTS2\n")
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "config.yaml").write_text("version: 2.0\n")
    calls = tmp_path / "calls"
    monkeypatch.setenv("STAND_IN_CALLS", str(calls))
    monkeypatch.setenv("PYTHONPATH", str(package.parent), prepend=":")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.syspath_prepend(str(package.parent))
    for name in ("indextts", "indextts.infer_v2", "indextts.infer_v2_5"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.chdir(tmp_path)
    return Upstream(tmp_path, calls)


@pytest.fixture
def engine(upstream: Upstream) -> Iterator[IndexTTS2Engine]:
    made = IndexTTS2Engine()
    made.load()
    yield made
    made.close()


def run(
    engine: IndexTTS2Engine,
    params: dict[str, Value],
    inputs: Mapping[str, EngineInput] | None = None,
    cancelled: Callable[[], bool] = lambda: False,
) -> tuple[RunResult, list[Chunk]]:
    chunks: list[Chunk] = []
    given = {"spk_audio_prompt": said()} if inputs is None else inputs
    return run_engine(engine, params, given, cancelled, chunks.append), chunks


def pcm(chunks: list[Chunk]) -> bytes:
    return b"".join(chunk.pcm for chunk in chunks if isinstance(chunk, AudioChunk))


def samples(chunks: list[Chunk]) -> "np.ndarray[Any, np.dtype[np.int16]]":
    return np.frombuffer(pcm(chunks), "<i2")


# -- what is made ------------------------------------------------------------------------------------------------


def test_streamed_segments_and_silences_are_the_samples_that_upstream_returns_whole(
    engine: IndexTTS2Engine, upstream: Upstream
) -> None:
    end, chunks = run(engine, {"text": "One two three. Four five. Six.", "interval_silence": 100, "seed": 7})
    assert end == RunResult(outcome="completed")
    assert chunks[0] == FormatChunk(AudioFormat(sample_rate=RATE))
    engine._model.cache_spk_audio_prompt = None
    with engine._file("spk_audio_prompt", recording(), RATE) as path:
        importlib.import_module("torch").manual_seed(7)
        rate, whole = engine._model.infer(str(path), "One two three. Four five. Six.", None, interval_silence=100)
    assert rate == RATE
    assert np.array_equal(samples(chunks), whole.reshape(-1))
    assert len(whole) == 6 * WORD_SAMPLES + 2 * 2_205


def test_a_text_that_comes_is_spoken_in_pieces_with_the_silence_of_segments_between_them(
    engine: IndexTTS2Engine,
) -> None:
    live = LiveInput("text/plain")
    for part in ("One two three fo", "ur. Five si", "x seven eight."):
        live.feed(part.encode())
    live.feed(b"", last=True)
    inputs = {"spk_audio_prompt": said(), "text": live}
    chunks: list[Chunk] = []
    end = run_engine(engine, {"interval_silence": 100, "seed": 7}, inputs, lambda: False, chunks.append)
    assert end == RunResult(outcome="completed")
    first, second = (
        pcm(run(engine, {"text": text, "seed": 7})[1]) for text in ("One two three four.", "Five six seven eight.")
    )
    assert pcm(chunks) == first + bytes(2 * 2_205) + second
    assert [chunk for chunk in chunks if isinstance(chunk, MarkChunk)] == [
        MarkChunk(19, len(first) // 2),
        MarkChunk(41, len(pcm(chunks)) // 2),
    ]


def test_no_silence_long_segments_and_progress(engine: IndexTTS2Engine) -> None:
    end, chunks = run(engine, {"text": "word " * 50 + ". end", "interval_silence": 0})
    assert end.outcome == "completed"
    assert len(samples(chunks)) == 51 * WORD_SAMPLES  # the list that upstream yields for a silence is none
    assert max(len(chunk.pcm) for chunk in chunks if isinstance(chunk, AudioChunk)) == CHUNK_BYTES
    told = [chunk for chunk in chunks if isinstance(chunk, ProgressChunk)]
    assert told[0].message == "starting inference..."
    assert len([one for one in told if one.message == "speech synthesis 1"]) > 9  # and every 50 steps
    assert engine._model.gr_progress is None
    assert not engine._model.gpt.inference_model._forward_pre_hooks


def test_each_recording_is_heard_and_the_same_one_only_once(engine: IndexTTS2Engine, upstream: Upstream) -> None:
    for loud in (0.25, 0.75, 0.75, 0.25):
        _, chunks = run(engine, {"text": "loud"}, {"spk_audio_prompt": said(loud)})
        assert samples(chunks).max() / 32_767 == pytest.approx(loud, abs=0.02)
    heard = upstream.called("heard")
    assert [call["rate"] for call in heard] == [RATE] * 3
    assert heard[0]["seconds"] == pytest.approx(1.0)
    assert engine._folder is not None
    assert list(engine._folder.iterdir()) == []  # no recording is left behind


def test_the_same_seed_says_the_same_and_another_says_it_another_way(engine: IndexTTS2Engine) -> None:
    first, second, other = (run(engine, {"text": "again", "seed": seed})[1] for seed in (3, 3, 4))
    assert pcm(first) == pcm(second) != pcm(other)
    assert pcm(run(engine, {"text": "again"})[1]) == pcm(run(engine, {"text": "again", "seed": 0})[1])
    assert not engine.capabilities.reproducible  # it was never seen to be, on the real one


def test_upstream_gets_every_param_by_its_name_and_its_own_defaults(
    engine: IndexTTS2Engine, upstream: Upstream
) -> None:
    run(engine, {"text": "plain"})
    given: dict[str, Value] = {
        "emo_alpha": 0.6,
        "emo_vector": [0.0, 0.0, 0.8, 0.0, 0.0, 0.0, 0.0, 0.25],
        "use_random": True,
        "interval_silence": 0,
        "max_text_tokens_per_segment": 80,
        "temperature": 1.0,
        "top_p": 0.5,
        "top_k": 0,
        "num_beams": 1,
        "repetition_penalty": 2.0,
        "length_penalty": -1.0,
        "max_mel_tokens": 600,
    }
    assert len(EMOTIONS) == len(given["emo_vector"])
    run(engine, {"text": "rich", **given})
    run(engine, {"text": "moved", "use_emo_text": True, "emo_text": "I am afraid"})
    run(engine, {"text": "moved"}, {"spk_audio_prompt": said(), "emo_audio_prompt": said(0.4, seconds=2)})
    plain, rich, by_text, by_audio = upstream.called("infer")
    defaults = {"temperature": 0.8, "top_p": 0.8, "top_k": 30, "num_beams": 3, "repetition_penalty": 10.0}
    defaults |= {"length_penalty": 0.0, "max_mel_tokens": 1_500, "max_text_tokens_per_segment": 120, "emo_alpha": 1.0}
    assert defaults.items() <= plain.items()
    assert (plain["output_path"], plain["emo_vector"], plain["stream_return"]) == (None, None, True)
    sent = {**given, "emo_vector": [0.0, 0.0, 0.4, 0.0, 0.0, 0.0, 0.0, 0.125], "top_k": None}  # as the WebUI sends them
    assert sent.items() <= rich.items()
    assert (by_text["use_emo_text"], by_text["emo_text"], by_text["emo_vector"]) == (True, "I am afraid", None)
    assert by_audio["emo_audio_prompt"].endswith("-16000.wav")
    assert upstream.called("heard")[-1]["rate"] == 16_000


def test_version_2_5_is_told_the_language_and_needs_no_model_of_emotions(upstream: Upstream) -> None:
    engine = IndexTTS2Engine({"version": "2.5", "half": True, "emo_text": False})
    engine.load()
    assert upstream.called("make 2.5") == [{"what": "make 2.5", "use_bf16": True, "use_qwen_emo": False}]
    schema = engine.capabilities.params
    assert schema["required"] == ["text", "lang"]
    assert "use_emo_text" not in schema["properties"]
    end, chunks = run(engine, {"text": "Hola.", "lang": "ES", "duration_factor": 1.5})
    assert (end.outcome, len(samples(chunks))) == ("completed", WORD_SAMPLES)
    assert upstream.called("infer 2.5") == [{"what": "infer 2.5", "lang": "ES", "duration_factor": 1.5}]
    engine.close()


def test_a_release_that_does_not_stream_is_heard_as_a_whole(upstream: Upstream) -> None:
    model = upstream.model()

    class Early:
        gr_progress = None

        def infer(self, spk_audio_prompt: str, text: str, output_path: None, interval_silence: int, **more: Any) -> Any:
            return model.infer(spk_audio_prompt, text, output_path, interval_silence=interval_silence)

    class Speech(IndexTTS2Engine):
        MODEL = Early()

    engine = Speech()
    engine.load()
    end, chunks = run(engine, {"text": "One. Two.", "interval_silence": 1_000})
    assert (end.outcome, len(samples(chunks))) == ("completed", 2 * WORD_SAMPLES + RATE)
    engine.close()


# -- what is refused ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("params", "inputs", "field", "words"),
    [
        ({"text": " \n"}, {}, "text", "nothing to speak"),
        ({"text": "…!"}, {}, "text", "nothing to speak"),
        ({"emo_text": "sad"}, {}, "emo_text", "use_emo_text"),
        ({"emo_vector": [0.1] * 8, "use_emo_text": True}, {}, "emo_vector", "one of them"),
        ({"emo_vector": [0.1] * 8}, {"emo_audio_prompt": said()}, "emo_audio_prompt", "one of them"),
        ({}, {"spk_audio_prompt": EngineInput(b"no audio at all")}, "spk_audio_prompt", "WAV, FLAC, MP3, OGG"),
        ({}, {"spk_audio_prompt": said(0.0)}, "spk_audio_prompt", "silent"),
        ({}, {"spk_audio_prompt": said(seconds=61)}, "spk_audio_prompt", "60 s"),
        ({}, {"emo_audio_prompt": said(seconds=0.05)}, "emo_audio_prompt", "at least"),
    ],
)
def test_what_upstream_would_pass_over_or_choke_on_is_refused_by_field(
    engine: IndexTTS2Engine, params: dict[str, Value], inputs: dict[str, EngineInput], field: str, words: str
) -> None:
    end, chunks = run(engine, {"text": "hi", **params}, {"spk_audio_prompt": said(), **inputs})
    assert (end.outcome, end.code, list(end.details)) == ("failed", "invalid_params", [field])
    assert words in str(end.details[field])
    assert pcm(chunks) == b""
    assert run(engine, {"text": "hi"})[0].outcome == "completed"


def test_a_request_without_a_recording_or_a_voice_says_which_input_is_missing(engine: IndexTTS2Engine) -> None:
    end, _ = run(engine, {"text": "hi"}, {})
    assert (end.code, list(end.details)) == ("input_missing", ["spk_audio_prompt"])
    assert engine.capabilities.inputs["spk_audio_prompt"].required
    check_schema(engine.capabilities.params)


def test_named_voices_speak_without_an_upload_and_not_beside_one(upstream: Upstream) -> None:
    folder = upstream.folder / "voices"
    folder.mkdir()
    (folder / "soft.wav").write_bytes(recording(0.2))
    (folder / "loud.wav").write_bytes(recording(0.8))
    engine = IndexTTS2Engine({"voices": str(folder)})
    engine.load()
    assert engine.capabilities.params["properties"]["voice"]["enum"] == ["loud", "soft"]
    assert not engine.capabilities.inputs["spk_audio_prompt"].required
    for name, loud in (("soft", 0.2), ("loud", 0.8)):
        _, chunks = run(engine, {"text": "hi", "voice": name}, {})
        assert samples(chunks).max() / 32_767 == pytest.approx(loud, abs=0.02)
    end, _ = run(engine, {"text": "hi", "voice": "soft"})
    assert list(end.details) == ["voice"]
    engine.close()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"model_dir": "nowhere"}, "hf download IndexTeam/IndexTTS-2 --local-dir=nowhere"),
        ({"model_dir": "broken"}, "loading state_dict"),
        ({"voices": "empty"}, "contains no voice"),
    ],
)
def test_what_cannot_be_loaded_says_what_to_do(upstream: Upstream, options: dict[str, Any], words: str) -> None:
    (upstream.folder / "empty").mkdir()
    (upstream.folder / "broken").mkdir()
    (upstream.folder / "broken" / "config.yaml").write_text("broken")
    with pytest.raises(EngineError, match=words):
        IndexTTS2Engine(options).load()


# -- cancels and faults, in a real slot process ------------------------------------------------------------------


@asynccontextmanager
async def a_slot(cancel_grace_s: float = 60) -> AsyncIterator[Callable[..., Any]]:
    """A slot process of the engine: called with a text it speaks it, until `stop` says so of a chunk."""
    options = {name: option.default for name, option in IndexTTS2Engine.OPTIONS.items()}
    slot = ProcessSlot(0, EngineHost("indextts2", options, cancel_grace_s=cancel_grace_s))
    changed = trio.lowlevel.ParkingLot()

    def note() -> None:
        changed.unpark_all()

    slot.on_change = note

    async def speak(text: str, stop: Callable[[Chunk], bool] = lambda _: False) -> tuple[RunResult, int, list[Chunk]]:
        while not slot.free:
            assert not slot.load_fault, slot.load_fault
            await changed.park()
        assert slot.host.child is not None
        pid = slot.host.child.pid
        chunks: list[Chunk] = []

        def take(chunk: Chunk) -> None:
            chunks.append(chunk)
            if stop(chunk):
                slot.cancel()

        end = await slot.run(Job({"text": text}, {"spk_audio_prompt": said()}), take)
        return end, pid, chunks

    with trio.fail_after(PATIENCE_S):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(slot.serve)
            yield speak
            nursery.cancel_scope.cancel()


@pytest.mark.trio
async def test_a_cancel_stops_it_within_a_segment_and_the_next_request_has_the_right_samples(
    upstream: Upstream, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "gpuworker.slot")
    async with a_slot() as speak:
        end, pid, first = await speak("One two. Three.")
        assert end == RunResult(outcome="completed")

        def late(chunk: Chunk) -> bool:  # the first segment is out, the second would never end
            return isinstance(chunk, ProgressChunk) and chunk.message == "speech synthesis 2"

        end, same, cut = await speak("One two. forever.", late)
        assert (end.outcome, same, len(samples(cut))) == ("cancelled", pid, 2 * WORD_SAMPLES)
        end, same, again = await speak("One two. Three.")
        assert (end.outcome, same) == ("completed", pid)
        assert pcm(again) == pcm(first)
    lines = [record.getMessage() for record in caplog.records]
    assert any("GPT weights restored" in line for line in lines)  # what it prints is a log line, and no more
    assert any("40%|####" in line for line in lines)


@pytest.mark.trio
@pytest.mark.parametrize(("text", "words"), [("oom", "fewer --slots"), ("assert", "device-side assert")])
async def test_a_fault_of_the_gpu_is_retryable_and_costs_the_slot_its_process(
    upstream: Upstream, text: str, words: str
) -> None:
    async with a_slot() as speak:
        end, pid, _ = await speak(text)
        assert (end.outcome, end.code, end.retryable, end.restart) == ("failed", "engine_failed", True, True)
        assert words in end.message
        end, other, _ = await speak("fine")
        assert end.outcome == "completed"
        assert other != pid


def test_a_text_that_upstream_makes_nothing_of_fails_alone(engine: IndexTTS2Engine) -> None:
    end, _ = run(engine, {"text": "(silence)"})
    assert (end.code, end.retryable, end.restart) == ("engine_failed", False, False)
    assert run(engine, {"text": "fine"})[0].outcome == "completed"


# -- through a relay ---------------------------------------------------------------------------------------------


def heard(path: Path) -> "array.array[int]":
    with wave.open(str(path)) as wav:
        assert (wav.getnchannels(), wav.getsampwidth(), wav.getframerate()) == (1, 2, RATE)
        return array.array("h", wav.readframes(wav.getnframes()))


@pytest.mark.trio
async def test_a_recording_sent_with_a_request_speaks_through_a_relay(upstream: Upstream) -> None:
    place = a_place(upstream.folder)
    (upstream.folder / "me.wav").write_bytes(recording(0.6, rate=44_100))
    (upstream.folder / "not.wav").write_text("not audio")
    say = ("say", "--space", "tts", "--input")
    async with a_relay(place) as relay, a_worker(place, relay, "--engine", "indextts2", "-o", "half=true"):
        await place.run("relay", *say, "spk_audio_prompt=me.wav", "-o", "out.wav", "One two. Three.")
        assert len(heard(upstream.folder / "out.wav")) == 3 * WORD_SAMPLES + RATE // 5
        _, told = await place.run("relay", *say, "spk_audio_prompt=not.wav", "-o", "bad.wav", "Hi", code=1)
        assert "spk_audio_prompt" in told
        assert "WAV, FLAC, MP3, OGG" in told
        _, told = await place.run("relay", "say", "Hi", "-o", "bad.wav", code=1)
        assert "input_missing" in told
        _, told = await place.run("relay", *say, "spk_audio_prompt=me.wav", "-p", "top_p=2", "Hi", code=1)
        assert "top_p" in told
        endless = ("spk_audio_prompt=me.wav", "-o", "cut.wav", "--json", "One. forever.")
        async with place.start("relay", *say, *endless) as client:
            await client.audio_chunks(1)
            client.send_signal(signal.SIGINT)
            assert await client.ended() == 130
        await place.run("relay", *say, "spk_audio_prompt=me.wav", "-o", "after.wav", "One two. Three.")
        assert heard(upstream.folder / "after.wav") == heard(upstream.folder / "out.wav")
    assert upstream.called("make")[0]["use_fp16"] is True
    assert len(upstream.called("make")) == 1  # no cancel and no refusal cost the model


@pytest.mark.trio
async def test_without_the_package_the_worker_says_how_upstream_installs_it(tmp_path: Path) -> None:
    place = a_place(tmp_path)
    _, told = await place.run("gpuworker", "run", "--engine", "indextts2", code=2)
    assert "git clone https://github.com/index-tts/index-tts" in told


# -- inside upstream's WebUI, as docs/indextts2.md says ------------------------------------------------------------

#: Upstream's webui.py, as far as the document's program sees it: options parsed and a model loaded on import, a page
#: whose button calls `tts.infer`. A line in the pipe `clicks` is a click; at its end the page is closed.
WEBUI = """
import argparse, sys

parser = argparse.ArgumentParser()
parser.add_argument("--host", default="127.0.0.1")
parser.add_argument("--port", type=int, default=7860)
parser.add_argument("--model_dir", default="checkpoints")
cmd_args = parser.parse_args()

from indextts.infer_v2 import IndexTTS2

tts = IndexTTS2(model_dir=cmd_args.model_dir, cfg_path=cmd_args.model_dir + "/config.yaml")


class Demo:
    def queue(self, size):
        self.size = size

    def launch(self, server_name, server_port):
        print(f"page on {server_name}:{server_port}, {self.size} in its queue", file=sys.stderr, flush=True)
        for text in open("clicks"):
            tts.gr_progress = lambda value, desc: None
            rate, wav = tts.infer("page.wav", text, None)
            print(f"page spoke {len(wav)} samples", file=sys.stderr, flush=True)


demo = Demo()
"""


@attrs.frozen
class WebuiPlace(Place):
    """A place where `webui` is the document's program."""

    def command(self, name: str, *args: str) -> list[str]:
        return [sys.executable, "relay_webui.py", *args] if name == "webui" else Place.command(self, name, *args)


@pytest.mark.trio
async def test_the_documents_program_serves_a_webuis_model_beside_its_page(upstream: Upstream) -> None:
    folder = upstream.folder
    (folder / "webui.py").write_text(WEBUI)
    [program] = re.findall(r"```python\n(.*?)```", (DOCS / "indextts2.md").read_text(), re.DOTALL)
    (folder / "relay_webui.py").write_text(program)
    (folder / "page.wav").write_bytes(recording(0.3, rate=RATE))
    (folder / "me.wav").write_bytes(recording(0.6))
    os.mkfifo(folder / "clicks")
    common = a_place(folder, "[spaces.indextts]\n")
    place = WebuiPlace(common.folder, common.environ)
    say = ("say", "--space", "indextts", "-i", "spk_audio_prompt=me.wav")
    async with a_relay(place) as relay, place.start("webui", "--port", "7999") as webui:
        await relay.event("worker registered")
        await webui.until(lambda line: "page on 127.0.0.1:7999, 20 in its queue" in line)
        clicks = await trio.open_file(folder / "clicks", "w")
        await place.run("relay", *say, "-o", "one.wav", "One two three.")
        await clicks.write("One. Two.\n")
        await clicks.flush()
        await webui.until(lambda line: f"page spoke {2 * WORD_SAMPLES + RATE // 5} samples" in line)
        async with place.start("relay", *say, "--json", "-o", "cut.wav", "One. forever.") as client:
            await client.audio_chunks(1)  # the model is in use
            await clicks.write("Mine.\n")
            await clicks.flush()
            client.send_signal(signal.SIGINT)
            assert await client.ended() == 130
        await webui.until(lambda line: f"page spoke {WORD_SAMPLES} samples" in line)
        await place.run("relay", *say, "-o", "two.wav", "One two three.")
        assert heard(folder / "two.wav") == heard(folder / "one.wav")
        await clicks.aclose()
        assert await webui.ended() == 0
        await relay.event("worker disconnected")
    assert len(upstream.called("make")) == 1


def test_the_documents_tables_are_the_engines_options_params_and_inputs(upstream: Upstream) -> None:
    engine = IndexTTS2Engine({"version": "2.5"})
    engine.load()
    schema = engine.capabilities.params["properties"]
    tables = re.findall(r"^\| `(\w+)` \|(.*)\|$", (DOCS / "indextts2.md").read_text(), re.MULTILINE)
    told = dict(tables)
    assert set(told) == set(schema) | {"voice"} | set(engine.capabilities.inputs) | set(engine.OPTIONS)
    for name, rule in schema.items():
        words = told[name].replace(",", "")
        if "minimum" in rule and "maximum" in rule:
            low, high = f"{rule['minimum']:g} to", f"to {rule['maximum']:g} "
            assert low in words, name
            assert high in words or "limit" in words or name == "seed", name
        if "default" in rule:
            assert f"| {json.dumps(rule['default'])} |" in words, name
    engine.close()
