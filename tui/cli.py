"""The command `relay-tui`: the operator's screen, or with `--once` the overview printed as text."""

import argparse
import os
import sys
from collections.abc import Sequence
from typing import Any

from protocol.arguments import CommandParser, add_about, add_login, fault_line
from protocol.commands.exit_codes import CANNOT_CONNECT, DONE, INTERRUPTED, USAGE, open_closed_streams, silence_stdout
from protocol.install_hint import install_command
from protocol.printable import printable, printable_json
from protocol.wire.errors import LinkError
from tui.themes.choose import NAMES, draws_ascii

#: The scenes of `tui.demo.source`, which is imported only when it is needed.
SCENES = ("busy", "empty", "broken")


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of the console script; returns the exit code (docs/design.md §11)."""
    open_closed_streams()
    args = _parser().parse_args(argv)
    try:
        return _once(args) if args.once or args.json else _live(args)
    except ValueError as fault:
        print(fault_line("relay-tui", printable(str(fault)), "usage", as_json=args.json), file=sys.stderr)
        return USAGE
    except ModuleNotFoundError as missing:
        if missing.name is None or missing.name.partition(".")[0] not in ("textual", "rich"):
            raise
        print(f"relay-tui: the screen is not installed; install it with: {install_command('tui')}", file=sys.stderr)
        return USAGE
    except KeyboardInterrupt:
        return INTERRUPTED


def _once(args: argparse.Namespace) -> int:
    import trio

    from protocol.client.contexts import choose_login
    from tui.print_once import demo_model, describe, fetch_model

    try:
        if args.demo:
            model = demo_model(args.demo)
        else:
            login = choose_login(args.url, args.token_file, args.context)
            model = trio.run(fetch_model, login, args.readonly)
        ascii_only = args.ascii or (sys.stdout.encoding or "").lower().replace("-", "") != "utf8"
        print(printable_json(model) if args.json else describe(model, ascii_only=ascii_only), flush=True)
    except (LinkError, trio.TooSlowError) as fault:
        why = printable(str(fault)) or "the relay did not answer"
        line = fault_line("relay-tui", f"cannot connect: {why}", "cannot_connect", as_json=args.json)
        print(line, file=sys.stderr)
        return CANNOT_CONNECT
    except BrokenPipeError:
        silence_stdout()
    return DONE


def _live(args: argparse.Namespace) -> int:
    import asyncio

    from protocol.client.address import from_environment
    from protocol.client.contexts import choose_login

    # Textual reads from stdin and writes to stderr.
    if not (sys.__stdin__ and sys.__stdin__.isatty() and sys.__stderr__ and sys.__stderr__.isatty()):
        raise ValueError("this is not a terminal; use --once to print the overview")
    if not args.demo:  # report errors in these before the screen appears
        from_environment(choose_login(args.url, args.token_file, args.context).url)
    return asyncio.run(_run(args))


async def _run(args: argparse.Namespace) -> int:
    # Importing Textual takes a third of a second; `--once` does not need it.
    from tui.app import RelayTui
    from tui.demo.source import Demo
    from tui.model.feed import RelaySource, Simulated, Source
    from tui.terminal.driver import RelayDriver

    source: Source = RelaySource(args.url, readonly=args.readonly, token_file=args.token_file, context=args.context)
    if args.demo:
        source = Simulated(Demo(args.demo, readonly=args.readonly))
    app = RelayTui(
        source,
        readonly=args.readonly,
        theme="ansi" if args.thrifty and args.theme == "auto" else args.theme,
        ascii_only=draws_ascii(os.environ) if args.ascii is None else args.ascii,
        rate=0.5 if args.thrifty else 1.0,
        driver_class=RelayDriver,
    )
    app.ending.keep_terminal()
    # Without the mouse, text can be selected as in any terminal, and moving the mouse sends nothing.
    code = 1
    try:
        value = await app.run_async(mouse=False)
        code = value if value is not None else app.return_code or 0
    finally:
        app.ending.begin(code)
        await app.close()
    app.ending.over()
    if app.ending.terminal_gone:
        os._exit(code)  # bytes still buffered for the terminal would raise at interpreter exit
    return code


def _parser() -> argparse.ArgumentParser:
    parser = CommandParser(
        prog="relay-tui", description="Watch and steer a relay: its spaces, workers, requests and clients."
    )
    add_about(parser)
    add_login(parser)
    parser.add_argument("--readonly", action="store_true", help="watch without steering; the relay enforces it")
    parser.add_argument("--once", action="store_true", help="print the overview once and exit")
    parser.add_argument("--json", action="store_true", help="like --once, but print JSON, errors included")
    parser.add_argument("--theme", choices=NAMES, default="auto", help="colours to use; NO_COLOR takes precedence")
    parser.add_argument("--thrifty", action="store_true", help="for a slow line: 16 colours, drawn every 2 s")
    ascii_help = "draw with ASCII characters only; default: as locale and TERM allow"
    parser.add_argument("--ascii", action=argparse.BooleanOptionalAction, help=ascii_help)
    demo: dict[str, Any] = {"nargs": "?", "const": SCENES[0], "choices": SCENES, "metavar": "SCENE"}
    parser.add_argument("--demo", help=f"show a simulated relay: {', '.join(SCENES)}", **demo)
    return parser


if __name__ == "__main__":
    sys.exit(main())
