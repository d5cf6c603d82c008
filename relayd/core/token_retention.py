"""Deletes the records of tokens that ended long ago."""

import time

import structlog
import trio

from relayd.auth.tokens import TokenRegistry
from relayd.store.base import Store
from relayd.store.records import DeleteToken

log = structlog.get_logger("relayd")

#: Once a day: records are kept for 30 days, and one more day does not matter.
PURGE_INTERVAL_S = 86_400.0


async def serve_token_retention(tokens: TokenRegistry, store: Store) -> None:
    """Purge old tokens at the start and once a day, until cancelled."""
    while True:
        try:
            if purged := tokens.purge(time.time()):
                store.post(*map(DeleteToken, purged))
                log.info("old tokens purged", tokens=purged)
        except Exception:
            log.exception("internal error in token retention loop")
        await trio.sleep(PURGE_INTERVAL_S)
