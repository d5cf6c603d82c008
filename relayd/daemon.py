"""The composition root of the daemon: assembles its parts, starts them and stops them."""

import os
import re
import signal
import socket
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from contextlib import asynccontextmanager
from itertools import chain
from typing import Protocol

import attrs
import structlog
import trio

from protocol.link.base import Link
from protocol.link.websocket_frames import GOING_AWAY
from protocol.sd_notify import ServiceManager
from relayd.auth.result_links import KEY_NAME, LinkSigner, load_signer, new_signer
from relayd.auth.tokens import TokenRegistry
from relayd.config.schema import Config
from relayd.config_reload import Reload
from relayd.connections.budget import ConnectionBudget
from relayd.connections.gateway import Gateway
from relayd.connections.listener import (
    Entrance,
    Port,
    Serve,
    describe,
    open_doors,
    open_listeners,
    serve_foreign,
    serve_listeners,
)
from relayd.connections.standby import Standby
from relayd.core.admission import Admission
from relayd.core.clock import RelayClock, serve_clock
from relayd.core.positions import serve_positions
from relayd.core.relay import Relay
from relayd.core.restore import restore, serve_settling
from relayd.core.token_retention import serve_token_retention
from relayd.http.app import Routes, make_app
from relayd.http.context import HttpContext
from relayd.http.server import Door, HttpServer
from relayd.logs.recent import serve_events
from relayd.net.reactor import open_reactor
from relayd.net.tls import make_tls_context
from relayd.service.health import HealthService
from relayd.service.malloc import serve_memory_return
from relayd.stats.counters import serve_stats
from relayd.store.factory import open_store
from relayd.store.records import Loaded

log = structlog.get_logger("relayd")

#: How long closing the connections may take at shutdown.
CLOSE_S = 3.0


@attrs.define(eq=False)
class Shutdown:
    """Shuts the daemon down: drains first, and exits at once when asked a second time."""

    relay: Relay
    leave: trio.Event = attrs.field(factory=trio.Event)

    def drain(self, why: str) -> None:
        """Accept nothing new and exit when the running requests have ended; on a second call, exit now."""
        if self.relay.draining.is_set():
            log.warning("exiting without waiting for running requests", why=why)
            self.leave.set()
            return
        running, at_most_s = self.relay.running_count, self.relay.config.drain_timeout_s
        log.warning("draining", why=why, running=running, at_most_s=at_most_s)
        self.relay.scheduler.state.draining = True
        self.relay.draining.set()


#: Logged at each start where other machines can connect without TLS.
PLAIN_TEXT = (
    "plain_text: everybody on the network can read and use the tokens, and read and change texts and audio; "
    "use [tls] or a proxy as soon as not all of them are trusted"
)


@attrs.define(eq=False)
class Daemon:
    """A listening daemon; made by `open_daemon`.

    Attributes:
        relay: the state of the relay.
        tokens: the tokens it accepts.
        http: the context shared by the HTTP routes.
        urls: the URLs it listens on.
        door_urls: those of its doors.
        gateway: the gateway that serves new connections.
        shutdown: starts the shutdown.
    """

    relay: Relay
    tokens: TokenRegistry
    http: HttpContext
    urls: list[str]
    door_urls: list[str]
    gateway: Gateway
    shutdown: Shutdown

    async def drain(self) -> None:
        """Wait for a shutdown request, then at most `drain_timeout_s` for the running requests to end."""
        await self.relay.draining.wait()
        # The listeners stay open meanwhile, so that disconnected peers can reconnect to running requests.
        await _until_idle(self.relay, self.http, self.shutdown, self.relay.config.drain_timeout_s)


async def serve(
    config: Config,
    *,
    on_ready: Callable[[Sequence[str]], None] | None = None,
    on_leave: Callable[[], None] = lambda: None,
    reread: Callable[[], Config] | None = None,
    wait: bool = False,
) -> None:
    """Run the daemon until a signal or an operator stops it.

    Args:
        config: all settings.
        on_ready: called with the URLs once every listener is open and the store is loaded.
        on_leave: called, perhaps repeatedly, once the daemon has drained or broken down, before its parts are ended.
        reread: loads `config` again on SIGHUP; None leaves that signal alone.
        wait: wait while another relay uses the state folder, instead of raising `StoreInUse`.

    Raises:
        StoreError: the store cannot be used.
        ListenError: a listener cannot be opened.
    """
    with trio.CancelScope() as scope:
        standby = Standby(scope.cancel) if wait else None
        async with open_daemon(config, on_leave=on_leave, reread=reread, standby=standby) as daemon:
            if on_ready is not None:
                on_ready(daemon.urls)
            await daemon.drain()
    log.info("stopped")


