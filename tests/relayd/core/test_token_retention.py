"""Records of tokens do not stay forever."""

import time
from pathlib import Path

import pytest

from relayd.auth.tokens import KEEP_ENDED_S
from relayd.store.records import PutToken
from tests.support.relay import daemon


@pytest.mark.trio
async def test_a_restart_deletes_tokens_that_were_revoked_long_ago_from_the_store(tmp_path: Path) -> None:
    now = time.time()
    async with daemon(tmp_path, store="sqlite") as relay:
        for name in ("ann", "bob"):
            relay.tokens.create(role="client", name=name, now=now - 2 * KEEP_ENDED_S)
        relay.tokens.revoke("ann", now - 1.5 * KEEP_ENDED_S)
        await relay.relay.store.commit(*map(PutToken, relay.tokens.list()))
    async with daemon(tmp_path, store="sqlite") as relay:
        assert [record.principal for record in relay.tokens.list()] == ["bob"]
    async with daemon(tmp_path, store="sqlite") as relay:
        assert [record.principal for record in (await relay.relay.store.load()).tokens] == ["bob"]
