"""SIGHUP: settings that can change without a restart are read again, and the log names those that cannot.

All is looked at before anything is changed, so a file with a fault in it changes nothing.
"""

import ssl
from collections.abc import Callable, Iterator
from typing import Any

import attrs
import structlog
import trio

from protocol.sd_notify import ServiceManager
from relayd.auth.tokens import TokenRegistry
from relayd.config.schema import Config, ConfigError
from relayd.core.relay import Relay
from relayd.core.space import Space
from relayd.logs.setup import set_level
from relayd.net.tls import ListenError, load_certificate, make_tls_context
from relayd.store.base import StoreError
from relayd.store.records import DeleteSpace, PutSpace

log = structlog.get_logger("relayd.reload")

#: What the daemon opened, locked or set up at its start. All else of the settings is looked at when it is needed.
NEEDS_RESTART = ("listen", "state_dir", "unix_socket", "unix_socket_mode", "store")


@attrs.define(eq=False)
class Reload:
    """Reads the settings again when asked.

    Args:
        relay: gets them.
        tokens: read again from the store.
        context: of TLS, whose certificate is read again; None for plain TCP.
        reread: makes the settings as the start of the daemon did. Blocks; raises `ConfigError`.
        manager: told when it begins and when it is over.
    """

    relay: Relay
    tokens: TokenRegistry
    tls_context: ssl.SSLContext | None
    reread: Callable[[], Config]
    manager: ServiceManager
    _asked: trio.Event = attrs.field(factory=trio.Event)

    def ask(self) -> None:
        """Have it done soon; what is asked while it is being done is done once more."""
        self._asked.set()

    async def serve(self) -> None:
        """Do it whenever asked, until cancelled. A task of its own: a store that hangs must not hold up SIGTERM."""
        while True:
            await self._asked.wait()
            self._asked = trio.Event()
            self.manager.reloading()
            try:
                words = await self.once()
            except Exception:
                log.exception("internal error while reloading the configuration")
                words = "reading the configuration again failed; see the log"
            self.manager.ready(words)

    async def once(self) -> str:
        """Read everything again; what came of it, in a line.

        Cancellation: what was changed stays changed.
        """
        try:
            new = await trio.to_thread.run_sync(self.reread)
            make_tls_context(new)  # on a context that nobody uses: a key that does not fit would ruin the one in use
            changed, restart = self._apply(new)
        except ConfigError as fault:
            log.error("configuration not read again: nothing is changed", faults=fault.faults)
            return f"configuration not read again: {'; '.join(fault.faults)}"
        except ListenError as fault:
            log.error("configuration not read again: nothing is changed", faults=[str(fault)])
            return f"configuration not read again: {fault}"
        spaces = await self._apply_spaces()
        log.warning("configuration read again", changed=changed, needs_restart=restart, **spaces)
        await self._apply_tokens()
        done = sum(map(len, (changed, *spaces.values())))
        left = f"; a restart is needed for {', '.join(name.partition(':')[0] for name in restart)}" if restart else ""
        return f"configuration read again: {done} changes{left}"

    # -- settings

    def _apply(self, new: Config) -> tuple[list[str], list[str]]:
        """Let `new` count, but for what needs a restart; both in words. No `await`: nobody sees half of it."""
        old = self.relay.config
        kept: dict[str, Any] = {name: getattr(old, name) for name in NEEDS_RESTART}
        kept["log"] = attrs.evolve(new.log, format=old.log.format)
        if (old.tls is None) != (new.tls is None):
            kept["tls"] = old.tls
        taken = attrs.evolve(new, **kept)
        if self.tls_context is not None and taken.tls is not None:
            load_certificate(self.tls_context, taken.tls)  # always: a renewed one lies under the same name
        self.relay.config = taken
        if taken.log.level != old.log.level:
            set_level(taken.log.level)
        return _differences(old, taken), _differences(taken, new)

    # -- spaces

    async def _apply_spaces(self) -> dict[str, list[str]]:
        """Have the spaces be as the settings say; names by what became of them."""
        relay = self.relay
        told: dict[str, list[str]] = {"spaces_added": [], "spaces_changed": [], "spaces_removed": [], "spaces_busy": []}
        for name, config in relay.config.spaces.items():
            space = relay.spaces.get(name)
            if space is None:
                space = Space(name=name, config=config, made_by="config")
                await relay.spaces.open(space)
                relay.store.post(PutSpace(relay.spaces.record(space)))
                told["spaces_added"].append(name)
            elif space.config != config:
                told["spaces_changed"].append(name)
            if space.config != config or space.made_by != "config":
                space.made_by = "config"
                relay.spaces.change(space, config)
        for name, space in list(relay.spaces.items()):
            if space.made_by == "config" and name not in relay.config.spaces:
                if refusal := relay.spaces.close(name):
                    # As after a restart, it stays until it is at rest; the next reload or restart looks again.
                    log.warning("space is gone from the configuration, stays for now", space=name, why=refusal.message)
                    told["spaces_busy"].append(name)
                else:
                    relay.store.post(DeleteSpace(name))
                    told["spaces_removed"].append(name)
        return told

    # -- tokens

    async def _apply_tokens(self) -> None:
        known = {record.token_id for record in self.tokens.list()}
        try:
            loaded = await self.relay.store.load()
        except StoreError as fault:
            log.error("tokens not read again", why=str(fault))
            return
        gone = self.tokens.reload(loaded.tokens, known)
        for connection in list(self.relay.connections.values()):
            if connection.principal.token_id in gone:
                connection.disconnect("its token was revoked")
        log.info("tokens read again", tokens=len(self.tokens.list()), gone=sorted(gone))


def _differences(old: Config, new: Config) -> list[str]:
    """What is set otherwise in `new`, as `path.to.key: old -> new`; spaces apart."""
    before, after = dict(_flat(old)), dict(_flat(new))
    return [
        f"{name}: {before.get(name)} -> {after.get(name)}"
        for name in sorted(before.keys() | after.keys())
        if before.get(name) != after.get(name)
    ]


def _flat(settings: Any, *path: str) -> Iterator[tuple[str, Any]]:
    for field in attrs.fields(type(settings)):
        value, name = getattr(settings, field.name), (*path, field.name)
        if attrs.has(type(value)):
            yield from _flat(value, *name)
        elif name != ("spaces",):
            yield ".".join(name), value
