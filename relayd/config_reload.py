"""Reloads the settings on SIGHUP: applies those that can change without a restart, and logs those that cannot.

Everything is checked before anything is changed, so a file with a fault changes nothing.
"""

import ssl
from collections.abc import Callable, Iterator
from typing import Any

import attrs
import structlog
import trio

from protocol.sd_notify import ServiceManager
from relayd.auth.tokens import TokenRegistry
from relayd.config.schema import Config, ConfigError, Talk
from relayd.core.relay import Relay
from relayd.core.space import Space
from relayd.logs.setup import set_level
from relayd.net.tls import ListenError, load_certificate, make_tls_context
from relayd.store.base import StoreError
from relayd.store.records import DeleteSpace, PutSpace

log = structlog.get_logger("relayd.reload")

#: What the daemon opened, locked or set up when it started. All other settings are read when they are needed.
NEEDS_RESTART = ("listen", "state_dir", "unix_socket", "unix_socket_mode", "store")


@attrs.define(eq=False)
class Reload:
    """Reloads the settings on request.

    Args:
        relay: the relay that uses the settings.
        tokens: the tokens; reloaded from the store.
        tls_context: the TLS context, whose certificate is reloaded; None for plain TCP.
        reread: loads the settings as at startup. Blocks; raises `ConfigError`.
        manager: is notified when a reload begins and ends.
    """

    relay: Relay
    tokens: TokenRegistry
    tls_context: ssl.SSLContext | None
    reread: Callable[[], Config]
    manager: ServiceManager
    _requested: trio.Event = attrs.field(factory=trio.Event)

    def request(self) -> None:
        """Schedule a reload; a request that arrives during a reload causes another one."""
        self._requested.set()

    async def serve(self) -> None:
        """Run requested reloads until cancelled. Needs its own task: a hung store must not delay SIGTERM."""
        while True:
            await self._requested.wait()
            self._requested = trio.Event()
            self.manager.reloading()
            try:
                summary = await self.once()
            except Exception:
                log.exception("internal error while reloading the configuration")
                summary = "configuration reload failed; see the log"
            self.manager.ready(summary)

    async def once(self) -> str:
        """Reload everything; returns a one-line summary.

        Cancellation: changes that were already applied stay.
        """
        try:
            new = await trio.to_thread.run_sync(self.reread)
            make_tls_context(new)  # checked on an unused context: a wrong key would break the one in use
            changed, restart = self._apply(new)
        except ConfigError as fault:
            log.error("configuration not reloaded: nothing changed", faults=fault.faults)
            return f"configuration not reloaded: {'; '.join(fault.faults)}"
        except ListenError as fault:
            log.error("configuration not reloaded: nothing changed", faults=[str(fault)])
            return f"configuration not reloaded: {fault}"
        spaces = await self._apply_spaces()
        log.warning("configuration reloaded", changed=changed, needs_restart=restart, **spaces)
        await self._apply_tokens()
        done = sum(map(len, (changed, *spaces.values())))
        left = f"; a restart is needed for {', '.join(name.partition(':')[0] for name in restart)}" if restart else ""
        return f"configuration reloaded: {done} changes{left}"

    # -- settings

    def _apply(self, new: Config) -> tuple[list[str], list[str]]:
        """Apply `new`, except what needs a restart; returns descriptions of the applied and of the other changes.

        Does not await, so no other task sees a half-applied configuration.
        """
        old = self.relay.config
        kept: dict[str, Any] = {name: getattr(old, name) for name in NEEDS_RESTART}
        kept["log"] = attrs.evolve(new.log, format=old.log.format, callsite=old.log.callsite)
        if (old.tls is None) != (new.tls is None):
            kept["tls"] = old.tls
        kept["talk"] = _reloaded_talk(old.talk, new.talk)
        kept["wyoming"] = old.wyoming
        if old.wyoming is not None and new.wyoming is not None:
            kept["wyoming"] = attrs.evolve(new.wyoming, listen=old.wyoming.listen)  # it is open
        applied = attrs.evolve(new, **kept)
        if self.tls_context is not None and applied.tls is not None:
            load_certificate(self.tls_context, applied.tls)  # always: a renewed certificate has the same file name
        self.relay.config = applied
        if applied.limits != old.limits:
            for request in self.relay.requests.values():
                request.wake()  # its deadline may have changed
        if applied.log.level != old.log.level:
            set_level(applied.log.level)
        return _differences(old, applied), _differences(applied, new)

    # -- spaces

    async def _apply_spaces(self) -> dict[str, list[str]]:
        """Add, change and remove spaces to match the settings; returns their names by outcome."""
        relay = self.relay
        names: dict[str, list[str]] = {"spaces_added": [], "spaces_changed": [], "spaces_removed": []}
        names["spaces_busy"] = []
        for name, config in relay.config.spaces.items():
            space = relay.spaces.get(name)
            if space is None:
                space = Space(name=name, config=config, made_by="config")
                await relay.spaces.open(space)
                relay.store.post(PutSpace(relay.spaces.record(space)))
                names["spaces_added"].append(name)
            elif space.config != config:
                names["spaces_changed"].append(name)
            if space.config != config or space.made_by != "config":
                space.made_by = "config"
                relay.spaces.change(space, config)
        for name, space in list(relay.spaces.items()):
            if space.made_by == "config" and name not in relay.config.spaces:
                if refusal := relay.spaces.close(name):
                    # As after a restart, a busy space stays; the next reload or restart tries to remove it again.
                    log.warning("space removed from the configuration is still busy", space=name, why=refusal.message)
                    names["spaces_busy"].append(name)
                else:
                    relay.store.post(DeleteSpace(name))
                    names["spaces_removed"].append(name)
        return names

    # -- tokens

    async def _apply_tokens(self) -> None:
        known = {record.token_id for record in self.tokens.list()}
        try:
            loaded = await self.relay.store.load()
        except StoreError as fault:
            log.error("tokens not reloaded", why=str(fault))
            return
        revoked = self.tokens.reload(loaded.tokens, known)
        for connection in list(self.relay.connections.values()):
            if connection.principal.token_id in revoked:
                connection.disconnect("its token was revoked")
        log.info("tokens reloaded", tokens=len(self.tokens.list()), revoked=sorted(revoked))


def _reloaded_talk(old: Talk | None, new: Talk | None) -> Talk | None:
    """Return the settings of conversations that hold until a restart: its doors and its history are open."""
    if old is None or new is None:
        return old
    return attrs.evolve(new, listen=old.listen, tts_server=old.tts_server, history=old.history)


def _differences(old: Config, new: Config) -> list[str]:
    """List the settings that differ, as `path.to.key: old -> new`; without spaces."""
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
