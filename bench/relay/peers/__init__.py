"""Minimal relays to compare with the real one: no logs, codec, accounting, limits or resume.

Each forwards a message received on `/in` to the connections on `/out/ID` whose ID is at `ROUTE` in the message. It is
the cheapest relay that its library allows, not a good one: if it awaits a send, one reader that does not read holds up
a whole worker. With `--ping S`, it checks idle connections in the way its library provides.
"""

import argparse
import json


def ping_interval_s() -> float | None:
    """The value of `--ping`, or None."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--ping", type=float, default=None)
    interval_s: float | None = parser.parse_args().ping
    return interval_s


def announce_listening(port: int) -> None:
    """Print the port in the format of relayd's log."""
    print(json.dumps({"event": "listening", "urls": [f"ws://127.0.0.1:{port}"]}), flush=True)
