"""What is admitted, to the last byte and request, and what becomes of a piece of an input."""

from pathlib import Path
from typing import Any

import pytest

from protocol.wire.messages import Accepted, Assign, Cancel, Input, Ping, Pong, Rejected, Submit
from relayd.core import admission
from tests.support.fake_worker import fake_worker
from tests.support.relay import Peer, a_submit, an_input, daemon, new_token, peer, until


def uploads(*sizes: int, **fields: Any) -> Submit:
    """A request whose inputs are awaited."""
    return a_submit(inputs={f"i{n}": an_input(b"x" * size) for n, size in enumerate(sizes)}, **fields)


async def refusal(client: Peer, submit: Submit) -> Rejected | None:
    """Why it is refused; None if it is not."""
    client.send(submit)
    client.send(Ping(timestamp=1.0))
    told = await client.next(Rejected, Pong)
    if isinstance(told, Rejected):
        assert told.request_id == submit.request_id
        await client.next(Pong)
        return told
    return None


async def codes(client: Peer, *submits: Submit) -> list[str | None]:
    return [told.code if (told := await refusal(client, submit)) else None for submit in submits]


@pytest.mark.trio
async def test_a_principals_share_is_counted_to_the_last_byte_and_upload(tmp_path: Path) -> None:
    limits = {"principal": {"max_input_bytes": 10, "max_uploads": 3}, "max_input_bytes": 20}
    async with daemon(tmp_path, limits=limits) as relay, peer(relay.url, "client", await new_token(relay)) as client:
        assert await codes(client, uploads(4, 5), uploads(1), uploads(1), a_submit()) == [
            None,
            None,
            "rate_limited",
            None,
        ]
        told = await refusal(client, uploads(1))
        assert told is not None
        assert (told.retry_after_s, told.retryable) == (2.0, True)
        assert "would have 11 bytes, and it may have 10" in told.message
        assert await codes(client, uploads(0), uploads(21), uploads(20)) == [None, "input_too_large", "rate_limited"]
    async with daemon(tmp_path, limits=limits) as relay, peer(relay.url, "client", await new_token(relay)) as client:
        assert await codes(client, uploads(1), uploads(1), uploads(1), uploads(1)) == [None] * 3 + ["rate_limited"]
    async with daemon(tmp_path, limits=limits) as relay, peer(relay.url, "client", await new_token(relay)) as client:
        assert await codes(client, uploads(20), uploads(1)) == [None, "rate_limited"], "the first may have any size"


@pytest.mark.trio
@pytest.mark.parametrize(("most", "largest"), [(100, 40), (40, 100)])
async def test_all_uploads_together_are_bounded_to_the_last_byte(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, most: int, largest: int
) -> None:
    assert admission.MAX_UPLOADING_BYTES == 256 * 1024 * 1024
    monkeypatch.setattr(admission, "MAX_UPLOADING_BYTES", most)
    async with (
        daemon(tmp_path, limits={"max_input_bytes": largest}) as relay,
        peer(relay.url, "client") as client,
    ):
        assert await codes(client, uploads(30), uploads(30), uploads(40), uploads(1), uploads(0), a_submit()) == [
            None,
            None,
            None,
            "rate_limited",
            None,
            None,
        ]
        told = await refusal(client, uploads(1))
        assert told is not None
        assert (told.retry_after_s, told.retryable) == (2.0, True)


@pytest.mark.trio
async def test_an_input_may_have_exactly_what_its_space_accepts(tmp_path: Path) -> None:
    rules = {"voice": {"media_types": ["audio/wav", "audio/*"], "max_bytes": 10, "required": True}, "more": {}}
    async with daemon(tmp_path) as relay, peer(relay.url, "client") as client:
        assert await refusal(client, a_submit(inputs={"any": an_input(b"x" * 99)})) is None, "nobody knows yet"
        async with fake_worker(relay.url, inputs=rules):
            await until(lambda: bool(relay.relay.workers))
            fits, more = an_input(b"x" * 10), an_input(b"x" * 9_999)
            assert await codes(
                client,
                a_submit(inputs={"voice": fits, "more": more}),
                a_submit(inputs={"voice": an_input(b"x" * 11)}),
                a_submit(inputs={"more": more}),
                a_submit(inputs={"voice": fits, "other": fits}),
                a_submit(inputs={"voice": an_input(b"x", media_type="text/plain")}),
            ) == [None, "input_too_large", "input_missing", "invalid_params", "invalid_params"]
            told = await refusal(client, a_submit(inputs={"voice": fits, "other": fits}))
            assert told is not None
            assert told.details == {"inputs.other": "is not accepted"}
            assert "it accepts more, voice" in told.message
            told = await refusal(client, a_submit(inputs={"voice": an_input(b"x", media_type="text/plain")}))
            assert told is not None
            assert told.details == {"inputs.voice": "is 'text/plain'; accepted are audio/wav, audio/*"}


@pytest.mark.trio
async def test_what_waits_is_counted_over_all_spaces(tmp_path: Path) -> None:
    limits = {"principal": {"max_queued": 2}}
    async with daemon(tmp_path, limits=limits) as relay, peer(relay.url, "client", await new_token(relay)) as client:
        assert await codes(client, a_submit(), a_submit(space="check"), a_submit()) == [None, None, "queue_full"]


@pytest.mark.trio
async def test_a_piece_for_what_is_being_stored_or_has_ended_is_passed_over(tmp_path: Path) -> None:
    async with daemon(tmp_path) as relay, peer(relay.url, "client") as client:
        whole, cancelled = uploads(3), uploads(3)
        client.send(whole)
        for _ in range(2):
            client.send(Input(request_id=whole.request_id, name="i0", offset=0, data=b"xxx"))
        await client.next(Accepted)
        client.send(Input(request_id=whole.request_id, name="i0", offset=9, data=b"beyond"))
        client.send(cancelled)
        client.send(Cancel(request_id=cancelled.request_id))
        client.send(Input(request_id=cancelled.request_id, name="i0", offset=9, data=b"beyond"))
        client.send(Ping(timestamp=1.0))
        assert isinstance(await client.next(Rejected, Pong), Pong)


@pytest.mark.trio
async def test_a_worker_is_told_what_was_asked_for_and_in_which_order_it_came(tmp_path: Path) -> None:
    async with daemon(tmp_path) as relay, peer(relay.url, "client") as client:
        submits = [a_submit(priority=9 if number == 2 else 5) for number in range(3)]
        assert await codes(client, *submits) == [None] * 3
        assert [relay.relay.requests[submit.request_id].entry.ticket for submit in submits] == [1, 2, 3]
        async with fake_worker(relay.url, slots=3) as worker:
            told: list[Assign] = [await worker.assigned() for _ in submits]
        assert [assign.request_id for assign in told] == [submits[n].request_id for n in (2, 0, 1)]