@asynccontextmanager
async def open_daemon(
    config: Config,
    *,
    on_leave: Callable[[], None] = lambda: None,
    reread: Callable[[], Config] | None = None,
    doors: Sequence[Door] = (),
    standby: Standby | None = None,
) -> AsyncIterator[Daemon]:
    """Start the daemon, from its store to its listeners; connections are closed in order when the block ends.

    Args:
        config: all settings.
        on_leave: as for `serve`.
        reread: as for `serve`.
        doors: further ports, each with an HTTP application of its own.
        standby: waits while another relay uses the state folder; None raises `StoreInUse`.

    Raises:
        StoreError: the store cannot be used.
        ListenError: a listener cannot be opened.

    Cancellation: stops the daemon abruptly, like a crash; accepted requests are in the store.
    """
    tls_context = make_tls_context(config)
    doors = [*doors, *_talk_doors(config)]
    async with (
        open_store(config, standby.waiting if standby else None) as store,
        open_listeners(config) as listeners,
        open_doors(doors) as opened,
        open_doors(_wyoming_port(config)) as wyoming_listeners,
    ):
        loaded = await store.load()
        # Entered last, and so left first: `on_leave` is called before a nursery waits for its tasks.
        async with trio.open_nursery() as nursery, _calling(on_leave):
            relay = Relay(config, store, nursery, clock=RelayClock.after(loaded))
            await nursery.start(serve_events, relay.events)
            shutdown = Shutdown(relay)
            admission = Admission(relay)
            tokens = TokenRegistry(loaded.tokens)
            http_context = HttpContext(relay, admission, tokens, _open_signer(config))
            http_context.accounts.restore(loaded)
            http = HttpServer(http_context, make_app(http_context, _talk_routes(http_context)))
            door_servers = [HttpServer(http_context, door.make_app(http_context)) for door in doors]
            foreign = [(sockets, _wyoming_server(http_context)) for sockets in wyoming_listeners]
            servers: list[Server] = [http, *door_servers, *(server for _, server in foreign)]
            await restore(relay, loaded)
            nursery.start_soon(serve_settling, relay, loaded.workers)
            nursery.start_soon(admission.serve)
            nursery.start_soon(relay.principals.serve)
            nursery.start_soon(serve_positions, relay)
            nursery.start_soon(serve_clock, relay)
            nursery.start_soon(serve_stats, relay.sample)
            nursery.start_soon(relay.results.serve_memory)
            nursery.start_soon(serve_memory_return, lambda: relay.stats.frames)
            nursery.start_soon(relay.results.serve_retention)
            nursery.start_soon(serve_token_retention, tokens, store)
            nursery.start_soon(http_context.serve)
            nursery.start_soon(http_context.accounts.serve)
            manager = ServiceManager.from_environment()
            reload = Reload(relay, tokens, tls_context, reread, manager) if reread else None
            if reload is not None:
                if standby is not None and standby.reload_asked:
                    reload.request()
                nursery.start_soon(reload.serve)
            await nursery.start(_handle_signals, shutdown, reload)  # before readiness is reported
            async with (
                _talking(http_context, loaded),
                open_reactor() as reactor,
                trio.open_nursery() as connections,
                _calling(on_leave),
            ):
                del loaded  # this frame lives as long as the daemon, and what has been restored is in the relay
                budget = ConnectionBudget(lambda: relay.config, http_context.failures)
                gateway = Gateway(
                    relay, admission, tokens, http_context.accounts, reactor, connections, shutdown.drain, budget
                )
                connections.start_soon(gateway.serve_login_timeouts)
                accepting = trio.CancelScope()

                entrances = [Entrance(gateway, http, tls_context)]
                entrances += [Entrance(gateway, server, tls_context, is_door=True) for server in door_servers]

                async def accept() -> None:
                    with accepting:
                        async with trio.open_nursery() as each:
                            for sockets, entrance in zip([listeners, *opened], entrances, strict=True):
                                each.start_soon(serve_listeners, sockets, entrance, connections)
                            for sockets, server in foreign:
                                each.start_soon(serve_foreign, sockets, budget, server.serve, connections)

                connections.start_soon(accept)
                urls = describe(listeners, tls=tls_context is not None)
                relay.urls = list(urls)
                door_urls = describe([*chain(*opened)], tls=tls_context is not None)
                door_urls += describe([*chain(*wyoming_listeners)], tls=False, scheme="tcp")
                log.info(
                    "listening",
                    urls=urls,
                    **({"doors": door_urls} if door_urls else {}),
                    spaces=sorted(relay.spaces),
                    state_dir=str(config.state_dir),
                    **_first_steps(urls),
                )
                if config.exposed:
                    log.warning(PLAIN_TEXT, listen=", ".join(config.exposed))
                everywhere = chain(listeners, *opened, *wyoming_listeners)
                accepted = dict(zip([*urls, *door_urls], everywhere, strict=True))
                nursery.start_soon(HealthService(relay, accepted, manager).serve)
                yield Daemon(relay, tokens, http_context, urls, door_urls, gateway, shutdown)
                on_leave()
                accepting.cancel()
                for space in relay.spaces.values():  # so that no deadline fires while the links are being closed
                    space.closed.set()
                await _close_links({*reactor.links, *(each.link for each in relay.connections.values())})
                for server in servers:
                    await server.close()
                connections.cancel_scope.cancel()
            with trio.move_on_after(CLOSE_S):  # after an immediate exit, results may not be stored yet
                await relay.finalizer.wait_finalized()
            nursery.cancel_scope.cancel()
        await store.flush()


