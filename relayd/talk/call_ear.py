"""Hears the microphone of a call: a request listens to it, and one that transcribes is piped from that.

While the caller is silent because of a muted microphone, nothing comes, and what transcribes takes no slot.
"""

import secrets

import attrs
import trio

from protocol.wire.messages import Input, Rejected, Submit
from protocol.wire.structs import InputInfo
from relayd.talk.call import COMMANDS, Call
from relayd.talk.ear import Ear
from relayd.talk.held_request import PRIORITY, FedRequest

#: What a call's microphone makes.
RATE = 16_000


@attrs.define(eq=False, kw_only=True)
class CallEar(Ear):
    """One stretch of what is said on a call.

    Args:
        call: whose microphone it is.
    """

    call: Call
    rate: int = RATE
    _source: FedRequest = attrs.field(init=False)

    @property
    def fed_bytes(self) -> int:
        """Bytes that were passed on."""
        return self._fed.known

    def open(self) -> Rejected | None:
        """Submit the requests; returns why they are refused."""
        source_id, now = secrets.token_hex(16), trio.current_time()
        self._source = FedRequest(lambda: None, principal=self.principal)
        submit = Submit(
            request_id=source_id,
            space=self.place.calls.space,
            params={"peer": self.call.request_id, "listen": True},
            inputs={COMMANDS: InputInfo(media_type="application/x-ndjson", live=True)},
            priority=PRIORITY,
            retry="never",
            group=self.call.key,
        )
        source = self.place.admission.submit(submit, self.principal, self._source)
        if isinstance(source, Rejected):
            return source
        self._source.request = source
        refused = self._submit(InputInfo(media_type=self._media_type, from_=source_id), self.call.key)
        if refused is not None:
            self.place.relay.cancel(source, refused.message)
            self._source.release(now)
        return refused

    async def end(self) -> None:
        """Listen no more; what was said so far is heard to its end."""
        self.is_ended = True
        if (source := self._source.request) is not None and source.live:
            piece = Input(request_id=source.request_id, name=COMMANDS, offset=0, data=b"", last=True)
            self.place.admission.add_input(source, piece, self._source)

    def close(self, reason: str = "the call is not listened to any more") -> None:
        """See `Ear.close`."""
        super().close(reason)
        if (source := self._source.request) is not None and source.live:
            self.place.relay.cancel(source, reason)
        self._source.release(trio.current_time())
