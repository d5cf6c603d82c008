"""Runs of the engine `voxcpm` on tiny checkpoints, and what they give."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gpuworker.engines.base import AudioChunk, Chunk, Engine, EngineInput
from gpuworker.engines.catalog import parse_options
from gpuworker.engines.voxcpm.crossfade import pcm16
from gpuworker.engines.voxcpm.engine import VoxcpmEngine
from gpuworker.slots.run_engine import RunResult, run_engine
from protocol.wire.params_schema import check_params
from protocol.wire.validators import Value

STEP_SAMPLES = {"voxcpm2": 7_680, "voxcpm1.5": 7_056, "voxcpm": 1_280}
#: As few steps as there can be, and coarse ones: a tiny model needs 20 ms for one. With 1 timestep its diffusion would
#: give its noise back, whatever it was asked for.
QUICK: dict[str, Value] = {"inference_timesteps": 2, "retry_badcase_ratio_threshold": 1, "retry_badcase": False}
Samples = NDArray[np.float32]


def never() -> bool:
    return False


def run(
    engine: Engine, text: str, cancelled: Callable[[], bool] = never, inputs: Any = None, **params: Value
) -> tuple[RunResult, list[Chunk]]:
    """What the engine makes of params that its own schema lets through, by the loop that every slot uses."""
    params = {"text": text, **QUICK, **params}
    assert check_params(engine.capabilities.params, params) == {}
    chunks: list[Chunk] = []
    given = {name: EngineInput(data) for name, data in (inputs or {}).items()}
    return run_engine(engine, params, given, cancelled, chunks.append), chunks


def pcm(chunks: list[Chunk]) -> bytes:
    return b"".join(chunk.pcm for chunk in chunks if isinstance(chunk, AudioChunk))


def speech_of(engine: Engine, text: str, inputs: Any = None, **params: Value) -> bytes:
    end, chunks = run(engine, text, inputs=inputs, **params)
    assert end.outcome == "completed", end
    return pcm(chunks)


def a_loaded(folder: Path, *options: str) -> VoxcpmEngine:
    given = [f"model={folder}", "device=cpu", "offline=true", *options]
    engine = VoxcpmEngine(parse_options(VoxcpmEngine.OPTIONS, given))
    engine.load()
    return engine


def as_pcm(chunks: list[Samples]) -> list[bytes]:
    return [pcm16(chunk) for chunk in chunks]
