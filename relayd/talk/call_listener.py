"""Takes what is said on the call of a conversation for what its user says, and has it answered there."""

from typing import TYPE_CHECKING

import attrs
import structlog
import trio

from protocol.wire.errors import ErrorCode
from protocol.wire.messages import Rejected
from relayd.talk.call import Call
from relayd.talk.ear import Heard, HearingFailed, Said, SpeechBegan
from relayd.talk.microphone import Microphone, Stretch

if TYPE_CHECKING:
    from relayd.talk.talks import Talk

log = structlog.get_logger("relayd.talk.calls")


@attrs.define(eq=False)
class CallListener:
    """Listens to one call."""

    talk: "Talk"
    call: Call
    _microphone: Microphone = attrs.field(init=False)

    async def run(self) -> None:
        """Listen until the call ends, and hear what was said by then."""
        try:
            async with trio.open_nursery() as nursery:
                place, principal = self.talk.session.place, self.talk.principal
                self._microphone = Microphone(place, principal, nursery, self._report, self.call)
                await self._microphone.listen(self._refuse)
        except Exception:
            log.exception("internal error in a call", request_id=self.call.request_id)

    async def _report(self, stretch: Stretch, heard: Heard | None) -> None:
        match heard:
            case SpeechBegan():
                self.talk.interrupt("the user has begun to speak")
            case Said(text=text) if text:
                if isinstance(refused := self.talk.say(text), Rejected):
                    await self._refuse(refused)
            case HearingFailed(code=code, message=message) if code != ErrorCode.RUN_TIMEOUT or stretch.is_speech:
                self._microphone.rest()
                self._log(code, message)

    async def _refuse(self, refused: Rejected) -> None:
        self._log(refused.code, refused.message)

    def _log(self, code: str, message: str) -> None:
        if not self.call.ended.is_set():
            log.warning("nobody hears a call", request_id=self.call.request_id, code=str(code), why=message)
