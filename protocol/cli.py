"""The `relay` command: its arguments, its exit codes, and how faults are told."""

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from protocol.arguments import CommandParser, ShowVersion
from protocol.commands.exit_codes import CANNOT_CONNECT, FAILED, INTERRUPTED, PIPE_CLOSED, USAGE, silence_stdout
from protocol.commands.progress import Progress
from protocol.wire.errors import ConnectError, LinkError, LoginRefused, ProtocolError, RequestError

EPILOG = """\
environment:
  RELAY_URL         ws://host:port, wss://host or unix:PATH; the local relay's socket where unset
  RELAY_TOKEN       the token, or
  RELAY_TOKEN_FILE  a file that holds it

exit codes: 0 done, 1 failed, 2 wrong use or config, 3 cannot connect, 130 interrupted
"""


def _parser() -> argparse.ArgumentParser:
    parser = CommandParser(
        prog="relay",
        description="Submit requests to a relay and follow them.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action=ShowVersion)
    commands: Any = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    common, output = _common(), _output()

    def add(
        name: str,
        words: str,
        parents: Sequence[argparse.ArgumentParser] = (),
        arguments: Callable[[argparse.ArgumentParser], None] | None = None,
    ) -> Any:
        return commands.add_parser(name, parents=[*parents, common], help=words, description=words, arguments=arguments)

    say = add("say", "Speak a text and write the speech to a file as it arrives.", [output], _add_making)
    say.add_argument("text", metavar="TEXT", help="what to speak; - reads it from standard input")
    say.add_argument("--space", default="tts", help="the space that speaks (default: %(default)s)")
    submit = add("submit", "Submit any request; outputs are printed as JSON lines.", [output], _add_making)
    submit.add_argument("--space", required=True, help="the space to submit to")
    attach = add("attach", "Follow a request that was submitted before.", [output])
    _add_id(attach)
    attach.add_argument("--after-seq", type=int, default=-1, metavar="N", help="leave out the frames up to number N")
    _add_id(add("status", "Show how a request stands."))
    cancel = add("cancel", "Cancel a request.")
    _add_id(cancel)
    cancel.add_argument("--reason", default="", help="why, for whoever reads of it")
    add("spaces", "List the spaces.")
    watch = add("watch", "Follow everything that happens (operators).")
    watch.add_argument(
        "topics",
        nargs="*",
        metavar="TOPIC",
        help="relay, spaces, workers, requests, clients, history, log, audit; or all",
    )
    return parser


def _common() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--url", help="where the relay is (default: $RELAY_URL, else the local socket)")
    parser.add_argument("--token-file", metavar="FILE", help="file that holds the token (default: $RELAY_TOKEN...)")
    parser.add_argument("--role", choices=("client", "operator"), help="log in as (default: client; watch: operator)")
    parser.add_argument("--json", action="store_true", help="print JSON; of a request, one line for each message")
    parser.add_argument("--quiet", "-q", action="store_true", help="no progress, only faults")
    return parser


def _output() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument(
        "--output",
        "-o",
        metavar="FILE",
        help="write audio here as WAV, or binary output as it is; - is raw PCM on standard output "
        "(default: SPACE-ID.wav in this directory, once there is audio)",
    )
    return parser


def _add_making(parser: argparse.ArgumentParser) -> None:
    from protocol.wire.messages import RETRY_POLICIES

    parser.add_argument(
        "--param", "-p", action="append", default=[], type=_param, metavar="KEY=VALUE", help="JSON where it parses"
    )
    parser.add_argument(
        "--input", "-i", action="append", default=[], type=_pair, metavar="NAME=PATH", help="a file to send along"
    )
    parser.add_argument("--priority", type=int, choices=range(10), default=5, metavar="0..9", help="higher goes first")
    parser.add_argument("--queue-timeout", type=float, metavar="S", help="give up when it has not started after this")
    parser.add_argument("--run-timeout", type=float, metavar="S", help="give up when it runs for longer")
    parser.add_argument(
        "--retry",
        choices=RETRY_POLICIES,
        default="before_output",
        help="when its worker is lost (default: %(default)s)",
    )
    parser.add_argument("--detach", action="store_true", help="print the request's id and leave it to itself")


def _add_id(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("request_id", metavar="ID", help="the request's id")


def _pair(argument: str) -> tuple[str, str]:
    name, equals, value = argument.partition("=")
    if not name or not equals:
        raise argparse.ArgumentTypeError(f"{argument!r} is not NAME=VALUE")
    return name, value


def _param(argument: str) -> tuple[str, Any]:
    name, value = _pair(argument)
    try:
        return name, json.loads(value, parse_constant=_no_constant)
    except ValueError:
        return name, value


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code.

    Args:
        argv: arguments without the program's name; None takes those of the process.
    """
    args = _parser().parse_args(argv)
    progress = Progress(sys.stderr, quiet=args.quiet)
    try:
        from protocol.commands.commands import (
            run_command,  # after the arguments: whoever asks for help need not wait for it
        )

        return run_command(args, progress)
    except LoginRefused as fault:
        progress.error(f"the relay refused the login: {fault} ({fault.code})")
        return CANNOT_CONNECT
    except ConnectError as fault:
        progress.error(str(fault))
        return CANNOT_CONNECT
    except RequestError as fault:
        progress.error(f"{fault.message or 'ended'} ({fault.code})")
        for field, what in fault.details.items():
            progress.error(f"  {field or 'params'}: {what}")
        return FAILED
    except (LinkError, ProtocolError) as fault:
        progress.error(str(fault))
        return FAILED
    except BrokenPipeError:
        silence_stdout()
        return PIPE_CLOSED
    except OSError as fault:
        progress.error(f"{fault.filename}: {fault.strerror}" if fault.filename else str(fault.strerror or fault))
        return FAILED if fault.filename is None else USAGE
    except ValueError as fault:
        progress.error(str(fault))
        return USAGE
    except KeyboardInterrupt:  # a second one, while the first was being obeyed
        return INTERRUPTED
    except BaseExceptionGroup as group:  # the same, where it hit one of the link's tasks
        if group.split(KeyboardInterrupt)[1] is not None:
            raise
        return INTERRUPTED
    finally:
        progress.close()


if __name__ == "__main__":
    sys.exit(main())
