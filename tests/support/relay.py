"""A real daemon in the test's own event loop, and raw connections to it."""

import hashlib
import secrets
from collections.abc import AsyncIterator, Callable, Iterator, MutableMapping
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import attrs
import pytest
import structlog
import trio

from protocol.client.address import parse_address
from protocol.link.base import Link
from protocol.link.dial import log_in, open_link
from protocol.wire.codec import decode
from protocol.wire.frames import Frame
from protocol.wire.messages import (
    FROM_RELAY,
    PROTOCOL_VERSION,
    Done,
    Hello,
    Ping,
    Pong,
    Rejected,
    Steer,
    Submit,
    Welcome,
)
from protocol.wire.structs import InputInfo
from protocol.wire.validators import Message
from relayd.auth.tokens import TokenRegistry
from relayd.config.loader import load_config
from relayd.config.schema import Config
from relayd.connections.gateway import Gateway
from relayd.core.relay import Relay
from relayd.daemon import Daemon as RelayDaemon
from relayd.daemon import open_daemon
from relayd.http.context import HttpContext
from relayd.logs.setup import run_taps
from tests.support.until import until as until


def a_config(state_dir: Path, **overrides: Any) -> Config:
    """Settings for a test's daemon: no TCP port unless asked for, and one space `tts`."""
    plain: dict[str, Any] = {"state_dir": state_dir, "listen": "", "spaces": {"tts": {}}}
    return load_config(Path(_empty_file(state_dir)), environ={}, overrides=plain | overrides)


def _empty_file(state_dir: Path) -> Path:
    state_dir.mkdir(parents=True, exist_ok=True)
    path = state_dir / "relayd.toml"
    path.touch()
    return path


@asynccontextmanager
async def running(config: Config, reread: Callable[[], Config] | None = None) -> AsyncIterator["Daemon"]:
    """Run the daemon until the end of the block, where it stops as in a crash, without a drain."""
    # Plain tracebacks: structlog's own show local variables, and take minutes for the megabytes in some of them.
    structlog.configure(
        processors=[
            run_taps,
            structlog.processors.add_log_level,
            structlog.dev.ConsoleRenderer(exception_formatter=structlog.dev.plain_traceback),
        ]
    )

    async def serve(task_status: trio.TaskStatus[RelayDaemon]) -> None:
        async with open_daemon(config, reread=reread) as started:
            task_status.started(started)
            await started.drain()

    try:
        async with trio.open_nursery() as nursery:
            with trio.fail_after(10):
                started: RelayDaemon = await nursery.start(serve)
            yield Daemon(started)
            nursery.cancel_scope.cancel()
    finally:
        structlog.reset_defaults()


@contextmanager
def kept_logs() -> Iterator[list[MutableMapping[str, Any]]]:
    """Capture what daemons log inside the block, instead of printing it."""
    with structlog.testing.capture_logs() as logs, pytest.MonkeyPatch.context() as patch:
        patch.setattr(structlog, "configure", lambda **_: None)
        patch.setattr(structlog, "reset_defaults", lambda: None)
        yield logs


@attrs.define(eq=False)
class Daemon:
    """A daemon that runs in the test's event loop, and what it holds in memory."""

    started: RelayDaemon

    @property
    def urls(self) -> list[str]:
        """The URLs at which it listens."""
        return self.started.urls

    @property
    def http_context(self) -> HttpContext:
        """The context that its HTTP routes share."""
        return self.started.http

    @property
    def gateway(self) -> Gateway:
        """The gateway that accepts its connections."""
        return self.started.gateway

    @property
    def relay(self) -> Relay:
        """Its state."""
        return self.started.relay

    @property
    def tokens(self) -> TokenRegistry:
        """The tokens it accepts."""
        return self.started.tokens

    @property
    def url(self) -> str:
        """The URL of its unix socket, where a test needs no token."""
        return self.urls[-1]

    async def at_rest(self) -> None:
        """Wait until every request has ended, and check that nothing of them is left in memory."""
        relay = self.relay
        await until(lambda: not any(request.live for request in relay.requests.values()))
        await until(lambda: not any(worker.held for worker in relay.scheduler.state.workers.values()))
        await until(lambda: not any(request.log.readers for request in relay.requests.values()))
        assert not relay.scheduler.state.entries
        assert not any(
            space.admitted or space.running or space.queue for space in relay.scheduler.state.spaces.values()
        )
        assert not any(client.held_requests or client.readers for client in relay.clients.values())
        assert not any(request.holders or request.inputs or request.fed for request in relay.requests.values())
        assert not any(request.feeding for request in relay.requests.values())
        assert not relay.scheduler.state.input_bytes
        await until(lambda: not relay.feeds.pending_bytes)
        in_memory = sum(request.log.memory_bytes for request in relay.requests.values())
        assert relay.results.memory.held_bytes == in_memory, "what is counted is what is held"

    async def goes_on(self) -> None:
        """Check that it still works, with a complete request in the space `check`."""
        from tests.support.fake_worker import fake_worker, samples  # which imports this module

        async with (
            fake_worker(self.url, spaces=("check",), name="checker") as worker,
            peer(self.url, "client") as client,
        ):
            submit = a_submit(space="check")
            client.send(submit)
            worker.speak(await worker.assigned(), [samples(10)])
            frames = await client.frames(submit)
            assert [frame.TYPE for frame in frames] == ["started", "audio", "completed"]
        await until(lambda: not self.relay.scheduler.state.workers_of("check"))


