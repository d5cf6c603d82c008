"""The clients that use HTTP: each follows its plans, and tries again after a cut as a program for HTTP does."""

import base64
import json
import random
import ssl
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any, Self

import attrs
import h11
import trio

from protocol.client.client import new_request_id
from protocol.wire.messages import LIVE_STATES
from tests.chaos.clients import AGAIN_S, END_S, POLL_S
from tests.chaos.proxy import Line
from tests.chaos.report import Case, Ledger
from tests.chaos.verdict import Reception
from tests.chaos.workload import CHUNK_MS, LOOSE, WEB_KINDS, Plan, draw_plan
from tests.support.raw_http_client import File, events_of, form
from tests.support.timed_http_client import Answer, ask_on, open_stream

#: Silence after which a connection is given up and opened again: HTTP has no sign of life of its own.
SILENCE_S = 4.0
#: The same where this gives up the request too.
SPEECH_SILENCE_S = 25.0
#: What such a response, which no other can continue, needs to be whole: this and its duration without a fault.
SPEECH_REST_S = 10.0
#: How a connection ends in this storm.
BROKEN = (OSError, trio.BrokenResourceError, trio.ClosedResourceError, trio.TooSlowError, h11.RemoteProtocolError)
WAV_HEADER_BYTES = 44
#: Answers after which a program asks again: too much at once, not now, and that the disk is too slow to tell.
_LATER = (429, 503, 507)


@attrs.frozen
class _Pieces:
    """The pieces of a body, as they arrive; no generator, which would have to be closed where reading ends early."""

    answer: Answer
    silence_s: float = SILENCE_S

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> bytes:
        with trio.fail_after(self.silence_s):
            piece = await self.answer.piece()
        if piece is None:
            raise StopAsyncIteration
        return piece


def _end_of(answer: Answer, body: bytes) -> str:
    """The end that an answer without a result means."""
    if answer.status == 410:
        return "cancelled"
    try:
        return f"failed {json.loads(body)['error']['code']}"
    except (ValueError, KeyError, TypeError):
        return f"status {answer.status}: {body[:200]!r}"


