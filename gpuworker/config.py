"""Reads a worker's configuration as one frozen value.

The command line takes precedence over the environment, the environment over the settings file, and that over defaults.
"""

import argparse
import difflib
import os
import re
import shlex
import socket
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import attrs

from gpuworker.engines.base import Engine, Missing, OptionError, OptionValue
from gpuworker.engines.catalog import EngineNotFound, find_engine, parse_options
from protocol.arguments import add_login
from protocol.client.address import Address, from_environment
from protocol.client.contexts import choose_login
from protocol.log_lines import FORMATS, LEVELS
from protocol.wire.messages import SPACE_PATTERN

DEFAULT_SPACE = "tts"
DEFAULT_ENGINE = "espeak"
MAX_SLOTS = 1_000


class ConfigError(ValueError):
    """The configuration is not valid; the message lists what is wrong and what is accepted."""


PREFIX = "GPUWORKER_"
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
    shared: bool
    slots: int
    name: str
    in_threads: bool
    load_timeout_s: float
    cancel_grace_s: float
    stall_timeout_s: float
    drain_timeout_s: float
    log_level: str
    log_format: str


def add_run_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of `gpuworker run`."""
    from gpuworker.slots.process_slot import CANCEL_GRACE_S, LOAD_TIMEOUT_S, STALL_TIMEOUT_S
    from gpuworker.worker import DRAIN_TIMEOUT_S

    parser.add_argument("--config", metavar="FILE", help="TOML file of settings with the names of these options")
    add_login(parser, "--relay")
    parser.add_argument(
        "--space", action=_Spaces, metavar="NAME", help=f"space to serve; repeatable (default: {DEFAULT_SPACE})"
    )
    add_engine_options(parser, DEFAULT_ENGINE, f"engine to run; see `gpuworker engines` (default: {DEFAULT_ENGINE})")
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
        "--stall-timeout",
        type=float,
        default=STALL_TIMEOUT_S,
        metavar="S",
        help="engines with one process for all slots: longest silence while requests run, in seconds "
        f"(default: {STALL_TIMEOUT_S:g})",
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
    parser.add_argument("--log-level", default="info", choices=LEVELS, help="least level to log (default: info)")
    parser.add_argument(
        "--log-format",
        default="text",
        choices=("text", *FORMATS),
        help="text or console: lines for people; json; auto: console on a terminal, else json (default: text)",
    )
    actions = {action.dest: action for action in parser._actions if action.dest != "help"}
    parser.set_defaults(settings=Settings(actions))
    for action in actions.values():
        action.default = None  # so that `Settings.fill` knows what was given
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


class Settings:
    """What `gpuworker run` can be told, by any of its ways.

    Args:
        actions: the command line's options, by name; those that the settings file may have.
    """

    def __init__(self, actions: Mapping[str, argparse.Action]) -> None:
        self._actions = dict(actions)
        self._defaults = {name: action.default for name, action in actions.items()}

    def fill(self, args: argparse.Namespace, environ: Mapping[str, str]) -> list[str]:
        """Fill in what neither the command line nor the environment said; returns the faults of the settings file."""
        faults: list[str] = []
        raw: dict[str, Any] = {}
        if args.config:
            path = Path(args.config)
            try:
                raw = tomllib.loads(path.read_bytes().decode())
            except OSError as fault:
                faults.append(f"{path}: cannot be read: {fault.strerror}")
            except ValueError as fault:  # TOMLDecodeError or UnicodeDecodeError
                faults.append(f"{path}: is not TOML: {fault}")
        if environ.get("RELAY_URL"):
            raw.pop("relay", None)
        if environ.get("RELAY_TOKEN") or environ.get("RELAY_TOKEN_FILE"):
            raw.pop("token_file", None)
        for key, value in raw.items():
            name = key.replace("-", "_")
            if name not in self._actions or name == "config":
                close = difflib.get_close_matches(name, self._actions, n=1, cutoff=0.6)
                faults.append(
                    f"{args.config}: {key}: is not a setting" + (f"; did you mean {close[0]}?" if close else "")
                )
            elif wrong := self._fault(name, value):
                faults.append(f"{args.config}: {key}: {wrong}")
            elif name == "options":
                args.options = [*(f"{option}={_option_text(v)}" for option, v in value.items()), *(args.options or ())]
            elif getattr(args, name) is None:
                in_folder = name == "token_file"
                setattr(args, name, str(Path(args.config).absolute().parent / value) if in_folder else value)
        for name, default in self._defaults.items():
            if getattr(args, name) is None:
                setattr(args, name, default)
        return faults

    def _fault(self, name: str, value: object) -> str:
        action = self._actions[name]
        if name == "space":
            fits = isinstance(value, str) or (isinstance(value, list) and all(isinstance(each, str) for each in value))
            return "" if fits else "must be a string or a list of strings"
        if name == "options":
            fits = isinstance(value, dict) and all(isinstance(each, str | int | float) for each in value.values())
            return "" if fits else 'must be a table of the engine\'s options, such as {model = "…"}'
        kind = bool if action.nargs == 0 else action.type or str
        if type(value) is not kind and not (kind is float and type(value) is int):
            return f"must be {_KINDS[kind]}, not {value!r}"
        if action.choices and value not in action.choices:
            return f"must be one of {', '.join(action.choices)}, not {value!r}"
        return ""


_KINDS: Mapping[object, str] = {bool: "true or false", int: "a whole number", float: "a number", str: "a string"}


def _option_text(value: str | float) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def add_engine_options(parser: argparse.ArgumentParser, default: str | None, engine_help: str) -> None:
    """Add `--engine`, `--slots` and `-o`."""
    parser.add_argument("--engine", default=default, metavar="NAME", help=engine_help)
    parser.add_argument(
        "--slots",
        type=int,
        metavar="N",
        help="requests to run at the same time, each in its own process unless the engine is shared "
        "(default: 1, or as many as the engine has room for)",
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
    faults: list[str] = args.settings.fill(args, environ)
    address, login, engine_class, shared = None, None, None, False
    options: dict[str, OptionValue] = {}
    try:
        login = choose_login(args.relay, args.token_file, args.context, environ)
    except ValueError as fault:
        faults.append(str(fault))
    try:
        address = from_environment(args.relay if login is None else login.url, environ)
    except ValueError as fault:
        faults.append(str(fault))
    named = args.space.replace(",", " ").split() if isinstance(args.space, str) else args.space
    spaces = tuple(dict.fromkeys(named or [DEFAULT_SPACE]))
    faults += [
        f"--space {space}: not a valid space name ({SPACE_PATTERN.pattern})"
        for space in spaces
        if not SPACE_PATTERN.fullmatch(space)
    ]
    slots = 1 if args.slots is None else args.slots
    if not 1 <= slots <= MAX_SLOTS:
        faults.append(f"--slots {slots}: must lie in 1..{MAX_SLOTS}")
    for name in ("load_timeout", "cancel_grace", "stall_timeout", "drain_timeout"):
        given_s = getattr(args, name)
        above_0 = name in ("load_timeout", "stall_timeout")  # with 0, every engine would be killed as it begins
        if not 0 <= given_s < float("inf") or (above_0 and not given_s):
            least = "above 0" if above_0 else "0 or more"
            faults.append(f"--{name.replace('_', '-')} {given_s}: must be a number of seconds, {least}")
    try:
        engine_class = find_engine(args.engine)
        options = parse_options(engine_class.OPTIONS, args.options)
        engine = engine_class(options)  # checks that only the engine can do
        shared = engine.SHARED
        if args.slots is None:
            slots = engine.default_slots
        if shared and args.in_threads:
            faults.append(f"--in-threads: engine {args.engine!r} serves all slots from one process; leave it out")
        faults += [needs(args.engine, lack) for lack in engine_class.check(options, slots)]
    except (EngineNotFound, OptionError) as fault:
        faults.append(str(fault))
    if faults or address is None or login is None or engine_class is None:
        raise ConfigError("\n".join(faults))
    return WorkerConfig(
        address=address,
        token=login.token or None,
        spaces=spaces,
        engine=args.engine,
        engine_class=engine_class,
        options=options,
        shared=shared,
        slots=slots,
        name=worker_name(args.name),
        in_threads=args.in_threads,
        load_timeout_s=args.load_timeout,
        cancel_grace_s=args.cancel_grace,
        stall_timeout_s=args.stall_timeout,
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
