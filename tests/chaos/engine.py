"""The engines: the mock with an input, on whose bytes its tune depends, and a language model that is none.

So a wrong or a missing input is heard, and so is a wrong prompt.
"""

import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import attrs

from gpuworker.engines.base import Capabilities, Chunk, Engine, OutputChunk
from gpuworker.engines.catalog import GROUP
from gpuworker.engines.language import last_output, params_schema
from gpuworker.engines.mock import MockEngine
from protocol.wire.structs import InputRule
from protocol.wire.validators import Value
from tests.chaos.talk_plans import WORD_S, retort
from tests.chaos.workload import INPUT, digest

NAME, MODEL = "voiced-mock", "retorting-model"


class VoicedMock(MockEngine):
    """Plays another tune for another input."""

    @property
    def capabilities(self) -> Capabilities:
        """The mock's, and an input."""
        return attrs.evolve(super().capabilities, inputs={INPUT: InputRule(media_types=[])})

    def generate(self, params: dict[str, Value], inputs: Mapping[str, Any]) -> Iterator[Chunk]:
        """Yield the tune of the text and the input, or the text."""
        words = "".join(digest(given.data) for given in inputs.values())
        return super().generate(params | {"text": params["text"] + words}, {})


class RetortingModel(Engine):
    """Replies with what the whole prompt decides, word by word."""

    SUMMARY = "a language model that is none"

    @property
    def capabilities(self) -> Capabilities:
        """Those of a language space."""
        return Capabilities(streams=True, reproducible=True, fingerprint="retorts", params=params_schema())

    def load(self) -> None:
        """There is nothing to load."""

    def generate(self, params: dict[str, Value], inputs: Mapping[str, Any]) -> Iterator[Chunk]:
        """Yield the words."""
        words = retort(params["messages"]).split(" ")
        for number, word in enumerate(words):
            if self.cancelled():
                return
            time.sleep(WORD_S)
            yield OutputChunk(f" {word}" if number else word)
        yield last_output("stop", None)


def install(folder: Path) -> None:
    """Name the engines as an installed package does, for processes that have `folder` in PYTHONPATH."""
    package = folder / "voiced_mock-1.dist-info"
    package.mkdir()
    (package / "METADATA").write_text("Metadata-Version: 2.1\nName: voiced-mock\nVersion: 1\n")
    (package / "entry_points.txt").write_text(
        f"[{GROUP}]\n{NAME} = {__name__}:{VoicedMock.__name__}\n{MODEL} = {__name__}:{RetortingModel.__name__}\n"
    )
