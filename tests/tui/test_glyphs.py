"""Glyphs: one cell each, an ASCII stand-in each, and never the only thing that tells two states apart."""

import unicodedata

import pytest
from rich.cells import cell_len

from protocol.wire.messages import ENDED_STATES, LIVE_STATES
from tui import glyphs
from tui.glyphs import GLYPHS, Kind


@pytest.mark.parametrize("kind", list(GLYPHS))
def test_every_glyph_is_one_cell_and_has_no_emoji_form(kind: Kind) -> None:
    for glyph in GLYPHS[kind].values():
        assert cell_len(glyph.glyph) == 1
        assert unicodedata.east_asian_width(glyph.glyph) not in ("W", "F")
        assert glyph.glyph not in "▶◀⏸✔✖⚠☑ℹ↔↩"


@pytest.mark.parametrize("kind", list(GLYPHS))
def test_every_mark_says_the_word_and_has_an_ascii_form_as_wide(kind: Kind) -> None:
    for state in GLYPHS[kind]:
        mark = glyphs.mark(kind, state)
        ascii_mark = glyphs.to_ascii(mark)
        assert state in mark
        assert ascii_mark.isascii()
        assert len(ascii_mark) == cell_len(mark)


def test_everything_else_we_draw_with_has_an_ascii_form() -> None:
    ours = [glyphs.SORT_DOWN, glyphs.SORT_UP, glyphs.TAGGED, glyphs.FOLLOWED, glyphs.CURSOR, glyphs.CRUMB]
    ours += [glyphs.NOTHING, glyphs.CUT, glyphs.BLOCKS, glyphs.BAR_FULL, glyphs.BAR_HALF, glyphs.BAR_EMPTY]
    for text in ours:
        assert glyphs.to_ascii(text).isascii()
        assert len(glyphs.to_ascii(text)) == len(text)


def test_the_names_of_others_stay_as_they_are_in_ascii() -> None:
    assert glyphs.to_ascii("● 王小明") == "* 王小明"


def test_every_state_of_a_request_on_the_wire_has_a_glyph() -> None:
    assert {*LIVE_STATES, *ENDED_STATES} <= GLYPHS["request"].keys()


def test_a_state_of_a_newer_relay_is_still_shown() -> None:
    assert glyphs.mark("worker", "hibernating") == "· hibernating"
