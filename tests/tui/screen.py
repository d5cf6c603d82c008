"""The screen without a terminal, and a relay that says what the test wants."""

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import attrs
import trio
from textual.pilot import Pilot

from protocol.client.watch import ROW_KEYS
from protocol.wire.errors import ErrorCode
from protocol.wire.messages import Delta, Done, Rejected, Snapshot
from protocol.wire.validators import Value
from tui.app import RelayTui
from tui.model.feed import Connected, Disconnected, Options, SourceEvent, Tell
from tui.screens.base import RelayScreen
from tui.widgets.row_table import RowTable

Row = dict[str, Any]
START_S = 1_000.0


def a_request(key: str, **other: Value) -> Row:
    return {
        "request_id": key,
        "principal": "alice",
        "space": "tts",
        "state": "running",
        "age_s": 1.0,
        "attempt": 1,
        "position": None,
        "frames": 0,
        **other,
    }


def a_space(name: str, **other: Value) -> Row:
    return {"name": name, "state": "ready", "workers": 1, "slots": 2, "busy": 0, "queued": 0, "paused": False, **other}


def a_worker(key: str, **other: Value) -> Row:
    return {
        "worker_id": key,
        "name": key,
        "connection_id": f"c-{key}",
        "state": "idle",
        "draining": False,
        "slots": 1,
        "busy": 0,
        "spaces": ["tts"],
        **other,
    }


def a_client(key: str, **other: Value) -> Row:
    return {"connection_id": key, "principal": "alice", "pending_bytes": 0, "slow": False, "requests": 0, **other}


def a_talk(key: str, **other: Value) -> Row:
    return {"talk_id": key, "principal": "alice", "session": "s-1", "state": "idle", "turns": 2, "waiting": 0, **other}


def a_relay(**other: Value) -> Row:
    return {"name": "relay", "state": "serving", "uptime_s": 60.0, "workers": 1, "queued": 0, "running": 0, **other}


def a_line(number: int, **other: Value) -> Row:
    return {"id": str(number), "time": 1e9 + number, "level": "info", "event": f"event {number}", **other}


@attrs.define(eq=False)
class Scripted:
    """A source that tells what the test hands it, and notes what it is asked to do."""

    tell: Tell = lambda _news: None
    asked: list[tuple[str, str]] = attrs.field(factory=list)
    answers: dict[str, Done | Rejected] = attrs.field(factory=dict)
    heard: Callable[[bytes], None] | None = None
    followed: trio.Event = attrs.field(factory=trio.Event)
    #: Before it is set, nothing is answered.
    hold: trio.Event | None = None

    async def follow(self, tell: Tell) -> None:
        self.tell = tell
        self.followed.set()
        await trio.sleep_forever()

    async def steer(self, action: str, target: str, options: Options) -> Done | Rejected:
        self.asked.append((action, target))
        await trio.lowlevel.checkpoint()
        if self.hold is not None:
            await self.hold.wait()
        return self.answers.get(target) or self.answers.get(action) or Done(action=action, target=target)

    async def listen(self, request_id: str, after_seq: int, heard: Callable[[bytes], None]) -> None:
        self.heard = heard
        try:
            await trio.sleep_forever()
        finally:
            self.heard = None


REFUSED = Rejected.because(ErrorCode.REQUEST_NOT_FOUND, "request is unknown")


@attrs.define(eq=False)
class Stage:
    app: RelayTui
    pilot: Pilot[int]
    source: Scripted
    now: list[float]

    async def snapshot(self, **topics: list[Row]) -> None:
        await self.news(Snapshot(data={"relay": [a_relay()], **topics}))

    async def delta(self, *, gone: dict[str, Value] | None = None, **topics: list[Row]) -> None:
        await self.news(Delta(data=dict(topics), gone=gone or {}))

    async def news(self, news: SourceEvent) -> None:
        self.source.tell(news)
        await self.draw()

    async def draw(self) -> None:
        """What the next tick of the clock does."""
        await self.pilot.pause()
        self.app.draw()
        await self.pilot.pause()

    async def later(self, seconds: float) -> None:
        self.now[0] += seconds
        await self.draw()

    async def press(self, *keys: str) -> None:
        await self.pilot.press(*keys)
        await self.pilot.pause()

    async def type(self, text: str) -> None:
        await self.press(*(_KEYS.get(char, char) for char in text))

    async def until(self, true: Callable[[], bool]) -> None:
        """Wait for what Trio and Textual are about to do."""
        for _ in range(500):
            if true():
                return
            await self.pilot.pause(0.01)
        raise AssertionError(f"it did not come about; the screen is:\n{self.text}")

    @property
    def screen(self) -> RelayScreen:
        assert isinstance(self.app.screen, RelayScreen), self.app.screen
        return self.app.screen

    @property
    def table(self) -> RowTable:
        table = self.screen.table
        assert table is not None
        return table

    @property
    def lines(self) -> list[str]:
        """The screen as it is seen."""
        strips = self.app.screen._compositor.render_strips()
        return [strip.text.rstrip() for strip in strips]

    @property
    def text(self) -> str:
        return "\n".join(self.lines)

    @property
    def keys_shown(self) -> list[str]:
        return [view.key for view in self.table.views]

    def line_with(self, text: str) -> str:
        return next((line for line in self.lines if text in line), "")


_KEYS = {"!": "exclamation_mark", "|": "vertical_line", "[": "left_square_bracket", "-": "minus", ".": "full_stop"}


@asynccontextmanager
async def a_stage(
    *, size: tuple[int, int] = (100, 30), screen: str | None = None, **options: Any
) -> AsyncIterator[Stage]:
    """The app, linked to a scripted relay; at the screen of this number key."""
    source, now = Scripted(), [START_S]
    app = RelayTui(source, theme="dark", clock=lambda: now[0], **options)
    try:
        async with app.run_test(size=size) as pilot:
            stage = Stage(app, pilot, source, now)
            await stage.until(source.followed.is_set)
            source.tell(Connected("relayd/test", "op"))
            if screen is not None:
                await stage.press(screen)
            yield stage
    finally:
        await app.close()


LOST = Disconnected("connection refused", 3.0)
assert ROW_KEYS["log"] == "id"
