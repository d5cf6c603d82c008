"""What the storm holds against a relay that forgets what it answered, or does what it was told not to."""

import json
from datetime import UTC, datetime
from pathlib import Path

import attrs
import pytest
import trio

from tests.chaos.operator_view import OperatorView
from tests.chaos.processes import Actor
from tests.chaos.report import Ledger
from tests.chaos.stage import LEAVER, WINDOWS
from tests.chaos.steering import Operator

REQUEST = "0" * 32


@attrs.define(eq=False)
class ScriptedView(OperatorView):
    """A relay that says what the test wants."""

    states: dict[str, str] = attrs.field(factory=dict)
    paused: bool = False

    async def state(self, request_id: str) -> str:
        return self.states.get(request_id, "")

    async def space(self, name: str) -> dict[str, object] | None:
        return {"name": name, "paused": self.paused}


def operator(ledger: Ledger, nursery: trio.Nursery) -> tuple[Operator, ScriptedView]:
    view = ScriptedView("unix:/nowhere")
    leaver = Actor(LEAVER, (), {}, Path(), lambda _name, _line: None, "")
    return Operator(view, ledger, 1, leaver, nursery), view


@pytest.mark.trio
@pytest.mark.parametrize("state", ["queued", "completed", "failed", ""])
async def test_a_cancel_that_a_relay_has_forgotten_at_its_restart_is_found(state: str) -> None:
    ledger = Ledger(WINDOWS, 0.0)
    async with trio.open_nursery() as nursery:
        steering, view = operator(ledger, nursery)
        view.states[REQUEST] = "cancelled"
        await steering.answered("it is cancelled", f"cancelled {REQUEST}", steering.is_cancelled(REQUEST))
        ledger.relay_starts.append(1.0)
        await steering.verify_after_restart()
        assert ledger.complaints == []
        view.states[REQUEST] = state
        ledger.relay_starts.append(2.0)
        await steering.verify_after_restart()
    (complaint,) = ledger.complaints
    assert REQUEST in complaint
    assert repr(state) in complaint


@pytest.mark.trio
async def test_a_pause_that_is_forgotten_at_a_restart_is_found() -> None:
    ledger = Ledger(WINDOWS, 0.0)
    async with trio.open_nursery() as nursery:
        steering, view = operator(ledger, nursery)
        view.paused = True
        await steering.answered("it is paused", "paused tts", steering.is_paused("tts", True))
        view.paused = False
        await steering.verify_after_restart()  # there was none
        assert ledger.complaints == []
        ledger.relay_starts.append(1.0)
        await steering.verify_after_restart()
    assert len(ledger.complaints) == 1


@pytest.mark.trio
@pytest.mark.parametrize(("space", "worker"), [("tts", "a-1"), ("loose", "d-1")])
async def test_a_request_must_not_start_where_it_is_paused_or_drained(space: str, worker: str) -> None:
    ledger = Ledger(WINDOWS, 0.0)
    ledger.held_back = {"tts": 1000.0, "d-1": 1000.0}

    def started(at: float, space: str, worker: str, attempt: int) -> None:
        entry = {"event": "request started", "request_id": REQUEST, "space": space, "worker": worker}
        told = entry | {"attempt": attempt, "timestamp": datetime.fromtimestamp(at, UTC).isoformat()}
        ledger.record_line("relay", json.dumps(told))

    started(999.0, space, worker, 1)
    started(1001.0, "loose", "a-1", 2)
    started(1001.0, space, worker, 1)  # sent again to a worker that came back without it
    assert ledger.complaints == []
    ledger.relay_starts.append(1.0)
    started(1001.0, space, worker, 3)  # the same, with the number that a new relay gives it
    assert ledger.complaints == []
    started(1001.0, space, worker, 4)
    assert len(ledger.complaints) == 1
    ledger.relay_starts.append(2.0)
    started(1001.0, "loose", "b-1", 5)
    ledger.relay_starts.append(3.0)
    started(1001.0, space, worker, 6)
    assert len(ledger.complaints) == 2


@pytest.mark.trio
@pytest.mark.parametrize("level", ["error", "critical"])
async def test_a_line_in_which_the_relay_says_that_it_erred_is_a_complaint(level: str) -> None:
    ledger = Ledger(WINDOWS, 0.0)
    ledger.record_line("relay", json.dumps({"event": "login refused", "level": "warning"}))
    assert ledger.complaints == []
    ledger.record_line("relay", json.dumps({"event": "internal error in request", "level": level}))
    assert len(ledger.complaints) == 1
