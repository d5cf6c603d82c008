"""How the pieces of fed inputs are sent to a worker, over cuts and attempts: in order, once, and within its window."""

import attrs
from hypothesis import given
from hypothesis import strategies as st

from protocol.wire.messages import MAX_INPUT_CHUNK_BYTES, MAX_UNACKED_BYTES
from relayd.connections.input_sender import AttemptFeeding
from relayd.requests.live_input import LiveInput, Piece


@attrs.define
class FarEnd:
    """A worker that gets an input, its engine, and the link between them and the relay."""

    log: LiveInput
    received: int = 0
    taken: int = 0
    ended: bool = False
    feeding: AttemptFeeding = attrs.field(factory=lambda: AttemptFeeding(1, {"text": 0}))

    def send(self) -> None:
        """Send one piece, if one is due."""
        if (size := self.feeding.due("text", self.log)) is None:
            return
        assert 0 <= size <= MAX_INPUT_CHUNK_BYTES
        offset = self.feeding.sent["text"]
        assert offset == self.received, "in order, and nothing twice"
        assert size or (self.log.ended and offset == self.log.size), "nothing is sent for nothing"
        self.received += size
        assert self.received <= self.log.size, "only what is stored"
        assert self.received - self.taken <= MAX_UNACKED_BYTES, "within the window"
        self.feeding.sent["text"] = self.received
        if self.log.ended and self.received == self.log.size:
            self.feeding.done.add("text")
            self.ended = True

    def take(self, share: float, *, heard: bool) -> None:
        """The engine takes a share of what is there; the relay hears of it, or the link is cut before."""
        self.taken += round(share * (self.received - self.taken))
        if heard:
            self.log.on_taken(self.taken, 1.0)

    def cut(self) -> None:
        """The link ends, and the worker registers again: it says what it has, and what its engine has taken."""
        self.feeding = AttemptFeeding(1, {"text": self.received})
        self.send()  # nothing beyond the window, whatever the relay knows
        self.log.on_taken(self.taken, 1.0)

    def restart(self) -> None:
        """The relay is started again, with what is stored."""
        self.log = LiveInput(rate=1.0, size=self.log.size, ended=self.log.ended)
        self.cut()

    def begin_anew(self) -> None:
        """Another attempt gets all of it."""
        self.log.begin_attempt()
        self.received, self.taken, self.ended = 0, 0, False
        self.feeding = AttemptFeeding(2, {"text": 0})

    def store(self, size: int, *, last: bool = False) -> None:
        """More of it is stored."""
        if not self.log.ended:
            self.log.grow(self.log.size + size, 1.0, ended=last)


steps = st.lists(
    st.one_of(
        st.integers(0, MAX_UNACKED_BYTES).map(lambda size: ("store", float(size))),
        st.floats(0.0, 1.0).map(lambda share: ("take", share)),
        st.floats(0.0, 1.0).map(lambda share: ("take unheard", share)),
        st.sampled_from([("send", 0.0), ("cut", 0.0), ("restart", 0.0), ("anew", 0.0), ("end", 0.0)]),
    ),
    max_size=50,
)


@given(steps=steps)
def test_an_input_reaches_the_engine_in_order_and_within_the_window_over_cuts_and_attempts(
    steps: list[tuple[str, float]],
) -> None:
    end = FarEnd(LiveInput(rate=1.0))
    for kind, value in steps:
        match kind:
            case "store":
                end.store(int(value))
            case "end":
                end.store(0, last=True)
            case "take" | "take unheard":
                end.take(value, heard=kind == "take")
            case "send":
                end.send()
            case "cut":
                end.cut()
            case "restart":
                end.restart()
            case "anew":
                end.begin_anew()
    end.store(0, last=True)
    end.cut()
    for _ in range(2 + end.log.size // MAX_UNACKED_BYTES):
        end.send()
        end.take(1.0, heard=True)
    assert end.ended
    assert end.received == end.taken == end.log.size
    assert end.feeding.due("text", end.log) is None


def test_a_stored_piece_is_due_at_once_and_its_end_once() -> None:
    log, feeding = LiveInput(rate=1.0), AttemptFeeding(1, {"text": 0})
    assert feeding.due("text", log) is None
    log.on_stored(Piece(0, b"abc", last=True), 1.0)
    assert feeding.due("text", log) == 3
    feeding.sent["text"] = 3
    assert feeding.due("text", log) == 0
    feeding.done.add("text")
    assert feeding.due("text", log) is None
