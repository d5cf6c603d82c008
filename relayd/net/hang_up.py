"""Ends a connection with an answer that the peer can read."""

import trio

#: Time for the peer to read the answer.
HANG_UP_S = 1.0
HANG_UP_READS = 64


async def answer_and_hang_up(stream: trio.abc.Stream, answer: bytes) -> None:
    """Send an answer, and let the peer read it: to close with unread bytes would reset the connection."""
    try:
        with trio.move_on_after(HANG_UP_S):
            await stream.send_all(answer)
            if isinstance(stream, trio.SocketStream):
                await stream.send_eof()
                for _ in range(HANG_UP_READS):
                    if not await stream.receive_some():
                        break
    except (trio.BrokenResourceError, trio.ClosedResourceError):
        return
