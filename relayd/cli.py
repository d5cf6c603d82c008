"""The command `relayd`: serve, look after spaces and tokens, and the demo."""

import argparse
import faulthandler
import gc
import os
import sys
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import attrs
import trio

from protocol.commands.exit_codes import CANNOT_CONNECT, DONE, FAILED, INTERRUPTED, USAGE, silence_stdout
from protocol.commands.progress import printable, printable_json, printable_lines, table
from protocol.wire.messages import ROLES
from protocol.wire.validators import Value
from relayd.admin import Admin, AdminError, NotRunning, open_admin
from relayd.config.loader import load_config
from relayd.config.schema import Config, ConfigError, SpaceConfig, parse_annotation
from relayd.daemon import serve
from relayd.demo import DEFAULT_TEXT, DemoFailed, run_demo
from relayd.logs.setup import set_up_logs
from relayd.net.tls import ListenError
from relayd.service.malloc import keep_freed_memory
from relayd.store.base import StoreError
from relayd.store.records import TokenLimits
from relayd.views.rows import Row

_LIMITS = tuple(field.name for field in attrs.fields(TokenLimits))

Command = Callable[[Admin, argparse.Namespace], Awaitable[None]]


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of the console script; returns the exit code (DESIGN §11)."""
    args = _parser().parse_args(argv)
    try:
        return int(args.run(args))
    except ConfigError as fault:
        return _complain(printable_lines(str(fault)), USAGE)
    except NotRunning as fault:
        return _complain(printable(str(fault)), CANNOT_CONNECT)
    except DemoFailed as fault:  # with the last lines of what it started
        return _complain(printable_lines(str(fault)), FAILED)
    except (AdminError, StoreError, ListenError) as fault:
        return _complain(printable(str(fault)), FAILED)
    except BrokenPipeError:  # `relayd requests | head`
        silence_stdout()
        return DONE
    except KeyboardInterrupt:
        return INTERRUPTED


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
    config = _config(args)
    set_up_logs(config.log)
    faulthandler.enable()  # systemd's watchdog ends a relay that hangs with SIGABRT: the log then says where it stood
    faults: list[BaseException] = []
    try:
        keep_freed_memory()
        trio.run(partial(serve, config, on_ready=_settle, reread=partial(_config, args)))
    except* (StoreError, ListenError) as group:
        faults += _leaves(group)  # told as any other command's, without the nurseries that it came through
    if faults:
        raise faults[0]
    return DONE


def _leaves(group: BaseExceptionGroup[Any]) -> list[BaseException]:
    return [leaf for e in group.exceptions for leaf in (_leaves(e) if isinstance(e, BaseExceptionGroup) else [e])]


def _check_config(args: argparse.Namespace) -> int:
    config = _config(args)
    names = ", ".join(sorted(config.spaces)) or "none"
    print(f"ok: listens on {config.listen or 'no TCP port'}, state in {config.state_dir}, spaces: {names}")
    return DONE


def _demo(args: argparse.Namespace) -> int:
    trio.run(run_demo, args.text, args.output, args.keep)
    return DONE


def _admin(command: Command) -> Callable[[argparse.Namespace], int]:
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


# -- arguments ----------------------------------------------------------------------------------------------------


def _parser() -> argparse.ArgumentParser:
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--config", type=Path, help="default: ./relayd.toml, else /etc/relayd/relayd.toml")
    common.add_argument("--state-dir", type=Path, help="store and socket; default: ~/.local/state/relayd")
    listing = argparse.ArgumentParser(add_help=False, parents=[common])
    listing.add_argument("--json", action="store_true", help="one JSON array")
    parser = argparse.ArgumentParser(prog="relayd", description="Use a GPU that has no public address.")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    def add(under: Any, name: str, run: Callable[[argparse.Namespace], int], words: str, parent: Any = common) -> Any:
        command = under.add_parser(name, parents=[parent], help=words, description=words)
        command.set_defaults(run=run)
        return command

    command = add(commands, "serve", _serve, "run the relay until SIGTERM")
    command.add_argument("--listen", metavar="HOST:PORT", help="default: 127.0.0.1:8765")
    add(commands, "check-config", _check_config, "read the configuration and tell every fault")
    demo = commands.add_parser("demo", help="hear a sentence through a relay and a worker started for it")
    demo.add_argument("text", nargs="?", default=DEFAULT_TEXT)
    demo.add_argument("-o", "--output", type=Path, default=Path("hello.wav"))
    demo.add_argument("--keep", action="store_true", help="leave relay and worker running, and tell how to use them")
    demo.set_defaults(run=_demo)

    spaces = commands.add_parser("space", help="make and look after spaces").add_subparsers(
        metavar="WHAT", required=True
    )
    create = add(spaces, "create", _admin(_space_create), "make a space")
    create.add_argument("name")
    for field in attrs.fields(SpaceConfig):
        kind, _rule = parse_annotation(field.type)
        plain = kind if kind in (int, float, str) else int if "int" in str(kind) else str
        create.add_argument(f"--{field.name.replace('_', '-')}", type=plain, help=f"default: {field.default}")
    add(spaces, "list", _admin(_space_list), "all spaces", listing)
    for name, run, words in (
        ("pause", _space_pause, "start nothing new in a space, and take nothing new"),
        ("resume", _space_resume, "undo pause"),
        ("delete", _space_delete, "delete a space that is at rest"),
    ):
        add(spaces, name, _admin(run), words).add_argument("name")

    tokens = commands.add_parser("token", help="make and revoke tokens").add_subparsers(metavar="WHAT", required=True)
    create = add(tokens, "create", _admin(_token_create), "make a token and print it, alone, on stdout")
    create.add_argument("--role", required=True, choices=ROLES)
    create.add_argument("--name", required=True, help="the principal it speaks for")
    create.add_argument(
        "--space", action="append", default=[], metavar="PATTERN", help="spaces it may use; default: all"
    )
    create.add_argument("--expires", metavar="WHEN", help="12h, 30d, or a date like 2031-12-31; default: never")
    for name, words in (
        ("queued", "requests it may have queued"),
        ("running", "requests it may have running; more wait"),
        ("connections", "connections it may have open"),
    ):
        create.add_argument(f"--max-{name}", type=int, metavar="N", help=f"{words}, over all spaces; default: no limit")
    add(tokens, "list", _admin(_token_list), "all tokens, without their texts", listing)
    add(tokens, "revoke", _admin(_token_revoke), "revoke a token and drop its connections").add_argument(
        "which", metavar="ID|NAME"
    )

    add(commands, "workers", _admin(_workers), "the workers of the running relay", listing)
    add(commands, "requests", _admin(_requests), "the requests of the running relay", listing)
    add(commands, "drain", _admin(_drain), "have the running relay finish what runs, and leave")
    return parser


if __name__ == "__main__":
    sys.exit(main())
