"""Relays of a few lines, to stand beside the real one: no logs, codec, accounting, limits or resume.

In each of them a message that comes in on `/in` goes to the connections on `/out/ID` whose ID stands at `ROUTE` in it.
It is the cheapest relay that its library allows, not a good one: where a send is awaited, one reader that does not read
holds up a whole worker. `--ping S` has it look after idle connections as its library does that.
"""

import argparse
import json


def ping_interval_s() -> float | None:
    """What `--ping` says; None for none."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--ping", type=float, default=None)
    given: float | None = parser.parse_args().ping
    return given


def told_to_listen(port: int) -> None:
    """Say so, as relayd's log does."""
    print(json.dumps({"event": "listening", "urls": [f"ws://127.0.0.1:{port}"]}), flush=True)
