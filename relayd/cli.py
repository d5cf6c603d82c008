"""The command `relayd`: its arguments and its entry point."""

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from protocol.arguments import CommandParser, add_about, add_filters
from protocol.commands.exit_codes import INTERRUPTED, open_closed_streams


def main(argv: Sequence[str] | None = None) -> int:
    """Run the console script; returns the exit code (docs/design.md §11)."""
    open_closed_streams()
    args = _parser().parse_args(argv)
    try:
        from relayd.commands import run_command  # only now, so that --help stays fast

        return run_command(args)
    except KeyboardInterrupt:
        return INTERRUPTED


def _parser() -> argparse.ArgumentParser:
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--config", type=Path, help="default: ./relayd.toml, else /etc/relayd/relayd.toml")
    common.add_argument(
        "--state-dir", type=Path, help="folder of the store and the socket; default: ~/.local/state/relayd"
    )
    listing = argparse.ArgumentParser(add_help=False, parents=[common])
    listing.add_argument("--json", action="store_true", help="print one JSON array; errors as JSON, too")
    parser = CommandParser(prog="relayd", description="Use a GPU that has no public address.")
    add_about(parser)
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    def add(
        name: str,
        text: str,
        parent: argparse.ArgumentParser = common,
        under: Any = commands,
        arguments: Callable[[argparse.ArgumentParser], None] | None = None,
    ) -> argparse.ArgumentParser:
        last = name.rpartition(" ")[2]
        command = under.add_parser(last, parents=[parent], help=text, description=text, arguments=arguments)
        command.set_defaults(command=name)
        assert isinstance(command, argparse.ArgumentParser)
        return command

    command = add("serve", "run the relay until SIGTERM")
    command.add_argument("--listen", metavar="HOST:PORT", help="default: 127.0.0.1:8765")
    command.add_argument(
        "--wait",
        action="store_true",
        help="while another relay uses the state folder, wait, and take over when it ends",
    )
    add("check-config", "check the configuration and list every fault")
    demo = commands.add_parser("demo", help="speak a sentence through a relay and a worker started for it")
    demo.add_argument("text", nargs="?")
    demo.add_argument("-o", "--output", type=Path, default=Path("hello.wav"))
    demo.add_argument(
        "--talk", action="store_true", help="hold conversations instead: prints the address of a page to talk with"
    )
    demo.add_argument(
        "--keep", action="store_true", help="leave the relay and its workers running, and print how to use them"
    )
    demo.set_defaults(command="demo")

    spaces = commands.add_parser("space", help="create and manage spaces").add_subparsers(metavar="WHAT", required=True)
    add("space create", "create a space", under=spaces, arguments=_space_options)
    add("space change", "change settings of a space; the others stay", under=spaces, arguments=_space_options)
    add_filters(add("space list", "list all spaces", listing, spaces), "space", "state")
    for name, summary in (
        ("pause", "start and accept no new requests in a space"),
        ("resume", "resume a paused space"),
        ("delete", "delete an idle space"),
    ):
        add(f"space {name}", summary, under=spaces).add_argument("name")

    tokens = commands.add_parser("token", help="create and revoke tokens").add_subparsers(metavar="WHAT", required=True)
    add("token create", "create a token and print only the token on stdout", under=tokens, arguments=_token_options)
    token_list = add("token list", "list all tokens, without their secrets", listing, tokens)
    add_filters(token_list, "space", "state", "principal")
    revoke = add("token revoke", "revoke a token and close its connections", under=tokens)
    revoke.add_argument("which", metavar="ID|NAME")

    users = commands.add_parser("user", help="manage the users of the page").add_subparsers(
        metavar="WHAT", required=True
    )
    user = add("user add", "add a user; asks for the password, or reads it from standard input", under=users)
    user.add_argument("name")
    user.add_argument("--role", choices=("client", "operator"), default="client")
    user.add_argument("--no-password", action="store_true", help="the user logs in at a proxy ([users] proxy_header)")
    add("user list", "list the users and the open invitations", listing, users)
    add("user passwd", "set a user's password, as for `add`, and end the user's sessions", under=users).add_argument(
        "name"
    )
    user = add("user role", "set a user's role, and end the user's sessions", under=users)
    user.add_argument("name")
    user.add_argument("role", choices=("client", "operator"))
    user = add("user remove", "remove a user and end the user's sessions, or take back an invitation", under=users)
    user.add_argument("which", metavar="NAME|ID")
    user = add("user invite", "make an invitation for one user, and print only its code on stdout", listing, users)
    user.add_argument("--role", choices=("client", "operator"), default="client")
    user.add_argument("--expires", metavar="WHEN", help="12h, 30d, or a date like 2031-12-31; default: in 7 days")

    add_filters(add("workers", "list the workers of the running relay", listing), "space", "state", "principal")
    requests = add("requests", "list the requests of the running relay, the latest first", listing)
    add_filters(requests, "space", "state", "principal")
    clients = add("clients", "list the connected clients and operators of the running relay", listing)
    add_filters(clients, "principal")
    steering = argparse.ArgumentParser(add_help=False, parents=[common])
    steering.add_argument("--json", action="store_true", help="print one JSON array, and errors as JSON")
    steer = partial(_add_steer, add, commands, steering)
    steer("worker", "drain, cordon and undrain workers", "id, name, or the beginning of an id", _WORKER)
    steer("request", "cancel and promote requests", "id, or its beginning", _REQUEST)
    steer("client", "disconnect clients", "connection id or its beginning, or the principal if it has one", _CLIENT)
    add("drain", "make the running relay finish its running requests and exit")
    return parser


