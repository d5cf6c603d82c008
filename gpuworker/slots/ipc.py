"""The protocol between the worker and an engine's process: msgpack maps, each preceded by its length in 4 bytes.

Worker to engine: `load` (engine, options, seats), `run` (slot, run, params, inputs, live, context), `feed` (slot, run,
name, data, last), `cancel` (slot, run).
Engine to worker: `progress` of a long load, `ready` (capabilities), `load_failed` (message), then a run's chunks
`format` `audio` `video` `progress` `output` `mark`, `asks` (run, name, taken) when it wants more of a live input, and
`end`, all with `slot`. A slot is named by its place among those of the process, from 0.
It is private to one version of gpuworker: both ends always come from the same installation.
"""

from typing import Any

import attrs
import msgpack

from gpuworker.engines.base import (
    AudioChunk,
    Capabilities,
    Chunk,
    FormatChunk,
    MarkChunk,
    OutputChunk,
    ProgressChunk,
    VideoChunk,
)
from protocol.wire.structs import AudioFormat, InputRule, VideoFormat
from protocol.wire.validators import Value, parse_struct

#: Large enough for all inputs of a request; a longer message is a bug in gpuworker itself.
MAX_BYTES = 256 * 1024 * 1024
_HEAD_BYTES = 4

IpcMessage = dict[str, Any]


class PipeError(Exception):
    """The bytes received are not a valid message."""


def pack(message: IpcMessage) -> bytes:
    """Encode one message."""
    body: bytes = msgpack.packb(message)
    return len(body).to_bytes(_HEAD_BYTES, "big") + body


class Inbox:
    """Collects received bytes into messages."""

    def __init__(self) -> None:
        self._held = bytearray()

    def feed(self, data: bytes) -> list[IpcMessage]:
        """The messages that `data` completes.

        Raises:
            PipeError: the length or the body is not valid.
        """
        held = self._held
        held += data
        messages: list[IpcMessage] = []
        at = 0
        while len(held) - at >= _HEAD_BYTES:
            size = int.from_bytes(held[at : at + _HEAD_BYTES], "big")
            if size > MAX_BYTES:
                raise PipeError(f"received a message of {size} bytes")
            end = at + _HEAD_BYTES + size
            if len(held) < end:
                break
            try:
                message = msgpack.unpackb(held[at + _HEAD_BYTES : end])
            except (ValueError, TypeError) as fault:
                raise PipeError(str(fault)) from None
            messages.append(message)
            at = end
        del held[:at]
        return messages


def encode_chunk(chunk: Chunk) -> IpcMessage:
    """Encode a chunk as a message."""
    if isinstance(chunk, AudioChunk):
        return {"is": "audio", "pcm": chunk.pcm}
    if isinstance(chunk, VideoChunk):
        return {"is": "video", "data": chunk.data, "pts": chunk.pts, "key": chunk.key}
    if isinstance(chunk, ProgressChunk):
        return {"is": "progress", **attrs.asdict(chunk)}
    if isinstance(chunk, OutputChunk):
        return {"is": "output", "data": chunk.data, "media_type": chunk.media_type}
    if isinstance(chunk, MarkChunk):
        return {"is": "mark", **attrs.asdict(chunk)}
    return {"is": "format", **_encode_formats(chunk)}


def decode_chunk(message: IpcMessage) -> Chunk | None:
    """Decode the chunk in a message; None if it is another kind of message."""
    kind = message["is"]
    if kind == "audio":
        return AudioChunk(message["pcm"])
    if kind == "video":
        return VideoChunk(message["data"], message["pts"], message["key"])
    if kind == "progress":
        return ProgressChunk(message["state"], message["fraction"], message["message"])
    if kind == "output":
        return OutputChunk(message["data"], message["media_type"])
    if kind == "mark":
        return MarkChunk(message["text_end"], message["sample"])
    if kind == "format":
        return FormatChunk(**_decode_formats(message))
    return None


def _encode_formats(formats: FormatChunk | Capabilities) -> IpcMessage:
    return {
        "format": formats.format.to_map() if formats.format else None,
        "video": formats.video.to_map() if formats.video else None,
    }


def _decode_formats(message: IpcMessage) -> dict[str, Any]:
    return {
        "format": parse_struct(AudioFormat, message["format"]) if message["format"] else None,
        "video": parse_struct(VideoFormat, message["video"]) if message["video"] else None,
    }


def encode_capabilities(capabilities: Capabilities) -> dict[str, Value]:
    """Encode capabilities as a map."""
    return {
        **_encode_formats(capabilities),
        "late_format": capabilities.late_format,
        "streams": capabilities.streams,
        "reproducible": capabilities.reproducible,
        "fingerprint": capabilities.fingerprint,
        "params": capabilities.params,
        "inputs": {name: rule.to_map() for name, rule in capabilities.inputs.items()},
    }


def decode_capabilities(message: dict[str, Value]) -> Capabilities:
    """Decode capabilities from a map."""
    return Capabilities(
        **_decode_formats(message),
        late_format=message["late_format"],
        streams=message["streams"],
        reproducible=message["reproducible"],
        fingerprint=message["fingerprint"],
        params=message["params"],
        inputs={name: parse_struct(InputRule, rule) for name, rule in message["inputs"].items()},
    )
