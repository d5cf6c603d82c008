"""What each command of `relayd` does."""

import argparse
import faulthandler
import gc
import os
import sys
from collections.abc import Awaitable, Callable, Mapping, Sequence
from functools import partial
from importlib.util import find_spec
from typing import Any

import attrs
import trio

from protocol.commands.exit_codes import CANNOT_CONNECT, DONE, FAILED, USAGE, silence_stdout
from protocol.commands.progress import printable, printable_json, printable_lines, table
from protocol.install_hint import install_command
from protocol.wire.validators import Value
from relayd.admin import Admin, AdminError, NotRunning, open_admin
from relayd.config.loader import load_config
from relayd.config.schema import Config, ConfigError, SpaceConfig
from relayd.store.base import StoreError
from relayd.store.records import TokenLimits
from relayd.views.rows import Row

#: What the extra `relay` brings, by the names it is imported by.
EXTRA = ("h11", "hypercorn", "prometheus_client", "python_multipart", "starlette", "structlog")

_LIMITS = tuple(field.name for field in attrs.fields(TokenLimits))


class ExtraMissing(Exception):
    """The command needs packages that are not installed."""


def run_command(args: argparse.Namespace) -> int:
    """Run the command that was asked for; returns the exit code (DESIGN §11)."""
    try:
        return COMMANDS[args.command](args)
    except (ConfigError, ExtraMissing) as fault:
        return _complain(printable_lines(str(fault)), USAGE)
    except NotRunning as fault:
        return _complain(printable(str(fault)), CANNOT_CONNECT)
    except (AdminError, StoreError) as fault:
        return _complain(printable(str(fault)), FAILED)
    except BrokenPipeError:  # `relayd requests | head`
        silence_stdout()
        return DONE


def _complain(words: str, code: int) -> int:
    print(f"relayd: {words}", file=sys.stderr)
    return code


def _settle(_urls: Sequence[str]) -> None:
    """What the daemon has made by now stays: no collection need look at it again, in the middle of a stream."""
    gc.collect()
    gc.freeze()


def _config(args: argparse.Namespace) -> Config:
    overrides = {"listen": getattr(args, "listen", None), "state_dir": args.state_dir}
    return load_config(args.config, environ=os.environ, overrides=overrides)


# -- commands -----------------------------------------------------------------------------------------------------


def _serve(args: argparse.Namespace) -> int:
    # The daemon's own modules, and the packages of the extra, are imported by the commands that need them.
    _check_extra()
    from relayd.daemon import serve
    from relayd.logs.setup import set_up_logs
    from relayd.net.tls import ListenError
    from relayd.service.malloc import keep_freed_memory

    config = _config(args)
    set_up_logs(config.log)
    faulthandler.enable()  # systemd's watchdog ends a relay that hangs with SIGABRT: the log then says where it stood
    faults: list[BaseException] = []
    try:
        keep_freed_memory()
        trio.run(partial(serve, config, on_ready=_settle, reread=partial(_config, args)))
    except* (StoreError, ListenError) as group:
        faults += _leaves(group)  # told as any other command's, without the nurseries that it came through
    return _complain(printable(str(faults[0])), FAILED) if faults else DONE


def _leaves(group: BaseExceptionGroup[Any]) -> list[BaseException]:
    return [leaf for e in group.exceptions for leaf in (_leaves(e) if isinstance(e, BaseExceptionGroup) else [e])]


def _check_config(args: argparse.Namespace) -> int:
    config = _config(args)
    names = ", ".join(sorted(config.spaces)) or "none"
    print(f"ok: listens on {config.listen or 'no TCP port'}, state in {config.state_dir}, spaces: {names}")
    return DONE


def _demo(args: argparse.Namespace) -> int:
    _check_extra()  # the relay that it starts needs them
    from relayd.demo import DEFAULT_TEXT, DemoFailed, run_demo

    try:
        trio.run(run_demo, DEFAULT_TEXT if args.text is None else args.text, args.output, args.keep)
    except DemoFailed as fault:  # with the last lines of what it started
        return _complain(printable_lines(str(fault)), FAILED)
    return DONE


