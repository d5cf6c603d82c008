"""The mutants: each is one change of behaviour, can be imported, and leaves the rest as it was."""

import ast
from pathlib import Path

import pytest

from tests.mutants.__main__ import TESTS, all_mutants, change_of, known_survivors
from tests.mutants.mutations import mutants_of, mutated

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


@pytest.mark.parametrize("place", TESTS)
def test_every_place_has_mutants_and_tests(place: str) -> None:
    found = all_mutants(place)
    assert found
    assert all(Path(test).is_file() for _mutant, tests in found for test in tests)


def test_each_known_survivor_is_a_mutant_that_exists_and_has_its_reason() -> None:
    changes = {change_of(mutant) for mutant, _tests in all_mutants("")}
    for change, reason in known_survivors().items():
        assert change in changes
        assert reason, change
