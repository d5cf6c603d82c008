"""What a failed attempt printed: operators read it with the request, clients never do."""

import json
from pathlib import Path

import pytest

from protocol.wire.codec import encode
from protocol.wire.errors import ErrorCode
from protocol.wire.frames import Cancelled, Failed
from protocol.wire.messages import MAX_REPORT_CHARS, Assign, Cancel, Report, Status, StatusReply
from tests.relayd.views.test_watch import screen
from tests.support.fake_worker import FakeWorker, fake_worker, identity
from tests.support.raw_http_client import visitor
from tests.support.relay import a_submit, daemon, peer

PRINTED = "Traceback (most recent call last):\n  File /srv/model.py, line 3\nKeyError: 'weights'"


def fail(worker: FakeWorker, assign: Assign, output: str, *, retryable: bool = False) -> None:
    worker.send(Report(request_id=assign.request_id, attempt=assign.attempt, output=output))
    code = ErrorCode.ENGINE_FAILED
    worker.send(Failed(**identity(assign, 0), code=code, message="KeyError", details={}, retryable=retryable))


@pytest.mark.trio
async def test_an_operator_reads_what_each_failed_attempt_printed_also_after_a_restart(tmp_path: Path) -> None:
    async with daemon(tmp_path, store="sqlite") as relay, peer(relay.url, "client") as client:
        client.send(submit := a_submit())
        async with fake_worker(relay.url, name="a") as worker:
            fail(worker, await worker.assigned(), "the first words", retryable=True)
            fail(worker, await worker.assigned(), f"{PRINTED} rly_w_{'x' * 32}")
            await client.frames(submit)
        async with screen(relay, readonly=True) as shown:
            told = (await shown.operator.steer("describe", submit.request_id))["report"]
        assert told.index("attempt 1 on a-") < told.index("the first words") < told.index("attempt 2 on a-")
        assert PRINTED in told
        assert "rly_w_[secret]" in told
    async with daemon(tmp_path, store="sqlite") as relay, screen(relay, readonly=True) as shown:
        assert (await shown.operator.steer("describe", submit.request_id))["report"] == told


@pytest.mark.trio
@pytest.mark.parametrize("why", ["run_timeout", "idle_timeout", "cancel"])
async def test_what_an_attempt_printed_comes_also_if_the_relay_has_ended_it_meanwhile(tmp_path: Path, why: str) -> None:
    timeouts = {} if why == "cancel" else {f"{why}_s": 0.05}
    async with daemon(tmp_path, store="sqlite", spaces={"tts": timeouts}) as relay:
        async with fake_worker(relay.url) as worker, peer(relay.url, "client") as client:
            client.send(submit := a_submit(retry="never"))
            assign = await worker.assigned()
            if why == "cancel":
                client.send(Cancel(request_id=submit.request_id))
            await worker.peer.next(Cancel)
            worker.send(Report(request_id=assign.request_id, attempt=1, output=PRINTED))
            worker.send(Cancelled(**identity(assign, 0)))
            await client.frames(submit)
            worker.send(Report(request_id=assign.request_id, attempt=1, output="too late"))
            await worker.peer.settled()
        await relay.relay.store.flush()
    async with daemon(tmp_path, store="sqlite") as relay, screen(relay, readonly=True) as shown:
        told = (await shown.operator.steer("describe", submit.request_id))["report"]
        assert PRINTED in told
        assert "too late" not in told


@pytest.mark.trio
async def test_a_client_never_reads_it(tmp_path: Path) -> None:
    async with daemon(tmp_path, listen="127.0.0.1:0") as relay, peer(relay.url, "client") as client:
        client.send(submit := a_submit())
        async with fake_worker(relay.url) as worker:
            fail(worker, await worker.assigned(), PRINTED)
            frames = await client.frames(submit)
        client.send(Status(request_id=submit.request_id))
        status = await client.next(StatusReply)
        for message in (*frames, status):
            assert b"model.py" not in encode(message)
        async with visitor(relay.url) as web:
            for path in ("", "/events"):
                answer = await web.get(f"/v1/requests/{submit.request_id}{path}")
                assert answer.status == 200
                assert "model.py" not in json.dumps(answer.body.decode())


@pytest.mark.trio
async def test_a_report_belongs_to_the_attempt_that_its_worker_runs_and_is_bounded(tmp_path: Path) -> None:
    async with (
        daemon(tmp_path) as relay,
        peer(relay.url, "client") as client,
        fake_worker(relay.url, name="a") as worker,
        screen(relay, readonly=True) as shown,
    ):
        client.send(mine := a_submit())
        assign = await worker.assigned()
        client.send(queued := a_submit())
        for wrong in (
            Report(request_id=queued.request_id, attempt=1, output="planted"),
            Report(request_id=mine.request_id, attempt=2, output="planted"),
        ):
            worker.send(wrong)
        for _ in range(2):  # the second as if over a new link
            worker.send(Report(request_id=mine.request_id, attempt=1, output="once"))
        await worker.peer.settled()
        assert relay.relay.requests[mine.request_id].report.count("once") == 1
        for number in range(9):
            worker.send(Report(request_id=mine.request_id, attempt=1, output=f"{number}" * MAX_REPORT_CHARS))
        fail(worker, assign, "the end")
        await client.frames(mine)
        told = (await shown.operator.steer("describe", mine.request_id))["report"]
        assert len(told) <= MAX_REPORT_CHARS
        assert told.endswith("the end")
        assert "planted" not in told
        assert (await shown.operator.steer("describe", queued.request_id))["report"] == ""
