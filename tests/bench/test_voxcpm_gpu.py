"""The bench of VoxCPM, as its smoke test runs it: tiny models on the CPU, both sides with real processes."""

import os
import re
from pathlib import Path

import pytest

from bench.__main__ import main
from bench.voxcpm.gpu import Row
from bench.voxcpm.round import MAX_STEPS, MIN_STEPS, Deadline, Side, Spoken, make_job, resident_bytes


def processes_with(word: str) -> list[str]:
    """Command lines of processes that name `word`."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            command = entry.read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:  # it has ended
            continue
        if word in command:
            found.append(command)
    return found


def test_both_sides_make_the_same_samples_and_leave_no_process(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    models, out = tmp_path / "models", tmp_path / "out.md"
    only = ["--size", "tiny", "--device", "cpu", "--arch", "voxcpm", "--slots", "1", "--steps", "12", "--rounds", "1"]
    assert main(["voxcpm", *only, "--seconds", "1000", "--folder", str(models), "--out", str(out)]) == 0
    told = capsys.readouterr().out
    assert out.read_text(encoding="utf-8") == told
    line = next(line for line in told.splitlines() if line.startswith("| VoxCPM 0.5B | 1 |"))
    assert line.endswith("| yes |")
    assert line.count("(**") == 6  # every figure was measured on both sides
    assert "12 steps from 1 characters" in told
    assert processes_with(str(models)) == []


def test_what_there_is_no_time_for_is_skipped_with_a_word_and_is_no_failure(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    only = ["--size", "tiny", "--device", "cpu", "--arch", "voxcpm", "--slots", "1,2", "--seconds", "0"]
    (tmp_path / "voxcpm-tiny").mkdir()
    (tmp_path / "voxcpm-tiny" / "written").touch()
    assert main(["voxcpm", *only, "--folder", str(tmp_path)]) == 0
    told = capsys.readouterr().out
    assert "VoxCPM 0.5B, 1 slot, plain: skipped: the time was up" in told
    assert "VoxCPM 0.5B, 2 slots, relayd: skipped: the time was up" in told


@pytest.mark.parametrize("steps", [MIN_STEPS, 13, 24, 30, 100, 333, MAX_STEPS])
def test_a_text_is_made_for_exactly_so_many_steps(steps: int) -> None:
    job = make_job(steps, 10)
    tokens = len(job.text) + 1  # as the tokenizer of the checkpoints counts them
    assert int(tokens * job.ratio + 10) == steps
    assert 1 <= job.ratio <= 20


def test_other_samples_are_told_and_are_a_failure() -> None:
    def side(digest: str) -> Side:
        return Side([[Spoken(0.1, 1.0, 2.0, digest)]], frozenset({"a"}), [3.0], None)

    row = Row(arch="voxcpm2", slots=1, plain=side("a"), path=side("b"))
    assert row.failed
    assert row.line().endswith("| – / – | **NO** |")
    assert re.search(r"\| 0\.500 / 0\.500 \(\*\*1\.00\*\*\) \|", row.line())


def test_a_side_that_broke_is_told_and_is_a_failure() -> None:
    row = Row(arch="voxcpm2", slots=2, plain=("needs 90 GiB", False), path=("CUDA went away", True))
    assert row.failed
    assert list(row.notes()) == [
        "VoxCPM2, 2 slots, plain: skipped: needs 90 GiB",
        "VoxCPM2, 2 slots, relayd: failed: CUDA went away",
    ]


def test_memory_counts_the_processes_that_a_process_started() -> None:
    assert resident_bytes([os.getppid()]) > resident_bytes([os.getpid()]) > 1024**2
    assert Deadline.after(5.0).left_s() > 4.0


def test_a_batch_is_compared_with_plain_speech_and_leaves_no_process(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    models, out = tmp_path / "models", tmp_path / "out.md"
    only = ["--size", "tiny", "--device", "cpu", "--arch", "voxcpm", "--rows", "2", "--steps", "12", "--rounds", "1"]
    assert main(["voxcpm", "--batch", *only, "--processes", "0", "--folder", str(models), "--out", str(out)]) == 0
    told = capsys.readouterr().out
    assert out.read_text(encoding="utf-8") == told
    line = next(line for line in told.splitlines() if line.startswith("| voxcpm, tiny | 2 |"))
    assert line.count("**") == 4
    assert line.count("/ – /") == 3  # no processes were asked for
    assert processes_with(str(models)) == []
