"""Standard input as an input of a request: whole, or piece by piece while another program writes it."""

import codecs
import io
import os
import sys
from collections.abc import AsyncIterable, AsyncIterator, Sequence

import trio

from protocol.wire.media_types import BINARY, accepts, recognize
from protocol.wire.messages import MAX_INPUT_CHUNK_BYTES
from protocol.wire.structs import KIB

#: Blanks before the first word; if there are more, they are sent, because they may never end.
MAX_BLANKS = 64 * KIB


class StandardInput:
    """Reads standard input; nothing is lost if a read is cancelled, unless another reads afterwards.

    Attributes:
        ended: whether all of it has been read.
    """

    def __init__(self) -> None:
        self.ended = False
        self._read_ahead = bytearray()
        self._fd = sys.stdin.fileno()

    async def read_all(self) -> bytes:
        """Read to the end."""
        while not self.ended:
            await self._read()
        return bytes(self._read_ahead)

    async def read_begun(self) -> bool:
        """Wait for the first that is not blank; return whether there is any, or so many blanks that more may follow."""
        while not self.ended and not self._read_ahead.strip():
            if len(self._read_ahead) >= MAX_BLANKS:
                return True
            await self._read()
        return bool(self._read_ahead.strip())

    def media_type(self, accepted: Sequence[str]) -> str:
        """What its first bytes say it is, if that is accepted; else the first that is."""
        known = recognize(bytes(self._read_ahead[:64]))
        if known is not None and accepts(accepted, known):
            return known
        return next((kind for kind in accepted if "*" not in kind), BINARY)

    async def pieces(self) -> AsyncIterator[bytes]:
        """Yield all of it as it comes."""
        while self._read_ahead or not self.ended:
            if not self._read_ahead:
                await self._read()
            if self._read_ahead:
                yield bytes(self._read_ahead)
                self._read_ahead.clear()

    async def _read(self) -> None:
        # Reading without Python's buffer, whose lock a read that was given up would keep until the program's end.
        data = await trio.to_thread.run_sync(os.read, self._fd, MAX_INPUT_CHUNK_BYTES, abandon_on_cancel=True)
        self._read_ahead += data
        self.ended = not data


class TextDecoder:
    """UTF-8 in pieces to text of whole characters, with "\\n" at the end of each line and without a byte order mark."""

    def __init__(self) -> None:
        utf_8 = codecs.getincrementaldecoder("utf-8")()
        self._decoder = io.IncrementalNewlineDecoder(utf_8, translate=True)
        self._bytes = 0
        self._begun = False

    def decode(self, data: bytes, *, final: bool = False) -> str:
        """Decode a piece.

        Raises:
            ValueError: it is not UTF-8.
        """
        try:
            text = self._decoder.decode(data, final=final)
        except UnicodeDecodeError as fault:
            place = self._bytes + len(data) - len(fault.object) + fault.start + 1
            raise ValueError(f"text: not UTF-8 at byte {place}; save the file as UTF-8") from None
        self._bytes += len(data)
        if text and not self._begun:
            self._begun = True
            return text.removeprefix("\ufeff")
        return text


async def decoded(pieces: AsyncIterable[bytes]) -> AsyncIterator[str]:
    """Decode pieces of UTF-8; see `TextDecoder`. What makes no whole character yet yields nothing."""
    decoder = TextDecoder()
    async for data in pieces:
        if text := decoder.decode(data):
            yield text
    if text := decoder.decode(b"", final=True):
        yield text
