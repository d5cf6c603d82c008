"""The commands of `relayd` that manage spaces, tokens and a running relay, and print the results."""

import argparse
import sys
from collections.abc import Awaitable, Callable, Mapping, Sequence

import attrs
import trio

from protocol.arguments import fault_line
from protocol.commands.exit_codes import CANNOT_CONNECT, DONE, FAILED, USAGE, Told
from protocol.commands.listing import chosen
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
    except Told:
        return FAILED
    except ValueError as fault:
        details, as_json = getattr(fault, "details", {}), getattr(args, "json", False)
        print(fault_line("relayd", printable(str(fault)), "usage", details, as_json=as_json), file=sys.stderr)
        if not as_json:
            for name, what in details.items():
                print("relayd:   " + printable(f"{name}: {what}"), file=sys.stderr)
        return USAGE
    except (AdminError, StoreError) as fault:
        code, word = (CANNOT_CONNECT, "cannot_connect") if isinstance(fault, NotRunning) else (FAILED, "failed")
        as_json = getattr(args, "json", False)
        print(fault_line("relayd", printable(str(fault)), word, as_json=as_json), file=sys.stderr)
        return code
    return DONE


async def _space_create(admin: Admin, args: argparse.Namespace) -> None:
    await admin.create_space(args.name, _settings(args))
    print(f"space {args.name} created", file=sys.stderr)


async def _space_change(admin: Admin, args: argparse.Namespace) -> None:
    if not (options := _settings(args)):
        raise AdminError("nothing to change: name a setting, such as --max-queued 50; see relayd space change --help")
    await admin.change_space(args.name, options)
    print(f"space {args.name} changed", file=sys.stderr)


def _settings(args: argparse.Namespace) -> dict[str, Value]:
    options: dict[str, Value] = {key: getattr(args, key) for key in SpaceConfig.field_names()}
    return {key: value for key, value in options.items() if value is not None}


async def _space_list(admin: Admin, args: argparse.Namespace) -> None:
    rows = chosen(await admin.spaces(), args)
    _print_rows(rows, ("name", "state", "workers", "slots", "busy", "queued", "engine"), args.json)


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
    rows = chosen(await admin.tokens(), args)
    _print_rows(
        rows,
        ("token_id", "principal", "role", "readonly", "spaces", "state", "created", "expires", "limits"),
        args.json,
    )


async def _token_revoke(admin: Admin, args: argparse.Namespace) -> None:
    print(f"revoked {', '.join(await admin.revoke_token(args.which))}", file=sys.stderr)


async def _user_add(admin: Admin, args: argparse.Namespace) -> None:
    password = "" if args.no_password else _read_password(args.name)
    await admin.create_user(args.name, args.role, password)
    print(f"user {args.name} added", file=sys.stderr)


async def _user_list(admin: Admin, args: argparse.Namespace) -> None:
    columns = ("name", "role", "state", "created", "seen", "sessions", "expires", "id")
    _print_rows(await admin.users(), columns, args.json)


async def _user_passwd(admin: Admin, args: argparse.Namespace) -> None:
    await admin.set_user_password(args.name, _read_password(args.name))
    print(f"password of {args.name} set; the user's sessions have ended", file=sys.stderr)


async def _user_role(admin: Admin, args: argparse.Namespace) -> None:
    await admin.set_user_role(args.name, args.role)
    print(f"user {args.name} is a {args.role}; the user's sessions have ended", file=sys.stderr)


async def _user_remove(admin: Admin, args: argparse.Namespace) -> None:
    await admin.remove_user(args.which)
    print(f"{args.which} removed", file=sys.stderr)


async def _user_invite(admin: Admin, args: argparse.Namespace) -> None:
    row = await admin.create_invite(args.role, args.expires)
    if args.json:
        print(printable_json([row]))
        return
    print(f"{row['id']}: for one user, shown once; the link is the page's address with /#invite=CODE", file=sys.stderr)
    print(row["code"])


