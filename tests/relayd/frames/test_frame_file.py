import contextlib
import errno
import itertools
import os
import stat
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from relayd.frames import frame_file
from relayd.frames.frame_file import FIRST_OFFSET, DamagedResult, Index, ResultFolder, extend, new_index
from tests.support.relay import an_id

FRAMES = [b"started", b"x" * 70_000, b"", b"completed"]
STARTS = ((2, 0), (3, 2))
MADE = 1_700_000_000.25


def a_file(folder: ResultFolder, frames: list[bytes], *, seal: bool = True) -> tuple[str, Index]:
    request_id, index = an_id(), new_index()
    folder.write(request_id, MADE, FIRST_OFFSET, frames)
    extend(index, frames)
    if seal:
        folder.seal(request_id, MADE, index, STARTS)
    return request_id, index


@pytest.fixture
def folder(tmp_path: Path) -> ResultFolder:
    return ResultFolder(tmp_path / "results")


def path_of(folder: ResultFolder, request_id: str) -> Path:
    return folder.path / f"{request_id}.frames"


def test_what_was_written_is_read_back(folder: ResultFolder) -> None:
    request_id, index = a_file(folder, FRAMES)
    contents = folder.load(request_id)
    assert (contents.created_unix, contents.starts, contents.frames) == (MADE, STARTS, 4)
    assert contents.index == index
    assert contents.frame_bytes == sum(map(len, FRAMES))
    assert contents.file_bytes == path_of(folder, request_id).stat().st_size
    assert folder.read(request_id, contents.index) == FRAMES
    for seq, (here, there) in enumerate(itertools.pairwise(index)):
        assert folder.read(request_id, (here, there)) == [FRAMES[seq]]


def test_a_small_result_is_written_in_one_go(folder: ResultFolder) -> None:
    (apart, index), once = a_file(folder, FRAMES), an_id()
    folder.write(once, MADE, FIRST_OFFSET, [b"left over" * 100_000])
    folder.seal(once, MADE, index, STARTS, FRAMES)
    assert path_of(folder, once).read_bytes() == path_of(folder, apart).read_bytes()


def test_a_result_is_the_daemons_alone(folder: ResultFolder) -> None:
    request_id, _ = a_file(folder, FRAMES)
    assert stat.S_IMODE(folder.path.stat().st_mode) == 0o700
    assert stat.S_IMODE(path_of(folder, request_id).stat().st_mode) == 0o600


def test_what_a_restarted_attempt_left_behind_is_cut_off(folder: ResultFolder) -> None:
    request_id, index = a_file(folder, FRAMES, seal=False)
    del index[2:]
    folder.write(request_id, MADE, index[-1], [b"other"])
    extend(index, [b"other"])
    folder.seal(request_id, MADE, index, STARTS)
    assert folder.read(request_id, folder.load(request_id).index) == [b"started", b"other"]


def test_a_file_of_an_earlier_life_is_begun_anew(folder: ResultFolder) -> None:
    request_id, _ = a_file(folder, FRAMES)
    folder.write(request_id, MADE + 1, FIRST_OFFSET, [b"x"])
    with pytest.raises(DamagedResult):
        folder.load(request_id)


@pytest.mark.parametrize("name", ["", "../relayd.db", "A" * 32, "0" * 31, "0" * 32 + "/..", "0" * 32 + "\n"])
def test_no_name_leads_out_of_the_folder(folder: ResultFolder, name: str) -> None:
    for use in (folder.load, folder.remove, lambda each: folder.write(each, MADE, FIRST_OFFSET, FRAMES)):
        with pytest.raises(ValueError, match="is not a valid request id"):
            use(name)


def test_what_lies_in_the_way_is_not_followed(folder: ResultFolder, tmp_path: Path) -> None:
    precious, request_id = tmp_path / "precious", an_id()
    precious.write_bytes(b"do not touch")
    path_of(folder, request_id).symlink_to(precious)
    with pytest.raises(OSError, match="symbolic link"):
        folder.write(request_id, MADE, FIRST_OFFSET, FRAMES)
    assert precious.read_bytes() == b"do not touch"
    pipe = an_id()
    os.mkfifo(path_of(folder, pipe))
    with pytest.raises(OSError, match="is not a regular file"):
        folder.load(pipe)


def test_only_files_of_ours_are_listed(folder: ResultFolder) -> None:
    ids = sorted(a_file(folder, FRAMES)[0] for _ in range(3))
    (folder.path / "notes.txt").touch()
    (folder.path / f"{ids[0]}.frames.bak").touch()
    assert folder.request_ids() == ids
    for request_id in ids * 2:
        folder.remove(request_id)
    assert folder.request_ids() == []
    assert (folder.path / "notes.txt").exists()


def test_a_file_that_was_cut_anywhere_is_not_whole(folder: ResultFolder) -> None:
    request_id, _ = a_file(folder, [b"a" * 50, b"b"])
    path = path_of(folder, request_id)
    data = path.read_bytes()
    for length in range(len(data)):
        path.write_bytes(data[:length])
        with pytest.raises(DamagedResult):
            folder.load(request_id)