@asynccontextmanager
async def daemon(state_dir: Path, **overrides: Any) -> AsyncIterator[Daemon]:
    """Run a daemon that has a space `check` too; at the end it stops as in a crash."""
    spaces = {"tts": {}, "check": {}} | overrides.pop("spaces", {})
    config = a_config(state_dir, **({"store": "memory", "spaces": spaces} | overrides))
    async with running(config) as started:
        yield started


async def new_token(relay: Daemon, role: str = "client", name: str = "ann", **options: Any) -> str:
    """Have the daemon create a token; `options` are those of `create_token`."""
    async with peer(relay.url, "operator") as operator:
        operator.send(Steer(action="create_token", target=name, options={"role": role, **options}))
        token: str = (await operator.next(Done)).data["token"]
        return token


def a_submit(text: Any = "hello", **fields: Any) -> Submit:
    """Make a request to speak."""
    plain: dict[str, Any] = {"request_id": an_id(), "space": "tts", "params": {"text": text}}
    return Submit(**(plain | fields))


def an_input(data: bytes, **fields: Any) -> InputInfo:
    """Make the announcement of an input."""
    plain: dict[str, Any] = {"media_type": "audio/wav", "size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    return InputInfo(**(plain | fields))


def an_id() -> str:
    """Make a new request or instance id."""
    return secrets.token_hex(16)


@attrs.define(eq=False)
class Peer:
    """A raw connection that sends and receives messages."""

    link: Link
    welcome: Welcome

    def send(self, message: Message) -> None:
        self.link.send(message)

    async def next(self, *kinds: type[Message]) -> Any:
        """The next message of one of these kinds, or of any kind if none is given; others are skipped."""
        with trio.fail_after(10):
            while True:
                message = decode(await self.link.receive(), FROM_RELAY)
                if not kinds or isinstance(message, kinds):
                    return message

    async def frames(self, submit: Submit, first: int = 0) -> list[Any]:
        """The request's frames to its end, checked for their sequence numbers."""
        frames: list[Any] = []
        while not frames or not frames[-1].ENDS:
            message = await self.next(Frame, Rejected)
            if message.request_id == submit.request_id:
                assert isinstance(message, Frame), message
                assert message.seq == first + len(frames)
                frames.append(message)
        return frames

    async def cut(self) -> None:
        """Cut the connection without a close frame, as a network failure does."""
        self.link.abort("cut by the test")
        await self.link.aclose()

    async def settled(self) -> None:
        """Wait until the relay has read everything sent."""
        self.send(Ping(timestamp=1.0))
        await self.next(Pong)


@asynccontextmanager
async def peer(
    url: str,
    role: str,
    token: str | None = None,
    *,
    readonly: bool = False,
    video: bool | None = True,
    **link_options: Any,
) -> AsyncIterator[Peer]:
    """A logged-in connection; `link_options` are those of `open_link`."""
    async with open_link(parse_address(url), **link_options) as link:
        hello = Hello(version=PROTOCOL_VERSION, role=role, token=token, readonly=readonly, video=video)
        yield Peer(link, await log_in(link, hello))
