"""A kill right behind each kind of answer; `python -m tests.chaos.answers` has hundreds of them."""

from pathlib import Path

import pytest
import trio

from tests.chaos.answers import SCENES, kill_behind_answers, report

#: Each kill costs a start of the relay: about 1 s by itself.
PATIENCE_S = 220.0


@pytest.mark.trio
async def test_a_relay_that_is_killed_behind_an_answer_has_not_forgotten_it(tmp_path: Path) -> None:
    with trio.fail_after(PATIENCE_S):
        stage = await kill_behind_answers(tmp_path, len(SCENES))
    assert stage.kills.total() == len(SCENES)
    assert not stage.forgotten.total(), report(stage)
