"""Real processes for tests: started, with their output read, and ended by pid."""

import json
import os
import signal
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import attrs
import trio

PATIENCE_S = 40.0
_MODULES = {"relayd": "relayd.cli", "gpuworker": "gpuworker.cli", "relay": "protocol.cli", "relay-tui": "tui.cli"}


@attrs.define(eq=False)
class Proc:
    """A process, and its output on stderr."""

    process: trio.Process
    lines: list[str] = attrs.field(factory=list)
    _said: trio.Event = attrs.field(factory=trio.Event)
    _closed: bool = False

    async def listen(self) -> None:
        """Read its stderr; otherwise the process would block."""
        assert self.process.stderr is not None
        left = b""
        async for data in self.process.stderr:
            *whole, left = (left + data).split(b"\n")
            self.lines += [line.decode("utf-8", "replace") for line in whole]
            self._said.set()
        if left:
            self.lines.append(left.decode("utf-8", "replace"))
        self._closed = True
        self._said.set()

    async def until(self, wanted: Callable[[str], Any], after: int = 0) -> Any:
        """Return the first true value of `wanted` over its lines from number `after` on."""
        with trio.move_on_after(PATIENCE_S):
            while True:
                said = self._said = trio.Event()
                for line in self.lines[after:]:
                    if value := wanted(line):
                        return value
                if self._closed:
                    break
                await said.wait()
        raise AssertionError("it never said that; it said:\n" + "\n".join(self.lines[-40:]))

    async def event(self, name: str, after: int = 0) -> dict[str, Any]:
        """Wait for the first JSON log line whose event is `name`."""

        def wanted(line: str) -> dict[str, Any] | None:
            told = json.loads(line) if line.startswith("{") else {}
            return told if told.get("event") == name else None

        found: dict[str, Any] = await self.until(wanted, after)
        return found

    async def audio_chunks(self, at_least: int | None) -> None:
        """Wait until a `relay --json` has printed `at_least` audio frames; None: until it prints no more."""
        assert self.process.stdout is not None
        heard = b""
        with trio.fail_after(PATIENCE_S):
            while at_least is None or heard.count(b'"audio"') < at_least:
                data = await self.process.stdout.receive_some()
                if not data:
                    return
                heard += data

    def send_signal(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    async def ended(self) -> int:
        """Wait for its end; returns its exit code."""
        with trio.fail_after(PATIENCE_S):
            return await self.process.wait()


@attrs.frozen
class Place:
    """A test's folder, and the environment that its processes share."""

    folder: Path
    environ: dict[str, str]

    def command(self, name: str, *args: str) -> list[str]:
        return [sys.executable, "-m", _MODULES[name], *args]

    @asynccontextmanager
    async def start(self, name: str, *args: str, stdin: Any = -3, **environ: str) -> AsyncIterator[Proc]:
        """Start a command; it is killed at the end of the block if it still runs."""
        process = await trio.lowlevel.open_process(
            self.command(name, *args), stderr=-1, stdout=-1, stdin=stdin, env=self.environ | environ, cwd=self.folder
        )
        proc = Proc(process)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(proc.listen)
            try:
                yield proc
            finally:
                if process.poll() is None:
                    process.kill()
                with trio.CancelScope(shield=True):
                    await process.wait()
                nursery.cancel_scope.cancel()

    async def run(self, name: str, *args: str, code: int = 0, stdin: bytes = b"", **environ: str) -> tuple[bytes, str]:
        """Run a command to its end; returns what it wrote to stdout and stderr."""
        with trio.fail_after(PATIENCE_S):
            done = await trio.run_process(
                self.command(name, *args),
                capture_stdout=True,
                capture_stderr=True,
                check=False,
                stdin=stdin,
                env=self.environ | environ,
                cwd=self.folder,
            )
        stderr = done.stderr.decode("utf-8", "replace")
        assert done.returncode == code, f"{name} {args} ended with {done.returncode}:\n{stderr}"
        return done.stdout, stderr


def engines_of(worker: Proc) -> list[int]:
    """The processes of a worker's engines."""
    children = Path(f"/proc/{worker.process.pid}/task/{worker.process.pid}/children").read_text().split()
    return [
        int(child)
        for child in children
        if b"gpuworker.slots.engine_main" in Path(f"/proc/{child}/cmdline").read_bytes()
    ]


def a_place(folder: Path, config: str = "[spaces.tts]\n") -> Place:
    """Make a folder with a configuration, and an environment in which every command uses it."""
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("RELAY_", "RELAYD_"))}
    (folder / "relayd.toml").write_text(
        f'listen = "127.0.0.1:0"\nstate_dir = "{folder}/state"\n[log]\nformat = "json"\n{config}'
    )
    return Place(folder, inherited | {"RELAYD_STATE_DIR": f"{folder}/state", "PYTHONUNBUFFERED": "1"})


@asynccontextmanager
async def a_relay(place: Place, *args: str) -> AsyncIterator[Proc]:
    """Start `relayd serve`, and wait until it is ready."""
    async with place.start("relayd", "serve", *args) as relay:
        await relay.event("listening")
        yield relay


@asynccontextmanager
async def a_worker(place: Place, relay: Proc, *args: str, **environ: str) -> AsyncIterator[Proc]:
    """Start `gpuworker run`, and wait until it is registered at `relay`."""
    heard = len(relay.lines)
    async with place.start("gpuworker", "run", *args, **environ) as worker:
        await relay.event("worker registered", after=heard)
        yield worker
