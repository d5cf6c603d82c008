"""The `relay` command: its arguments, its exit codes, and how it reports errors."""

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import Any

from protocol.arguments import CommandParser, add_about, add_filters, add_login
from protocol.commands.exit_codes import (
    CANNOT_CONNECT,
    FAILED,
    INTERRUPTED,
    PIPE_CLOSED,
    USAGE,
    Told,
    open_closed_streams,
    silence_stdout,
)
from protocol.commands.progress import Progress
from protocol.wire.errors import ConnectError, LinkError, LoginRefused, ProtocolError, RequestError

EPILOG = """\
environment:
  RELAY_URL         ws://host:port, wss://host, the page's http(s):// address or unix:PATH;
                    default: that of the context in use, else the local relay's socket;
                    or several with commas between them: relays that stand in for each other
  RELAY_TOKEN       the token, or
  RELAY_TOKEN_FILE  a file that contains it
  RELAY_PLAYER      a program that plays the WAV on its standard input, such as "mpv -"
  SSL_CERT_FILE     the certificates to trust with wss://, if not those of the system

The relay and the token come from the options, else from these variables, else from the context in use (relay context).

exit codes: 0 done, 1 failed, 2 wrong usage or configuration, 3 cannot connect, 130 interrupted
"""


def _parser() -> argparse.ArgumentParser:
    parser = CommandParser(
        prog="relay",
        description="Submit requests to a relay and follow them.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_about(parser)
    commands: Any = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    common, output = _common(), _output()

    def add(
        name: str,
        summary: str,
        parents: Sequence[argparse.ArgumentParser] = (),
        arguments: Callable[[argparse.ArgumentParser], None] | None = None,
    ) -> Any:
        return commands.add_parser(
            name, parents=[*parents, common], help=summary, description=summary, arguments=arguments
        )

    say = add("say", "Speak a text: play the speech as it comes, or write it to a file.", [output], _add_submit_options)
    say.add_argument(
        "text",
        nargs="*",
        metavar="TEXT",
        help="text to speak, in one or more words; - reads it from standard input, and speaks while it is written "
        "where the space can",
    )
    say.add_argument(
        "--lines",
        metavar="FILE",
        help="speak each line of a file (-: standard input) into a file of its own, and go on where an earlier run "
        "stopped; a line that is a JSON object has params, and with file the name of its output",
    )
    say.add_argument("--out-dir", metavar="FOLDER", help="where --lines writes 00001.wav, 00002.wav, ...")
    say.add_argument("--suffix", default=".wav", help="of the files of --lines, as for -o (default: %(default)s)")
    say.add_argument(
        "--jobs",
        type=int,
        choices=range(1, 65),
        default=4,
        metavar="N",
        help="lines at once, 1..64 (default: %(default)s)",
    )
    _add_play(say, "where a terminal has a sound card, and -o is not given")
    say.add_argument("--space", default="tts", help="space to submit to (default: %(default)s)")
    talk = add("talk", "Talk: each line is answered, in a conversation that the relay keeps.")
    talk.add_argument(
        "--output", "-o", metavar="FOLDER", help="have the replies spoken, and write each as a WAV into this folder"
    )
    talk.add_argument("--session", metavar="ID", help="go on with a conversation (default: a new one)")
    talk.add_argument("--user", help="whose conversation it is, where a token serves several users")
    talk.add_argument("--instructions", metavar="TEXT", help="what the model is told before the conversation")
    submit = add("submit", "Submit any request; outputs are printed as JSON lines.", [output], _add_submit_options)
    submit.add_argument("--space", required=True, help="space to submit to")
    attach = add("attach", "Follow a request that was submitted before.", [output])
    attach.add_argument("request_id", metavar="ID", help="the request's id, or its beginning")
    _add_play(attach, "no")
    attach.set_defaults(play=False)
    attach.add_argument("--after-seq", type=int, default=-1, metavar="N", help="skip the frames up to number N")
    _add_ids(add("status", "Show the state of requests."))
    cancel = add("cancel", "Cancel requests.")
    _add_ids(cancel)
    cancel.add_argument("--reason", default="", help="reason, reported with the end of the request")
    requests = add("requests", "List your requests, the latest first; as an operator those of all.")
    add_filters(requests, "space", "state", "principal")
    add_filters(add("spaces", "List the spaces."), "space", "state")
    show = add("show", "Show what a space makes and takes: its params with their ranges, and its inputs.")
    show.add_argument("space", metavar="SPACE", help="name of the space")
    voices = add("voices", "List the voices of a space.")
    voices.add_argument("space", metavar="SPACE", help="name of the space")
    context = add("context", "Keep relays by name: a URL and a token each; the one in use is everybody's default.")
    context.add_argument("what", choices=("add", "list", "use", "remove"), help="what to do")
    context.add_argument("name", nargs="?", metavar="NAME", help="name of the context, but for list")
    complete = commands.add_parser("completion", help="Print the completion script of a shell; as --completion.")
    complete.add_argument("shell", choices=("bash", "zsh", "fish"))
    watch = add("watch", "Follow everything that happens (for operators).")
    watch.add_argument(
        "topics",
        nargs="*",
        metavar="TOPIC",
        help="relay, spaces, workers, requests, clients, history, log, audit; or all",
    )
    return parser


def _common() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(add_help=False)
    add_login(parser)
    parser.add_argument(
        "--role", choices=("client", "operator"), help="role to log in with (default: client; watch: operator)"
    )
    parser.add_argument(
        "--json", action="store_true", help="print JSON, errors included; for a request, one line for each message"
    )
    parser.add_argument("--quiet", "-q", action="store_true", help="show errors only, no progress")
    return parser


def _output() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument(
        "--output",
        "-o",
        metavar="FILE",
        help="write audio to this file, by its suffix as WAV, .mp3, .pcm, or with the extra [audio] .opus, .flac or "
        ".aac, video as .ivf, or binary output as it is; - writes raw PCM, or IVF, to standard output (default: "
        "SPACE-ID.wav or .ivf in this directory, created when it arrives)",
    )
    return parser


def _add_play(parser: argparse.ArgumentParser, default: str) -> None:
    parser.add_argument(
        "--play",
        action=argparse.BooleanOptionalAction,
        help="play the speech while it is made: with the program in RELAY_PLAYER, which gets a WAV on its standard "
        "input, the extra [play], or aplay, ffplay or afplay; a file is then written only with -o "
        f"(default: {default})",
    )


def _add_submit_options(parser: argparse.ArgumentParser) -> None:
    from protocol.wire.messages import RETRY_POLICIES

    parser.add_argument(
        "--param",
        "-p",
        action="append",
        default=[],
        type=_pair,
        metavar="KEY=VALUE",
        help="a param; the value is used as text if the space takes text or it is not valid JSON, else parsed as JSON",
    )
    parser.add_argument(
        "--input",
        "-i",
        action="append",
        default=[],
        type=_pair,
        metavar="NAME=PATH",
        help="a file to send as an input; - is standard input, which is sent as it comes where the space takes that "
        "(./- is a file of this name)",
    )
    parser.add_argument(
        "--pipe",
        action="append",
        default=[],
        type=_pair,
        metavar="NAME=ID",
        help="the output of another request as an input, while it is made: its text, its audio as PCM, or its video "
        "as IVF, as the space takes it",
    )
    parser.add_argument(
        "--group", metavar="NAME", help="any name; relay cancel of one request of a group cancels the others, too"
    )
    parser.add_argument("--priority", type=int, choices=range(10), default=5, metavar="0..9", help="higher goes first")
    parser.add_argument(
        "--queue-timeout", type=float, metavar="S", help="give up if it has not started after S seconds"
    )
    parser.add_argument("--run-timeout", type=float, metavar="S", help="give up if it runs for more than S seconds")
    parser.add_argument(
        "--retry",
        choices=RETRY_POLICIES,
        default="before_output",
        help="whether to try again if its worker is lost (default: %(default)s)",
    )
    parser.add_argument(
        "--no-cache", action="store_true", help="have it made, also if the relay keeps the result of an equal request"
    )
    parser.add_argument("--detach", action="store_true", help="print the request's id and do not wait for the result")


def _add_ids(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("request_ids", nargs="+", metavar="ID", help="ids of requests, or their beginnings")


def _pair(argument: str) -> tuple[str, str]:
    name, equals, value = argument.partition("=")
    if not name or not equals:
        raise argparse.ArgumentTypeError(f"{argument!r} is not NAME=VALUE")
    return name, value


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code.

    Args:
        argv: arguments without the program's name; None uses those of the process.
    """
    open_closed_streams()
    parser = _parser()
    args = parser.parse_args(argv)
    if args.command == "completion":
        parser.parse_args(["--completion", args.shell])
    if args.command == "say" and bool(args.text) is (args.lines is not None):
        parser.error("say: TEXT or --lines FILE is required, and not both")
    progress = Progress(sys.stderr, quiet=args.quiet, as_json=args.json)
    try:
        if args.command == "talk":
            from protocol.commands.talk import run_talk

            return run_talk(args, progress)
        if args.command == "context":
            from protocol.commands.context import run_context

            return run_context(args, progress)
        from protocol.commands.commands import (
            run_command,  # after parsing, so that --help does not wait for the import
        )

        return run_command(args, progress)
    except LoginRefused as fault:
        progress.error(f"the relay refused the login: {fault} ({fault.code})", fault.code)
        return CANNOT_CONNECT
    except ConnectError as fault:
        progress.error(str(fault), "cannot_connect")
        return CANNOT_CONNECT
    except RequestError as fault:
        progress.error(
            (fault.message or "ended") + ("" if args.json else f" ({fault.code})"), fault.code, fault.details
        )
        return FAILED
    except Told:
        return FAILED
    except LinkError as fault:
        progress.error(str(fault), "connection_lost")
        return FAILED
    except ProtocolError as fault:
        progress.error(str(fault), fault.code)
        return FAILED
    except BrokenPipeError:
        silence_stdout()
        return PIPE_CLOSED
    except OSError as fault:
        why = f"{fault.filename}: {fault.strerror}" if fault.filename else str(fault.strerror or fault)
        progress.error(why, "system")
        return FAILED if fault.filename is None else USAGE
    except ValueError as fault:
        progress.error(str(fault), "usage", getattr(fault, "details", None))
        return USAGE
    except KeyboardInterrupt:  # a second Ctrl-C, while the first was being handled
        return INTERRUPTED
    except BaseExceptionGroup as group:  # likewise, raised in one of the link's tasks
        if group.split(KeyboardInterrupt)[1] is not None:
            raise
        return INTERRUPTED
    finally:
        progress.close()


if __name__ == "__main__":
    sys.exit(main())