def _read_password(name: str) -> str:
    """Ask for a password on the terminal, twice; else read a line of standard input.

    Raises:
        AdminError: there is none, or the two differ.
    """
    if not sys.stdin.isatty():
        if password := sys.stdin.readline().rstrip("\r\n"):
            return password
        raise AdminError("no password: type it on a terminal, or give it as a line on standard input")
    import getpass

    password = getpass.getpass(f"password for {name}: ")
    if password != getpass.getpass("again: "):
        raise AdminError("the two passwords differ; nothing was changed")
    return password


async def _workers(admin: Admin, args: argparse.Namespace) -> None:
    columns = ("worker_id", "state", "spaces", "engine", "slots", "busy", "rtt_ms", "peer", "principal")
    _print_rows(chosen(await admin.rows("workers"), args), columns, args.json)


async def _requests(admin: Admin, args: argparse.Namespace) -> None:
    columns = ("request_id", "state", "space", "principal", "attempt", "age_s", "audio_s", "worker_id", "code")
    rows = sorted(await admin.rows("requests"), key=lambda row: -float(row.get("created_at") or 0))
    _print_rows(chosen(rows, args), columns, args.json)


async def _drain(admin: Admin, args: argparse.Namespace) -> None:
    running = await admin.drain()
    print(f"the relay accepts nothing new and exits when its running requests have ended ({running})", file=sys.stderr)


async def _clients(admin: Admin, args: argparse.Namespace) -> None:
    columns = ("connection_id", "principal", "role", "agent", "peer", "requests", "readers", "pending_bytes")
    _print_rows(chosen(await admin.rows("clients"), args), columns, args.json)


#: Command -> the steer that it sends, the topic of its targets, and what is said of each.
STEERS = {
    "worker drain": ("drain_worker", "workers", "finishes what runs, takes no more and leaves"),
    "worker cordon": ("cordon_worker", "workers", "finishes what runs, takes no more and stays"),
    "worker undrain": ("undrain_worker", "workers", "takes requests again"),
    "request cancel": ("cancel", "requests", "is cancelled"),
    "request promote": ("promote", "requests", "is the first of its queue"),
    "client disconnect": ("disconnect", "clients", "is disconnected; it may come back by itself"),
}


async def _steer(admin: Admin, args: argparse.Namespace) -> None:
    """Carry out an action on each of its targets, also when one is refused; not before all of them are clear."""
    action, topic, effect = STEERS[args.command]
    targets = list(dict.fromkeys([await admin.find(topic, given) for given in args.targets]))
    answers: list[Row] = []
    done: list[str] = []
    for target in targets:
        try:
            answers.append({"action": action, "target": target, "done": True, **await admin.steer(action, target)})
            done.append(target)
            if not args.json:
                print(printable(f"{topic.removesuffix('s')} {target} {effect}"), file=sys.stderr)
        except NotRunning:
            raise
        except AdminError as fault:
            answers.append({"action": action, "target": target, "done": False, "message": str(fault)})
            if not args.json:
                print(fault_line("relayd", printable(str(fault)), "failed", as_json=False), file=sys.stderr)
    if getattr(args, "wait", False):
        await admin.wait_idle(done)
    if args.json:
        print(printable_json(answers))
    if len(done) < len(targets):
        raise Told


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
    "space change": _space_change,
    "space list": _space_list,
    "space pause": _space_pause,
    "space resume": _space_resume,
    "space delete": _space_delete,
    "token create": _token_create,
    "token list": _token_list,
    "token revoke": _token_revoke,
    "user add": _user_add,
    "user list": _user_list,
    "user passwd": _user_passwd,
    "user role": _user_role,
    "user remove": _user_remove,
    "user invite": _user_invite,
    "workers": _workers,
    "requests": _requests,
    "clients": _clients,
    "drain": _drain,
    **dict.fromkeys(STEERS, _steer),
}
