"""Why a queued request waits: who is ahead of it, on how many slots, and when it is likely to start."""

from collections import Counter

from tui.model import formatting
from tui.model.formatting import plain
from tui.model.relay_model import RowView

#: More slots than any space has; a relay may say anything.
MAX_SLOTS = 10_000


def starts_s(view: RowView, now: float) -> float | None:
    """Seconds until a queued request is likely to start, if nothing moves it; None where that is not known.

    As soon as each running request has taken as long as is usual in the space, the next of the queue starts.
    """
    place, slots, usual = view.position, _slots(view), view.model.usual_run_s(view.text("space"))
    if place is None or not slots or usual is None:
        return None
    running = view.model.rows_in("running", view.text("space"))
    left = sorted(max(0.0, usual - (one.aged("run_s", now) or 0.0)) for one in running)[:slots]
    left = [0.0] * (slots - len(left)) + left
    rounds, slot = divmod(place - 1, slots)
    return left[slot] + rounds * usual


def why(view: RowView, now: float) -> str:
    """One line about a queued request: `#13, starts in 3m20s: 12 ahead on 1 slot at 16.0 s; alice has 9 of them`."""
    place = view.position or 0
    ahead = view.model.queue(view.text("space"))[: max(0, place - 1)]
    space, slots = view.model.get("spaces", view.text("space")), _slots(view)
    usual = view.model.usual_run_s(view.text("space"))
    text = f"#{place}"
    if (eta := starts_s(view, now)) is not None:
        text += f", starts in {formatting.age(eta)}"
    text += f": {len(ahead)} ahead on {slots} slot{'' if slots == 1 else 's'}"
    if usual is not None:
        text += f" at {formatting.seconds(usual)}"
    if ahead:
        whose, most = Counter(one.text("principal") for one in ahead).most_common(1)[0]
        text += f"; {plain(whose)} has {most} of them"
    if space is not None and space.text("state") != "ready":
        text += f"; the space is {space.text('state')}" if space.text("state") == "paused" else "; it has no worker"
    return text


def _slots(view: RowView) -> int:
    space = view.model.get("spaces", view.text("space"))
    return max(0, min(MAX_SLOTS, int(space.number("slots") or 0))) if space is not None else 0
