"""A few seconds of each fuzz target; `make fuzz` runs them for minutes, guided by coverage."""

import itertools
import random

import pytest

from tests.fuzz.mutate import mutations
from tests.fuzz.targets import TARGETS

EXECUTIONS = {
    "codec": 4_000,
    "frames": 4_000,
    "http": 300,
    "wyoming": 200,
    "audio": 600,
    "hearing": 400,
    "semantics": 150,
    "sdp": 200,
}


@pytest.mark.parametrize("name", TARGETS)
def test_a_few_thousand_odd_inputs_break_nothing(name: str) -> None:
    with TARGETS[name]() as target:
        for data in itertools.islice(mutations(random.Random(f"{name} 1"), target.seeds), EXECUTIONS[name]):
            target.run(data)
