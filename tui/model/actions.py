"""The actions an operator can take on rows: which steers they send, what they ask first and what they report after."""

from collections import Counter
from collections.abc import Callable, Sequence

import attrs

from tui.model.cells import LIVE
from tui.model.formatting import plain, short_id
from tui.model.relay_model import RowView

#: Principals named in a question; further ones are only counted.
MAX_PRINCIPALS = 4


@attrs.frozen
class Plan:
    """What one key press will do; the ids are those at the time of the press.

    Attributes:
        steps: (steer action, target) in order.
        question: asked before anything is destroyed, else empty.
        done: the notice shown once every step has succeeded.
        names: the objects it acts on, as shown to people.
    """

    steps: tuple[tuple[str, str], ...]
    question: str
    done: str
    names: tuple[str, ...] = ()


def name_of(view: RowView) -> str:
    """The name of a row as shown to people."""
    if view.topic == "requests":
        return f"request {plain(short_id(view.key))}"
    if view.topic == "workers":
        return f"worker {plain(view.text('name') or view.key)}"
    if view.topic == "spaces":
        return f"space {plain(view.key)}"
    if view.topic == "talks":
        return f"conversation {plain(view.text('session') or short_id(view.key))}"
    if view.topic == "clients":
        return f"{plain(view.text('principal') or 'client')} ({plain(short_id(view.key))})"
    return plain(view.key)


def cancel(views: Sequence[RowView]) -> Plan | str:
    """Cancel those of the requests that have not ended; end the replies of conversations."""
    if views and views[0].topic == "talks":
        return end_talks(views)
    live = [view for view in views if view.text("state") in LIVE]
    if not live:
        return "it has ended already" if len(views) == 1 else "they have ended already"
    speaking = sum(_speaks(view) for view in live)
    if len(live) == 1:
        view = live[0]
        doing = "speaking now" if speaking else view.text("state")
        question = f"Cancel {name_of(view)} of {plain(view.text('principal'))} in {plain(view.text('space'))}, {doing}?"
    else:
        effect = f"{speaking} of them speaking" if speaking else "none of them speaking yet"
        question = f"Cancel {len(live)} requests of {_whose(live)}, {effect}?"
    return _plan(live, "cancel", question, f"cancelled {_these(live, 'request')}")


def _whose(views: Sequence[RowView]) -> str:
    """The principals of these rows, those with most of them first: `alice (12), bob (3)`."""
    counts = Counter(plain(view.text("principal")) for view in views).most_common()
    if len(counts) == 1:
        return counts[0][0]
    names = [f"{name} ({count})" for name, count in counts[:MAX_PRINCIPALS]]
    return ", ".join([*names, *([f"{len(counts) - len(names)} more"] if len(counts) > len(names) else [])])


def end_talks(views: Sequence[RowView]) -> Plan | str:
    """End the replies that are being made in these conversations, and those that wait."""
    live = [view for view in views if view.text("state") != "idle"]
    if not live:
        return "no reply is being made in it" if len(views) == 1 else "no reply is being made in them"
    waiting = sum(int(view.number("waiting") or 0) for view in live)
    whose = f" of {plain(live[0].text('principal'))}, {plain(live[0].text('state'))} now" if len(live) == 1 else ""
    effect = f" {_count(waiting, 'waiting text')} will have no reply." if waiting else ""
    question = f"End the replies in {_these(live, 'conversation')}{whose}?{effect} What was said stays."
    return _plan(live, "end_talk", question, f"ended the replies in {_these(live, 'conversation')}")


def _speaks(view: RowView) -> bool:
    return view.text("state") == "running" and bool(view.number("audio_s") or view.number("first_frame_s") is not None)


def promote(views: Sequence[RowView]) -> Plan | str:
    """Move queued requests to the front of their queues, in their present order."""
    queued = [view for view in views if view.text("state") == "queued"]
    if not queued:
        return "only what is queued can go to the front"
    # The request promoted last ends up in front.
    queued.sort(key=lambda view: -(view.position or 0))
    return _plan(queued, "promote", "", f"{_these(queued, 'request')} to the front")


