"""Programs whose standard streams were closed by whoever started them: `relay ... <&-`, and services of old."""

from pathlib import Path

import pytest
import trio

from tests.support.processes import Place, a_place
from tests.support.relay import until


def closed(place: Place, which: str, *command: str) -> list[str]:
    return ["/bin/sh", "-c", f'exec "$@" {which}', "sh", *place.command(*command)]


async def run(place: Place, which: str, *command: str) -> tuple[int, str]:
    with trio.fail_after(60):
        done = await trio.run_process(
            closed(place, which, *command),
            capture_stdout=True,
            capture_stderr=True,
            check=False,
            env=place.environ,
            cwd=place.folder,
        )
    assert b"Traceback" not in done.stderr
    assert b"Exception" not in done.stderr
    return done.returncode, done.stderr.decode()


@pytest.mark.trio
async def test_relay_and_worker_serve_without_any_and_commands_without_what_they_do_not_need(tmp_path: Path) -> None:
    place = a_place(tmp_path)
    started: list[trio.Process] = []
    try:
        for command in (["relayd", "serve"], ["gpuworker", "run", "--engine", "mock", "--space", "tts"]):
            without = closed(place, "<&- >&- 2>&-", *command)
            started.append(await trio.lowlevel.open_process(without, env=place.environ, cwd=place.folder))
        with trio.fail_after(60):
            await until((tmp_path / "state/relayd.sock").exists)
        say = ("relay", "say", "Hi", "-p", "duration_s=0.1")
        for number, which in enumerate(("2>&-", "<&-", ">&-", "<&- >&- 2>&-")):
            code, said = await run(place, which, *say, "-o", f"{number}.wav")
            assert code == 0, said
            assert (tmp_path / f"{number}.wav").stat().st_size == 44 + 4_800
        code, why = await run(place, ">&-", *say, "-o", "-")
        assert code == 1, "audio that is lost is not done"
        assert "Bad file descriptor" in why
        assert (await run(place, ">&-", "relay", "spaces"))[0] == 141, "as at a pipe whose reader has gone"
    finally:
        for process in reversed(started):
            process.kill()
            await process.wait()


@pytest.mark.trio
@pytest.mark.parametrize("which", ["<&-", "</dev/null"])
async def test_a_text_that_cannot_be_read_is_said_to_be_missing(tmp_path: Path, which: str) -> None:
    code, why = await run(a_place(tmp_path), which, "relay", "say", "-")
    assert (code, why) == (2, "relay: there is nothing to read on standard input\n")


#: What each command answers where no relay runs, with or without its streams.
CODES = {"relayd check-config": 0, "relayd workers": 3, "gpuworker engines": 0, "relay-tui --once": 3, "relay-tui": 2}


@pytest.mark.trio
@pytest.mark.parametrize("which", [">&-", "<&- >&- 2>&-"])
async def test_no_command_breaks_without_its_streams(tmp_path: Path, which: str) -> None:
    for command, code in CODES.items():
        assert (await run(a_place(tmp_path), which, *command.split()))[0] == code, command
