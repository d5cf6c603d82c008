"""The calls of all principals: found by whose they are, limited by the lines that there are."""

import hashlib
from collections.abc import Callable

import attrs
import structlog
import trio

from protocol.wire.errors import ErrorCode
from protocol.wire.messages import Rejected
from relayd.auth.tokens import Principal, reject_readonly
from relayd.core.admission import Admission
from relayd.core.relay import Relay
from relayd.stats.counters import count
from relayd.talk.call import ENDED, FULL, Call, offers_microphone

log = structlog.get_logger("relayd.talk.calls")

#: Size of an offer: with what else a request has, it fits into its params.
MAX_OFFER_BYTES = 60_000
NO_CALLS = "this relay takes no calls; its owner can name a space for them: [talk] calls"
#: What the keys of calls begin with: that of a conversation, of a user of the GPU server, of a Realtime session.
TALK, USER, SESSION = "talk", "user", "session"


def key_of(kind: str, *names: str) -> str:
    """Return the key of a call: short, whatever the names are."""
    return f"{kind}-{hashlib.sha256(repr(names).encode()).hexdigest()[:32]}"


@attrs.define(eq=False)
class Calls:
    """The calls that live.

    Args:
        nursery: in which they are followed.
    """

    admission: Admission
    nursery: trio.Nursery
    #: Principal and key -> the call.
    _calls: dict[tuple[str, str], Call] = attrs.field(factory=dict)

    @property
    def relay(self) -> Relay:
        """The relay."""
        return self.admission.relay

    def __len__(self) -> int:
        return len(self._calls)

    @property
    def space(self) -> str:
        """The space through which they go; "" if there is none."""
        settings = self.relay.config.talk
        return settings.calls if settings is not None else ""

    def find(self, principal: Principal, key: str) -> Call | None:
        """Return the call of a principal with this key; None if there is none that lives."""
        call = self._calls.get((principal.name, key))
        return call if call is not None and not call.ended.is_set() else None

    def all_with(self, kind: str) -> list[Call]:
        """Return the calls whose keys are of this kind."""
        return [call for (_, key), call in self._calls.items() if key.startswith(f"{kind}-")]

    def with_id(self, principal: Principal, request_id: str) -> Call | None:
        """Return the call of a principal that goes through this request."""
        mine = (call for (name, _), call in self._calls.items() if name == principal.name)
        return next((call for call in mine if call.request_id == request_id), None)

    def open(
        self, principal: Principal, key: str, offer: str, avatar: str = "", *, listen: bool = False
    ) -> Call | Rejected:
        """Begin a call; it takes the place of the one with the same key.

        Args:
            principal: whose it is.
            key: see `key_of`.
            offer: the SDP of the peer.
            avatar: whose face it shows.
            listen: whether its microphone is heard, if it has one and a space transcribes.

        Returns:
            The call, which is not answered yet; or why there is none.
        """
        if refusal := self._refuse(principal, offer):
            return refusal
        call = Call(self.admission, principal, key, offer, avatar, self._on_end)
        call.listens = listen and offers_microphone(offer) and self._can_listen
        if refusal := self._refuse_full(call):
            return refusal
        if (before := self.find(principal, key)) is not None:
            before.hang_up("another call has taken its place")
        self._begin(call)
        return call

    @property
    def _can_listen(self) -> bool:
        """Whether somebody writes down what callers say, and the worker of calls, which may be older, passes it on."""
        settings, space = self.relay.config.talk, self.relay.spaces.get(self.space)
        known = space.params.get("properties", {}) if space is not None else {}
        return settings is not None and bool(settings.transcribe) and "microphone" in known

    def _refuse(self, principal: Principal, offer: str) -> Rejected | None:
        space = self.space
        if principal.readonly:
            return reject_readonly()
        if not space:
            return Rejected.because(ErrorCode.SPACE_NOT_FOUND, NO_CALLS)
        if len(offer.encode(errors="replace")) > MAX_OFFER_BYTES:
            message = f"an offer may have {MAX_OFFER_BYTES} bytes"
            return Rejected.because(ErrorCode.INVALID_PARAMS, message, details={"sdp": message})
        if not self.relay.workers.serving(space):
            message = f"no worker of space {space!r} is connected, so nobody can call; call again when there is one"
            return Rejected.because(ErrorCode.NO_WORKER, message)
        return None

    def _refuse_full(self, call: Call) -> Rejected | None:
        slots = sum(worker.slots for worker in self.relay.scheduler.state.workers_of(self.space))
        mine = call.principal.name, call.key
        taken = sum(other.slots for key, other in self._calls.items() if key != mine)
        if taken + call.slots > slots:
            each = "three" if call.listens else "two"
            return Rejected.because(ErrorCode.QUEUE_FULL, f"{FULL} (a call takes {each} of its {slots} slots)")
        return None

    def _begin(self, call: Call) -> None:
        self._calls[call.principal.name, call.key] = call
        self.relay.stats.talk.calls = len(self._calls)
        self.nursery.start_soon(self._run, call, name=f"call {call.key}")

    async def _run(self, call: Call) -> None:
        try:
            await call.run()
        except Exception:
            log.exception("internal error in a call", request_id=call.request_id)

    def _on_end(self, call: Call) -> None:
        if self._calls.get((call.principal.name, call.key)) is call:
            del self._calls[call.principal.name, call.key]
        stats = self.relay.stats.talk
        stats.calls = len(self._calls)
        if call.failure is None or call.failure.code == ENDED:
            stats.calls_hung_up += 1
        else:
            count(stats.calls_failed, call.failure.code)
        log.info("call ended", request_id=call.request_id, why=call.failure.message if call.failure else "hung up")

    def restore(self, principal_named: Callable[[str], Principal]) -> None:
        """Know again the calls that have gone on while the relay was restarted."""
        for request in self.relay.live_requests():
            kind, _, rest = (request.submit.group or "").partition("-")
            if request.submit.space != self.space or not rest or "offer" not in request.submit.params:
                continue
            if kind not in (TALK, USER):  # whoever called has no session any more
                self.relay.cancel(request, "the relay was restarted; call again")
                continue
            principal, offer = principal_named(request.principal), request.submit.params["offer"]
            call = Call(self.admission, principal, f"{kind}-{rest}", str(offer), "", self._on_end)
            call.listens = bool(request.submit.params.get("microphone"))
            call.resume(request)
            if kind == TALK:
                call.hold(self)
            self._begin(call)
