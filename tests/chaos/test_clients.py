"""What the clients of a storm do: none of them waits for what nobody ends."""

import random
from pathlib import Path
from typing import Any, cast

import attrs
import pytest
import trio

from protocol.client.client import open_relay
from protocol.wire.frames import Cancelled, Failed, Output, Started
from protocol.wire.messages import Cancel
from tests.chaos.clients import Client
from tests.chaos.report import Ledger
from tests.chaos.stage import WINDOWS
from tests.chaos.workload import PIPED, Plan, draw_plan
from tests.support.fake_worker import fake_worker, identity
from tests.support.relay import daemon


def a_plan(kind: str, *, grouped: bool) -> Plan:
    """One that is to be cancelled, and never by itself."""
    for seed in range(1_000):
        plan = draw_plan(random.Random(seed), f"plan {seed}", {kind: 1})
        if plan.grouped is grouped and plan.space == "tts" and plan.source is not None and plan.source.space == "tell":
            return plan
    raise AssertionError(f"no plan of {kind} in {PIPED} is like this")


@pytest.mark.trio
@pytest.mark.parametrize(("kind", "grouped"), [("piped and cancelled", True), ("piped from cancelled", False)])
async def test_a_request_that_ends_before_its_cancel_leaves_no_long_source(
    tmp_path: Path, kind: str, grouped: bool
) -> None:
    rules: dict[str, Any] = {"params": {}, "inputs": {"text": {"live": True}, "voice": {}}}
    spaces: dict[str, Any] = {"tts": {}, "tell": {}}
    async with (
        daemon(tmp_path, spaces=spaces) as relay,
        fake_worker(relay.url, spaces=("tell",), **rules) as teller,
        fake_worker(relay.url, spaces=("tts",), **rules) as speaker,
        open_relay(relay.url) as client,
        trio.open_nursery() as nursery,
    ):
        ledger = Ledger(WINDOWS, trio.current_time())
        one = Client("client 1", client, cast(Any, None), ledger, "", 1, cast(Any, None))
        plan = attrs.evolve(a_plan(kind, grouped=grouped), later_s=0.0, input_bytes=0)
        followed = trio.Event()

        async def follow() -> None:
            await one.follow(plan)
            followed.set()

        nursery.start_soon(follow)
        source = await teller.assigned()
        teller.send(Started(**identity(source, 0), format=None))
        teller.send(Output(**identity(source, 1), data="for minutes "))
        speech = await speaker.assigned()
        speaker.send(Failed(**identity(speech, 0), code="worker_lost", message="", details={}, retryable=False))
        await teller.peer.next(Cancel)
        teller.send(Cancelled(**identity(source, 2)))
        with trio.fail_after(10):
            await followed.wait()
