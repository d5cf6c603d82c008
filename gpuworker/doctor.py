"""`gpuworker doctor`: reports what can run here, how to install what is missing, and whether the relay answers."""

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Mapping
from importlib.util import find_spec
from typing import Literal

import attrs

from gpuworker.config import ConfigError, add_engine_options
from gpuworker.engines.base import Engine, EngineError, OptionError
from gpuworker.engines.catalog import EngineNotFound, engine_names, find_engine, parse_options
from protocol.arguments import add_login
from protocol.client.address import Address, parse_address
from protocol.client.contexts import choose_login
from protocol.wire.errors import ErrorCode, LinkError, LoginRefused, ProtocolError
from protocol.wire.messages import PROTOCOL_VERSION, Hello

NVIDIA_SMI_S = 10.0
TORCH_S = 60.0
MIN_PYTHON = (3, 11)

Outcome = Literal["ok", "missing", "failed", "unreachable"]


@attrs.frozen(kw_only=True)
class Finding:
    """The result of one check: its subject, outcome and description, and the command that fixes a failure.

    The field names are those of `--json`.
    """

    what: str
    outcome: Outcome
    words: str
    install: str = ""


def add_doctor_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of `gpuworker doctor`."""
    add_login(parser, "--relay")
    parser.add_argument("--json", action="store_true", help="print JSON")
    add_engine_options(parser, None, "check only this engine, with the options given to `gpuworker run`")


def run_doctor(args: argparse.Namespace, environ: Mapping[str, str] | None = None) -> int:
    """Print the findings; return 1 if no engine can run or the login fails, 3 if the relay does not answer.

    Raises:
        ConfigError: the relay's address, the engine or its options are not valid.
    """
    environ = os.environ if environ is None else environ
    if args.engine is None and (args.options or args.slots is not None):
        raise ConfigError("--slots and -o belong to an engine: give --engine too")
    engines = _engines() if args.engine is None else _engine(args.engine, args.options, args.slots)
    findings, relays = [_python(), *engines, _gpu()], []
    try:
        login = choose_login(args.relay, args.token_file, args.context, environ)
        address = parse_address(login.url) if login.url else None
    except ValueError as fault:
        raise ConfigError(str(fault)) from None
    if address is not None:
        import trio

        relays = [trio.run(_relay, each, login.token or None) for each in address.each]
        findings += relays
    if args.json:
        print(json.dumps([attrs.asdict(finding) for finding in findings], ensure_ascii=False, indent=2))
    else:
        for finding in findings:
            print(f"{finding.what:<18} {finding.outcome:<12} {finding.words}")
            if finding.install:
                print(f"{'':<18} {'':<12} install it with: {finding.install}")
    if relays and all(finding.outcome == "unreachable" for finding in relays):  # a standby need not listen
        return 3
    runs = any(finding.outcome == "ok" for finding in engines)
    return 0 if runs and all(finding.outcome != "failed" for finding in findings) else 1


def _python() -> Finding:
    version = f"Python {platform.python_version()} on {platform.system()} {platform.machine()}"
    if sys.platform != "linux":
        return Finding(
            what="python", outcome="failed", words=f"{version}; slots need Linux (pidfd, parent-death signal)"
        )
    return Finding(what="python", outcome="ok" if sys.version_info >= MIN_PYTHON else "failed", words=version)


def _engines() -> list[Finding]:
    findings = []
    for name in engine_names():
        what = f"engine {name}"
        try:
            engine = find_engine(name)
        except EngineNotFound as fault:
            findings.append(Finding(what=what, outcome="missing", words=str(fault)))
            continue
        lacking = engine.missing()
        findings += [
            Finding(what=what, outcome="missing", words=f"needs {lack.what}", install=lack.install) for lack in lacking
        ] or [Finding(what=what, outcome="ok", words=_summary(engine))]
    return findings


def _engine(name: str, arguments: list[str], slots: int | None) -> list[Finding]:
    """Check one engine with these options and this many slots."""
    if slots is not None and slots < 1:
        raise ConfigError(f"--slots {slots}: must be 1 or more")
    try:
        engine = find_engine(name)
        options = parse_options(engine.OPTIONS, arguments)
        made = engine(options)  # checks that only the engine can do
    except (EngineNotFound, OptionError) as fault:
        raise ConfigError(str(fault)) from None
    what, slots = f"engine {name}", slots or made.default_slots
    lacking = [
        Finding(what=what, outcome="missing", words=f"needs {lack.what}", install=lack.install)
        for lack in engine.check(options, slots)
    ]
    if lacking:
        return lacking
    try:
        outlook = engine.outlook(options, slots)
    except EngineError as fault:
        return [Finding(what=what, outcome="failed", words=str(fault))]
    return [Finding(what=what, outcome="ok", words=_summary(engine, outlook))]


def _summary(engine: type[Engine], outlook: str = "") -> str:
    live = f"live inputs: {', '.join(engine.LIVE_INPUTS)}" if engine.LIVE_INPUTS else ""
    return "; ".join(filter(None, (engine.SUMMARY, live, outlook)))


def _gpu() -> Finding:
    """Ask nvidia-smi, which needs no Python package; then ask torch, in its own process, whether it sees the GPU."""
    description = "none found (no nvidia-smi); espeak, mock and function need none"
    outcome: Outcome = "missing"
    if smi := shutil.which("nvidia-smi"):
        query = [smi, "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
        gpus = _output(query, NVIDIA_SMI_S)
        outcome = "ok" if gpus else "failed"
        description = "; ".join(gpus.splitlines()) if gpus else "nvidia-smi does not answer"
    if find_spec("torch") is not None:
        script = "import torch; print(torch.__version__, 'sees', torch.cuda.device_count(), 'GPU(s)')"
        description += f"; torch {_output([sys.executable, '-c', script], TORCH_S) or 'cannot be imported'}"
    return Finding(what="gpu", outcome=outcome, words=description)


def _output(command: list[str], limit_s: float) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=limit_s, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


async def _relay(address: Address, token: str | None) -> Finding:
    from protocol.link.dial import log_in, open_link

    what = "relay"
    hello = Hello(version=PROTOCOL_VERSION, role="worker", token=token, agent="gpuworker-doctor")
    try:
        async with open_link(address) as link:
            welcome = await log_in(link, hello)
            return Finding(what=what, outcome="ok", words=f"{address} accepts the token, as {welcome.principal!r}")
    except LoginRefused as refusal:
        if refusal.code == ErrorCode.NOT_OWNER:
            return Finding(what=what, outcome="ok", words=f"{address} stands by: {refusal}")
        return Finding(what=what, outcome="failed", words=f"{address} refuses the login: {refusal.code}: {refusal}")
    except (LinkError, ProtocolError) as fault:
        return Finding(what=what, outcome="unreachable", words=f"{address}: {fault}")
