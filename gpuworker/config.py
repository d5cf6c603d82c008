"""Reads a worker's configuration from the command line, the environment and defaults, as one frozen value."""

import argparse
import difflib
import os
import re
import shlex
import socket
from collections.abc import Mapping
from typing import Any

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


PREFIX = "GPUWORKER_"
LOG_LEVELS = ("debug", "info", "warning", "error")
#: The unit's own variable, and those that Kubernetes and Docker links set for a service named "gpuworker".
_FOREIGN_VARIABLES = re.compile(rf"{PREFIX}(ARGS|SERVICE_\w+|PORT(_\w+)?|ENV_\w+)")


class _Spaces(argparse.Action):
    """Collects spaces; those of the environment, which are one text, are replaced."""

    def __call__(self, _parser: object, namespace: argparse.Namespace, values: Any, _option: object = None) -> None:
        """Add one."""
        before = getattr(namespace, self.dest)
        setattr(namespace, self.dest, [*(before if isinstance(before, list) else ()), values])


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
    log_level: str
    log_format: str


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
        "--space", action=_Spaces, metavar="NAME", help=f"space to serve; repeatable (default: {DEFAULT_SPACE})"
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
    parser.add_argument("--log-level", default="info", choices=LOG_LEVELS, help="least level to log (default: info)")
    parser.add_argument(
        "--log-format", default="text", choices=("text", "json"), help="lines for people, or JSON (default: text)"
    )
    _read_variables(parser)


def _read_variables(parser: argparse.ArgumentParser) -> None:
    """Take the defaults of the options from `GPUWORKER_SPACE`, `GPUWORKER_LOG_LEVEL`, ..., as if they were args."""
    options = {f"{PREFIX}{action.dest.upper()}": action for action in parser._actions if action.nargs != 0}
    for variable in sorted(os.environ):
        if not variable.startswith(PREFIX) or _FOREIGN_VARIABLES.fullmatch(variable):
            continue
        if (action := options.get(variable)) is None:
            close = difflib.get_close_matches(variable, options, n=1, cutoff=0.8)
            parser.error(f"{variable}: is not a setting" + (f"; did you mean {close[0]}?" if close else ""))
        value = os.environ[variable]
        if action.choices and value not in action.choices:
            parser.error(f"{variable}: must be one of {', '.join(action.choices)}, not {value!r}")
        # Given again on the command line, spaces replace these, and options of the engine add to them.
        action.default = shlex.split(value) if action.dest == "options" else value


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
    named = args.space.replace(",", " ").split() if isinstance(args.space, str) else args.space
    spaces = tuple(dict.fromkeys(named or [DEFAULT_SPACE]))
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
        log_level=args.log_level,
        log_format=args.log_format,
    )


def needs(engine: str, lack: Missing) -> str:
    """Describe in one line what an engine lacks."""
    return f"engine {engine!r} needs {lack.what}" + (f": {lack.install}" if lack.install else "")


def worker_name(name: str | None) -> str:
    """The worker's name as shown to people: the one given, else the host name."""
    return re.sub(r"\s+", "-", (name or socket.gethostname() or "worker").strip())[:64] or "worker"
