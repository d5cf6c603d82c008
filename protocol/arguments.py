"""The base classes of the command-line parsers of `relay`, `relayd`, `gpuworker` and `relay-tui`."""

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

#: Wrong usage, as in `protocol.commands.exit_codes`, which imports more than a parser needs.
USAGE = 2


class CommandParser(argparse.ArgumentParser):
    """A parser whose arguments can be added late: only when its command is the one requested.

    `relayd --help` therefore does not import what the options of `relayd space create` are derived from.

    Args:
        arguments: adds the arguments.
    """

    def __init__(self, *args: Any, arguments: Callable[[argparse.ArgumentParser], None] | None = None, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._late = arguments
        self._as_json = False

    # The signature is that of typeshed's overloads; argparse itself calls it for a command's parser.
    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Like `ArgumentParser.parse_known_args`."""
        self._as_json = "--json" in (sys.argv[1:] if args is None else args)
        self.add_late_arguments()
        return super().parse_known_args(args, namespace)

    def add_late_arguments(self) -> None:
        """Add the arguments that were put off, if they were not added yet."""
        if self._late is not None:
            self._late(self)
            self._late = None

    def error(self, message: str) -> NoReturn:
        """Report wrong usage as `ArgumentParser.error` does, and with `--json` as JSON."""
        if self._as_json:
            self.exit(USAGE, f"{fault_line(self.prog, message, 'usage', as_json=True)}\n")
        super().error(message)


def fault_line(
    program: str, message: str, code: str, details: Mapping[str, Any] | None = None, *, as_json: bool
) -> str:
    """An error as the programs print it on standard error: a sentence, or with `--json` an object on a line.

    Args:
        program: begins the sentence.
        message: what is wrong and what to do, made `printable`.
        code: of the wire, or `usage` or `cannot_connect`.
        details: field -> what is wrong with it.
        as_json: whether `--json` was given.
    """
    if not as_json:
        return f"{program}: {message}"
    from protocol.printable import printable_json  # only now: a parser seldom fails

    return printable_json({"error": {"code": code, "message": message, "details": dict(details or {})}}, str)


def add_login(parser: argparse.ArgumentParser, *more_names: str) -> None:
    """Add `--url`, also by other names, `--token-file` and `--context`, which all four programs have."""
    parser.add_argument(
        *more_names,
        "--url",
        metavar="URL",
        help="the relay: ws://host:port, wss://…, the page's http(s):// address, or unix:PATH, or several with commas "
        "between them "
        "(default: RELAY_URL, else the context in use, else the local socket)",
    )
    parser.add_argument(
        "--token-file",
        metavar="FILE",
        help="file that contains the token (default: RELAY_TOKEN, the file in RELAY_TOKEN_FILE, or the context's)",
    )
    parser.add_argument("--context", metavar="NAME", help="use this context, whatever the environment says")


def add_filters(parser: argparse.ArgumentParser, *names: str) -> None:
    """Add the options that choose what a listing shows: those named of `space`, `state`, `principal`; and `limit`."""
    summaries = {
        "space": ("PATTERN", "only what is of this space, as tts or tts-*; repeatable"),
        "state": ("STATE", "only what is in this state; repeatable"),
        "principal": ("NAME", "only what is of this principal; repeatable"),
    }
    for name in names:
        metavar, summary = summaries[name]
        parser.add_argument(f"--{name}", action="append", metavar=metavar, help=summary)
    parser.add_argument("--limit", type=_at_least_1, metavar="N", help="show at most N")


def _at_least_1(text: str) -> int:
    if not text.isascii() or not text.isdigit() or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 1 on")
    return int(text)


class ShowManual(argparse.Action):
    """Prints the completion script of the shell that is given, or the man page of an option without a value."""

    def __init__(self, option_strings: Sequence[str], dest: str, **more: Any) -> None:
        super().__init__(option_strings, argparse.SUPPRESS, default=argparse.SUPPRESS, **more)

    def __call__(self, parser: argparse.ArgumentParser, _namespace: object, value: Any, _option: object = None) -> None:
        """Print, and exit."""
        from protocol.manual import completion, man_page

        try:
            print(completion(parser, value) if isinstance(value, str) else man_page(parser), end="")
        except ValueError as fault:
            parser.error(str(fault))
        parser.exit()


def add_about(parser: argparse.ArgumentParser) -> None:
    """Add `--version`, `--completion` and `--man`, which all four programs have."""
    parser.add_argument("--version", action=ShowVersion)
    summary = "print the completion script of a shell and exit"
    parser.add_argument("--completion", action=ShowManual, choices=("bash", "zsh", "fish"), help=summary)
    parser.add_argument("--man", action=ShowManual, nargs=0, help="print the man page, in roff, and exit")


class ShowVersion(argparse.Action):
    """Prints the name of the program and the version of relayd, which is looked up only when needed."""

    def __init__(self, option_strings: Sequence[str], dest: str) -> None:
        summary = "show the version and exit"
        super().__init__(option_strings, argparse.SUPPRESS, nargs=0, default=argparse.SUPPRESS, help=summary)

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        """Print the version and exit."""
        from importlib.metadata import version

        print(f"{parser.prog} {version('relayd')}")
        parser.exit()
