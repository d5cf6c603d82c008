"""The files that hold frames: one for each request, `<request id>.frames`, in a folder of their own. Blocks.

A file is a header, a record a frame (its length, its CRC-32, its bytes), and, once the request has ended, a trailer
with which it counts as whole: the length of every frame, the attempts and where each began, and a footer. A file
without a trailer is one that was being written when the relay died; its worker still has all of its frames.
Everything is checked before it is used: what lies on a disk for days may come back otherwise.
"""

import contextlib
import errno
import itertools
import os
import re
import stat
import struct
import zlib
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import attrs

from protocol.wire.structs import ID_PATTERN

SUFFIX = ".frames"
_NAME = re.compile(ID_PATTERN.pattern + re.escape(SUFFIX))
_MAGIC, _WHOLE = b"relayd-1", b"relayd.."
#: Magic, and when the request was made (Unix seconds): an id may come again once its request is forgotten.
_HEADER = struct.Struct(">8sd")
_RECORD = struct.Struct(">II")
_START = struct.Struct(">II")
#: Where the trailer begins, frames, attempts, CRC-32 of header, trailer and these three, magic.
_COUNTS = struct.Struct(">QII")
_FOOTER = struct.Struct(">QIII8s")

#: Left free on the disk: results must not take the last of it from the store, which each request needs to be accepted.
KEEP_FREE_BYTES = 16 * 1024 * 1024
FIRST_OFFSET = _HEADER.size
RECORD_BYTES = _RECORD.size
if TYPE_CHECKING:
    #: Where each frame's record begins, and last where the next one would.
    Index = array[int]
else:
    Index = array  # takes no parameters before Python 3.12
Starts = Sequence[tuple[int, int]]


class DamagedResult(Exception):
    """A file, or a part of it, is not what was written."""


@attrs.frozen(kw_only=True)
class Contents:
    """What a whole file holds.

    Args:
        created_unix: of its request.
        starts: (attempt, seq it began at), in order.
    """

    created_unix: float
    index: Index
    starts: tuple[tuple[int, int], ...]

    @property
    def frames(self) -> int:
        """How many."""
        return len(self.index) - 1

    @property
    def frame_bytes(self) -> int:
        """Of all frames, without what the file adds."""
        return self.index[-1] - FIRST_OFFSET - RECORD_BYTES * self.frames

    @property
    def file_bytes(self) -> int:
        """Of the file."""
        return size_of(self.index[-1], self.frames, len(self.starts))


def new_index() -> Index:
    """Of a file that holds no frames yet."""
    return array("Q", (FIRST_OFFSET,))


def extend(index: Index, frames: Sequence[bytes]) -> None:
    """Note that `frames` were written behind what was there."""
    end = index[-1]
    for data in frames:
        end += RECORD_BYTES + len(data)
        index.append(end)


def size_of(end: int, frames: int, starts: int) -> int:
    """Bytes of a whole file whose last record ends at `end`."""
    return end + 4 * frames + _START.size * starts + _FOOTER.size


