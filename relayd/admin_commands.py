"""The commands of `relayd` that manage spaces, tokens and a running relay, and print the results."""

import argparse
import sys
from collections.abc import Awaitable, Callable, Mapping, Sequence

import attrs
import trio

from protocol.commands.exit_codes import CANNOT_CONNECT, DONE, FAILED
from protocol.commands.progress import table
from protocol.printable import printable, printable_json
from protocol.wire.validators import Value
from relayd.admin import Admin, AdminError, NotRunning, open_admin
from relayd.config.schema import Config, SpaceConfig
from relayd.store.base import StoreError
from relayd.store.records import TokenLimits
from relayd.views.token_rows import Row

_LIMITS = tuple(field.name for field in attrs.fields(TokenLimits))


def run_admin(args: argparse.Namespace, config: Config) -> int:
    """Run an admin command for the daemon of this configuration; returns the exit code (docs/design.md §11)."""

    async def work() -> None:
        async with open_admin(config) as admin:
            await COMMANDS[args.command](admin, args)

    try:
        trio.run(work)
    except (AdminError, StoreError) as fault:
        print(f"relayd: {printable(str(fault))}", file=sys.stderr)
        return CANNOT_CONNECT if isinstance(fault, NotRunning) else FAILED
    return DONE


async def _space_create(admin: Admin, args: argparse.Namespace) -> None:
    options: dict[str, Value] = {key: getattr(args, key) for key in SpaceConfig.field_names()}
    await admin.create_space(args.name, {key: value for key, value in options.items() if value is not None})
    print(f"space {args.name} created", file=sys.stderr)


async def _space_list(admin: Admin, args: argparse.Namespace) -> None:
    _print_rows(await admin.spaces(), ("name", "state", "workers", "slots", "busy", "queued", "engine"), args.json)


async def _space_pause(admin: Admin, args: argparse.Namespace) -> None:
    await admin.set_paused(args.name, True)
    print(f"space {args.name} paused: running requests continue, nothing new is started or accepted", file=sys.stderr)


async def _space_resume(admin: Admin, args: argparse.Namespace) -> None:
    await admin.set_paused(args.name, False)
    print(f"space {args.name} resumed", file=sys.stderr)


async def _space_delete(admin: Admin, args: argparse.Namespace) -> None:
    await admin.delete_space(args.name)
    print(f"space {args.name} deleted", file=sys.stderr)


async def _token_create(admin: Admin, args: argparse.Namespace) -> None:
    limits = {key: value for key in _LIMITS if (value := getattr(args, key)) is not None}
    row = await admin.create_token(args.name, args.role, args.space, args.expires, limits, readonly=args.readonly)
    print(f"{row['token_id']}: keep the token, it is not shown again", file=sys.stderr)
    print(row["token"])


async def _token_list(admin: Admin, args: argparse.Namespace) -> None:
    rows = await admin.tokens()
    _print_rows(
        rows,
        ("token_id", "principal", "role", "readonly", "spaces", "state", "created", "expires", "limits"),
        args.json,
    )


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
    print(f"the relay accepts nothing new and exits when its running requests have ended ({running})", file=sys.stderr)


def _print_rows(rows: list[Row], columns: Sequence[str], as_json: bool) -> None:
    if as_json:
        print(printable_json(rows))
        return
    print(table([list(columns), *([_cell(row.get(column)) for column in columns] for row in rows)]))


def _cell(value: Value) -> str:
    if value is None:
        return "-"
    if isinstance(value, dict):
        value = [f"{key}={item}" for key, item in value.items()]
    return ",".join(map(str, value)) or "-" if isinstance(value, list) else str(value) or "-"


COMMANDS: Mapping[str, Callable[[Admin, argparse.Namespace], Awaitable[None]]] = {
    "space create": _space_create,
    "space list": _space_list,
    "space pause": _space_pause,
    "space resume": _space_resume,
    "space delete": _space_delete,
    "token create": _token_create,
    "token list": _token_list,
    "token revoke": _token_revoke,
    "workers": _workers,
    "requests": _requests,
    "drain": _drain,
}
