"""The inputs of a request: read, hashed and announced, then sent in pieces that leave room for other messages."""

import hashlib
import mimetypes
from collections.abc import AsyncIterable, Iterator, Mapping
from pathlib import Path

import attrs
import trio

from protocol.link.base import Link
from protocol.wire.errors import LinkError
from protocol.wire.messages import MAX_INPUT_CHUNK_BYTES, Input
from protocol.wire.structs import KIB, InputInfo

#: What is fed into a live input: bytes, or text that becomes UTF-8.
Piece = str | bytes

#: More than any relay accepts; checked before such a file is read into memory.
MAX_INPUT_BYTES = 1024 * KIB * KIB
#: Pieces are queued until the link's backlog has this size, and again once it has fallen to `LOW_WATER_BYTES`.
#: This is two pieces: the link never runs dry, and another message waits for half a MiB at most.
HIGH_WATER_BYTES = 2 * MAX_INPUT_CHUNK_BYTES
LOW_WATER_BYTES = MAX_INPUT_CHUNK_BYTES
TEXT = "text/plain"


@attrs.frozen
class Live:
    """An input that `Stream.feed` feeds while the request waits and runs, until `Stream.end_input`."""

    media_type: str = TEXT


@attrs.frozen
class From:
    """An input that the relay feeds with the output of another request: its text as UTF-8, its audio as PCM,
    or its video as IVF, whichever the space takes.

    The request waits until the other one has put out something, and fails with `source_failed` if that one does.
    """

    request_id: str
    media_type: str = ""


InputSource = bytes | Path | AsyncIterable[Piece] | Live | From | tuple[bytes | Path | AsyncIterable[Piece], str]


@attrs.define
class Inputs:
    """The inputs of a request, by name.

    Attributes:
        infos: what `submit` announces about each.
        data: the whole ones.
        live: names of the live ones.
        sources: what feeds those live ones that are not fed by hand.
    """

    infos: dict[str, InputInfo] = attrs.field(factory=dict)
    data: dict[str, bytes] = attrs.field(factory=dict)
    live: list[str] = attrs.field(factory=list)
    sources: dict[str, AsyncIterable[Piece]] = attrs.field(factory=dict)


async def read_inputs(sources: Mapping[str, InputSource]) -> Inputs:
    """Read the whole inputs, and say what `submit` announces about each input.

    Args:
        sources: name -> bytes, a path, or either with its media type. The type of a path is guessed from its name;
            that of bytes is `application/octet-stream`. Or a live input: an async iterator, alone for `text/plain` or
            with its media type, `Live`, or `From`.

    Raises:
        OSError: a file cannot be read.
        ValueError: a file is larger than any relay accepts, or a name or media type breaks a rule of the wire.
    """
    inputs = Inputs()
    for name, entry in sources.items():
        source, media_type = entry if isinstance(entry, tuple) else (entry, None)
        if isinstance(source, From):
            try:
                inputs.infos[name] = InputInfo(from_=source.request_id, media_type=source.media_type)
            except ValueError as fault:
                raise ValueError(f"input {name!r}: {fault}") from None
        elif isinstance(source, Live | AsyncIterable):
            if isinstance(source, Live):
                media_type = source.media_type
            else:
                inputs.sources[name] = source
            inputs.infos[name] = InputInfo(media_type=media_type or TEXT, live=True)
            inputs.live.append(name)
        else:
            if isinstance(source, Path):
                media_type = media_type or mimetypes.guess_type(source.name)[0]
                data = await trio.to_thread.run_sync(_read, source)
            else:
                data = bytes(source)
            inputs.data[name] = data
            inputs.infos[name] = InputInfo(
                media_type=media_type or "application/octet-stream",
                size=len(data),
                sha256=await trio.to_thread.run_sync(_digest, data),
            )
    return inputs


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
