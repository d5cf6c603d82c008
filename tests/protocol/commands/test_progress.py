"""What is told of a request that has ended."""

import io

from protocol.commands.progress import Progress


def test_what_the_relay_had_already_is_told_as_such() -> None:
    out = io.StringIO()
    progress = Progress(out, clock=lambda: 0.0)
    progress.completed(6.0, "out.wav", cached=True)
    assert out.getvalue() == "6.0 s of audio in 0.0 s, from the relay's cache -> out.wav\n"
