"""Reads a worker's configuration from the command line, the environment and defaults, as one frozen value."""

import argparse
import os
import re
import socket
from collections.abc import Mapping

import attrs

from gpuworker.engines.base import Engine, Missing, OptionError, OptionValue
from gpuworker.engines.catalog import EngineNotFound, find_engine, parse_options
from protocol.client.address import Address, from_environment, read_token, token_from_environment
from protocol.wire.messages import SPACE_PATTERN

DEFAULT_SPACE = "tts"
DEFAULT_ENGINE = "espeak"
MAX_SLOTS = 1_000


class ConfigError(ValueError):
    """The configuration is not valid; the message lists what is wrong and what is accepted."""


@attrs.frozen(kw_only=True)
class WorkerConfig:
    """The configuration of one worker; the fields correspond to the options of `gpuworker run`."""

    address: Address
    token: str | None
    spaces: tuple[str, ...]
    engine: str
    engine_class: type[Engine]
    options: dict[str, OptionValue]
    slots: int
    name: str
    in_threads: bool
    load_timeout_s: float
    cancel_grace_s: float
    drain_timeout_s: float


def add_run_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of `gpuworker run`."""
    from gpuworker.slots.process_slot import CANCEL_GRACE_S, LOAD_TIMEOUT_S
    from gpuworker.worker import DRAIN_TIMEOUT_S

    parser.add_argument(
        "--relay",
        metavar="URL",
        help="ws://, wss://, http(s):// or unix:PATH (default: RELAY_URL, else the local socket)",
    )
    parser.add_argument(
        "--space", action="append", metavar="NAME", help=f"space to serve; repeatable (default: {DEFAULT_SPACE})"
    )
    add_engine_options(parser, DEFAULT_ENGINE, f"engine to run; see `gpuworker engines` (default: {DEFAULT_ENGINE})")
    parser.add_argument(
        "--token-file",
        metavar="FILE",
        help="file that contains the token (default: RELAY_TOKEN or the file in RELAY_TOKEN_FILE)",
    )
    parser.add_argument("--name", help="name of this worker, for people (default: the host name)")
    parser.add_argument(
        "--load-timeout",
        type=float,
        default=LOAD_TIMEOUT_S,
        metavar="S",
        help=f"longest silence while loading, downloads excepted, in seconds (default: {LOAD_TIMEOUT_S:g})",
    )
    parser.add_argument(
        "--cancel-grace",
        type=float,
        default=CANCEL_GRACE_S,
        metavar="S",
        help=f"seconds from a cancel until a slot is killed (default: {CANCEL_GRACE_S:g})",
    )
    parser.add_argument(
        "--drain-timeout",
        type=float,
        default=DRAIN_TIMEOUT_S,
        metavar="S",
        help=f"seconds for running requests to finish after SIGTERM (default: {DRAIN_TIMEOUT_S:g})",
    )
    parser.add_argument(
        "--in-threads", action="store_true", help="run slots as threads: no isolation, less memory; for load tests"
    )


def add_engine_options(parser: argparse.ArgumentParser, default: str | None, engine_help: str) -> None:
    """Add `--engine`, `--slots` and `-o`."""
    parser.add_argument("--engine", default=default, metavar="NAME", help=engine_help)
    parser.add_argument(
        "--slots",
        type=int,
        default=1,
        metavar="N",
        help="requests to run at the same time, each in its own process (default: 1)",
    )
    parser.add_argument(
        "-o",
        action="append",
        default=[],
        dest="options",
        metavar="KEY=VALUE",
        help="an option of the engine; repeatable",
    )


def read_config(args: argparse.Namespace, environ: Mapping[str, str] | None = None) -> WorkerConfig:
    """Read the configuration from a parsed command line and the environment.

    Raises:
        ConfigError: its message has one line for each fault.
    """
    environ = os.environ if environ is None else environ
    faults: list[str] = []
    address, token, engine_class = None, None, None
    options: dict[str, OptionValue] = {}
    try:
        address = from_environment(args.relay, environ)
    except ValueError as fault:
        faults.append(str(fault))
    try:
        token = read_token(args.token_file) if args.token_file else token_from_environment(environ)
    except ValueError as fault:
        faults.append(str(fault))
    spaces = tuple(dict.fromkeys(args.space or [DEFAULT_SPACE]))
    faults += [
        f"--space {space}: not a valid space name ({SPACE_PATTERN.pattern})"
        for space in spaces
        if not SPACE_PATTERN.fullmatch(space)
    ]
    if not 1 <= args.slots <= MAX_SLOTS:
        faults.append(f"--slots {args.slots}: must lie in 1..{MAX_SLOTS}")
    for name in ("load_timeout", "cancel_grace", "drain_timeout"):
        if not 0 <= getattr(args, name) < float("inf"):
            faults.append(f"--{name.replace('_', '-')} {getattr(args, name)}: must be a number of seconds, 0 or more")
    try:
        engine_class = find_engine(args.engine)
        options = parse_options(engine_class.OPTIONS, args.options)
        engine_class(options)  # checks that only the engine can do
        faults += [needs(args.engine, lack) for lack in engine_class.check(options, args.slots)]
    except (EngineNotFound, OptionError) as fault:
        faults.append(str(fault))
    if faults or address is None or engine_class is None:
        raise ConfigError("\n".join(faults))
    return WorkerConfig(
        address=address,
        token=token,
        spaces=spaces,
        engine=args.engine,
        engine_class=engine_class,
        options=options,
        slots=args.slots,
        name=worker_name(args.name),
        in_threads=args.in_threads,
        load_timeout_s=args.load_timeout,
        cancel_grace_s=args.cancel_grace,
        drain_timeout_s=args.drain_timeout,
    )


def needs(engine: str, lack: Missing) -> str:
    """Describe in one line what an engine lacks."""
    return f"engine {engine!r} needs {lack.what}" + (f": {lack.install}" if lack.install else "")


def worker_name(name: str | None) -> str:
    """The worker's name as shown to people: the one given, else the host name."""
    return re.sub(r"\s+", "-", (name or socket.gethostname() or "worker").strip())[:64] or "worker"
