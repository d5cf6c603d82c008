"""Measures how soon a reply is seen and heard: eliza and espeak, over HTTP as the page asks."""

import array
import base64
import json
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from http.client import HTTPConnection

import attrs

from bench.figures import Row
from bench.stage import Stage, open_quietly, open_stage

_SETTINGS = '[talk]\nreply = "llm"\nspeech = "tts"\n[spaces.llm]\n[spaces.tts]\n'
TURNS = 20
SAID = ("Hello!", "I am sad about my job.", "What is your name?", "你好", "My mother called me yesterday.")
#: A sample this loud is heard: 2 % of full scale. The samples before it are in the time.
AUDIBLE = 655
#: The pause between two words: the engine's default, that of `relayd demo --talk`, and none.
PACES_MS = (40, 10, 0)
READY_S = 30.0


@attrs.frozen
class Turn:
    """When something came, in ms after the text was sent."""

    text_ms: float
    speech_ms: float
    audible_ms: float


def measure() -> list[Row]:
    """Measure 20 turns at each pace; three quarters of a minute."""
    rows = []
    for pace_ms in PACES_MS:
        with open_stage(_SETTINGS) as stage, ExitStack() as stack:
            work = [stage.checkout.python, "-m", "gpuworker.cli", "run", "--relay", stage.url]
            token = stage.token("worker", "talker")
            for more in (
                ("--space", "llm", "--engine", "eliza", "-o", f"pace_ms={pace_ms}"),
                ("--space", "tts", "--engine", "espeak"),
            ):
                stack.enter_context(open_quietly([*work, *more], RELAY_TOKEN=token))
            turns = _talk(stage, stage.token("client", "talks"))
        for name, field in (
            ("the first word is read", "text_ms"),
            ("the first samples", "speech_ms"),
            ("the first audible sample, with the silence before it", "audible_ms"),
        ):
            value = statistics.median(getattr(turn, field) for turn in turns)
            rows.append(Row(figure="talk", name=f"{name} (eliza, {pace_ms} ms a word)", unit="ms", value=value))
    return rows


def _talk(stage: Stage, token: str) -> list[Turn]:
    connection = HTTPConnection("127.0.0.1", stage.server.port, timeout=READY_S)
    headers = {"Authorization": f"Bearer {token}", "Accept": "text/event-stream"}

    def say(number: int, text: str) -> Iterator[tuple[str, float, dict[str, object]]]:
        began = time.perf_counter()
        connection.request("POST", f"/v1/talks/bench-{number}/say", json.dumps({"text": text}), headers)
        kind = ""
        for line in connection.getresponse():
            if line.startswith(b"event: "):
                kind = line[7:].decode().strip()
            elif line.startswith(b"data: "):
                yield kind, 1e3 * (time.perf_counter() - began), json.loads(line[6:])

    _wait_for_both(lambda: [kind for kind, _ms, _data in say(0, "Are you there?")])
    return [_turn(say(number + 1, SAID[number % len(SAID)])) for number in range(TURNS)]


def _wait_for_both(say: Callable[[], list[str]]) -> None:
    deadline = time.monotonic() + READY_S
    while "speech" not in say():
        if time.monotonic() > deadline:
            raise RuntimeError("eliza and espeak did not answer; is the extra espeak installed?")
        time.sleep(0.2)


def _turn(events: Iterator[tuple[str, float, dict[str, object]]]) -> Turn:
    text_ms = speech_ms = audible_ms = 0.0
    rate, samples = 1, 0
    for kind, at_ms, data in events:
        if kind == "text":
            text_ms = text_ms or at_ms
        elif kind == "speech_started":
            rate = int(str(data["sample_rate"]))
        elif kind == "speech":
            speech_ms = speech_ms or at_ms
            pcm = array.array("h", base64.b64decode(str(data["pcm"])))
            loud = next((index for index, sample in enumerate(pcm) if abs(sample) >= AUDIBLE), None)
            if loud is not None and not audible_ms:
                # It is played from the first samples on, so it sounds when both have come and gone.
                audible_ms = max(at_ms, speech_ms + 1e3 * (samples + loud) / rate)
            samples += len(pcm)
    return Turn(text_ms, speech_ms, audible_ms)
