"""The base classes of the command-line parsers of `relay`, `relayd`, `gpuworker` and `relay-tui`."""

import argparse
from collections.abc import Callable, Sequence
from typing import Any


class CommandParser(argparse.ArgumentParser):
    """A parser whose arguments can be added late: only when its command is the one requested.

    `relayd --help` therefore does not import what the options of `relayd space create` are derived from.

    Args:
        arguments: adds the arguments.
    """

    def __init__(self, *args: Any, arguments: Callable[[argparse.ArgumentParser], None] | None = None, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._late = arguments

    # The signature is that of typeshed's overloads; argparse itself calls it for a command's parser.
    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Like `ArgumentParser.parse_known_args`."""
        if self._late is not None:
            self._late(self)
            self._late = None
        return super().parse_known_args(args, namespace)


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
