"""The `gpuworker` command: `run`, `engines` and `doctor`."""

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from protocol.arguments import CommandParser, add_about, fault_line
from protocol.commands.exit_codes import DONE, INTERRUPTED, USAGE, open_closed_streams, silence_stdout

if TYPE_CHECKING:
    from protocol.wire.validators import Value

ENGINES_SUMMARY = "list the installed engines, their options, and whether they can run here"
RUN_DESCRIPTION = (
    "Register with a relay and run its requests. The first SIGTERM or Ctrl-C lets running requests finish; the second "
    "stops them."
)


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point; exits with the codes of docs/design.md §11."""
    open_closed_streams()
    args = _parser().parse_args(arguments)
    try:
        # Each command imports only what it needs, so that --help and `engines` do not wait for the rest.
        from gpuworker.config import ConfigError

        try:
            code: int = args.command(args)
        except ConfigError as fault:
            line = fault_line("gpuworker", str(fault), "usage", as_json=getattr(args, "json", False))
            print(line, file=sys.stderr)
            code = USAGE
    except KeyboardInterrupt:
        code = INTERRUPTED
    except BrokenPipeError:  # the reader (`| head`) has closed the pipe: write nothing more, not even at exit
        silence_stdout()
        code = DONE
    sys.exit(code)


def _parser() -> argparse.ArgumentParser:
    parser = CommandParser(prog="gpuworker", description="Serve an engine on this machine through a relay.")
    add_about(parser)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def add(
        name: str,
        command: Callable[[argparse.Namespace], int],
        summary: str,
        arguments: Callable[[argparse.ArgumentParser], None],
        description: str | None = None,
    ) -> None:
        parser = commands.add_parser(name, help=summary, description=description, arguments=arguments)
        parser.set_defaults(command=command)

    add("run", _run, "register with a relay and run its requests", _run_options, RUN_DESCRIPTION)
    add("engines", list_engines, ENGINES_SUMMARY, _engines_options)
    add("doctor", _doctor, "check what can run here, and show how to install what is missing", _doctor_options)
    return parser


def _run_options(parser: argparse.ArgumentParser) -> None:
    from gpuworker.config import add_run_options

    add_run_options(parser)


def _engines_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON")


def _doctor_options(parser: argparse.ArgumentParser) -> None:
    from gpuworker.doctor import add_doctor_options

    add_doctor_options(parser)


def _run(args: argparse.Namespace) -> int:
    from gpuworker.config import read_config
    from gpuworker.serving import run_worker

    return run_worker(read_config(args))


def _doctor(args: argparse.Namespace) -> int:
    from gpuworker.doctor import run_doctor

    return run_doctor(args)


# -- engines -----------------------------------------------------------------------------------------------------


def describe_engine(name: str) -> "dict[str, Value]":
    """Describe one engine, as `gpuworker engines --json` lists it."""
    from gpuworker.engines.catalog import EngineNotFound, find_engine

    try:
        engine = find_engine(name)
    except EngineNotFound as fault:
        return {
            "name": name,
            "summary": "",
            "runs_here": False,
            "missing": [{"what": str(fault), "install": ""}],
            "options": {},
        }
    missing = [{"what": lack.what, "install": lack.install} for lack in engine.missing()]
    options = {
        key: {
            "kind": option.kind.__name__,
            "default": option.default,
            "required": option.required,
            "help": option.help,
            **({"choices": list(option.choices)} if option.choices else {}),
        }
        for key, option in engine.OPTIONS.items()
    }
    return {"name": name, "summary": engine.SUMMARY, "runs_here": not missing, "missing": missing, "options": options}


def list_engines(args: argparse.Namespace) -> int:
    """Print the installed engines."""
    from gpuworker.engines.catalog import engine_names

    engines = [describe_engine(name) for name in engine_names()]
    if args.json:
        print(json.dumps(engines, ensure_ascii=False, indent=2))
        return DONE
    for engine in engines:
        print(
            f"{engine['name']:<10} {'runs here' if engine['runs_here'] else 'cannot run here':<16} {engine['summary']}"
        )
        for lack in engine["missing"]:
            print(f"{'':<10} needs {lack['what']}" + (f": {lack['install']}" if lack["install"] else ""))
        for key, option in engine["options"].items():
            default = "" if option["default"] is None else f" (default {option['default']})"
            setting = f"-o {key}={option['kind'].upper()}"
            print(f"{'':<12} {setting:<26} {option['help']}{' (required)' if option['required'] else default}")
    print("An engine with a param text also speaks a text while it is written: live input text (relay say - reads it).")
    return DONE


if __name__ == "__main__":
    main()
