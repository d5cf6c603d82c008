"""Runs the commands of `relayd`; each imports only what it needs, so that short ones start fast."""

import argparse
import faulthandler
import gc
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib.util import find_spec
from typing import Any

from protocol.arguments import fault_line
from protocol.commands.exit_codes import DONE, FAILED, USAGE, silence_stdout
from protocol.install_hint import install_command
from protocol.printable import printable, printable_lines
from relayd.config.loader import load_config
from relayd.config.schema import Config, ConfigError

#: Descriptors that the daemon asks the system for.
MAX_FILES = 65_536
#: Import names of the packages in the extra `relay`.
EXTRA = ("argon2", "h11", "lameenc", "prometheus_client", "python_multipart", "starlette", "structlog")


class ExtraMissing(Exception):
    """The command needs packages that are not installed."""


def run_command(args: argparse.Namespace) -> int:
    """Run the command in `args`; returns the exit code (docs/design.md §11)."""
    try:
        return COMMANDS.get(args.command, _admin)(args)
    except (ConfigError, ExtraMissing) as fault:
        return _print_error(printable_lines(str(fault)), USAGE, as_json=getattr(args, "json", False))
    except BrokenPipeError:  # `relayd requests | head`
        silence_stdout()
        return DONE


def _print_error(message: str, code: int, *, as_json: bool = False) -> int:
    """Print why a command failed; returns its exit code."""
    print(fault_line("relayd", message, "usage" if code == USAGE else "failed", as_json=as_json), file=sys.stderr)
    return code


def _freeze_objects(_urls: Sequence[str]) -> None:
    """Exclude the objects made at startup, which live as long as the daemon, from later garbage collections."""
    gc.collect()
    gc.freeze()


def _config(args: argparse.Namespace) -> Config:
    overrides = {"listen": getattr(args, "listen", None), "state_dir": args.state_dir}
    return load_config(args.config, environ=os.environ, overrides=overrides)


# -- commands -----------------------------------------------------------------------------------------------------


def _raise_file_limit() -> None:
    """Use as many descriptors as the system allows: strangers need some, beyond the connections that count."""
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = MAX_FILES if hard == resource.RLIM_INFINITY else min(hard, MAX_FILES)
    if soft != resource.RLIM_INFINITY and soft < most:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


def _serve(args: argparse.Namespace) -> int:
    _check_extra()
    import trio

    from protocol.exit_deadline import end_within, prepare_exit_deadline
    from relayd.daemon import serve
    from relayd.logs.setup import set_up_logs
    from relayd.net.tls import ListenError
    from relayd.service.health import LEAVE_S
    from relayd.service.malloc import keep_freed_memory
    from relayd.store.base import StoreError, StoreInUse

    config = _config(args)
    set_up_logs(config.log)
    faulthandler.enable()  # systemd's watchdog sends SIGABRT to a hung relay; the log then shows where it hung
    prepare_exit_deadline()
    leave = partial(end_within, LEAVE_S)
    faults: list[BaseException] = []
    try:
        keep_freed_memory()
        _raise_file_limit()
        run = partial(serve, config, on_ready=_freeze_objects, on_leave=leave, reread=partial(_config, args))
        trio.run(partial(run, wait=args.wait))
    except* (StoreError, ListenError) as group:
        faults += _leaves(group)  # reported like other commands' errors, without the exception groups of the nurseries
    finally:
        leave()
    if not faults:
        return DONE
    # Another start would not repair a store, but a port or folder that another process holds may be free soon.
    hopeless = isinstance(faults[0], StoreError) and not isinstance(faults[0], StoreInUse)
    return _print_error(printable(str(faults[0])), USAGE if hopeless else FAILED)


def _leaves(group: BaseExceptionGroup[Any]) -> list[BaseException]:
    return [leaf for e in group.exceptions for leaf in (_leaves(e) if isinstance(e, BaseExceptionGroup) else [e])]


def _check_config(args: argparse.Namespace) -> int:
    config = _config(args)
    names = ", ".join(sorted(config.spaces)) or "none"
    print(f"ok: listens on {config.listen or 'no TCP port'}, state in {config.state_dir}, spaces: {names}")
    return DONE


def _demo(args: argparse.Namespace) -> int:
    _check_extra()  # the relay it starts needs them
    import trio

    from relayd.demo import DEFAULT_TEXT, DemoFailed, run_demo, run_talk_demo

    if args.talk and args.text is not None:
        return _print_error("demo --talk takes no text; what you say goes into the page that it names", USAGE)
    try:
        if args.talk:
            trio.run(run_talk_demo, args.keep)
            return DONE
        trio.run(run_demo, DEFAULT_TEXT if args.text is None else args.text, args.output, args.keep)
    except DemoFailed as fault:  # its message may hold several lines of a process's log
        return _print_error(printable_lines(str(fault)), FAILED)
    return DONE


def _check_extra() -> None:
    if missing := [name for name in EXTRA if find_spec(name) is None]:
        what = f"the relay's packages are not installed ({', '.join(missing)})"
        raise ExtraMissing(f"{what}; install them with: {install_command('relay')}")


def _admin(args: argparse.Namespace) -> int:
    config = _config(args)
    from relayd.admin_commands import run_admin

    return run_admin(args, config)


COMMANDS: Mapping[str, Callable[[argparse.Namespace], int]] = {
    "serve": _serve,
    "check-config": _check_config,
    "demo": _demo,
}