@settings(deadline=None)
@given(st.integers(0), st.integers(1, 255))
def test_a_flipped_byte_is_never_passed_on(tmp_path_factory: pytest.TempPathFactory, where: int, flip: int) -> None:
    folder = ResultFolder(tmp_path_factory.mktemp("flip") / "results")
    frames = [b"a" * 50, b"b", b"c" * 20]
    request_id, _ = a_file(folder, frames)
    path = path_of(folder, request_id)
    data = bytearray(path.read_bytes())
    data[where % len(data)] ^= flip
    path.write_bytes(data)
    with pytest.raises(DamagedResult):
        folder.read(request_id, folder.load(request_id).index)


def test_the_last_of_the_disk_is_left_to_the_store(folder: ResultFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    disk = os.statvfs(folder.path)
    monkeypatch.setattr(frame_file, "KEEP_FREE_BYTES", (disk.f_blocks + 1) * disk.f_frsize)
    with pytest.raises(OSError, match="MiB are free on the disk") as refused:
        a_file(folder, FRAMES)
    assert refused.value.errno == errno.ENOSPC
    assert folder.request_ids() == []


@pytest.mark.parametrize("missing", [0, 1])
def test_sixteen_mebibytes_are_left_to_the_store(
    folder: ResultFolder, monkeypatch: pytest.MonkeyPatch, missing: int
) -> None:
    request_id, index = a_file(folder, FRAMES, seal=False)
    free = SimpleNamespace(f_frsize=4096, f_bavail=16 * 1024 * 1024 // 4096 - missing)
    monkeypatch.setattr(os, "statvfs", lambda _path: free)
    calls: list[Callable[[], None]] = [
        lambda: folder.write(request_id, MADE, index[-1], [b"more"]),
        lambda: folder.seal(request_id, MADE, index, STARTS),
    ]
    for call in calls:
        with pytest.raises(OSError, match="MiB are free") if missing else contextlib.nullcontext():
            call()


def test_a_result_is_synced_with_its_name_when_it_is_sealed_and_nothing_stays_open(
    folder: ResultFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced = []

    def sync(file: int) -> None:
        synced.append(str(Path(f"/proc/self/fd/{file}").readlink()))

    monkeypatch.setattr(os, "fdatasync", sync)
    monkeypatch.setattr(os, "fsync", sync)
    before = len(list(Path("/proc/self/fd").iterdir()))
    request_id, _ = a_file(folder, FRAMES)
    folder.load(request_id)
    assert synced == [str(path_of(folder, request_id)), str(folder.path)]
    assert len(list(Path("/proc/self/fd").iterdir())) == before


def test_what_the_system_writes_and_reads_in_pieces_is_whole(
    folder: ResultFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    pwrite, pread = os.pwrite, os.pread
    monkeypatch.setattr(os, "pwrite", lambda file, data, offset: pwrite(file, data[:7], offset))
    monkeypatch.setattr(os, "pread", lambda file, size, offset: pread(file, min(size, 7), offset))
    request_id, index = a_file(folder, [b"started" * 9, b"completed"])
    assert folder.read(request_id, folder.load(request_id).index) == [b"started" * 9, b"completed"]
    assert folder.load(request_id).index == index


def test_nothing_is_left_of_a_file_that_is_begun_anew_and_none_is_made_by_sealing(folder: ResultFolder) -> None:
    request_id, _ = a_file(folder, FRAMES)
    folder.write(request_id, MADE, FIRST_OFFSET, [b"x"])
    assert path_of(folder, request_id).stat().st_size == extend_one(b"x")[-1]
    with pytest.raises(FileNotFoundError):
        folder.seal(an_id(), MADE, extend_one(b"x"), STARTS)
    assert folder.request_ids() == [request_id]


def extend_one(frame: bytes) -> Index:
    index = new_index()
    extend(index, [frame])
    return index


def test_a_result_without_frames_is_whole(folder: ResultFolder) -> None:
    request_id, _ = a_file(folder, [])
    contents = folder.load(request_id)
    assert (contents.frames, contents.frame_bytes) == (0, 0)
    empty = an_id()
    folder.write(empty, MADE, FIRST_OFFSET, [])
    folder.seal(empty, MADE, new_index(), ())
    assert folder.load(empty).frames == 0


def test_a_folder_that_was_deleted_is_made_again_and_one_that_is_there_is_used(tmp_path: Path) -> None:
    folder = ResultFolder(tmp_path / "results")
    folder.path.rmdir()
    a_file(folder, FRAMES)
    assert len(ResultFolder(folder.path).request_ids()) == 1


def test_what_root_makes_belongs_to_the_owner_of_the_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    owner, given = tmp_path.stat(), []

    def give(what: Path | int, uid: int, gid: int, *, follow_symlinks: bool = True) -> None:
        name = what if isinstance(what, Path) else Path(f"/proc/self/fd/{what}").readlink()
        given.append((name, uid, gid))

    monkeypatch.setattr("os.chown", give)
    monkeypatch.setattr("os.fchown", give)
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    a_file(ResultFolder(tmp_path / "own"), FRAMES)
    assert not given
    monkeypatch.setattr("os.geteuid", lambda: 0)
    folder = ResultFolder(tmp_path / "results")
    request_id, _ = a_file(folder, FRAMES)
    assert given == [(path, owner.st_uid, owner.st_gid) for path in (folder.path, path_of(folder, request_id))]
