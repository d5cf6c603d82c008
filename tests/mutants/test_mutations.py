"""The mutants: each is one change of behaviour, can be imported, and leaves the rest as it was."""

import ast
from pathlib import Path

import pytest

from tests.mutants.__main__ import TESTS, all_mutants, drawn, known_survivors, report
from tests.mutants.mutations import Mutant, mutants_of, mutated
from tests.mutants.session import Verdict

_SOURCE = '''
"""Words."""
LIMIT = 3

def inside(size: int, most: int = 2) -> bool:
    """More words."""
    if size <= most and not size == LIMIT:
        log.info("size", size=size + 1)
        return True
    raise ValueError(f"{size + 1} is too much")
'''


def test_each_mutant_has_one_change_of_behaviour_and_none_of_words(tmp_path: Path) -> None:
    path = tmp_path / "module.py"
    path.write_text(_SOURCE)
    changes = {(mutant.before, mutant.after) for mutant in mutants_of(path)}
    assert changes == {
        ("3", "4"),
        ("2", "3"),
        ("if size <= most and (not size == LIMIT):", "if True:"),
        ("if size <= most and (not size == LIMIT):", "if False:"),
        ("size <= most and (not size == LIMIT)", "size <= most or not size == LIMIT"),
        ("size <= most and (not size == LIMIT)", "size <= most"),
        ("size <= most and (not size == LIMIT)", "not size == LIMIT"),
        ("size <= most", "size < most"),
        ("not size == LIMIT", "size == LIMIT"),
        ("size == LIMIT", "size != LIMIT"),
        ("True", "False"),
    }
    for mutant in mutants_of(path):
        tree = mutated(path, mutant.number)
        assert ast.dump(tree) != ast.dump(ast.parse(_SOURCE))
        compile(tree, str(path), "exec")


def test_a_mutant_says_whose_body_it_is_in_and_on_which_lines(tmp_path: Path) -> None:
    path = tmp_path / "module.py"
    path.write_text(_SOURCE)
    where = {(mutant.before, mutant.owner, mutant.lines) for mutant in mutants_of(path)}
    assert {
        ("3", "", range(3, 4)),
        ("2", "", range(5, 6)),
        ("size <= most", "inside", range(7, 8)),
        ("True", "inside", range(9, 10)),
    } <= where


def test_each_change_has_a_name_of_its_own() -> None:
    changes = [mutant.change for mutants in all_mutants("scheduling").values() for mutant in mutants]
    assert len(changes) == len(set(changes))


@pytest.mark.parametrize("place", TESTS)
def test_every_place_has_mutants_and_tests(place: str) -> None:
    found = all_mutants(place)
    assert found
    assert all(Path(test).exists() for tests in found for test in tests)


def test_each_known_survivor_is_a_mutant_that_exists_and_has_its_reason() -> None:
    changes = {mutant.change for mutants in all_mutants().values() for mutant in mutants}
    for change, reason in known_survivors().items():
        assert change in changes
        assert reason, change


def mutant(number: int) -> Mutant:
    return Mutant(Path("a.py"), number, number, "f", range(number, number + 1), f"{number}", "0")


def test_a_seed_draws_the_same_and_every_known_survivor_is_tried() -> None:
    groups: dict[tuple[str, ...], list[Mutant]] = {("tests",): [mutant(number) for number in range(50)]}
    known = [mutant(3).change]
    sample = drawn(groups, known, 5, seed=7)
    assert sample == drawn(groups, known, 5, seed=7) != drawn(groups, known, 5, seed=8)
    assert mutant(3) in sample
    assert len(sample) == 6
    assert len(drawn(groups, known, 0, seed=7)) == 50


@pytest.mark.parametrize(("alive", "right"), [({1}, True), ({1, 2}, False), ({1, 0}, True), (set(), True)])
def test_more_than_a_twentieth_alive_is_a_failure_and_known_ones_do_not_count(
    alive: set[int], right: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    verdicts = [Verdict(mutant(number), number in alive, 0.1, 1) for number in range(21)]
    known = [mutant(0).change] if 0 in alive else []
    assert report(verdicts, known, []) is right
    assert f"{len(alive - {0})} alive" in capsys.readouterr().out


def test_a_known_survivor_that_is_killed_or_gone_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    verdicts = [Verdict(mutant(number), False, 0.1, 1) for number in range(21)]
    assert not report(verdicts, [mutant(4).change], [])
    assert not report(verdicts, [], ["b.py"])
    told = capsys.readouterr().out
    assert f"killed: {mutant(4).change}" in told
    assert "gone: b.py" in told
