"""A relay with a mock worker, as processes, for figures that clients measure."""

import os
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import attrs

from bench.relay.servers import Checkout, Server, open_process_in, port_in_log

_CONFIG = """
listen = "127.0.0.1:0"
state_dir = "state"
[log]
format = "json"
[spaces.bench]
"""


@attrs.frozen
class Stage:
    """What runs."""

    server: Server
    checkout: Checkout
    config: Path

    @property
    def url(self) -> str:
        """For clients."""
        return f"ws://127.0.0.1:{self.server.port}"

    def token(self, role: str, who: str) -> str:
        """A new token."""
        create = [*self.checkout.command, "token", "create", "--role", role, "--name", who]
        command = [*create, "--config", str(self.config)]
        made = subprocess.run(command, cwd=self.checkout.folder, capture_output=True, text=True, check=True)
        return made.stdout.strip()


@contextmanager
def open_stage(settings: str = "", options: Sequence[str] = ()) -> Iterator[Stage]:
    """Start a relay, and a worker with four slots in space `bench`.

    Args:
        settings: more of the relay's, after `[spaces.bench]`.
        options: more of the worker's.
    """
    checkout = Checkout.wanted()
    with tempfile.TemporaryDirectory(prefix="relayd-bench-") as name:
        folder = Path(name)
        config = folder / "relayd.toml"
        config.write_text(_CONFIG + settings)
        serve = [*checkout.command, "serve", "--config", str(config)]
        with open_process_in(checkout.folder, serve, folder / "log", {}) as process:
            port = port_in_log(process, folder / "log")
            stage = Stage(Server("relayd", process.pid, port), checkout, config)
            work = [checkout.python, "-m", "gpuworker.cli", "run", "--engine", "mock", "--space", "bench"]
            work += ["--in-threads", "--relay", stage.url, "--slots", "4", *options]
            with open_quietly(work, RELAY_TOKEN=stage.token("worker", "box")):
                yield stage


@contextmanager
def open_quietly(command: list[str], **environ: str) -> Iterator[None]:
    """Run a command until the end of the block."""
    with subprocess.Popen(command, env=os.environ | environ, stderr=subprocess.DEVNULL) as process:
        try:
            yield
        finally:
            process.kill()