def _check_extra() -> None:
    if lacks := [name for name in EXTRA if find_spec(name) is None]:
        what = f"the relay's packages are not installed ({', '.join(lacks)})"
        raise ExtraMissing(f"{what}; install them with: {install_command('relay')}")


def _admin(command: Callable[[Admin, argparse.Namespace], Awaitable[None]]) -> Callable[[argparse.Namespace], int]:
    def run(args: argparse.Namespace) -> int:
        config = _config(args)

        async def work() -> None:
            async with open_admin(config) as admin:
                await command(admin, args)

        trio.run(work)
        return DONE

    return run


async def _space_create(admin: Admin, args: argparse.Namespace) -> None:
    options: dict[str, Value] = {key: getattr(args, key) for key in SpaceConfig.field_names()}
    await admin.create_space(args.name, {key: value for key, value in options.items() if value is not None})
    print(f"space {args.name} created", file=sys.stderr)


async def _space_list(admin: Admin, args: argparse.Namespace) -> None:
    _print_rows(await admin.spaces(), ("name", "state", "workers", "slots", "busy", "queued", "engine"), args.json)


async def _space_pause(admin: Admin, args: argparse.Namespace) -> None:
    await admin.set_paused(args.name, True)
    print(f"space {args.name} paused: what runs goes on, nothing new starts or is taken", file=sys.stderr)


async def _space_resume(admin: Admin, args: argparse.Namespace) -> None:
    await admin.set_paused(args.name, False)
    print(f"space {args.name} resumed", file=sys.stderr)


async def _space_delete(admin: Admin, args: argparse.Namespace) -> None:
    await admin.delete_space(args.name)
    print(f"space {args.name} deleted", file=sys.stderr)


async def _token_create(admin: Admin, args: argparse.Namespace) -> None:
    limits = {key: value for key in _LIMITS if (value := getattr(args, key)) is not None}
    row = await admin.create_token(args.name, args.role, args.space, args.expires, limits)
    print(f"{row['token_id']}: keep the token, it is shown only now", file=sys.stderr)
    print(row["token"])


async def _token_list(admin: Admin, args: argparse.Namespace) -> None:
    rows = await admin.tokens()
    _print_rows(rows, ("token_id", "principal", "role", "spaces", "state", "created", "expires", "limits"), args.json)


async def _token_revoke(admin: Admin, args: argparse.Namespace) -> None:
    print(f"revoked {', '.join(await admin.revoke_token(args.which))}", file=sys.stderr)


async def _workers(admin: Admin, args: argparse.Namespace) -> None:
    columns = ("worker_id", "state", "spaces", "engine", "slots", "busy", "rtt_ms", "peer", "principal")
    _print_rows(await admin.rows("workers"), columns, args.json)


async def _requests(admin: Admin, args: argparse.Namespace) -> None:
    columns = ("request_id", "state", "space", "principal", "attempt", "age_s", "audio_s", "worker_id", "code")
    _print_rows(await admin.rows("requests"), columns, args.json)


async def _drain(admin: Admin, args: argparse.Namespace) -> None:
    running = await admin.drain()
    print(f"the relay takes nothing new and leaves when {running} running requests have ended", file=sys.stderr)


def _print_rows(rows: list[Row], columns: Sequence[str], as_json: bool) -> None:
    if as_json:
        print(printable_json(rows))
        return
    print(table([list(columns), *([_cell(row.get(column)) for column in columns] for row in rows)]))


def _cell(value: Value) -> str:
    if value is None:
        return "-"
    if isinstance(value, dict):
        value = [f"{key}={one}" for key, one in value.items()]
    return ",".join(map(str, value)) or "-" if isinstance(value, list) else str(value) or "-"


COMMANDS: Mapping[str, Callable[[argparse.Namespace], int]] = {
    "serve": _serve,
    "check-config": _check_config,
    "demo": _demo,
    "space create": _admin(_space_create),
    "space list": _admin(_space_list),
    "space pause": _admin(_space_pause),
    "space resume": _admin(_space_resume),
    "space delete": _admin(_space_delete),
    "token create": _admin(_token_create),
    "token list": _admin(_token_list),
    "token revoke": _admin(_token_revoke),
    "workers": _admin(_workers),
    "requests": _admin(_requests),
    "drain": _admin(_drain),
}
