"""Stores the end of a request, then acknowledges it.

A last frame from a worker is passed on at once, and acknowledged when the frames are in a file and the end is in the
store; until then the worker keeps everything. A last frame that the relay itself makes, which nobody else knows, is
stored before it is sent. So is every cancellation: a worker that repeats `cancelled` to a relay that has forgotten the
cancel would have the request run again. If the disk cannot be written, ends are acknowledged all the same, but a
cancellation waits for the disk.
"""

from collections import Counter
from collections.abc import Awaitable, Callable
from functools import partial

import attrs
import structlog
import trio

from protocol.wire.errors import ErrorCode
from protocol.wire.messages import Rejected
from relayd.core.interfaces import ResultsOwner
from relayd.core.retention import Retention
from relayd.requests.request import Request
from relayd.scheduling.model import State
from relayd.store.base import StoreError

log = structlog.get_logger("relayd.results")

#: Seconds until the relay tries again to store a cancellation that the disk refused.
RETRY_S = 1.0
#: Seconds that a reply waits for the disk to store a decision about a request; then the reply is a refusal.
SAFE_S = 5.0


@attrs.define(eq=False)
class Finalizer:
    """Writes ended requests, and cancels of running ones, to the store and to result files."""

    relay: ResultsOwner
    results: Retention
    #: Requests whose end or cancel is not stored yet, and the number of tasks that store it; their workers still keep
    #: them.
    unfinalized: Counter[Request] = attrs.field(factory=Counter)
    _changed: trio.Event = attrs.field(factory=trio.Event)

    def finalize(self, request: Request, last_frame: bytes | None) -> None:
        """Store the end of a request, then acknowledge it.

        Args:
            request: an accepted request that has ended.
            last_frame: the last frame if the relay made it; None if the log already has the last frame.
        """
        self._begin(request, partial(self._finalize, request, last_frame))

    def remember_cancel(self, request: Request) -> None:
        """Store that a running request is being stopped: a relay that is started again must not let it run on."""
        self._begin(request, partial(self._record, request))

    def _begin(self, request: Request, work: Callable[[], Awaitable[None]]) -> None:
        self.unfinalized[request] += 1
        self.relay.nursery.start_soon(self._run, request, work)

    async def _run(self, request: Request, work: Callable[[], Awaitable[None]]) -> None:
        try:
            await work()
        except Exception:
            log.exception("internal error in request", request_id=request.request_id)
        finally:
            self.unfinalized -= Counter((request,))  # drops what reaches zero
            self._changed.set()
            self._changed = trio.Event()

    async def _finalize(self, request: Request, last_frame: bytes | None) -> None:
        try:
            if last_frame is None:
                await self.results.seal(request)
                await self._record(request)
            else:
                await self._record(request)
                request.log.append(last_frame, ends=True)
                if request.log.next_seq > 1 or request.details:  # otherwise its record is enough
                    await self.results.seal(request)
            if request.pending_ack is not None:
                self.relay.acknowledge(*request.pending_ack)
        except Exception:
            log.exception("internal error in request", request_id=request.request_id)
            self._end_log(request, last_frame)
        finally:
            request.pending_ack = None

    def _end_log(self, request: Request, last_frame: bytes | None) -> None:
        """End the log after an internal error, so that readers do not wait for ever. Never raises."""
        if last_frame is None or request.log.ended:
            return
        try:
            request.log.append(last_frame, ends=True)
        except Exception:
            log.exception("internal error in request", request_id=request.request_id)

    async def wait_finalized(self) -> None:
        """Wait until every end is stored."""
        while self.unfinalized:
            await self._changed.wait()

    async def wait_safe(self, request: Request) -> Rejected | None:
        """Wait until the decision about a request is in the store and may be reported; else return a refusal."""
        with trio.move_on_after(SAFE_S):
            while request in self.unfinalized:
                await self._changed.wait()
            return None
        message = "the relay's disk cannot store the outcome of the request now; ask again later"
        return Rejected.because(ErrorCode.STORAGE_FULL, message, request_id=request.request_id)

    async def _record(self, request: Request) -> None:
        logged = False
        while True:
            update = self.relay.status_update(request)
            try:
                await self.relay.store.commit(update)
                return
            except StoreError as fault:
                if not logged:
                    log.error("request end not stored, retrying", request_id=request.request_id, why=str(fault))
                    logged = True
            if not request.live and request.entry.state is not State.CANCELLED:
                self.relay.store.post(update)
                return
            await trio.sleep(RETRY_S)
