"""What one key sends to the terminal, for each key; and that the terminal then shows what Textual drew."""

from typing import Any

import pyte
import pytest
from textual.drivers import headless_driver
from textual.pilot import Pilot

from tests.tui.scenes import at_scene
from tui.app import RelayTui
from tui.terminal.cell_buffer import CellBuffer

#: Keys in the order in which they are pressed, from the overview, with the most bytes that each may send at 80×24 and
#: at 120×40. Textual would send ten times as much. So a line of 4 KB/s
#: shows any key within a second at 80×24.
MOST_BYTES = [
    ("3", 1_100, 1_600),
    ("4", 3_000, 6_500),
    ("x", 1_200, 1_200),
    ("escape", 1_200, 1_200),
    ("question_mark", 3_000, 3_300),
    ("escape", 2_700, 3_500),
    ("f1", 3_000, 3_400),
    ("escape", 2_700, 3_500),
    ("colon", 2_500, 2_700),
    ("escape", 2_300, 2_600),
    ("slash", 400, 400),
    ("a", 1_000, 2_900),
    ("escape", 1_400, 3_400),
    ("j", 400, 400),
    ("pagedown", 2_000, 4_300),
    ("space", 2_000, 4_200),
    ("enter", 1_700, 2_000),
    ("escape", 3_000, 6_500),
    ("s", 2_300, 4_500),
    ("r", 1_900, 3_900),
    ("home", 2_300, 4_500),
    ("E", 1_100, 1_200),
    ("escape", 1_000, 1_000),
    ("z", 2_400, 4_600),
    ("escape", 2_400, 4_700),
    ("2", 1_100, 1_600),
    ("5", 600, 600),
    ("6", 1_200, 1_500),
    ("7", 2_400, 4_200),
    ("8", 700, 900),
    ("9", 700, 1_000),
    ("1", 3_000, 6_500),
    ("tab", 400, 500),
    ("p", 200, 200),
    ("p", 200, 200),
    ("plus", 100, 100),
    ("minus", 100, 100),
]
MOST_FIRST_BYTES = {(80, 24): 6_000, (120, 40): 12_000}


class Recorder(headless_driver.HeadlessDriver):
    """A driver with cells and no terminal behind it."""

    behind = False

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.cells = CellBuffer(fills=True)
        self.sent: list[str] = []

    def write(self, data: str) -> None:
        self.sent.append(data)


def recorder_of(app: RelayTui) -> Recorder:
    driver = app._driver  # Textual's
    assert isinstance(driver, Recorder)
    return driver


async def drawn(pilot: Pilot[int]) -> None:
    """Drawn and sent; a change of the layout is drawn a second time."""
    app = pilot.app
    assert isinstance(app, RelayTui)
    for _ in range(2):
        app.draw()
        await pilot.pause()
    while app.sending:
        await pilot.pause(0.01)


@pytest.mark.asyncio
@pytest.mark.parametrize("size", [(80, 24), (120, 40)])
async def test_a_key_sends_little_and_shows_what_was_drawn(
    size: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(headless_driver, "HeadlessDriver", Recorder)
    screen = pyte.Screen(*size)
    stream = pyte.Stream(screen)
    stream.feed("\x1b[?7l")
    over = []

    def took() -> int:
        """What has been sent since the last call."""
        sent = "".join(driver.sent)
        driver.sent.clear()
        stream.feed(sent)
        drawn = [strip.text.rstrip() for strip in app.screen._compositor.render_strips()]
        assert [line.rstrip() for line in screen.display] == drawn
        return len(sent.encode())

    async with at_scene("busy", size, "dark") as pilot:
        app = pilot.app
        assert isinstance(app, RelayTui)
        driver = recorder_of(app)
        await drawn(pilot)
        assert took() <= MOST_FIRST_BYTES[size]
        for key, *most in MOST_BYTES:
            await pilot.press(key)
            await drawn(pilot)
            if (sent := took()) > most[size == (120, 40)]:
                over.append(f"{key}: {sent}")
    assert not over


@pytest.mark.asyncio
async def test_a_terminal_that_does_not_keep_up_is_sent_nothing_more_and_later_one_difference(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(headless_driver, "HeadlessDriver", Recorder)
    screen = pyte.Screen(80, 24)
    stream = pyte.Stream(screen)
    async with at_scene("busy", (80, 24), "dark") as pilot:
        app = pilot.app
        assert isinstance(app, RelayTui)
        driver = recorder_of(app)
        await drawn(pilot)
        stream.feed("\x1b[?7l" + "".join(driver.sent))
        driver.sent.clear()
        driver.behind = True
        for key in "2347":
            await pilot.press(key)
            app.draw()
            await pilot.pause()
        assert app.sending
        assert not any("\x1b[" in one for one in driver.sent), "but the shape of the pointer, which Textual sets"
        driver.behind = False
        await drawn(pilot)
        sent = "".join(driver.sent)
        stream.feed(sent)
        assert screen.display[1].startswith("relay › log")
        assert len(sent.encode()) <= max(most for _, most, _ in MOST_BYTES)
