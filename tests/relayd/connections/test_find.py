"""`find`: which requests a principal is told of, by the beginning of their ids, their spaces and states."""

from pathlib import Path
from typing import Any

import pytest

from protocol.wire.messages import Accepted, Cancel, Error, Find, Found
from relayd.views.rows import PAGE_ROWS
from tests.support.relay import Peer, a_submit, daemon, new_token, peer

MANY = PAGE_ROWS + 1


async def found(client: Peer, **wanted: Any) -> tuple[list[dict[str, Any]], int]:
    """The rows of all pages, and the total."""
    client.send(Find(**wanted))
    rows: list[dict[str, Any]] = []
    while True:
        page: Found = await client.next(Found, Error)
        assert isinstance(page, Found), page
        rows += page.requests
        if not page.more:
            return rows, page.total


@pytest.mark.trio
async def test_requests_are_found_by_the_beginning_of_their_ids_and_by_what_they_are(tmp_path: Path) -> None:
    async with daemon(tmp_path) as relay, peer(relay.url, "client") as client:
        ids = ["ab" + "0" * 30, "ac" + "0" * 30, "b" * 32]
        for request_id, space in zip(ids, ("tts", "tts", "check"), strict=True):
            client.send(a_submit(request_id=request_id, space=space))
            await client.next(Accepted)
        rows, total = await found(client)
        assert [row["request_id"] for row in rows] == ids[::-1]
        assert total == 3
        assert rows[0] | {"created_at": 0, "age_s": 0, "principal": ""} == {
            "request_id": ids[2],
            "space": "check",
            "principal": "",
            "state": "queued",
            "priority": 5,
            "created_at": 0,
            "age_s": 0,
            "attempt": 0,
            "audio_s": None,
            "code": None,
            "message": None,
        }
        assert [row["request_id"] for row in (await found(client, prefix="a"))[0]] == ids[1::-1]
        assert [row["request_id"] for row in (await found(client, prefix="ab"))[0]] == ids[:1]
        assert [row["request_id"] for row in (await found(client, spaces=["check"]))[0]] == ids[2:]
        rows, total = await found(client, limit=1)
        assert ([row["request_id"] for row in rows], total) == (ids[2:], 3)
        client.send(Cancel(request_id=ids[0]))
        assert [row["request_id"] for row in (await found(client, states=["cancelled"]))[0]] == ids[:1]
        assert await found(client, prefix="c") == ([], 0)
        assert await found(client, principals=["nobody"]) == ([], 0)


@pytest.mark.trio
async def test_a_client_finds_its_own_requests_and_an_operator_those_of_all(tmp_path: Path) -> None:
    async with daemon(tmp_path) as relay:
        ann, bob = await new_token(relay, name="ann"), await new_token(relay, name="bob")
        url = relay.urls[0]
        async with peer(url, "client", ann) as client, peer(url, "client", bob) as other:
            submit = a_submit()
            client.send(submit)
            await client.next(Accepted)
            assert (await found(client, prefix=submit.request_id[:8]))[1] == 1
            assert await found(other, prefix=submit.request_id[:8]) == ([], 0)
            assert await found(other, principals=["ann"]) == ([], 0)
            async with peer(relay.url, "operator", readonly=True) as operator:
                rows, total = await found(operator, principals=["ann"])
                assert ([row["principal"] for row in rows], total) == (["ann"], 1)


@pytest.mark.trio
async def test_many_requests_come_in_pages(tmp_path: Path) -> None:
    spaces = {"tts": {"max_queued_per_principal": MANY}}
    async with daemon(tmp_path, spaces=spaces) as relay, peer(relay.url, "client") as client:
        for _ in range(MANY):
            client.send(a_submit(detach=True))
            await client.next(Accepted)
        rows, total = await found(client, limit=1_000)
        assert (len({row["request_id"] for row in rows}), total) == (MANY, MANY)
