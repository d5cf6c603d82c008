"""What is made of a program's parser: completion for shells, and a man page."""

import argparse
import re
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any

from protocol.arguments import CommandParser
from protocol.install_hint import install_command


def completion(parser: argparse.ArgumentParser, shell: str) -> str:
    """Return the script that completes the program's commands and options in a shell.

    Raises:
        ValueError: the package shtab is not installed.
    """
    try:
        import shtab
    except ImportError:
        what = f"completion needs the package shtab, of the extra [completion] ({install_command('completion')})"
        raise ValueError(what) from None
    for each in _parsers(parser):
        for action in each._actions:
            if action.metavar in ("FILE", "FOLDER", "PATH"):
                action.complete = shtab.FILE if action.metavar != "FOLDER" else shtab.DIRECTORY  # type: ignore[attr-defined]
    return str(shtab.complete(parser, shell))


def man_page(parser: argparse.ArgumentParser) -> str:
    """Return the program's man page, in roff: its commands, their arguments and options."""
    from importlib.metadata import version

    name, today = parser.prog, datetime.now(UTC).date()
    lines = [
        f'.TH {name.upper()} 1 {today} "relayd {version("relayd")}"',
        *(".SH NAME", f"{name} \\- {_roff(parser.description or name).rstrip('.')}"),
        *(".SH SYNOPSIS", f".B {name}", "[\\fIOPTION\\fR]... \\fICOMMAND\\fR [\\fIARGUMENT\\fR]..."),
    ]
    own = list(_described(parser))
    lines += [".SH OPTIONS", *own] if own else []
    commands = [each for each in _parsers(parser) if each is not parser]
    if commands:
        lines.append(".SH COMMANDS")
    for each in commands:
        if any(isinstance(action, argparse._SubParsersAction) for action in each._actions):
            continue
        lines += [f".SS {_roff(each.prog.removeprefix(f'{name} '))}", _roff(each.description or ""), *_described(each)]
    if parser.epilog:
        lines += [".SH ENVIRONMENT AND EXIT CODES", ".nf", *map(_roff, parser.epilog.splitlines()), ".fi"]
    return "\n".join(line for line in lines if line) + "\n"


def _parsers(parser: argparse.ArgumentParser) -> Iterator[argparse.ArgumentParser]:
    """The parser and those of its commands, with all of their arguments."""
    if isinstance(parser, CommandParser):
        parser.add_late_arguments()
    yield parser
    seen: set[int] = set()
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for each in action.choices.values():
                if id(each) not in seen:
                    seen.add(id(each))
                    yield from _parsers(each)


def _described(parser: argparse.ArgumentParser) -> Iterator[str]:
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction) or action.help == argparse.SUPPRESS:
            continue
        value = "" if action.nargs == 0 else f" \\fI{_roff(_metavar(action))}\\fR"
        names = [f"\\fB{_roff(each)}\\fR" for each in action.option_strings]
        text = _expanded(parser, action)
        yield from (".TP", (", ".join(names) + value).strip(), _roff(text) or "\\&")


def _metavar(action: argparse.Action) -> str:
    if action.metavar is not None:
        return action.metavar if isinstance(action.metavar, str) else " ".join(action.metavar)
    return "|".join(map(str, action.choices)) if action.choices else action.dest.upper()


def _expanded(parser: argparse.ArgumentParser, action: argparse.Action) -> str:
    """The help of an option, with its default where it says so."""
    fields: dict[str, Any] = {**vars(action), "prog": parser.prog}
    return (action.help or "") % fields


def _roff(text: str) -> str:
    r"""Text that roff shows as it is: `\` and `-` are escaped, and a line may not begin with `.` or `'`."""
    text = text.replace("\\", "\\e").replace("-", "\\-")
    return re.sub(r"^(?=[.'])", r"\\&", text)
