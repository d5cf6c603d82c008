"""The clients that use HTTP: each follows its plans, and tries again after a cut as a program for HTTP does."""

import base64
import json
import random
from collections.abc import Awaitable, Callable
from typing import Any

import attrs
import trio

from protocol.client.client import new_request_id
from protocol.wire.messages import LIVE_STATES
from tests.chaos.asking import BROKEN, LATER, WAV_HEADER_BYTES, Pieces, WebPeer
from tests.chaos.clients import AGAIN_S, END_S, POLL_S
from tests.chaos.report import Case
from tests.chaos.verdict import Reception
from tests.chaos.workload import CHUNK_MS, LOOSE, WEB_KINDS, Plan, draw_plan
from tests.support.raw_http_client import File, events_of, form
from tests.support.timed_http_client import Answer

#: Silence after which a connection is given up, where this gives up the request too.
SPEECH_SILENCE_S = 25.0
#: What such a response, which no other can continue, needs to be whole: this and its duration without a fault.
SPEECH_REST_S = 10.0


def _end_of(answer: Answer, body: bytes) -> str:
    """The end that an answer without a result means."""
    if answer.status == 410:
        return "cancelled"
    try:
        return f"failed {json.loads(body)['error']['code']}"
    except (ValueError, KeyError, TypeError):
        return f"status {answer.status}: {body[:200]!r}"


@attrs.define(eq=False)
class WebClient(WebPeer):
    """One program, with its line; each request has a connection of its own."""

    _plans: random.Random = attrs.field(init=False)

    def __attrs_post_init__(self) -> None:
        self._plans = random.Random(f"{self.seed} plans of {self.name}")

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
                self.counts["HTTP speech given up, as no response was left alone for long enough"] += 1
            else:
                self.ledger.complain(f"no end within {END_S:g} s", case)
        self.ledger.close_case(case)

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
        answer, body = await self.until_answered(
            case.plan.name, "PUT", f"/v1/requests/{case.request_id}?space={plan.space}", **told
        )
        if answer.status in (200, 202):
            self.ledger.note_accepted(case)
            return True
        self.ledger.complain(f"it was refused: {answer.status} {body[:500]!r}", case)
        return False

    async def _check_status(self, case: Case, reception: Reception) -> None:
        """Check that its status says the same end, as `Client` does."""
        while True:
            answer, body = await self.until_answered(case.plan.name, "GET", f"/v1/requests/{case.request_id}")
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
            answer, body = await self.until_answered(case.plan.name, "DELETE", f"/v1/requests/{case.request_id}")
            if answer.status not in (200, 202):
                self.ledger.complain(f"DELETE was answered with {answer.status} {body[:300]!r}", case)
            self.ledger.note_answer()
            await self._follow_events(case, reception)

    async def _follow_events(self, case: Case, reception: Reception, until: int | None = None) -> bool:
        """Follow the events to the end (True), or until `until` audio frames have arrived."""
        while not reception.end:
            last = [("Last-Event-ID", f"{reception.attempt}.{reception.last_seq}")] if reception.attempt else []
            try:
                async with self.ask("GET", f"/v1/requests/{case.request_id}/events", headers=last) as answer:
                    if answer.status == 200:
                        self.ledger.link_up(self.name)
                        self.counts["HTTP event streams"] += 1
                        if not await self._take_events(case, reception, answer, until):
                            return False
                    elif answer.status not in LATER:
                        reception.end = _end_of(answer, await answer.body())
            except BROKEN as fault:
                self.broken(case.plan.name, fault)
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
        async for piece in Pieces(answer):
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
                async with self.ask("GET", path, headers=rest) as answer:
                    if answer.status in (200, 206):
                        if answer.status == 200:
                            got.clear()
                        else:
                            self.counts["HTTP downloads continued"] += 1
                        etag = answer.headers.get("etag", "")
                        async for piece in Pieces(answer):
                            got += piece
                        reception.end = "completed"
                    elif answer.status == 416 and rest:
                        reception.end = "completed"
                    elif answer.status not in LATER:
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
                async with self.ask("POST", "/v1/audio/speech", body=body, silence_s=SPEECH_SILENCE_S) as answer:
                    self.counts["HTTP speech responses"] += 1
                    async for piece in Pieces(answer, SPEECH_SILENCE_S):
                        got += piece
                if answer.status == 200:
                    reception.end = "completed"
                    reception.pieces = [(0, bytes(got[WAV_HEADER_BYTES:]))]
                elif answer.status not in LATER:
                    reception.end = _end_of(answer, bytes(got))
            except BROKEN as fault:
                self._cut(case, got[WAV_HEADER_BYTES:], fault)
            if not reception.end:
                await trio.sleep(AGAIN_S)

    def _cut(self, case: Case, got: bytearray, fault: BaseException) -> None:
        """A download was cut: what arrived must be right nevertheless."""
        self.broken(case.plan.name, fault)
        if not case.plan.expected().startswith(bytes(got)):
            self.ledger.complain(f"the {len(got)} bytes before a cut are not those of the request", case)


_DEEDS: dict[str, Callable[[WebClient, Case, Reception], Awaitable[None]]] = {
    "events": WebClient._events,
    "audio": WebClient._audio,
    "deleted": WebClient._deleted,
    "speech": WebClient._speech,
}
