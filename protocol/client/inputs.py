"""The inputs of a request: read, hashed and announced, then sent in pieces that leave room for other messages."""

import hashlib
import mimetypes
from collections.abc import Iterator, Mapping
from pathlib import Path

import trio

from protocol.link.base import Link
from protocol.wire.errors import LinkError
from protocol.wire.messages import MAX_INPUT_CHUNK_BYTES, Input
from protocol.wire.structs import KIB, InputInfo

InputSource = bytes | Path | tuple[bytes | Path, str]

#: More than any relay accepts; checked before such a file is read into memory.
MAX_INPUT_BYTES = 1024 * KIB * KIB
#: Pieces are queued until the link's backlog has this size, and again once it has fallen to `LOW_WATER_BYTES`.
#: This is two pieces: the link never runs dry, and another message waits for half a MiB at most.
HIGH_WATER_BYTES = 2 * MAX_INPUT_CHUNK_BYTES
LOW_WATER_BYTES = MAX_INPUT_CHUNK_BYTES


async def read_inputs(sources: Mapping[str, InputSource]) -> tuple[dict[str, bytes], dict[str, InputInfo]]:
    """Read the inputs; return the bytes of each, and what `submit` announces about it.

    Args:
        sources: name -> bytes, a path, or either with its media type. The type of a path is guessed from its name;
            that of bytes is `application/octet-stream`.

    Raises:
        OSError: a file cannot be read.
        ValueError: a file is larger than any relay accepts, or a name or media type breaks a rule of the wire.
    """
    data: dict[str, bytes] = {}
    infos: dict[str, InputInfo] = {}
    for name, entry in sources.items():
        source, media_type = entry if isinstance(entry, tuple) else (entry, None)
        if isinstance(source, Path):
            media_type = media_type or mimetypes.guess_type(source.name)[0]
            data[name] = await trio.to_thread.run_sync(_read, source)
        else:
            data[name] = bytes(source)
        infos[name] = InputInfo(
            media_type=media_type or "application/octet-stream",
            size=len(data[name]),
            sha256=await trio.to_thread.run_sync(_digest, data[name]),
        )
    return data, infos


def _read(path: Path) -> bytes:
    if path.stat().st_size > MAX_INPUT_BYTES:
        raise ValueError(f"input file {path} has more than {MAX_INPUT_BYTES >> 20} MiB, which no relay accepts")
    return path.read_bytes()


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


class Upload:
    """Sends the inputs of a request over one link, piece by piece, called by the link's `on_drained`."""

    def __init__(self, link: Link, request_id: str, inputs: Mapping[str, bytes]) -> None:
        self._link = link
        self._pieces = _pieces(request_id, inputs)
        self._remove = link.on_drained(self._pump, LOW_WATER_BYTES)
        self._pump()

    def stop(self) -> None:
        """Stop sending."""
        self._remove()
        self._pieces = iter(())

    def _pump(self) -> None:
        try:
            while self._link.backlog_bytes < HIGH_WATER_BYTES:
                piece = next(self._pieces, None)
                if piece is None:
                    self._remove()
                    return
                self._link.send(piece)
        except LinkError:  # the upload starts again on the next link
            self.stop()


def _pieces(request_id: str, inputs: Mapping[str, bytes]) -> Iterator[Input]:
    for name, data in inputs.items():
        for offset in range(0, len(data), MAX_INPUT_CHUNK_BYTES):
            piece = data[offset : offset + MAX_INPUT_CHUNK_BYTES]
            yield Input(request_id=request_id, name=name, offset=offset, data=piece)
