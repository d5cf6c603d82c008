"""The command `relay-tui`. So far it prints one picture of the relay; the live screen comes with Part 4."""

import argparse
import sys
from collections.abc import Sequence

import trio

from protocol.client import open_relay
from protocol.errors import LinkError
from protocol.exits import CANNOT_CONNECT, DONE, INTERRUPTED, USAGE, quiet_stdout
from protocol.fields import Value
from protocol.messages import Snapshot
from protocol.terminal import printable, printable_json

#: For the relay to tell all it knows.
ANSWER_S = 10.0

Picture = dict[str, list[dict[str, Value]]]


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of the console script; returns the exit code (DESIGN §11)."""
    args = _parser().parse_args(argv)
    if not args.once:
        print("relay-tui: the live screen is not part of this version; --once prints one picture", file=sys.stderr)
        return USAGE
    try:
        picture = trio.run(take_picture, args.url, args.readonly)
        print(printable_json(picture) if args.json else describe(picture), flush=True)
    except ValueError as fault:
        print(f"relay-tui: {printable(str(fault))}", file=sys.stderr)
        return USAGE
    except (LinkError, trio.TooSlowError) as fault:
        why = printable(str(fault)) or "the relay did not answer"
        print(f"relay-tui: cannot connect: {why}", file=sys.stderr)
        return CANNOT_CONNECT
    except BrokenPipeError:
        quiet_stdout()
    except KeyboardInterrupt:
        return INTERRUPTED
    return DONE


async def take_picture(url: str | None, readonly: bool) -> Picture:
    """All that the relay tells an operator, topic -> rows.

    Raises:
        LinkError: the relay cannot be reached, or went away.
        trio.TooSlowError: it did not answer within `ANSWER_S`.
    """
    with trio.fail_after(ANSWER_S):
        async with (
            open_relay(url, role="operator", agent="relay-tui", readonly=readonly) as relay,
            relay.watch() as watch,
        ):
            async for change in watch:
                if isinstance(change, Snapshot):
                    return dict(change.data)
    raise LinkError("the relay ended the watch")


def describe(picture: Picture) -> str:
    """The picture as lines of text."""
    lines = [
        f"relay {row['state']}, up {row['uptime_s']:.0f} s, "
        f"{row['workers']} workers, {row['queued']} queued, {row['running']} running"
        for row in picture.get("relay", [])
    ]
    for row in picture.get("spaces", []):
        busy = f"{row['busy']}/{row['slots']} slots busy, {row['queued']} queued"
        lines.append(f"space {row['name']}: {row['state']}, {busy}, {row['failed']} failed")
    if not picture.get("workers"):
        lines.append("no worker has registered yet: run gpuworker run --relay URL --space NAME")
    lines += [
        f"worker {row['worker_id']}: {row['state']}, {row['engine']}, {','.join(row['spaces'])}"
        for row in picture.get("workers", [])
    ]
    for row in picture.get("requests", []):
        audio = "" if row["audio_s"] is None else f", {row['audio_s']:.1f} s of audio"
        lines.append(f"request {row['request_id']}: {row['state']} in {row['space']}, {row['age_s']:.1f} s{audio}")
    return "\n".join(map(printable, lines))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="relay-tui", description="See a relay's spaces, workers and requests.")
    parser.add_argument("--url", help="ws://host:port or unix:PATH; default: RELAY_URL, else the local socket")
    parser.add_argument("--readonly", action="store_true", help="look and never steer; the relay holds it to that")
    parser.add_argument("--once", action="store_true", help="print one picture and leave")
    parser.add_argument("--json", action="store_true", help="with --once: as JSON")
    return parser


if __name__ == "__main__":
    sys.exit(main())
