"""Keeps the calls to the relay that have not been answered yet."""

from collections import deque
from collections.abc import Callable
from functools import partial

import attrs
import trio

from protocol.wire.errors import LinkBroken, RequestRejected
from protocol.wire.messages import Done, Error, Find, Found, Rejected, Spaces, SpacesReply, Status, StatusReply, Steer
from protocol.wire.validators import Message, Value


@attrs.define(eq=False)
class PendingCall:
    """A message of ours that expects an answer from the relay.

    Attributes:
        repeat: whether it may be sent again over a new link; a steer might be carried out twice.
        answer: present once `done` is set, unless `fault` is set or the link was lost (then neither is).
    """

    ask: Message
    repeat: bool = True
    answer: Message | None = None
    fault: Callable[[], Exception] | None = None
    done: trio.Event = attrs.field(factory=trio.Event)
    #: The rows of the pages that have come of an answer to `spaces` or `find`.
    rows: list[dict[str, Value]] = attrs.field(factory=list)

    @property
    def correlation_id(self) -> str | None:
        """The `request_id` of a `rejected` that answers it."""
        if isinstance(self.ask, Steer):
            return self.ask.steer_id
        return self.ask.request_id if isinstance(self.ask, Status) else None


class PendingCalls:
    """Unanswered calls in the order sent, which is the order in which a relay answers calls of one kind."""

    def __init__(self) -> None:
        self._open: deque[PendingCall] = deque()

    def add(self, call: PendingCall) -> None:
        """Add a call that was sent, or is about to be."""
        self._open.append(call)

    def forget(self, call: PendingCall) -> None:
        """Remove a call that nobody waits for; a late answer is dropped."""
        if call in self._open:
            self._open.remove(call)

    def rejected(self, refusal: Rejected) -> None:
        """Take a refusal; one that answers no call is dropped."""
        call = next((one for one in self._open if one.correlation_id == refusal.request_id), None)
        if call is not None:
            target = call.ask.target if isinstance(call.ask, Steer) else refusal.request_id or ""
            self._reject(call, target, refusal, refusal.retryable)

    def reject_all(self, error: Error) -> None:
        """Fail all calls: the relay does not know one of these messages, and does not say which."""
        for call in tuple(self._open):
            self._reject(call, "", error, False)

    def _reject(self, call: PendingCall, target: str, why: Rejected | Error, retryable: bool) -> None:
        fault = partial(RequestRejected, target, why.code, why.message, dict(why.details), retryable)
        self._settle(call, fault=fault)

    def status_reply(self, reply: StatusReply) -> None:
        """Take the answer to `status`."""
        self._answer(Status, reply.request_id, reply)

    def done(self, done: Done) -> None:
        """Take the answer to `steer`."""
        self._answer(Steer, done.steer_id, done)

    def spaces_reply(self, reply: SpacesReply) -> None:
        """Take a page of the answer to `spaces`."""
        self._page(Spaces, reply, reply.spaces)

    def found(self, found: Found) -> None:
        """Take a page of the answer to `find`."""
        self._page(Find, found, found.requests)

    def _page(self, kind: type[Message], page: SpacesReply | Found, rows: list[dict[str, Value]]) -> None:
        call = next((one for one in self._open if isinstance(one.ask, kind)), None)
        if call is not None:
            call.rows += rows
            if not page.more:
                self._settle(call, page)

    def _answer(self, kind: type[Message], about: str, answer: Message) -> None:
        call = next((one for one in self._open if isinstance(one.ask, kind) and one.correlation_id == about), None)
        if call is not None:
            self._settle(call, answer)

    def _settle(
        self, call: PendingCall, answer: Message | None = None, fault: Callable[[], Exception] | None = None
    ) -> None:
        self._open.remove(call)
        call.answer, call.fault = answer, fault
        call.done.set()

    def on_link_lost(self, why: str) -> None:
        """Wake all callers, who then call again, except those whose call must not be repeated."""
        unknown = partial(LinkBroken, f"{why}; whether it was carried out is not known")
        for call in tuple(self._open):
            self._settle(call, fault=None if call.repeat else unknown)

    def fail(self, fault: Callable[[], Exception]) -> None:
        """Fail all calls: there will be no more answers."""
        for call in tuple(self._open):
            self._settle(call, fault=fault)
