"""What a client of HTTP makes of the events that it is told."""

import random

import attrs
import pytest
import trio

from protocol.wire.errors import ErrorCode
from relayd.http.errors import HttpError
from relayd.http.json_encoding import error_json, format_sse
from tests.chaos import web
from tests.chaos.proxy import Line
from tests.chaos.report import Fault, Ledger, Windows
from tests.chaos.test_verdict import PLAN
from tests.chaos.verdict import Reception
from tests.chaos.web import WebClient
from tests.support.raw_http_client import events_of


@pytest.mark.trio
async def test_an_error_event_ends_a_request_unless_the_relay_is_only_leaving() -> None:
    ledger = Ledger(Windows(worker_grace_s=5.0, unheard_grace_s=1.5, resume_window_s=8.0, promised_s=15.0), 0.0)
    client = WebClient("web 1", Line("web 1", "nowhere", random.Random(1)), ledger, "token", 1, None)
    for code, end in ((ErrorCode.SHUTTING_DOWN, ""), (ErrorCode.INTERNAL, "error internal")):
        reception = Reception("web 1")
        for kind, _id, data in events_of(format_sse("error", error_json(HttpError(code, "why")))):
            client.take_event(ledger.open_case(PLAN, "00" * 16, "web 1"), reception, kind, data)
        assert reception.end == end


@pytest.mark.trio
@pytest.mark.parametrize(("faults_s", "excused"), [((9.0, 19.0, 29.0), True), ((9.0, 29.0), False)])
async def test_a_speech_is_excused_only_if_no_response_was_left_alone(
    faults_s: tuple[float, ...], excused: bool, monkeypatch: pytest.MonkeyPatch, autojump_clock: object
) -> None:
    ledger = Ledger(Windows(worker_grace_s=5.0, unheard_grace_s=1.5, resume_window_s=8.0, promised_s=15.0), 0.0)
    client = WebClient("web 1", Line("web 1", "nowhere", random.Random(1)), ledger, "token", 1, None)

    async def refused(*_args: object) -> None:
        for number, at in enumerate(faults_s):
            fault = Fault("kill -9", ("relay", "web 1")[number % 2], began + at, began + at + 1.0)
            ledger.faults += [fault, Fault("cut RST", "web 2", began + at + 1.0, began + at + 1.0)]
        await trio.sleep_forever()

    monkeypatch.setattr(web, "END_S", 35.0)
    monkeypatch.setitem(web._DEEDS, "speech", refused)
    began = trio.current_time()
    await client.follow(attrs.evolve(PLAN, kind="speech"))
    assert (ledger.complaints == []) is excused
