"""Stores the end of a request, then acknowledges it.

A last frame from a worker is passed on at once, and acknowledged when the frames are in a file and the end is in the
store; until then the worker keeps everything. A last frame that the relay itself makes, which nobody else knows, is
stored before it is sent. If the disk cannot be written, ends are acknowledged all the same.
"""

import functools

import attrs
import structlog
import trio

from relayd.core.interfaces import ResultsOwner
from relayd.core.retention import Retention
from relayd.requests.request import Request
from relayd.store.base import StoreError

log = structlog.get_logger("relayd.results")


@attrs.define(eq=False)
class Finalizer:
    """Writes ended requests to the store and to result files."""

    relay: ResultsOwner
    results: Retention
    #: Ended requests that are not stored yet; their workers still keep them.
    unfinalized: set[Request] = attrs.field(factory=set)
    _all_final: trio.Event = attrs.field(factory=trio.Event)

    def finalize(self, request: Request, last_frame: bytes | None) -> None:
        """Store the end of a request, then acknowledge it.

        Args:
            request: an accepted request that has ended.
            last_frame: the last frame if the relay made it; None if the log already has the last frame.
        """
        self.unfinalized.add(request)
        self.relay.nursery.start_soon(functools.partial(self._finalize, request, last_frame))

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
            self.unfinalized.discard(request)
            if not self.unfinalized:
                self._all_final.set()
                self._all_final = trio.Event()

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
            await self._all_final.wait()

    async def _record(self, request: Request) -> None:
        update = self.relay.status_update(request)
        try:
            await self.relay.store.commit(update)
        except StoreError as fault:
            log.error("request end not stored, retrying", request_id=request.request_id, why=str(fault))
            self.relay.store.post(update)
