"""The last frame of a request whose frames are gone: from its record alone."""

from typing import Any

import pytest

from protocol.wire.codec import decode
from protocol.wire.frames import Cancelled, Failed
from protocol.wire.messages import FROM_RELAY
from relayd.config.schema import SpaceConfig
from relayd.requests.final_frame import make_final_frame
from relayd.requests.outcome import KEPT_BYTES, Outcome
from relayd.requests.request import Request
from relayd.scheduling.model import ScheduledRequest, State
from tests.support.relay import a_submit


def ended(state: State, frames: int = 0, **fields: Any) -> Request:
    submit = a_submit()
    entry = ScheduledRequest(
        request_id=submit.request_id, space="tts", principal="ann", ticket=1, state=state, attempt=2
    )
    request = Request.of(submit, "ann", entry, SpaceConfig(), 0.0)
    for name, value in fields.items():
        setattr(request, name, value)
    for number in range(frames):
        request.log.append(b"frame", ends=number == frames - 1)
    return request


async def last(request: Request) -> Any:
    return decode(make_final_frame(request), FROM_RELAY)


@pytest.mark.trio
async def test_it_says_how_the_request_ended_at_the_place_of_its_last_frame() -> None:
    cancelled = ended(State.CANCELLED, 5, message="enough")
    assert await last(cancelled) == Cancelled(request_id=cancelled.request_id, attempt=2, seq=4, reason="enough")
    outcome = Outcome(retryable=True)
    failed = ended(State.FAILED, 1, code="x", message="y", details={"a": 1}, outcome=outcome)
    assert await last(failed) == Failed(
        request_id=failed.request_id, attempt=2, seq=0, code="x", message="y", details={"a": 1}, retryable=True
    )


@pytest.mark.trio
@pytest.mark.parametrize(
    ("code", "told", "retryable"),
    [
        (None, "internal", True),
        ("storage_full", "storage_full", True),
        ("invalid_params", "invalid_params", False),
        ("of a later release", "of a later release", False),
    ],
)
async def test_a_record_without_details_has_those_of_its_code(code: str | None, told: str, retryable: bool) -> None:
    frame = await last(ended(State.FAILED, code=code))
    assert (frame.code, frame.message, frame.seq, frame.retryable) == (told, "", 0, retryable)
    assert not (await last(ended(State.FAILED, code="storage_full", outcome=Outcome(retryable=False)))).retryable
    assert (await last(ended(State.CANCELLED))).reason == ""


def test_an_outcome_keeps_what_fits_and_comes_back_as_it_was() -> None:
    overhead = len(b"\x81\xa1a\xc5\x00\x00")
    outcome = Outcome(details={"a": bytes(KEPT_BYTES - overhead)}, result={"a": bytes(KEPT_BYTES - overhead + 1)})
    assert (set(outcome.details), outcome.result) == ({"a"}, {})
    assert set(Outcome(result={"a": bytes(3_000), "b": bytes(1_000), "c": 1}).result) == {"a", "b", "c"}
    assert set(Outcome(result={"a": bytes(3_000), "b": bytes(1_100), "c": 1}).result) == {"a"}
    for whole in (Outcome(), Outcome(run_s=1.5, audio_s=0.0, has_outputs=True, retryable=False, details={"a": 1})):
        assert Outcome.unpack(whole.pack()) == whole
    assert Outcome.unpack(None) == Outcome.unpack(b"") == Outcome()
    assert (Outcome().retryable, Outcome().run_s, Outcome().has_outputs) == (None, None, False)
