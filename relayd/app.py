"""The daemon, put together: what it consists of, how it starts and how it stops."""

import signal
import time
from collections.abc import Callable, Sequence

import attrs
import structlog
import trio

from relayd.auth import Tokens
from relayd.config import Config
from relayd.intake import Intake
from relayd.listener import describe, open_listeners, serve_listeners, tls_context
from relayd.places import serve_places
from relayd.relay import Relay, Space
from relayd.requests import Holder, Request
from relayd.states import Entry, State
from relayd.store.base import DeleteRequest, DeleteSpace, Loaded, PutSpace, RequestRecord, SpaceRecord
from relayd.store.opening import open_store
from relayd.wire import Gate

log = structlog.get_logger("relayd")

#: For connections to be closed in order at the end.
CLOSE_S = 3.0
#: How often ended requests are looked over.
REAP_INTERVAL_S = 5.0
#: Ended requests that are remembered at most; the oldest go first. One costs about 2 KiB without its frames.
MAX_ENDED = 10_000
GOING_AWAY = 1001


@attrs.define(eq=False)
class Shutdown:
    """The way out: drain first, leave at once when asked twice."""

    relay: Relay
    leave: trio.Event = attrs.field(factory=trio.Event)

    def drain(self, why: str) -> None:
        """Take nothing new and leave when what runs has ended; asked again, leave now."""
        if self.relay.draining.is_set():
            log.warning("leaving at once", why=why)
            self.leave.set()
            return
        running = sum(request.entry.state is State.RUNNING for request in self.relay.requests.values())
        log.warning("draining", why=why, running=running, at_most_s=self.relay.config.drain_timeout_s)
        self.relay.scheduler.draining = True
        self.relay.draining.set()


async def serve(config: Config, *, on_ready: Callable[[Sequence[str]], None] | None = None) -> None:
    """Be the daemon until a signal or an operator ends it.

    Args:
        config: all settings.
        on_ready: told the URLs once every door is open and the store is loaded.

    Raises:
        StoreError: the store cannot be used.
        ListenError: a door cannot be opened.
    """
    context = tls_context(config)
    async with open_store(config) as store, open_listeners(config) as listeners:
        loaded = await store.load()
        for words in loaded.damaged:
            log.error("store has a damaged record", what=words)
        async with trio.open_nursery() as nursery:
            relay = Relay(config, store, nursery)
            shutdown = Shutdown(relay)
            intake = Intake(relay)
            tokens = Tokens(loaded.tokens)
            gate = Gate(relay, intake, tokens, shutdown.drain)
            await _restore(relay, loaded)
            nursery.start_soon(intake.serve)
            nursery.start_soon(serve_places, relay)
            nursery.start_soon(_reap, relay)
            nursery.start_soon(_hear_signals, shutdown)
            async with trio.open_nursery() as connections:
                accepting = trio.CancelScope()

                async def accept() -> None:
                    with accepting:
                        await serve_listeners(listeners, gate, context, connections)

                connections.start_soon(accept)
                urls = describe(listeners, tls=context is not None)
                log.info("listening", urls=urls, spaces=sorted(relay.spaces), state_dir=str(config.state_dir))
                if on_ready is not None:
                    on_ready(urls)
                await relay.draining.wait()
                accepting.cancel()
                await _until_idle(relay, shutdown, config.drain_timeout_s)
                for space in relay.spaces.values():  # no deadline counts while the links are being closed
                    space.closed.set()
                await _close_links(relay)
                connections.cancel_scope.cancel()
            nursery.cancel_scope.cancel()
        await store.flush()
    log.info("stopped")


async def _hear_signals(shutdown: Shutdown) -> None:
    with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
        async for number in signals:
            shutdown.drain(signal.Signals(number).name)


async def _until_idle(relay: Relay, shutdown: Shutdown, drain_timeout_s: float) -> None:
    """Wait for what runs, for as long as a drain may take, and for listeners to have heard its end."""
    with trio.move_on_after(drain_timeout_s):
        while not shutdown.leave.is_set():
            running = [r for r in relay.requests.values() if r.entry.state is State.RUNNING]
            unsent = any(reader for client in relay.clients.values() for reader in client.unfinished())
            if not running and not unsent:
                return
            with trio.move_on_after(0.1):
                await shutdown.leave.wait()
    left = sum(r.entry.state is State.RUNNING for r in relay.requests.values())
    if left:
        log.warning("left running work to its workers; it goes on when the relay is back", requests=left)