def drain(views: Sequence[RowView]) -> Plan | str:
    """Drain these workers; if all of them are draining already, undrain them."""
    there = [view for view in views if view.text("state") != "away"]
    if not there:
        return "a worker that is away can be neither drained nor undrained"
    taking = [view for view in there if not _is(view, "draining")]
    if not taking:
        return _plan(there, "undrain_worker", "", f"{_these(there, 'worker')} takes requests again")
    running = sum(int(view.number("busy") or 0) for view in taking)
    left = f"finishes {_count(running, 'running request')}, takes no more and leaves"
    question = f"Drain {_these(taking, 'worker')}? It {left}." if len(taking) == 1 else ""
    question = question or f"Drain {len(taking)} workers? Each {left.replace('finishes', 'finishes its share of')}."
    return _plan(taking, "drain_worker", question, f"draining {_these(taking, 'worker')}")


def pause(views: Sequence[RowView]) -> Plan | str:
    """Pause these spaces; if all of them are paused already, resume them."""
    if not views:
        return "there is no space here"
    open_ones = [view for view in views if not _is(view, "paused")]
    if not open_ones:
        return _plan(views, "resume_space", "", f"{_these(views, 'space')} resumed")
    return _plan(
        open_ones, "pause_space", "", f"{_these(open_ones, 'space')} paused: new requests are refused; P resumes"
    )


def disconnect(views: Sequence[RowView]) -> Plan | str:
    """Disconnect these clients or workers."""
    there = [view for view in views if view.text("connection_id")]
    if not there:
        return "it is not connected"
    word = "worker" if there[0].topic == "workers" else "connection"
    held = sum(_held(view) for view in there)
    effect = f"It has {_count(held, 'request')}" if len(there) == 1 else f"They have {_count(held, 'request')}"
    question = f"Disconnect {_these(there, word)}? {effect}, and may come back by itself."
    steps = tuple(("disconnect", view.text("connection_id")) for view in there)
    return Plan(steps, question, f"disconnected {_these(there, word)}", tuple(map(name_of, there)))


def _held(view: RowView) -> int:
    return int(view.number("busy" if view.topic == "workers" else "requests") or 0)


def _is(view: RowView, word: str) -> bool:
    return view.text("state") == word or view.row.get(word) is True


def _plan(views: Sequence[RowView], action: str, question: str, done: str) -> Plan:
    return Plan(tuple((action, view.key) for view in views), question, done, tuple(map(name_of, views)))


def _these(views: Sequence[RowView], word: str) -> str:
    return name_of(views[0]) if len(views) == 1 else f"{len(views)} {word}s"


def _count(number: int, word: str) -> str:
    return f"{number or 'no'} {word}{'' if number == 1 else 's'}"


@attrs.frozen
class Action:
    """An action that a key is bound to.

    Attributes:
        name: its name in Textual.
        topics: the topics whose rows it acts on.
    """

    key: str
    name: str
    title: str
    topics: frozenset[str]
    plan: Callable[[Sequence[RowView]], Plan | str]


ACTIONS = {
    action.name: action
    for action in (
        Action("x", "cancel", "Cancel", frozenset({"requests", "talks"}), cancel),
        Action("T", "promote", "To the front", frozenset({"requests"}), promote),
        Action("d", "drain", "Drain/undrain", frozenset({"workers"}), drain),
        Action("P", "pause", "Pause/resume", frozenset({"spaces"}), pause),
        Action("K", "disconnect", "Disconnect", frozenset({"clients", "workers"}), disconnect),
    )
}
#: The topic whose rows a table shows, by the table's kind; the kind itself where it is not listed.
TOPIC_OF = {"queue": "requests", "wrong": "requests"}
