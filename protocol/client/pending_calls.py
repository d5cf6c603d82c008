"""What was asked of the relay and not answered yet."""

from collections import deque
from collections.abc import Callable
from functools import partial

import attrs
import trio

from protocol.wire.errors import LinkBroken, RequestRejected
from protocol.wire.messages import Done, Error, Rejected, Spaces, SpacesReply, Status, StatusReply, Steer
from protocol.wire.validators import Message


@attrs.define(eq=False)
class PendingCall:
    """A message of ours that the relay answers.

    Attributes:
        repeat: whether it may be asked again over a new link; a steer would be carried out twice.
        answer: there once `done` is set, unless `fault` is, or the link went (then neither is).
    """

    ask: Message
    repeat: bool = True
    answer: Message | None = None
    fault: Callable[[], Exception] | None = None
    done: trio.Event = attrs.field(factory=trio.Event)
    #: Of `spaces`, whose answer comes in pages.
    pages: list[SpacesReply] = attrs.field(factory=list)

    @property
    def correlation_id(self) -> str | None:
        """What a `rejected` for it carries as `request_id`."""
        if isinstance(self.ask, Steer):
            return self.ask.steer_id
        return self.ask.request_id if isinstance(self.ask, Status) else None


class PendingCalls:
    """Open questions in the order asked, which is the order in which a relay answers those of one kind."""

    def __init__(self) -> None:
        self._open: deque[PendingCall] = deque()

    def add(self, question: PendingCall) -> None:
        """It was, or is about to be, sent."""
        self._open.append(question)

    def forget(self, question: PendingCall) -> None:
        """Nobody waits for it any more; a late answer is dropped."""
        if question in self._open:
            self._open.remove(question)

    def rejected(self, refusal: Rejected) -> bool:
        """Take a refusal; False where no question asked for it."""
        question = next((one for one in self._open if one.correlation_id == refusal.request_id), None)
        if question is None:
            return False
        target = question.ask.target if isinstance(question.ask, Steer) else refusal.request_id or ""
        self._reject(question, target, refusal, refusal.retryable)
        return True

    def reject_all(self, error: Error) -> None:
        """The relay does not know something that was asked, and does not say what."""
        for question in tuple(self._open):
            self._reject(question, "", error, False)

    def _reject(self, question: PendingCall, target: str, why: Rejected | Error, retryable: bool) -> None:
        fault = partial(RequestRejected, target, why.code, why.message, dict(why.details), retryable)
        self._settle(question, fault=fault)

    def status_reply(self, reply: StatusReply) -> None:
        """Take the answer to `status`."""
        self._answer(Status, reply.request_id, reply)

    def done(self, done: Done) -> None:
        """Take the answer to `steer`."""
        self._answer(Steer, done.steer_id, done)

    def spaces_reply(self, reply: SpacesReply) -> None:
        """Take a page of the answer to `spaces`."""
        question = next((one for one in self._open if isinstance(one.ask, Spaces)), None)
        if question is not None:
            question.pages.append(reply)
            if not reply.more:
                self._settle(question, reply)

    def _answer(self, kind: type[Message], about: str, answer: Message) -> None:
        question = next((one for one in self._open if isinstance(one.ask, kind) and one.correlation_id == about), None)
        if question is not None:
            self._settle(question, answer)

    def _settle(
        self, question: PendingCall, answer: Message | None = None, fault: Callable[[], Exception] | None = None
    ) -> None:
        self._open.remove(question)
        question.answer, question.fault = answer, fault
        question.done.set()

    def on_link_lost(self, why: str) -> None:
        """No answers come any more: who asked asks again, except what must not be."""
        unknown = partial(LinkBroken, f"{why}; whether it was carried out is not known")
        for question in tuple(self._open):
            self._settle(question, fault=None if question.repeat else unknown)

    def fail(self, fault: Callable[[], Exception]) -> None:
        """Nothing will be answered any more."""
        for question in tuple(self._open):
            self._settle(question, fault=fault)
