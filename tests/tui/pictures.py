"""All pictures of the screen that are kept: those of docs/tui.md, and those that only the tests look at.

`python -m tests.tui.pictures` makes them anew; look at each that changed before it is committed.
"""

import asyncio
import sys
from pathlib import Path

import attrs

from tests.tui.scenes import at_scene
from tests.tui.svg import model

ROOT = Path(__file__).resolve().parents[2]
SNAPSHOTS = ROOT / "tests/tui/snapshots"
DOCS = ROOT / "docs/tui"

Size = tuple[int, int]
SIZES: tuple[Size, ...] = ((60, 20), (80, 24), (120, 40))
THEMES = ("dark", "light", "ansi", "mono")


@attrs.frozen
class Picture:
    """A scene, and the keys that lead to what is shown."""

    scene: str = "busy"
    size: Size = (80, 24)
    theme: str = "dark"
    keys: tuple[str, ...] = ()
    ascii_only: bool = False
    lost: bool = False

    async def drawn(self) -> str:
        """It, as SVG."""
        async with at_scene(
            self.scene, self.size, self.theme, keys=self.keys, ascii_only=self.ascii_only, lost=self.lost
        ) as pilot:
            return model(pilot.app)


PICTURES: dict[Path, Picture] = {
    # Shown in docs/tui.md.
    DOCS / "overview.svg": Picture("busy", (100, 30)),
    DOCS / "broken.svg": Picture("broken"),
    DOCS / "empty.svg": Picture("empty", (80, 16)),
    DOCS / "workers.svg": Picture("broken", (100, 16), keys=("3",)),
    DOCS / "requests.svg": Picture("busy", (100, 24), keys=("4",)),
    DOCS / "request.svg": Picture("busy", keys=("4", "enter")),
    DOCS / "queue.svg": Picture("broken", (80, 16), keys=("5",)),
    DOCS / "clients.svg": Picture("broken", (80, 16), keys=("6",)),
    DOCS / "log.svg": Picture("broken", (100, 20), keys=("7",)),
    DOCS / "audit.svg": Picture("broken", (80, 12), keys=("8",)),
    DOCS / "talks.svg": Picture("busy", (100, 12), keys=("9",)),
    DOCS / "confirm.svg": Picture("busy", (80, 20), keys=("4", "space", "space", "space", "x")),
    DOCS / "help.svg": Picture("busy", (80, 24), keys=("question_mark",)),
    DOCS / "light.svg": Picture("broken", (80, 20), "light", keys=("2",)),
    # The rest: every size in every theme, and what must be read without glyphs, without colour, without a relay.
    **{
        SNAPSHOTS / f"overview-{width}x{height}-{theme}.svg": Picture("busy", (width, height), theme)
        for width, height in SIZES
        for theme in THEMES
    },
    SNAPSHOTS / "ascii-80x24-mono.svg": Picture("broken", theme="mono", ascii_only=True),
    SNAPSHOTS / "lost-80x24-mono.svg": Picture("broken", theme="mono", lost=True),
    SNAPSHOTS / "workers-60x20-ansi.svg": Picture("broken", (60, 20), "ansi", keys=("3",)),
    SNAPSHOTS / "requests-60x20-light.svg": Picture("broken", (60, 20), "light", keys=("4", "slash", *"!tts")),
    SNAPSHOTS / "confirm-60x20-mono.svg": Picture("broken", (60, 20), "mono", keys=("4", "x")),
}


async def _main() -> int:
    for folder in (SNAPSHOTS, DOCS):
        folder.mkdir(exist_ok=True)
        for old in set(folder.glob("*.svg")) - PICTURES.keys():
            old.unlink()
            print(f"removed {old.relative_to(ROOT)}")
    for path, wanted in PICTURES.items():
        drawn = await wanted.drawn()
        if not path.exists() or path.read_text() != drawn:
            path.write_text(drawn)
            print(f"wrote   {path.relative_to(ROOT)}")
    return 0


if __name__ == "__main__":
    sys.exit(asyncio.run(_main()))
