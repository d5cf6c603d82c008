"""The mock with an input: its tune depends on the bytes, so that a wrong or a missing one is heard."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import attrs

from gpuworker.engines.base import Capabilities, Chunk
from gpuworker.engines.catalog import GROUP
from gpuworker.engines.mock import MockEngine
from protocol.wire.structs import InputRule
from protocol.wire.validators import Value
from tests.chaos.workload import INPUT, digest

NAME = "voiced-mock"


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


def install(folder: Path) -> None:
    """Name the engine as an installed package does, for processes that have `folder` in PYTHONPATH."""
    package = folder / "voiced_mock-1.dist-info"
    package.mkdir()
    (package / "METADATA").write_text("Metadata-Version: 2.1\nName: voiced-mock\nVersion: 1\n")
    (package / "entry_points.txt").write_text(f"[{GROUP}]\n{NAME} = {__name__}:{VoicedMock.__name__}\n")
