"""`relay context`: adds, lists, uses and removes contexts."""

import argparse
import getpass
import os
import sys

from protocol.client.address import read_token
from protocol.client.contexts import Contexts, load_contexts
from protocol.commands.exit_codes import DONE
from protocol.commands.progress import Progress, table
from protocol.printable import printable_json


def run_context(args: argparse.Namespace, progress: Progress) -> int:
    """Run the command; returns its exit code.

    Raises:
        ValueError: what was given is not valid, or the contexts cannot be read.
        OSError: the contexts cannot be written.
    """
    if (args.name is None) is not (args.what == "list"):
        raise ValueError(
            "list takes no name" if args.what == "list" else f"name the context: relay context {args.what} NAME"
        )
    contexts = load_contexts()
    if args.what == "list":
        _list(contexts, as_json=args.json)
        return DONE
    if args.what == "add":
        url = args.url or os.environ.get("RELAY_URL")
        if not url:
            raise ValueError("name the relay: relay context add NAME --url URL")
        contexts.add(args.name, url, _token(args.token_file))
        told = f"context {args.name} added" + (", and in use" if contexts.current == args.name else "")
    elif args.what == "use":
        contexts.find(args.name)
        contexts.current = args.name
        told = f"context {args.name} is in use"
    else:
        contexts.remove(args.name)
        told = f"context {args.name} removed" + ("" if contexts.current else "; none is in use now")
    contexts.save()
    progress.note(told)
    return DONE


def _token(token_file: str | None) -> str | None:
    if token_file:
        return read_token("/dev/stdin" if token_file == "-" else token_file)
    if token := os.environ.get("RELAY_TOKEN"):
        return token
    if sys.stdin.isatty():
        return getpass.getpass("token (empty for none): ").strip() or None
    return None


def _list(contexts: Contexts, *, as_json: bool) -> None:
    rows = [
        {"name": name, "current": name == contexts.current, "url": context.url, "token": context.token is not None}
        for name, context in sorted(contexts.by_name.items())
    ]
    if as_json:
        print(printable_json(rows), flush=True)
        return
    cells = [
        ["*" if row["current"] else "", str(row["name"]), str(row["url"]), "yes" if row["token"] else "no"]
        for row in rows
    ]
    print(table([["", "NAME", "URL", "TOKEN"], *cells]), flush=True)
