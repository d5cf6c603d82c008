"""The screen looks as it did when somebody last looked at it: every size, every theme, and all pictures of the docs.

After a change that is meant: `python -m tests.tui.pictures`, and look at what changed.
"""

import re
from pathlib import Path

import pytest
from textual.binding import Binding

from tests.tui.pictures import DOCS, PICTURES, ROOT, SNAPSHOTS, Picture
from tests.tui.scenes import at_scene
from tui.app import RelayTui
from tui.screens.base import RelayScreen
from tui.screens.detail import RequestDetail
from tui.widgets.row_table import RowTable

KEPT = {path: path.read_text() if path.exists() else "" for path in PICTURES}


@pytest.mark.asyncio
@pytest.mark.parametrize("path", list(PICTURES), ids=lambda path: path.stem)
async def test_it_looks_as_in_the_picture(path: Path, tmp_path: Path) -> None:
    drawn = await PICTURES[path].drawn()
    if drawn != KEPT[path]:
        now = tmp_path / path.name
        now.write_text(drawn)
        pytest.fail(f"{path.relative_to(ROOT)} looks otherwise now: compare it with {now}")


def test_no_picture_is_left_that_nothing_makes() -> None:
    assert {*SNAPSHOTS.glob("*.svg"), *DOCS.glob("*.svg")} == PICTURES.keys()


def test_the_documents_show_the_pictures_that_are_made_for_them() -> None:
    shown = set(re.findall(r"tui/([a-z]+\.svg)", (ROOT / "docs/tui.md").read_text()))
    assert shown == {path.name for path in PICTURES if path.parent == DOCS}
    assert "docs/tui/overview.svg" in (ROOT / "README.md").read_text()


def test_the_documents_name_every_key() -> None:
    shown = {
        one.key_display or key
        for one in (*RelayTui.BINDINGS, *RelayScreen.BINDINGS, *RequestDetail.BINDINGS, *RowTable.BINDINGS)
        if isinstance(one, Binding)
        for key in one.key.split(",")
    }
    text = (ROOT / "docs/tui.md").read_text()
    named = {"escape": "Esc", "ctrl+c": "Ctrl+C", "enter": "Enter", "space": "Space", "home": "Home", "end": "End"}
    named |= {"ctrl+l": "Ctrl+L", "ctrl+z": "Ctrl+Z"}
    named |= {"up": "arrows", "down": "arrows", "pageup": "PgUp", "pagedown": "PgDn"}
    assert {key for key in shown if f"`{key}`" not in text and named.get(key, "`") not in text} == set()


def test_pictures_fetch_nothing_and_are_small() -> None:
    for path in PICTURES:
        text = path.read_text()
        assert text.count("http") == 1  # the name space
        assert len(text) < 40_000
    assert sum(path.stat().st_size for path in PICTURES) < 500_000


@pytest.mark.asyncio
@pytest.mark.parametrize("scene", ["busy", "broken"])
async def test_the_same_scene_is_the_same_picture_twice(scene: str) -> None:
    wanted = Picture(scene)
    assert await wanted.drawn() == await wanted.drawn()


@pytest.mark.asyncio
@pytest.mark.parametrize("keys", [(), *((key,) for key in "23456789"), ("question_mark",), ("4", "enter"), ("4", "x")])
async def test_in_ascii_nothing_but_names_is_not_ascii(keys: tuple[str, ...]) -> None:
    async with at_scene("busy", (80, 24), "mono", keys=keys, ascii_only=True) as pilot:
        shown = "".join(re.findall(r"<text[^>]*>([^<]*)</text>", pilot.app.export_screenshot()))
    ours = {char for char in shown if not char.isascii() and not char.isalnum()} - set("🚀🎧")
    assert ours <= set("\xa0")