def _talk_routes(context: HttpContext) -> Routes:
    """Return the routes of conversations; nothing of them is imported without [talk]."""
    if context.relay.config.talk is None:
        return []
    from relayd.talk.routes import PATHS, routes

    context.more_paths = PATHS
    return routes(context.relay.config.talk)


def _talk_doors(config: Config) -> list[Door]:
    if config.talk is None:
        return []
    from relayd.talk.routes import doors

    return doors(config.talk)


class Server(Protocol):
    """Serves connections until it is closed."""

    async def close(self) -> None:
        """Accept no more requests, and wait a moment for the connections to end."""


class ForeignServer(Server, Protocol):
    """Serves connections of another protocol."""

    @property
    def serve(self) -> Serve:
        """Serves a connection to its end."""


def _wyoming_port(config: Config) -> list[Port]:
    return [] if config.wyoming is None else [ForeignPort(config.wyoming.listen, "[wyoming] listen")]


def _wyoming_server(context: HttpContext) -> ForeignServer:
    """Return the server of the Wyoming protocol; nothing of it is imported without [wyoming]."""
    from relayd.wyoming.server import WyomingServer

    return WyomingServer(context)


@attrs.frozen
class ForeignPort:
    """A further port, with a protocol of its own; see `Port`."""

    listen: str
    setting: str


@asynccontextmanager
async def _talking(context: HttpContext, loaded: Loaded) -> AsyncIterator[None]:
    """Keep the conversations until the end of the block, if there are to be any."""
    if context.relay.config.talk is None:
        del loaded  # as below
        yield
        return
    from relayd.talk.talks import open_talks

    async with open_talks(context.admission, context.tokens) as context.talks:
        await context.talks.restore(loaded)
        del loaded  # this frame lives as long as the daemon
        yield


@asynccontextmanager
async def _calling(on_leave: Callable[[], None]) -> AsyncIterator[None]:
    try:
        yield
    finally:
        on_leave()


def _open_signer(config: Config) -> LinkSigner:
    try:
        return load_signer(config.state_dir)
    except OSError as fault:
        why = f"links to results end with this process: {config.state_dir / KEY_NAME}: {fault.strerror or fault}"
        log.warning("the key of links cannot be kept", why=why)
        return new_signer()


def _first_steps(urls: Sequence[str]) -> dict[str, str]:
    """Return what a newcomer looks for: the page, the base URL of OpenAI's API, and how to make a token."""
    steps = {"new_token": "relayd token create --role client --name NAME"}
    if web := next((url for url in urls if url.startswith("ws")), None):
        web = re.sub(r"//(0\.0\.0\.0|\[::\]):", f"//{socket.gethostname()}:", web.replace("ws", "http", 1))
        steps |= {"page": f"{web}/", "openai_base_url": f"{web}/v1"}
    return steps


async def _handle_signals(
    shutdown: Shutdown, reload: Reload | None, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
) -> None:
    had_terminal = os.isatty(2)
    handled = (signal.SIGTERM, signal.SIGINT, *((signal.SIGHUP,) if reload else ()))
    with trio.open_signal_receiver(*handled) as signals:
        task_status.started()
        async for number in signals:
            # A closed terminal sends SIGHUP, too; isatty() is then False.
            if number != signal.SIGHUP or (had_terminal and not os.isatty(2)):
                shutdown.drain(signal.Signals(number).name)
            elif reload is not None:
                reload.request()


async def _until_idle(relay: Relay, http_context: HttpContext, shutdown: Shutdown, drain_timeout_s: float) -> None:
    """Wait at most `drain_timeout_s` until running requests have ended, are stored and were sent to their readers."""
    with trio.move_on_after(drain_timeout_s):
        while not shutdown.leave.is_set():
            unsent = any(reader for client in relay.clients.values() for reader in client.unsent_readers())
            if (
                not relay.running_count
                and not unsent
                and not http_context.unfinished
                and not relay.finalizer.unfinalized
            ):
                return
            with trio.move_on_after(0.1):
                await shutdown.leave.wait()
    if left := relay.running_count:
        log.warning("exiting with running requests; they continue when the relay is back", requests=left)


async def _close_links(links: Iterable[Link]) -> None:
    with trio.move_on_after(CLOSE_S, shield=True):
        async with trio.open_nursery() as nursery:
            for link in links:
                nursery.start_soon(link.aclose, GOING_AWAY, "the relay is shutting down")
