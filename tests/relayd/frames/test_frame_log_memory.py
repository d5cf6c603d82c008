"""A frame log's memory: what is counted, the exact limits, and what is left when frames are released or dropped."""

import pytest

from relayd.frames.frame_log import FRAME_COST_BYTES, HIGH_WATER_BYTES, FrameLog, FrameReader, MemoryBudget
from tests.relayd.frames.test_frame_log import frame, reader_of

COST = 10 + FRAME_COST_BYTES


def a_log(frames: int, *, end: bool = False) -> FrameLog:
    log = FrameLog()
    for number in range(frames):
        log.append(frame(number), ends=end and number == frames - 1)
    return log


@pytest.mark.parametrize("at_once", [False, True])
def test_memory_is_over_only_beyond_its_limit_and_says_so_with_each_frame(at_once: bool) -> None:
    told: list[int] = []
    memory = MemoryBudget(limit_bytes=2 * COST)
    memory.on_exceeded = lambda: told.append(memory.held_bytes)
    log = FrameLog(memory=memory)
    for number in range(2):
        log.extend([frame(number)], 10) if at_once else log.append(frame(number))
    assert (memory.held_bytes, memory.over, told) == (2 * COST, False, [])
    memory.add(0)
    assert not told
    log.extend([frame(2)], 10) if at_once else log.append(frame(2))
    assert (memory.over, told) == (True, [3 * COST])
    memory.add(0)
    assert told == [3 * COST] * 2


def test_frames_are_taken_until_there_are_enough_bytes() -> None:
    log = a_log(4)
    assert log.frames_from(0, 20) == ([frame(0), frame(1)], 20)
    assert log.frames_from(1, 21) == ([frame(1), frame(2), frame(3)], 30)
    assert log.frames_from(4, 20) == ([], 0)
    assert (log.frame(0), log.frame(3)) == (frame(0), frame(3))


@pytest.mark.parametrize(
    ("most_bytes", "most_frames", "count"), [(20, 9, 2), (19, 9, 1), (5, 9, 1), (100, 2, 2), (100, 9, 4)]
)
def test_what_is_written_next_stays_within_both_limits(most_bytes: int, most_frames: int, count: int) -> None:
    assert a_log(4).next_unwritten(most_bytes, most_frames) == [frame(number) for number in range(count)]


def test_several_frames_go_out_at_once_to_whoever_has_room_for_all_and_is_up_to_date() -> None:
    log = FrameLog()
    _, quick = reader_of(log)
    behind, full = reader_of(log)
    full.backlog_bytes = HIGH_WATER_BYTES
    log.append(frame(0))
    exact = [frame(1, HIGH_WATER_BYTES // 2), frame(2, HIGH_WATER_BYTES // 2 - 10)]
    log.extend(exact, HIGH_WATER_BYTES - 10)
    assert quick.got == [frame(0), *exact]
    assert not full.got
    assert (log.next_seq, log.size_bytes) == (3, HIGH_WATER_BYTES)
    assert log.memory_bytes == log.memory.held_bytes == HIGH_WATER_BYTES + 3 * FRAME_COST_BYTES
    quick.backlog_bytes = HIGH_WATER_BYTES - 19
    log.extend([frame(3), frame(4)], 20)
    assert quick.got[3:] == [frame(3), frame(4)], "each while there is room"
    quick.backlog_bytes = HIGH_WATER_BYTES - 10
    log.extend([frame(5), frame(6)], 20)
    assert quick.got[5:] == [frame(5)], "and no further"
    full.backlog_bytes = 0
    behind.pump()
    full.backlog_bytes = 0
    behind.pump()
    assert full.got == [frame(0), *exact, *(frame(number) for number in range(3, 7))]


def test_whoever_has_read_all_of_an_ended_log_is_sent_its_last_frame_again() -> None:
    log = a_log(3, end=True)
    assert (log.resume_seq(1, 99), log.resume_seq(1, 2), log.resume_seq(1, 1), log.resume_seq(1, 0)) == (2, 2, 2, 1)
    assert a_log(3).resume_seq(1, 2) == 3


def test_of_a_dropped_log_the_last_frame_may_stay_and_goes_to_whoever_reads() -> None:
    log = a_log(3)
    _, stuck = reader_of(log)
    slow, full = reader_of(log)
    full.got.clear()
    slow.seq, full.backlog_bytes = 1, HIGH_WATER_BYTES
    log.append(frame(3), ends=True)
    assert stuck.read == ["key"]
    restarts = log.restarts
    log.drop(b"how it ended")
    assert log.restarts == restarts + 1
    assert (log.first_seq, log.next_seq, log.is_complete, log.in_memory) == (3, 4, False, True)
    assert (log.frame(2), log.frame(3)) == (None, b"how it ended")
    assert log.frames_from(2, 100) == ([], 0)
    assert (log.size_bytes, log.memory_bytes, log.memory.held_bytes) == (
        12,
        12 + FRAME_COST_BYTES,
        12 + FRAME_COST_BYTES,
    )
    full.backlog_bytes = 0
    slow.pump()
    assert (full.got, full.read) == ([b"how it ended"], ["key"])
    _, late = reader_of(log)
    assert (late.got, late.read) == ([b"how it ended"], ["key"])
    log.release_written()
    assert log.frame(3) == b"how it ended", "nothing of it is in a file"
    log.drop()
    assert (log.first_seq, log.frame(3), log.memory.held_bytes) == (4, None, 0)


def test_a_drop_sends_nothing_to_a_reader_that_has_it_all() -> None:
    log = a_log(2)
    reader, bucket = reader_of(log)
    log.drop()
    assert (reader.seq, reader.is_open, len(bucket.got)) == (2, True, 2)
    log.append(frame(2), ends=True)
    assert bucket.got[2:] == [frame(2)]


def test_what_was_read_ahead_counts_as_memory_until_it_is_sent_or_discarded() -> None:
    memory = MemoryBudget()
    log = FrameLog(memory=memory, next_seq=3, base=3, ended=True)
    reader, bucket = reader_of(log)
    bucket.backlog_bytes = HIGH_WATER_BYTES
    reader.feed([frame(0), frame(1)])
    assert (memory.held_bytes, bucket.got) == (20, [])
    bucket.backlog_bytes = HIGH_WATER_BYTES - 10
    reader.pump()
    assert (memory.held_bytes, bucket.got) == (10, [frame(0)])
    memory.limit_bytes = 10
    reader.pump()
    assert memory.held_bytes == 10, "it is not over its limit"
    reader.close()
    assert memory.held_bytes == 0


def test_what_was_read_ahead_is_discarded_while_memory_is_short() -> None:
    log = FrameLog(memory=MemoryBudget(limit_bytes=19), next_seq=3, base=3, ended=True)
    reader, bucket = reader_of(log)
    bucket.backlog_bytes = HIGH_WATER_BYTES
    reader.feed([frame(0), frame(1)])
    assert log.memory.held_bytes == 0
    log.memory.limit_bytes = 20
    reader.feed([frame(0), frame(1)])
    assert log.memory.held_bytes == 20
    reader.seek(1)
    assert log.memory.held_bytes == 0


def test_frames_are_asked_for_once_until_they_come() -> None:
    log = FrameLog(next_seq=3, base=3, ended=True)
    asked = []

    def fetch(reader: FrameReader) -> None:
        asked.append(reader.seq)
        reader.prefetching = True

    log.fetch = fetch
    reader, bucket = reader_of(log)
    reader.pump()
    assert asked == [0]
    reader.prefetching = False
    reader.feed([frame(0)])
    assert (asked, bucket.got) == ([0, 1], [frame(0)])
