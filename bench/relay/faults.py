"""A faulty relay, with which each run first proves that the load generator detects a relay's faults."""

import secrets
import socket
import threading
from collections.abc import Callable

from bench.relay.frames import TCP, variants
from bench.relay.generator import SATURATED, Stream, Stuck, run_round
from bench.relay.sockets import Tcp

COUNT = 8
PCM_BYTES = 500
Frames = list[bytes]


def _damaged(frames: Frames) -> Frames:
    return [*frames[:3], frames[3][:-100] + b"?" + frames[3][-99:], *frames[4:]]


#: What a relay does with eight frames, and the error that the generator must report.
_FAULTS: dict[str, tuple[Callable[[Frames], Frames], str]] = {
    "passes them on": (lambda frames: frames, ""),
    "loses one": (lambda frames: frames[:3] + frames[4:], "frame 4 in place of 3"),
    "doubles one": (lambda frames: [*frames[:4], *frames[3:]], "frame 3 in place of 4"),
    "swaps two": (lambda frames: [*frames[:3], frames[4], frames[3], *frames[5:]], "frame 4 in place of 3"),
    "damages one": (_damaged, "frame 3 is damaged"),
    "cuts one": (lambda frames: [*frames[:3], frames[3][:-9], *frames[4:]], "frame 3 is damaged"),
    "sends one too many": (lambda frames: [*frames, frames[-1]], "in place of 8"),
}


def prove() -> None:
    """Check the generator; raises RuntimeError if it misses a fault, or reports one that does not exist."""
    for behaviour, (err, expected) in _FAULTS.items():
        try:
            _round(err)
            report = ""
        except Stuck as stuck:
            report = str(stuck)
        if expected not in report or bool(report) != bool(expected):
            message = f"a relay that {behaviour}: the load generator reports {report!r} instead of {expected!r}"
            raise RuntimeError(message)


def _round(err: Callable[[Frames], Frames]) -> None:
    name = secrets.token_hex(16)
    made = variants(name, PCM_BYTES, 0, COUNT, TCP)
    (ours_in, theirs_in), (theirs_out, ours_out) = socket.socketpair(), socket.socketpair()
    sender, reader = Tcp.of_socket(ours_in), Tcp.of_socket(ours_out)

    def relay() -> None:
        size = len(made[0].wire)
        frames = [theirs_in.recv(size, socket.MSG_WAITALL) for _ in range(COUNT)]
        theirs_out.sendall(b"".join(err(frames)))

    thread = threading.Thread(target=relay)
    thread.start()
    try:
        run_round(SATURATED, [Stream(sender, [reader], made, 0, COUNT)], [], [])
    finally:
        ours_in.shutdown(socket.SHUT_RDWR)  # ends the wait if nothing was sent
        thread.join()
        for end in (ours_in, theirs_in, theirs_out, ours_out):
            end.close()