async def _close_links(relay: Relay) -> None:
    with trio.move_on_after(CLOSE_S, shield=True):
        async with trio.open_nursery() as nursery:
            for connection in list(relay.connections.values()):
                nursery.start_soon(connection.link.aclose, GOING_AWAY, "the relay is shutting down")


# -- before and after ---------------------------------------------------------------------------------------------


async def _restore(relay: Relay, loaded: Loaded) -> None:
    """Open the spaces of the config and of the store, and take up the requests where the last run left them."""
    records = {record.name: record for record in loaded.spaces}
    for name, config in relay.config.spaces.items():
        record = records.pop(name, SpaceRecord(name=name, created_at=time.time()))
        await _open(relay, attrs.evolve(record, config=config, made_by="config"))
    for record in records.values():
        kept = any(r.submit.space == record.name and State(r.state).live for r in loaded.requests)
        if record.made_by == "command" or kept:
            await _open(relay, record)
        else:
            log.info("space is gone from relayd.toml", space=record.name)
            relay.store.post(DeleteSpace(record.name))
    live = 0
    for stored in loaded.requests:
        if stored.submit.space not in relay.spaces:
            relay.store.post(DeleteRequest(stored.request_id))
            continue
        request = _revive(relay, stored)
        if request.live:
            live += 1
            relay.scheduler.restore(request.entry, request.created_at)
        relay.keep(request)
    if live:
        log.info("requests taken up from the store", requests=live)


async def _open(relay: Relay, record: SpaceRecord) -> None:
    space = Space(
        name=record.name,
        config=record.config,
        made_by=record.made_by,
        created_at=record.created_at,
        engine=record.engine,
        params=dict(record.params),
        inputs=dict(record.inputs),
        format=record.format,
    )
    await relay.open_space(space, paused=record.paused)
    relay.store.post(PutSpace(relay.space_record(space)))


def _revive(relay: Relay, record: RequestRecord) -> Request:
    """A request of the store. Its deadlines begin anew: the clock that measured them stopped with the last run."""
    now, state = trio.current_time(), State(record.state)
    submit = record.submit
    entry = Entry(
        request_id=record.request_id,
        space=submit.space,
        principal=record.principal,
        priority=submit.priority,
        ticket=record.ticket,
        retry=submit.retry,
        state=state,
        attempt=record.attempt,
        unsure=state.live,
        losses=record.losses,
        started_at=now,
        reproducible=record.reproducible,
        has_output=record.has_output,
    )
    request = Request.of(
        submit,
        record.principal,
        entry,
        relay.spaces[submit.space].config,
        record.created_at,
        whole=True,
        accepted=True,
        unheld_at=now,
        worker_grace_s=relay.config.limits.worker_grace_s,
        ended_at=None if state.live else now,
        code=record.code,
        message=record.message,
        has_result=state.live,
    )
    if not state.live:
        request.shed()
    return request


async def _reap(relay: Relay) -> None:
    """Forget ended requests after `results.retain_s`, and drop the oldest results while all are over their memory."""
    while True:
        await trio.sleep(REAP_INTERVAL_S)
        try:
            _reap_once(relay, trio.current_time())
        except Exception:
            log.exception("reaping broke the relay's own rules")


def _reap_once(relay: Relay, now: float) -> None:
    results = relay.config.results
    ended = [r for r in relay.requests.values() if r.ended_at is not None and not r.log.readers]
    ended.sort(key=lambda request: request.ended_at or 0.0)
    held = sum(request.log.bytes_held for request in relay.requests.values())
    too_many = len(ended) - MAX_ENDED
    here: set[Holder] = set(relay.clients.values())
    for request in ended:
        # Its listeners are away: their links are gone, and the window in which they may come back is over.
        since = max(request.ended_at or 0.0, request.unheld_at or 0.0)
        if request.owed and now - since >= relay.config.limits.resume_window_s and not request.unheard & here:
            relay.conclude(request)
    for number, request in enumerate(ended):
        if number < too_many or now - (request.ended_at or 0.0) >= results.retain_s:
            held -= request.log.bytes_held
            relay.forget(request)
            relay.store.post(DeleteRequest(request.request_id))
        elif held > results.memory_bytes and request.has_result:
            held -= request.log.bytes_held
            request.has_result = False
            request.log.drop()
