"""The files that hold frames: one per request, `<request id>.frames`, in a folder of their own. Its calls block.

A file has a header, one record per frame (length, CRC-32, bytes) and, once the request has ended, a trailer that makes
it complete: the length of every frame, the attempts with the seq at which each began, and a footer. A file without a
trailer was being written when the relay died; its worker still has all of its frames. Everything is checked before it
is used, since data on a disk can be damaged.
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
#: Magic, and the creation time of the request (Unix seconds): an id may be used again once its request is forgotten.
_HEADER = struct.Struct(">8sd")
_RECORD = struct.Struct(">II")
_START = struct.Struct(">II")
#: Offset of the trailer, number of frames, number of attempts.
_COUNTS = struct.Struct(">QII")
#: The fields of `_COUNTS`, the CRC-32 of the header, the trailer and those fields, and a magic.
_FOOTER = struct.Struct(">QIII8s")

#: Bytes left free on the disk for the store, which must be able to write for a request to be accepted.
KEEP_FREE_BYTES = 16 * 1024 * 1024
FIRST_OFFSET = _HEADER.size
RECORD_BYTES = _RECORD.size
if TYPE_CHECKING:
    #: The offset of each frame's record, and last the offset at which the next one would begin.
    Index = array[int]
else:
    Index = array  # accepts no type parameters before Python 3.12
Starts = Sequence[tuple[int, int]]


class DamagedResult(Exception):
    """A file, or a part of it, is damaged."""


class UnfinishedResult(DamagedResult):
    """A file has no trailer: the relay died before it was complete, or the file was truncated."""


@attrs.frozen(kw_only=True)
class Contents:
    """The contents of a complete file, without the frames themselves.

    Args:
        created_unix: creation time of the request, Unix seconds.
        index: offsets of the records.
        starts: (attempt, seq at which it began), in order.
    """

    created_unix: float
    index: Index
    starts: tuple[tuple[int, int], ...]

    @property
    def frames(self) -> int:
        """Number of frames."""
        return len(self.index) - 1

    @property
    def frame_bytes(self) -> int:
        """Bytes of all frames, without headers and trailer."""
        return self.index[-1] - FIRST_OFFSET - RECORD_BYTES * self.frames

    @property
    def file_bytes(self) -> int:
        """Size of the file in bytes."""
        return size_of(self.index[-1], self.frames, len(self.starts))


def new_index() -> Index:
    """Return the index of a file that holds no frames yet."""
    return array("Q", (FIRST_OFFSET,))


def extend(index: Index, frames: Sequence[bytes]) -> None:
    """Extend `index` by `frames`, which were written at the end of the file."""
    end = index[-1]
    for data in frames:
        end += RECORD_BYTES + len(data)
        index.append(end)


def size_of(end: int, frames: int, starts: int) -> int:
    """Return the size in bytes of a complete file whose last record ends at `end`."""
    return end + 4 * frames + _START.size * starts + _FOOTER.size


class ResultFolder:
    """The folder of the files. Only one thread at a time may use a file; different files may be used in parallel."""

    def __init__(self, path: Path) -> None:
        """Create the folder, accessible to the owner only, unless it exists.

        Raises:
            OSError: the folder cannot be created.
        """
        path.mkdir(mode=0o700, exist_ok=True)
        self.path = path
        # Files that root creates are given to the owner of the state folder, like the other files in it.
        self._owner = path.parent.stat() if os.geteuid() == 0 else None
        if self._owner is not None:
            os.chown(path, self._owner.st_uid, self._owner.st_gid, follow_symlinks=False)

    def write(self, request_id: str, created_unix: float, offset: int, frames: Sequence[bytes]) -> None:
        """Write the records of `frames` at `offset`; at `FIRST_OFFSET` the file is started again.

        Raises:
            OSError: they cannot be written; the file up to `offset` is unchanged.
        """
        self._need_room()
        begins = offset == FIRST_OFFSET
        head = [_HEADER.pack(_MAGIC, created_unix)] if begins else []
        with self._open(request_id, os.O_WRONLY | os.O_CREAT | (os.O_TRUNC if begins else 0)) as file:
            _write_all(file, b"".join([*head, *_records(frames)]), 0 if begins else offset)

    def seal(
        self, request_id: str, created_unix: float, index: Index, starts: Starts, all_frames: Sequence[bytes] = ()
    ) -> None:
        """Complete a file by its trailer; when this returns, all of it is synced to the disk.

        Args:
            request_id: the id of the request, which names the file.
            created_unix: creation time of the request, Unix seconds.
            index: the index of all frames.
            starts: (attempt, seq at which it began) of the attempts.
            all_frames: all frames, to write the whole file at once; empty if the file has them already.

        Raises:
            OSError: the file cannot be written or synced.
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
        """Return the frames whose records begin at `offsets`; the last offset is the end of the last record.

        Raises:
            OSError: the file cannot be read.
            DamagedResult: a record is damaged.
        """
        begin, end = offsets[0], offsets[-1]
        with self._open(request_id, os.O_RDONLY) as file:
            data = memoryview(_read_all(file, end - begin, begin))
        frames = []
        for offset, next_offset in itertools.pairwise(offsets):
            length, crc = _RECORD.unpack_from(data, offset - begin)
            frame = bytes(data[offset - begin + RECORD_BYTES : next_offset - begin])
            if length != len(frame) or crc != zlib.crc32(frame):
                raise DamagedResult(f"the frame at byte {offset} of {request_id}{SUFFIX} is damaged")
            frames.append(frame)
        return frames

    def load(self, request_id: str) -> Contents:
        """Load and check the header and trailer of a file; the frames themselves are checked when they are read.

        Raises:
            OSError: the file cannot be read.
            UnfinishedResult: the file has no trailer.
            DamagedResult: the file is damaged, or not a file of frames.
        """
        with self._open(request_id, os.O_RDONLY) as file:
            size = os.fstat(file).st_size
            if size < FIRST_OFFSET + _FOOTER.size:
                raise UnfinishedResult(f"{request_id}{SUFFIX} is too short")
            header = _read_all(file, _HEADER.size, 0)
            footer = _read_all(file, _FOOTER.size, size - _FOOTER.size)
            end, frames, starts, crc, whole = _FOOTER.unpack(footer)
            magic, created_unix = _HEADER.unpack(header)
            if (magic, whole) != (_MAGIC, _WHOLE) or size_of(end, frames, starts) != size:
                raise UnfinishedResult(f"{request_id}{SUFFIX} is incomplete")
            trailer = _read_all(file, size - _FOOTER.size - end, end)
        if crc != zlib.crc32(footer[: _COUNTS.size], zlib.crc32(trailer, zlib.crc32(header))):
            raise DamagedResult(f"the trailer of {request_id}{SUFFIX} is damaged")
        index = new_index()
        for (length,) in struct.iter_unpack(">I", trailer[: 4 * frames]):
            index.append(index[-1] + RECORD_BYTES + length)
        begun = _START.iter_unpack(trailer[4 * frames :])
        return Contents(created_unix=created_unix, index=index, starts=tuple((n, seq) for n, seq in begun))

    def cut(self, request_id: str, end: int) -> None:
        """Truncate the file to `end` bytes, since a failed write may have left more.

        Raises:
            OSError: the file cannot be truncated.
        """
        with self._open(request_id, os.O_WRONLY) as file:
            os.ftruncate(file, end)

    def remove(self, request_id: str) -> None:
        """Delete a file, if it exists.

        Raises:
            OSError: the file cannot be deleted.
        """
        with contextlib.suppress(FileNotFoundError):
            self._path(request_id).unlink()

    def request_ids(self) -> list[str]:
        """Return the request ids of all files whose names match; other files in the folder are ignored.

        Raises:
            OSError: the folder cannot be read.
        """
        names = (path.name for path in self.path.iterdir())
        return sorted(name.removesuffix(SUFFIX) for name in names if _NAME.fullmatch(name))

    def _need_room(self) -> None:
        self.path.mkdir(mode=0o700, exist_ok=True)  # somebody may have deleted it meanwhile
        disk = os.statvfs(self.path)
        if disk.f_bavail * disk.f_frsize < KEEP_FREE_BYTES:
            raise OSError(errno.ENOSPC, f"less than {KEEP_FREE_BYTES // 1024**2} MiB are free on the disk")

    @contextlib.contextmanager
    def _open(self, request_id: str, flags: int) -> Iterator[int]:
        flags |= os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK  # O_NONBLOCK: if it is a pipe, do not wait for its peer
        file = os.open(self._path(request_id), flags, 0o600)
        try:
            if not stat.S_ISREG(os.fstat(file).st_mode):
                raise OSError(f"{request_id}{SUFFIX} is not a regular file")
            if self._owner is not None and flags & os.O_CREAT:
                os.fchown(file, self._owner.st_uid, self._owner.st_gid)
            yield file
        finally:
            os.close(file)

    def _path(self, request_id: str) -> Path:
        """Return the path of a request's file. The wire has checked the id; this is a second check."""
        if not ID_PATTERN.fullmatch(request_id):
            raise ValueError(f"{request_id!r} is not a valid request id")
        return self.path / (request_id + SUFFIX)


def _records(frames: Sequence[bytes]) -> Iterator[bytes]:
    for data in frames:
        yield _RECORD.pack(len(data), zlib.crc32(data))
        yield data


def _write_all(file: int, data: bytes, offset: int) -> None:
    view = memoryview(data)
    while view:
        written = os.pwrite(file, view, offset)
        view, offset = view[written:], offset + written


def _read_all(file: int, size: int, offset: int) -> bytes:
    parts: list[bytes] = []
    while size:
        part = os.pread(file, size, offset)
        if not part:
            raise DamagedResult("the file of a result was truncated")
        parts.append(part)
        size, offset = size - len(part), offset + len(part)
    return b"".join(parts)
