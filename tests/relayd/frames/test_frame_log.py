from hypothesis import given
from hypothesis import strategies as st

from relayd.frames.frame_log import FRAME_COST_BYTES, HIGH_WATER_BYTES, FrameLog, FrameReader

#: Four of them fill a sink.
BIG = HIGH_WATER_BYTES // 4


class Bucket:
    """A sink that is drained by the test."""

    def __init__(self) -> None:
        self.backlog_bytes = 0
        self.got: list[bytes] = []
        self.read: list[str] = []

    def send_frames(self, frames: list[bytes], size: int) -> None:
        assert self.backlog_bytes + sum(map(len, frames[:-1])) < HIGH_WATER_BYTES, "no more than a sink takes"
        assert size == sum(map(len, frames))
        self.backlog_bytes += size
        self.got += frames

    def on_all_sent(self, reader: FrameReader) -> None:
        self.read.append(reader.key)

    def on_read_error(self, reader: FrameReader) -> None:
        raise AssertionError("nothing is read back here")


def frame(number: int, size: int = 10) -> bytes:
    return number.to_bytes(4, "big").ljust(size, b".")


def reader_of(log: FrameLog, seq: int = 0) -> tuple[FrameReader, Bucket]:
    bucket = Bucket()
    reader = FrameReader("key", log, bucket, seq)
    reader.open()
    return reader, bucket


def test_a_reader_gets_what_is_there_and_what_comes_each_as_the_bytes_that_came() -> None:
    log = FrameLog()
    first, second = frame(0), frame(1)
    log.append(first)
    _, bucket = reader_of(log)
    log.append(second)
    assert bucket.got[0] is first
    assert bucket.got[1] is second


def test_readers_begin_where_they_ask_to() -> None:
    log = FrameLog()
    for number in range(4):
        log.append(frame(number))
    _, late = reader_of(log, 2)
    _, ahead = reader_of(log, 4)
    log.append(frame(4))
    assert late.got == [frame(2), frame(3), frame(4)]
    assert ahead.got == [frame(4)]


def test_a_reader_that_has_read_all_of_an_ended_log_leaves_it_once() -> None:
    log = FrameLog()
    _, bucket = reader_of(log)
    log.append(frame(0))
    assert not bucket.read
    log.append(frame(1), ends=True)
    assert bucket.read == ["key"]
    assert not log.readers
    _, late = reader_of(log)
    assert late.got == bucket.got
    assert late.read == ["key"]
    assert not log.readers


def test_a_full_sink_holds_up_nobody_else() -> None:
    log = FrameLog()
    slow, full = reader_of(log)
    _, other = reader_of(log)
    for number in range(10):
        log.append(frame(number, BIG), ends=number == 9)
        other.backlog_bytes = 0
    assert len(full.got) == 4
    assert len(other.got) == 10
    while not slow.done:
        full.backlog_bytes = 0
        slow.pump()
    assert full.got == other.got
    assert full.read == ["key"]
    assert not log.readers


def test_a_closed_reader_gets_nothing_more() -> None:
    log = FrameLog()
    reader, bucket = reader_of(log)
    reader.close()
    reader.close()
    log.append(frame(0), ends=True)
    assert not bucket.got
    assert not bucket.read


def test_a_restart_forgets_what_lies_behind_it_and_takes_readers_back() -> None:
    log = FrameLog()
    _, bucket = reader_of(log)
    for number in range(3):
        log.append(frame(number))
    log.restart(2, 1)
    assert log.next_seq == 1
    assert log.size_bytes == len(frame(0))
    log.append(frame(7))
    assert bucket.got == [frame(0), frame(1), frame(2), frame(7)]


def test_where_a_reader_goes_on_after_a_cut() -> None:
    log = FrameLog()
    for number in range(10):
        log.append(frame(number))
    assert log.resume_seq(1, 4) == 5
    assert log.resume_seq(0, -1) == 0
    assert log.resume_seq(1, 99) == 10, "never beyond what is there"
    log.restart(2, 3)
    for number in range(3, 8):
        log.append(frame(number))
    assert log.resume_seq(1, 5) == 3, "its frames from 3 on are void"
    assert log.resume_seq(1, 1) == 2
    assert log.resume_seq(2, 5) == 6
    log.restart(3, 6)
    assert log.resume_seq(2, 7) == 6
    assert log.resume_seq(1, 7) == 3


def test_dropping_frees_the_memory() -> None:
    log = FrameLog()
    log.append(frame(0), ends=True)
    log.drop()
    assert log.memory_bytes == log.memory.held_bytes == log.size_bytes == 0


steps = st.lists(
    st.one_of(
        st.tuples(st.just("append"), st.sampled_from([10, BIG, 2 * BIG])),
        st.tuples(st.sampled_from(["open", "drain", "restart"]), st.integers(0, 30)),
    ),
    max_size=60,
)


@given(steps)
def test_every_reader_ends_with_every_frame_in_order(plan: list[tuple[str, int]]) -> None:
    """As a client sees it: a frame replaces what it holds from that `seq` on."""
    log, attempt = FrameLog(), 1
    readers: list[tuple[FrameReader, Bucket]] = []
    truth: list[bytes] = []

    def tagged(size: int) -> bytes:
        return (len(truth)).to_bytes(4, "big") + attempt.to_bytes(4, "big") + bytes(size)

    for step, value in plan:
        if step == "append":
            truth.append(tagged(value))
            log.append(truth[-1])
        elif step == "open":
            readers.append(reader_of(log))
        elif step == "drain" and readers:
            reader, bucket = readers[value % len(readers)]
            bucket.backlog_bytes = 0
            reader.pump()
        elif step == "restart":
            attempt += 1
            del truth[min(value, len(truth)) :]
            log.restart(attempt, len(truth))
        assert log.next_seq == len(truth)
        assert log.size_bytes == sum(map(len, truth))
        assert log.memory_bytes == log.memory.held_bytes == log.size_bytes + FRAME_COST_BYTES * len(truth)
    truth.append(tagged(1))
    log.append(truth[-1], ends=True)
    for reader, bucket in readers:
        while not reader.done:
            bucket.backlog_bytes = 0
            reader.pump()
        view: list[bytes] = []
        for data in bucket.got:
            seq = int.from_bytes(data[:4], "big")
            assert seq <= len(view), "none is missing"
            if seq < len(view):
                assert int.from_bytes(data[4:8], "big") > int.from_bytes(view[seq][4:8], "big"), "none comes twice"
            del view[seq:]
            view.append(data)
        assert view == truth
        assert bucket.read == ["key"]
    assert not log.readers
