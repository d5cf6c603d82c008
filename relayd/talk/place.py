"""What all conversations share: the relay, the settings, the limits and the figures."""

import time
from collections import Counter, OrderedDict

import attrs
import trio

from protocol.wire.errors import ErrorCode
from protocol.wire.messages import Rejected
from relayd.auth.tokens import Principal, TokenRegistry
from relayd.config.schema import Talk as TalkSettings
from relayd.core.admission import Admission
from relayd.core.principals import too_fast
from relayd.core.relay import Relay
from relayd.stats.counters import TalkStats
from relayd.store.records import Change
from relayd.talk.calls import Calls
from relayd.talk.conversation import Making

#: Conversations of which it is kept how their last replies were spoken, whether somebody uses them or not.
MAX_SPOKEN_TALKS = 1_000


@attrs.define(eq=False)
class Place:
    """What the conversations share.

    Args:
        nursery: in which turns run.
        calls: on which replies are played.
        kept: whether conversations outlive those who use them, as `history` says.
    """

    admission: Admission
    tokens: TokenRegistry
    nursery: trio.Nursery
    calls: Calls
    kept: bool = True
    #: Principal -> its replies that wait or are being made.
    unended: Counter[str] = attrs.field(factory=Counter)

    #: Id of a conversation -> see `Conversation`; the one that was opened last comes last.
    spoken: OrderedDict[str, dict[int, Making]] = attrs.field(factory=OrderedDict)

    @property
    def relay(self) -> Relay:
        """The relay."""
        return self.admission.relay

    @property
    def stats(self) -> TalkStats:
        """The figures of conversations."""
        return self.relay.stats.talk

    @property
    def settings(self) -> TalkSettings:
        """The settings, as they are now."""
        settings = self.relay.config.talk
        assert settings is not None, "without [talk], there are no conversations"
        return settings

    @property
    def history(self) -> str:
        """Where conversations are kept."""
        return self.settings.history if self.kept else "memory"

    @property
    def is_durable(self) -> bool:
        """Whether conversations are stored."""
        return self.history == "disk"

    async def commit(self, *changes: Change) -> None:
        """Store changes, if conversations are stored.

        Raises:
            StoreError: they cannot be stored.
        """
        if self.is_durable:
            await self.relay.store.commit(*changes)
        else:
            await trio.lowlevel.checkpoint()

    def post(self, *changes: Change) -> None:
        """Store changes soon, if conversations are stored."""
        if self.is_durable:
            self.relay.store.post(*changes)

    def spoken_in(self, talk_id: str) -> dict[int, Making]:
        """Return how the last replies of a conversation were spoken; what is added is kept for a while."""
        spoken = self.spoken.setdefault(talk_id, {})
        self.spoken.move_to_end(talk_id)
        if len(self.spoken) > MAX_SPOKEN_TALKS:
            self.spoken.popitem(last=False)
        return spoken

    def refuse_too_fast(self, principal: Principal) -> Rejected | None:
        """Count one request of a principal that comes over a WebSocket; returns why it has to wait."""
        wait_s = self.relay.principals.request_wait_s(principal, self.relay.config.limits.principal)
        if not wait_s:
            return None
        return Rejected.because(ErrorCode.RATE_LIMITED, too_fast(principal.name), retry_after_s=wait_s)

    def count(self, principal: str, replies: int) -> None:
        """Count replies of a principal that have begun to wait; or, below 0, that have ended."""
        self.stats.unended += replies
        self.unended[principal] += replies
        if not self.unended[principal]:
            del self.unended[principal]

    def principal_named(self, name: str) -> Principal:
        """Return a principal for what it said before the relay was restarted; see `TokenRegistry.principal_named`."""
        return self.tokens.principal_named(name, time.time())
