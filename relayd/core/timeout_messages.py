"""What a request is told whose time is over: why, and what its sender can do."""

from protocol.wire.frames import RUN_TIMEOUT_ADVICE
from relayd.requests.request import Request


def queue_timeout_message(request: Request, *, is_paused: bool, is_served: bool) -> str:
    """Why a request did not start in time.

    Args:
        request: one that waits for a slot.
        is_paused: whether its space is paused.
        is_served: whether a worker is connected to the space that starts requests.
    """
    space, within = request.submit.space, f"within {request.queue_timeout_s:g} s"
    waited = f"it waited {request.queue_timeout_s:g} s"
    if is_paused:
        return f"space {space!r} is paused; {waited}: try again when it is resumed"
    if not is_served:
        return f"no worker is connected to space {space!r}; {waited}: try again when one is"
    if request.entry.alone:
        return (
            f"the process of its engine ended as it ran with others, and no worker of space {space!r} could run it "
            f"alone {within}; try again later"
        )
    if request.entry.failed_on:
        return (
            f"its engine failed on {', '.join(sorted(request.entry.failed_on))}, and no slot of another worker of "
            f"space {space!r} was free {within}; try again later"
        )
    return f"no slot of space {space!r} was free {within}; try again later, or set a longer queue_timeout_s"


def feed_timeout_message(request: Request, feed_idle_timeout_s: float) -> str:
    """Why a request was ended whose engine waited for its feeder."""
    names = " and ".join(map(repr, request.awaited_inputs))
    return (
        f"its engine waits for more of its live input {names}, and nothing came for {feed_idle_timeout_s:g} s, the "
        "relay's feed_idle_timeout_s; send it without long pauses, and end it with `last`"
    )


def run_timeout_message(request: Request) -> str:
    """Why a request that ran was ended."""
    return f"it ran for more than {request.run_timeout_s:g} s; {RUN_TIMEOUT_ADVICE}"