_WORKER = {
    "drain": "let a worker finish what runs, give it no more, and have it leave",
    "cordon": "let a worker finish what runs, and give it no more; it stays connected",
    "undrain": "give a drained or cordoned worker requests again",
}
_REQUEST = {"cancel": "cancel requests", "promote": "put queued requests before all others of their spaces"}
_CLIENT = {"disconnect": "close the connections of clients or operators"}


def _add_steer(
    add: Callable[..., argparse.ArgumentParser],
    commands: Any,
    parent: argparse.ArgumentParser,
    what: str,
    summary: str,
    target: str,
    actions: Mapping[str, str],
) -> None:
    under = commands.add_parser(what, help=summary).add_subparsers(metavar="WHAT", required=True)
    for action, text in actions.items():
        command = add(f"{what} {action}", text, parent, under)
        command.add_argument("targets", nargs="+", metavar="ID", help=f"{target}; several may be given")
        if action in ("drain", "cordon"):
            command.add_argument("--wait", action="store_true", help="return when it runs nothing any more")


def _space_options(create: argparse.ArgumentParser) -> None:
    import attrs

    from relayd.config.rules import parse_annotation
    from relayd.config.schema import SpaceConfig

    create.add_argument("name")
    for field in attrs.fields(SpaceConfig):
        kind, _rule = parse_annotation(field.type)
        parse = kind if kind in (int, float, str) else int if "int" in str(kind) else str
        create.add_argument(f"--{field.name.replace('_', '-')}", type=parse, help=f"default: {field.default}")


def _token_options(create: argparse.ArgumentParser) -> None:
    import attrs

    from protocol.wire.messages import ROLES
    from relayd.store.records import TokenLimits

    create.add_argument("--role", required=True, choices=ROLES)
    create.add_argument("--name", required=True, help="the principal it belongs to")
    create.add_argument(
        "--space", action="append", default=[], metavar="PATTERN", help="spaces it may use; default: all"
    )
    readonly = "it may watch and read results, and change nothing"
    create.add_argument("--readonly", "--read-only", action="store_true", help=readonly)
    create.add_argument("--expires", metavar="WHEN", help="12h, 30d, or a date like 2031-12-31; default: never")
    for field in attrs.fields(TokenLimits):
        setting = f"default: {field.name} of [limits.principal]"
        create.add_argument(f"--{field.name.replace('_', '-')}", type=int, metavar="N", help=setting)


if __name__ == "__main__":
    sys.exit(main())