@attrs.define(eq=False)
class WebClient:
    """One program, with its line; each request has a connection of its own."""

    name: str
    line: Line
    ledger: Ledger
    token: str
    seed: int
    tls: ssl.SSLContext | None
    _plans: random.Random = attrs.field(init=False)

    def __attrs_post_init__(self) -> None:
        self._plans = random.Random(f"{self.seed} plans of {self.name}")

    @property
    def _counts(self) -> Counter[str]:
        return self.ledger.counts

    async def serve(self, calm: trio.Event) -> None:
        """Follow one plan after another until `calm` is set."""
        number = 0
        while not calm.is_set():
            number += 1
            await self.follow(draw_plan(self._plans, f"{self.name} #{number}", WEB_KINDS))

    async def follow(self, plan: Plan) -> None:
        """Follow one plan, and judge its result."""
        case = self.ledger.open_case(plan, new_request_id(), self.name)
        reception = Reception(self.name, began_at=trio.current_time())
        case.receptions.append(reception)
        with trio.move_on_after(END_S) as patience:
            await _DEEDS[plan.kind](self, case, reception)
            self.ledger.close_reception(case, reception)
            if plan.kind != "speech":
                await self._check_status(case, reception)
        if patience.cancelled_caught:
            rest_s = self.ledger.longest_rest(case, trio.current_time())
            if plan.kind == "speech" and rest_s < plan.duration_s + SPEECH_REST_S:
                self._counts["HTTP speech given up, as no response was left alone for long enough"] += 1
            else:
                self.ledger.complain(f"no end within {END_S:g} s", case)
        self.ledger.close_case(case)

    # -- asking

    @asynccontextmanager
    async def _ask(self, method: str, path: str, *, silence_s: float = SILENCE_S, **more: Any) -> AsyncIterator[Answer]:
        """Ask on a connection of its own; the block begins with the head of the answer."""
        url = f"{'http' if self.tls is None else 'https'}://127.0.0.1:{self.line.port}"
        with trio.fail_after(silence_s) as patience:
            async with open_stream(url, self.tls) as stream:
                answer = await ask_on(stream, method, path, token=self.token, **more)
                patience.deadline = float("inf")
                yield answer

    async def _until_answered(self, case: Case, method: str, path: str, **more: Any) -> tuple[Answer, bytes]:
        """Ask until there is an answer that is not to ask later."""
        while True:
            try:
                with trio.fail_after(2 * SILENCE_S):
                    async with self._ask(method, path, **more) as answer:
                        body = await answer.body()
                if answer.status not in _LATER:
                    return answer, body
                self._counts[f"HTTP answers {answer.status}"] += 1
            except BROKEN as fault:
                self._broken(case, fault)
            await trio.sleep(AGAIN_S)

    def _broken(self, case: Case, fault: BaseException) -> None:
        self._counts["HTTP responses cut"] += 1
        self.ledger.note(case.plan.name, f"its connection broke: {fault!r}")

    async def _put(self, case: Case, *, detach: bool = False) -> bool:
        """Put the request until it is accepted; False if it was refused."""
        plan = case.plan
        case.detached = detach
        if plan.inputs:
            parts: dict[str, str | File] = {"params": json.dumps(plan.params), "retry": plan.retry}
            parts |= {"detach": str(detach).lower()}
            parts |= {name: File(data, "application/octet-stream") for name, data in plan.inputs.items()}
            sent = form(parts)
            told = {"body": sent["body"], "headers": list(sent["headers"].items())}
        else:
            body = json.dumps({"params": plan.params, "retry": plan.retry, "detach": detach}).encode()
            told = {"body": body, "headers": [("Content-Type", "application/json")]}
        answer, body = await self._until_answered(
            case, "PUT", f"/v1/requests/{case.request_id}?space={plan.space}", **told
        )
        if answer.status in (200, 202):
            self.ledger.note_accepted(case)
            return True
        self.ledger.complain(f"it was refused: {answer.status} {body[:500]!r}", case)
        return False

    async def _check_status(self, case: Case, reception: Reception) -> None:
        """Check that its status says the same end, as `Client` does."""
        while True:
            answer, body = await self._until_answered(case, "GET", f"/v1/requests/{case.request_id}")
            if answer.status == 404 and self.ledger.may_be_forgotten(case):
                return
            status = json.loads(body)
            state = status.get("state", "")
            if state not in LIVE_STATES:
                break
            await trio.sleep(POLL_S)
        state = f"failed {status['code']}" if state == "failed" else state
        if state != reception.end and not self.ledger.may_end_anew(case):
            self.ledger.complain(f"its status is {body[:300]!r}, and the end received is {reception.end!r}", case)

    # -- the kinds of plans

    async def _events(self, case: Case, reception: Reception) -> None:
        if await self._put(case):
            await self._follow_events(case, reception)

    async def _deleted(self, case: Case, reception: Reception) -> None:
        if not await self._put(case):
            return
        if not await self._follow_events(case, reception, case.plan.at_frame):
            case.cancelled_at = trio.current_time()
            self.ledger.note(case.plan.name, "deletes it")
            answer, body = await self._until_answered(case, "DELETE", f"/v1/requests/{case.request_id}")
            if answer.status not in (200, 202):
                self.ledger.complain(f"DELETE was answered with {answer.status} {body[:300]!r}", case)
            self.ledger.note_answer()
            await self._follow_events(case, reception)

    async def _follow_events(self, case: Case, reception: Reception, until: int | None = None) -> bool:
        """Follow the events to the end (True), or until `until` audio frames have arrived."""
        while not reception.end:
            last = [("Last-Event-ID", f"{reception.attempt}.{reception.last_seq}")] if reception.attempt else []
            try:
                async with self._ask("GET", f"/v1/requests/{case.request_id}/events", headers=last) as answer:
                    if answer.status == 200:
                        self.ledger.link_up(self.name)
                        self._counts["HTTP event streams"] += 1
                        if not await self._take_events(case, reception, answer, until):
                            return False
                    elif answer.status not in _LATER:
                        reception.end = _end_of(answer, await answer.body())
            except BROKEN as fault:
                self._broken(case, fault)
            finally:
                self.ledger.link_down(self.name)
            if not reception.end:
                await trio.sleep(AGAIN_S)
        return True

    async def _take_events(self, case: Case, reception: Reception, answer: Answer, until: int | None) -> bool:
        """Process events until their stream ends (True), or until enough has arrived."""
        left = b""
        since: float | None = None
        pace_s = CHUNK_MS / 1000 / case.plan.speed * (1.5 if case.plan.space == LOOSE else 1.0)
        async for piece in _Pieces(answer):
            whole, mark, left = (left + piece).rpartition(b"\n\n")
            for kind, _id, data in events_of(whole + mark):
                if kind == "audio":
                    now = trio.current_time()
                    if since is not None:
                        self.ledger.record_gap(case, self.name, since, now, pace_s)
                    since = now
                self.take_event(case, reception, kind, data)
            if until is not None and len(reception.pieces) > until and not reception.end:
                return False
        return True

    def take_event(self, case: Case, reception: Reception, kind: str, data: dict[str, Any]) -> None:
        """Process one event."""
        if kind == "queued":
            self.ledger.note_position(case, data["position"], data["of"])
            return
        if kind == "error":
            if data["code"] != "shutting_down":  # not in an `error` of its own, as in a body
                reception.end = f"error {data['code']}"
            return
        if "seq" not in data:  # `worker_away`, `worker_back`
            return
        attempt, seq = data["attempt"], data["seq"]
        if attempt > reception.attempt and seq <= reception.last_seq:
            reception.void(seq)
        reception.attempt, reception.last_seq = attempt, seq
        if kind == "audio":
            reception.pieces.append((seq, base64.b64decode(data["pcm"])))
        elif kind == "failed":
            reception.end, reception.message = f"failed {data['code']}", data["message"]
        elif kind in ("completed", "cancelled"):
            reception.end, reception.message = kind, data.get("reason", "")

    async def _audio(self, case: Case, reception: Reception) -> None:
        if not await self._put(case, detach=True):
            return
        got, etag = bytearray(), ""
        while not reception.end:
            rest = [("Range", f"bytes={len(got)}-"), ("If-Range", etag)] if got and etag else []
            try:
                path = f"/v1/requests/{case.request_id}/audio?format=pcm"
                async with self._ask("GET", path, headers=rest) as answer:
                    if answer.status in (200, 206):
                        if answer.status == 200:
                            got.clear()
                        else:
                            self._counts["HTTP downloads continued"] += 1
                        etag = answer.headers.get("etag", "")
                        async for piece in _Pieces(answer):
                            got += piece
                        reception.end = "completed"
                    elif answer.status == 416 and rest:
                        reception.end = "completed"
                    elif answer.status not in _LATER:
                        reception.end = _end_of(answer, await answer.body())
            except BROKEN as fault:
                self._cut(case, got, fault)
            if not reception.end:
                await trio.sleep(AGAIN_S)
        reception.pieces = [(0, bytes(got))]

    async def _speech(self, case: Case, reception: Reception) -> None:
        plan = case.plan
        asked = {"model": plan.space, "input": plan.name, "voice": "default", "response_format": "wav"}
        body = json.dumps(asked | {"seed": plan.seed, "duration_s": plan.duration_s}).encode()
        while not reception.end:
            got = bytearray()
            try:
                async with self._ask("POST", "/v1/audio/speech", body=body, silence_s=SPEECH_SILENCE_S) as answer:
                    self._counts["HTTP speech responses"] += 1
                    async for piece in _Pieces(answer, SPEECH_SILENCE_S):
                        got += piece
                if answer.status == 200:
                    reception.end = "completed"
                    reception.pieces = [(0, bytes(got[WAV_HEADER_BYTES:]))]
                elif answer.status not in _LATER:
                    reception.end = _end_of(answer, bytes(got))
            except BROKEN as fault:
                self._cut(case, got[WAV_HEADER_BYTES:], fault)
            if not reception.end:
                await trio.sleep(AGAIN_S)

    def _cut(self, case: Case, got: bytearray, fault: BaseException) -> None:
        """A download was cut: what arrived must be right nevertheless."""
        self._broken(case, fault)
        if not case.plan.expected().startswith(bytes(got)):
            self.ledger.complain(f"the {len(got)} bytes before a cut are not those of the request", case)


_DEEDS: dict[str, Callable[[WebClient, Case, Reception], Awaitable[None]]] = {
    "events": WebClient._events,
    "audio": WebClient._audio,
    "deleted": WebClient._deleted,
    "speech": WebClient._speech,
}
