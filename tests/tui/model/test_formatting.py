"""What a person reads: numbers, times, names; every text in exactly its cells."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len

from tui.model import formatting


@pytest.mark.parametrize(
    ("value_s", "said"),
    [
        (0.0, "0 ms"),
        (0.0003, "0.3 ms"),
        (0.0341, "34 ms"),
        (0.9994, "999 ms"),
        (0.9996, "1.00 s"),
        (1.239, "1.24 s"),
        (9.994, "9.99 s"),
        (9.996, "10.0 s"),
        (59.94, "59.9 s"),
        (59.96, "59 s"),
        (125.0, "2m05s"),
        (3720.0, "1h02m"),
        (3 * 86400 + 4 * 3600.0, "3d04h"),
    ],
)
def test_a_duration_has_as_many_digits_as_matter(value_s: float, said: str) -> None:
    assert formatting.seconds(value_s) == said


@pytest.mark.parametrize(
    ("value_s", "said"), [(-2.0, "0 s"), (0.99, "0 s"), (59.99, "59 s"), (60, "1m00s"), (86_400, "1d00h")]
)
def test_an_age_counts_whole_seconds(value_s: float, said: str) -> None:
    assert formatting.age(value_s) == said


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (999.6, "1.0 kB"),
        (1_234, "1.2 kB"),
        (9_960, "10 kB"),
        (345_000, "345 kB"),
        (999_700, "1.0 MB"),
        (6e9, "6.0 GB"),
        (5e15, "5000 TB"),
    ],
)
def test_a_size_has_two_digits_or_three(value: float, said: str) -> None:
    assert formatting.size(value) == said


@given(st.text(max_size=30), st.integers(0, 20), st.sampled_from(["left", "right"]))
def test_fitted_text_fills_its_cells_exactly_whatever_it_is(text: str, width: int, align: formatting.Align) -> None:
    assert cell_len(formatting.fit(formatting.plain(text), width, align)) == width


def test_a_wide_character_is_not_cut_in_half() -> None:
    assert formatting.fit("实验室", 5) == "实验…"
    assert formatting.fit("实验室", 4) == "实… "
    assert formatting.fit("实验室", 6) == "实验室"
    assert formatting.fit("实验室", 8, "right") == "  实验室"


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("a\x1b[2Jb", "a\\x1b[2Jb"),
        ("tab\tnew\nline", "tab new line"),
        ("right\u202eleft", "right\\u202eleft"),
        ("👩\u200d💻", "👩💻"),
        ("⚙\ufe0f gpu", "⚙ gpu"),
        ("👍🏽", "👍"),
        ("🇩🇪 box", "DE box"),
        ("1\ufe0f\u20e3", "1"),
        ("王小明", "王小明"),
        ("e\u0301", "e\u0301"),
    ],
)
def test_names_keep_no_character_whose_width_terminals_disagree_on(name: str, shown: str) -> None:
    assert formatting.plain(name) == shown


@given(st.text(max_size=30))
def test_plain_text_never_steers_the_terminal(text: str) -> None:
    assert not any(ord(char) < 32 or 127 <= ord(char) < 160 for char in formatting.plain(text))


@given(st.floats(-1, 2), st.integers(0, 40))
def test_a_bar_fills_its_cells(fraction: float, width: int) -> None:
    assert len(formatting.bar(fraction, width)) == width


def test_a_bar_is_empty_at_first_and_full_at_last() -> None:
    assert formatting.bar(0, 4) == "────"
    assert formatting.bar(0.5, 4) == "━━──"
    assert formatting.bar(0.6, 4) == "━━──"
    assert formatting.bar(0.63, 4) == "━━╸─"
    assert formatting.bar(1, 4) == "━━━━"


def test_a_sparkline_shows_the_last_values_and_the_highest_is_full() -> None:
    assert formatting.spark([0, 1, 4, 8], 4) == "▁▂▅█"
    assert formatting.spark([8, 0, 1], 2) == "▁█"
    assert formatting.spark([0, 0], 4) == "  ▁▁"
    assert formatting.spark([], 3) == "   "


def test_anything_above_zero_stands_out_in_a_sparkline() -> None:
    assert formatting.spark([0.001, 100], 2) == "▂█"


def test_the_time_of_day_minds_the_time_zone() -> None:
    assert formatting.clock(1_772_506_800.0) == "03:00:00"
    assert formatting.clock(1_772_506_800.0, 3600) == "04:00:00"