class ResultFolder:
    """The folder of the files. One thread at a time for each file; any number for all of them."""

    def __init__(self, path: Path) -> None:
        """Make the folder if need be, for the owner alone.

        Raises:
            OSError: it cannot be made.
        """
        path.mkdir(mode=0o700, exist_ok=True)
        self.path = path
        # What root makes belongs to the owner of the state folder, as its other files.
        self._owner = path.parent.stat() if os.geteuid() == 0 else None
        if self._owner is not None:
            os.chown(path, self._owner.st_uid, self._owner.st_gid, follow_symlinks=False)

    def write(self, request_id: str, created_unix: float, offset: int, frames: Sequence[bytes]) -> None:
        """Write the records of `frames` at `offset`; at `FIRST_OFFSET` the file begins anew.

        Raises:
            OSError: the disk does not take them; the file up to `offset` is as it was.
        """
        self._need_room()
        begins = offset == FIRST_OFFSET
        head = [_HEADER.pack(_MAGIC, created_unix)] if begins else []
        with self._open(request_id, os.O_WRONLY | os.O_CREAT | (os.O_TRUNC if begins else 0)) as file:
            _write_all(file, b"".join([*head, *_records(frames)]), 0 if begins else offset)

    def seal(
        self, request_id: str, created_unix: float, index: Index, starts: Starts, all_frames: Sequence[bytes] = ()
    ) -> None:
        """Write the trailer of a file that holds all frames; when this returns the disk has it all.

        Args:
            request_id: names the file.
            created_unix: of the request, Unix seconds.
            index: of all frames.
            starts: of the attempts.
            all_frames: written in the same go, to a file that begins anew; none where it has them.

        Raises:
            OSError: the disk does not take it, or could not say that it has it.
        """
        end, frames = index[-1], len(index) - 1
        lengths = (index[i + 1] - index[i] - RECORD_BYTES for i in range(frames))
        trailer = struct.pack(f">{frames}I", *lengths) + b"".join(_START.pack(*start) for start in starts)
        counts = _COUNTS.pack(end, frames, len(starts))
        header = _HEADER.pack(_MAGIC, created_unix)
        crc = zlib.crc32(counts, zlib.crc32(trailer, zlib.crc32(header)))
        footer = _FOOTER.pack(end, frames, len(starts), crc, _WHOLE)
        self._need_room()
        with self._open(request_id, os.O_WRONLY | (os.O_CREAT if all_frames else 0)) as file:
            if all_frames:
                os.ftruncate(file, 0)
                _write_all(file, b"".join([header, *_records(all_frames), trailer, footer]), 0)
            else:
                os.ftruncate(file, end)  # a restarted attempt may have left more behind
                _write_all(file, trailer + footer, end)
            os.fdatasync(file)
        folder = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(folder)  # the file's name
        finally:
            os.close(folder)

    def read(self, request_id: str, offsets: Sequence[int]) -> list[bytes]:
        """The frames whose records begin at `offsets`, the last of which is where the last record ends.

        Raises:
            OSError: the file cannot be read.
            DamagedResult: that is not what was written.
        """
        begin, end = offsets[0], offsets[-1]
        with self._open(request_id, os.O_RDONLY) as file:
            data = memoryview(_read_all(file, end - begin, begin))
        frames = []
        for here, there in itertools.pairwise(offsets):
            length, crc = _RECORD.unpack_from(data, here - begin)
            frame = bytes(data[here - begin + RECORD_BYTES : there - begin])
            if length != len(frame) or crc != zlib.crc32(frame):
                raise DamagedResult(f"the frame at byte {here} of {request_id}{SUFFIX} is damaged")
            frames.append(frame)
        return frames

    def load(self, request_id: str) -> Contents:
        """What a file says it holds; the frames themselves are checked when they are read.

        Raises:
            OSError: the file cannot be read.
            DamagedResult: it is not whole, or no file of ours.
        """
        with self._open(request_id, os.O_RDONLY) as file:
            size = os.fstat(file).st_size
            if size < FIRST_OFFSET + _FOOTER.size:
                raise DamagedResult(f"{request_id}{SUFFIX} is too short")
            header = _read_all(file, _HEADER.size, 0)
            footer = _read_all(file, _FOOTER.size, size - _FOOTER.size)
            end, frames, starts, crc, whole = _FOOTER.unpack(footer)
            magic, created_unix = _HEADER.unpack(header)
            if (magic, whole) != (_MAGIC, _WHOLE) or size_of(end, frames, starts) != size:
                raise DamagedResult(f"{request_id}{SUFFIX} is not whole")
            trailer = _read_all(file, size - _FOOTER.size - end, end)
        if crc != zlib.crc32(footer[: _COUNTS.size], zlib.crc32(trailer, zlib.crc32(header))):
            raise DamagedResult(f"the trailer of {request_id}{SUFFIX} is damaged")
        index = new_index()
        for (length,) in struct.iter_unpack(">I", trailer[: 4 * frames]):
            index.append(index[-1] + RECORD_BYTES + length)
        if index[-1] != end:
            raise DamagedResult(f"the frames of {request_id}{SUFFIX} do not add up")
        begun = _START.iter_unpack(trailer[4 * frames :])
        return Contents(created_unix=created_unix, index=index, starts=tuple((n, seq) for n, seq in begun))

    def cut(self, request_id: str, end: int) -> None:
        """Let the file end at `end`, where a write that failed may have left more.

        Raises:
            OSError: it cannot be done.
        """
        with self._open(request_id, os.O_WRONLY) as file:
            os.ftruncate(file, end)

    def remove(self, request_id: str) -> None:
        """Delete a file; one that is not there is no fault.

        Raises:
            OSError: it cannot be done.
        """
        with contextlib.suppress(FileNotFoundError):
            self._path(request_id).unlink()

    def request_ids(self) -> list[str]:
        """Of all files that are ours by their names; whatever else lies in the folder is left alone.

        Raises:
            OSError: the folder cannot be read.
        """
        names = (path.name for path in self.path.iterdir())
        return sorted(name.removesuffix(SUFFIX) for name in names if _NAME.fullmatch(name))

    def _need_room(self) -> None:
        disk = os.statvfs(self.path)
        if disk.f_bavail * disk.f_frsize < KEEP_FREE_BYTES:
            raise OSError(errno.ENOSPC, f"less than {KEEP_FREE_BYTES // 1024**2} MiB are left on the disk")

    @contextlib.contextmanager
    def _open(self, request_id: str, flags: int) -> Iterator[int]:
        flags |= os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK  # not a pipe's other end either
        file = os.open(self._path(request_id), flags, 0o600)
        try:
            if not stat.S_ISREG(os.fstat(file).st_mode):
                raise OSError(f"{request_id}{SUFFIX} is no file")
            if self._owner is not None and flags & os.O_CREAT:
                os.fchown(file, self._owner.st_uid, self._owner.st_gid)
            yield file
        finally:
            os.close(file)

    def _path(self, request_id: str) -> Path:
        """The file of a request. The wire has checked the id; a name that leaves the folder is refused all the same."""
        if not ID_PATTERN.fullmatch(request_id):
            raise ValueError(f"{request_id!r} is no request id")
        return self.path / (request_id + SUFFIX)


def _records(frames: Sequence[bytes]) -> Iterator[bytes]:
    for data in frames:
        yield _RECORD.pack(len(data), zlib.crc32(data))
        yield data


def _write_all(file: int, data: bytes, offset: int) -> None:
    view = memoryview(data)
    while view:
        taken = os.pwrite(file, view, offset)
        view, offset = view[taken:], offset + taken


def _read_all(file: int, size: int, offset: int) -> bytes:
    parts: list[bytes] = []
    while size:
        part = os.pread(file, size, offset)
        if not part:
            raise DamagedResult("a file of results is shorter than it was")
        parts.append(part)
        size, offset = size - len(part), offset + len(part)
    return b"".join(parts)
