"""Glyphs: one cell each, an ASCII stand-in each, and never the only thing that tells two states apart."""

import unicodedata

import pytest
from rich.cells import cell_len

from protocol.wire.messages import ENDED_STATES, LIVE_STATES
from tui.model import state_glyphs
from tui.model.state_glyphs import GLYPHS, Kind


@pytest.mark.parametrize("kind", list(GLYPHS))
def test_every_glyph_is_one_cell_and_has_no_emoji_form(kind: Kind) -> None:
    for glyph in GLYPHS[kind].values():
        assert cell_len(glyph.glyph) == 1
        assert unicodedata.east_asian_width(glyph.glyph) not in ("W", "F")
        assert glyph.glyph not in "▶◀⏸✔✖⚠☑ℹ↔↩"


@pytest.mark.parametrize("kind", list(GLYPHS))
def test_every_mark_says_the_word_and_has_an_ascii_form_as_wide(kind: Kind) -> None:
    for state in GLYPHS[kind]:
        mark = state_glyphs.mark(kind, state)
        ascii_mark = state_glyphs.to_ascii(mark)
        assert state in mark
        assert ascii_mark.isascii()
        assert len(ascii_mark) == cell_len(mark)


def test_everything_else_we_draw_with_has_an_ascii_form() -> None:
    ours = [
        state_glyphs.SORT_DOWN,
        state_glyphs.SORT_UP,
        state_glyphs.TAGGED,
        state_glyphs.FOLLOWED,
        state_glyphs.CURSOR,
        state_glyphs.CRUMB,
    ]
    ours += [
        state_glyphs.NOTHING,
        state_glyphs.CUT,
        state_glyphs.BLOCKS,
        state_glyphs.BAR_FULL,
        state_glyphs.BAR_HALF,
        state_glyphs.BAR_EMPTY,
    ]
    for text in ours:
        assert state_glyphs.to_ascii(text).isascii()
        assert len(state_glyphs.to_ascii(text)) == len(text)


def test_the_names_of_others_stay_as_they_are_in_ascii() -> None:
    assert state_glyphs.to_ascii("● 王小明") == "* 王小明"


def test_every_state_of_a_request_on_the_wire_has_a_glyph() -> None:
    assert {*LIVE_STATES, *ENDED_STATES} <= GLYPHS["request"].keys()


def test_a_state_of_a_newer_relay_is_still_shown() -> None:
    assert state_glyphs.mark("worker", "hibernating") == "· hibernating"
