"""However the relay breaks down or leaves, its process ends."""

import contextlib
import importlib
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import trio

from relayd.daemon import serve
from tests.support.relay import a_config

#: Each task of the daemon.
TASKS = (
    "relayd.daemon:serve_positions",
    "relayd.daemon:serve_clock",
    "relayd.daemon:serve_stats",
    "relayd.daemon:serve_token_retention",
    "relayd.daemon:serve_listeners",
    "relayd.core.admission:Admission.serve",
    "relayd.core.principals:Principals.serve",
    "relayd.core.retention:Retention.serve_memory",
    "relayd.core.retention:Retention.serve_retention",
    "relayd.http.context:HttpContext.serve",
    "relayd.config_reload:Reload.serve",
    "relayd.connections.gateway:Gateway.serve_login_timeouts",
    "relayd.service.health:HealthService.serve",
)
#: What the real programs run as, with a short limit; `{break_down}` is what happens to them.
PROGRAM = """
import sys, trio
import relayd.daemon, relayd.service.health, gpuworker.health, gpuworker.serving
from relayd.cli import main as relayd
from gpuworker.cli import main as gpuworker
sys.modules["relayd.service.health"].LEAVE_S = 0.5
sys.modules["gpuworker.serving"].LEAVE_S = 0.5

async def refuse_to_end(*_arguments):
    with trio.CancelScope(shield=True):
        await trio.sleep_forever()

async def out_of_memory(*_arguments):
    raise MemoryError("out of memory, in a test")

{break_down}
sys.exit({program}(sys.argv[1:]))
"""


@pytest.mark.parametrize("name", TASKS)
@pytest.mark.trio
async def test_no_memory_in_any_task_ends_the_daemon(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, _, path = name.partition(":")
    owner: Any = importlib.import_module(module)
    *classes, function = path.split(".")
    for each in classes:
        owner = getattr(owner, each)
    assert callable(getattr(owner, function))
    left: list[str] = []

    async def out_of_memory(*_arguments: Any) -> None:
        raise MemoryError("out of memory, in a test")

    monkeypatch.setattr(owner, function, out_of_memory)
    config = a_config(tmp_path)
    with pytest.raises(BaseExceptionGroup) as broken, trio.fail_after(20):
        await serve(config, on_leave=lambda: left.append("leaving"), reread=lambda: config)
    assert broken.group_contains(MemoryError)
    assert left


def ended(program: str, break_down: str, *arguments: str, send: signal.Signals | None = None) -> tuple[int, str]:
    """Run a program that breaks down; returns its exit code and what it said."""
    script = PROGRAM.replace("{break_down}", break_down).replace("{program}", program)
    with subprocess.Popen(
        [sys.executable, "-u", "-c", script, *arguments], stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            assert process.stderr is not None
            said = ""
            for line in process.stderr:
                said += line
                if send is not None and any(word in line for word in ("listening", "no link to")):
                    process.send_signal(send)
                    send = None
            return process.wait(30), said
        finally:
            with contextlib.suppress(ProcessLookupError):
                process.kill()


STUBBORN_RELAY = "relayd_daemon = sys.modules['relayd.daemon']; relayd_daemon.serve_positions = refuse_to_end\n"
BROKEN_RELAY = STUBBORN_RELAY + "relayd_daemon.serve_clock = out_of_memory"
STUBBORN_WORKER = "from gpuworker.slots.process_slot import ProcessSlot; ProcessSlot.serve = refuse_to_end\n"
BROKEN_WORKER = STUBBORN_WORKER + "from gpuworker.worker import Worker; Worker._leave_when_drained = out_of_memory"


@pytest.mark.parametrize(("break_down", "send"), [(BROKEN_RELAY, None), (STUBBORN_RELAY, signal.SIGTERM)])
def test_a_relay_whose_task_refuses_to_end_is_ended_and_says_where_it_hung(
    break_down: str, send: signal.Signals | None, tmp_path: Path
) -> None:
    code, said = ended("relayd", break_down, "serve", "--state-dir", str(tmp_path), "--listen", "", send=send)
    assert code == -signal.SIGALRM, said
    assert "most recent call first" in said


@pytest.mark.parametrize(("break_down", "send"), [(BROKEN_WORKER, None), (STUBBORN_WORKER, signal.SIGTERM)])
def test_a_worker_whose_task_refuses_to_end_is_ended_and_says_where_it_hung(
    break_down: str, send: signal.Signals | None, tmp_path: Path
) -> None:
    relay = f"unix:{tmp_path / 'no relay'}"
    code, said = ended("gpuworker", break_down, "run", "--engine", "mock", "--relay", relay, send=send)
    assert code == -signal.SIGALRM, said
    assert "most recent call first" in said
