"""The screen at a scene of the demo, with a clock that stands: for snapshots and for the pictures in docs/tui."""

import os
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager

import trio
from textual.pilot import Pilot

from protocol.wire.messages import Done, Rejected
from tui.app import RelayTui
from tui.demo.source import Demo
from tui.model.feed import Connected, Disconnected, Options, Tell

#: The clock of the picture stands here.
NOW_S = 1_000.0
#: So many times in a row it must have looked the same.
SETTLED = 2


class Still:
    """A source that tells one snapshot of a scene and nothing after it; `lost`: and then that the relay is gone."""

    def __init__(self, demo: Demo, *, lost: bool = False) -> None:
        self._demo = demo
        self._lost = lost

    async def follow(self, tell: Tell) -> None:
        tell(Connected("relayd 0.2.0", "root"))
        tell(self._demo.snapshot())
        if self._lost:
            tell(Disconnected("the relay closed the connection", 4.0))
        await trio.sleep_forever()

    async def steer(self, action: str, target: str, options: Options) -> Done | Rejected:
        return await self._demo.steer(action, target, dict(options))

    async def listen(self, request_id: str, after_seq: int, heard: Callable[[bytes], None]) -> None:
        await trio.sleep_forever()


@contextmanager
def in_utc() -> Iterator[None]:
    """Times of day as in Greenwich."""
    before = os.environ.get("TZ")
    os.environ["TZ"] = "UTC"
    time.tzset()
    try:
        yield
    finally:
        del os.environ["TZ"]
        if before is not None:
            os.environ["TZ"] = before
        time.tzset()


async def settled(pilot: Pilot[int]) -> None:
    """Drawn, laid out for what was drawn, and drawn again for the new layout, until nothing moves any more."""
    app, same, before = pilot.app, 0, ""
    assert isinstance(app, RelayTui)
    while same < SETTLED:
        app.draw()
        await pilot.pause()
        now = app.export_screenshot()
        same, before = (same + 1 if now == before else 0), now


@asynccontextmanager
async def at_scene(
    scene: str,
    size: tuple[int, int],
    theme: str,
    *,
    keys: Sequence[str] = (),
    ascii_only: bool = False,
    lost: bool = False,
) -> AsyncIterator[Pilot[int]]:
    """The app at a scene, after these keys."""
    app = RelayTui(Still(Demo(scene), lost=lost), theme=theme, ascii_only=ascii_only, clock=lambda: NOW_S)
    with in_utc():
        async with app.run_test(size=size) as pilot:
            while not app.model.known or app.model.link.up is lost:
                await pilot.pause()
            await settled(pilot)
            for key in keys:
                await pilot.press(key)
                await settled(pilot)
            yield pilot
        await app.close()
