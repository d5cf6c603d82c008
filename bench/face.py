"""Measures what a talking face costs: CPU of engine `face` for a second of its video, beside the encoder alone."""

import statistics
import time
from array import array
from collections.abc import Callable
from typing import Any

from bench.figures import Row
from gpuworker.engines.base import EngineInput
from gpuworker.engines.catalog import parse_options
from gpuworker.engines.face.engine import FaceEngine

RATE = 16_000
SPEECH_S = 10
ROUNDS = 5


def measure() -> list[Row]:
    """Measure ten seconds of speech, five times; some ten seconds."""
    engine = FaceEngine(parse_options(FaceEngine.OPTIONS, []))
    engine.load()
    pictures = _pictures()
    whole: list[float] = []
    encoder: list[float] = []
    for _ in range(ROUNDS):
        whole.append(_percent(lambda: _talk(engine)))
        encoder.append(_percent(lambda: _encode(pictures)))
    ratios = tuple(talk / encode for talk, encode in zip(whole, encoder, strict=True))
    return [
        Row(
            figure="face",
            name="a talking face, 360 x 360 at 25 fps",
            unit="% of a core",
            value=statistics.median(whole),
            against=statistics.median(encoder),
            peer="encoding it",
            ratios=ratios,
        )
    ]


def _percent(work: Callable[[], None]) -> float:
    began = time.process_time()
    work()
    return 100 * (time.process_time() - began) / SPEECH_S


def _talk(engine: FaceEngine) -> None:
    # Syllables of a buzz: 0.2 s loud, 0.1 s silent.
    samples = array("h", ((at % 130 - 65) * 200 if at % 4_800 < 3_200 else 0 for at in range(SPEECH_S * RATE)))
    speech = EngineInput(samples.tobytes(), f"audio/L16;rate={RATE};channels=1")
    for _ in engine.generate({}, {"audio": speech}):
        pass


def _pictures() -> list[Any]:
    from gpuworker.engines.face.drawing import LOOKS, Face, Shape

    face = Face(360, LOOKS[0])
    return [face.draw(Shape(opening=number / 7)) for number in range(8)]


def _encode(pictures: list[Any]) -> None:
    from gpuworker.engines.face.vp8 import Vp8Encoder

    encoder = Vp8Encoder(360, 25, 400_000)
    for number in range(25 * SPEECH_S):
        for _ in encoder.encode(pictures[number % len(pictures)]):
            pass
