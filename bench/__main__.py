"""`python -m bench [FIGURE]...`: measures, and prints a table or JSON."""

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from bench import cached, codec, face, store, talk, tenants, webrtc, worker
from bench.figures import Row, table, verdict
from bench.machine import machine_line
from bench.relay import idle, relay
from bench.relay.servers import Checkout, peers_line

#: Name -> function that measures it. A new figure is a module with `measure`, and a line here.
FIGURES: dict[str, Callable[[], list[Row]]] = {
    "relay": relay.measure,
    "idle": idle.measure,
    "worker": worker.measure,
    "codec": codec.measure,
    "store": store.measure,
    "tenants": tenants.measure,
    "cached": cached.measure,
    "talk": talk.measure,
    "webrtc": webrtc.measure,
    "face": face.measure,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 1 if a figure exceeds a limit claimed in the documents."""
    argv = sys.argv[1:] if argv is None else list(argv)
    if argv[:1] == ["voxcpm"]:
        # A command of its own, because it takes many minutes and needs torch and the real voxcpm package.
        from bench.voxcpm import batch, gpu

        if "--batch" in argv:
            return batch.main([argument for argument in argv[1:] if argument != "--batch"])
        return gpu.main(argv[1:])
    parser = argparse.ArgumentParser(prog="python -m bench", description="Measure this machine, as ratios.")
    parser.add_argument(
        "figures",
        nargs="*",
        metavar="FIGURE",
        help=f"what to measure, of {', '.join(FIGURES)} (default: all). Or: voxcpm --help",
    )
    parser.add_argument(
        "--quick", action="store_true", help="for `relay`, only the figures with a promised limit: about a minute"
    )
    parser.add_argument(
        "--part",
        action="append",
        choices=(*relay.PARTS, "tenants"),
        help="with --quick: measure only this part; repeatable",
    )
    parser.add_argument("--list", action="store_true", help="list the figures without measuring")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the table")
    parser.add_argument("--save", action="store_true", help="also write to bench/results/DATE-COMMIT.md")
    parser.add_argument("-o", "--output", type=Path, help="also write to this file")
    args = parser.parse_args(argv)
    if unknown := [name for name in args.figures if name not in FIGURES]:
        parser.error(f"there is no figure {', '.join(unknown)}; available: {', '.join(FIGURES)}")
    if args.list:
        for name, measure in FIGURES.items():
            print(f"{name:8} {(sys.modules[measure.__module__].__doc__ or '').splitlines()[0]}")
        return 0
    machine, peers, began, rows = machine_line(), peers_line(), time.monotonic(), []
    figures, broken = dict(FIGURES), False
    parts = args.part or relay.PARTS
    if args.quick or args.part:
        figures["relay"] = lambda: relay.measure_quick([part for part in parts if part != "tenants"])
    named = args.figures
    if not named and (args.quick or args.part):
        named = [name for name in ("relay", "tenants") if name in parts or (name == "relay" and parts != ["tenants"])]
    for name in named or figures:
        print(f"measuring {name}...", file=sys.stderr, flush=True)
        try:
            rows += figures[name]()
        except RuntimeError as fault:  # no compiler, or a relay that does not start: measure the other figures
            print(f"{name}: {fault}", file=sys.stderr, flush=True)
            broken = True
    took_s = round(time.monotonic() - began)
    if args.json:
        report = {"machine": machine, "peers": peers, "date": _today(), "took_s": took_s}
        report["rows"] = [row.to_map() for row in rows]
        text = json.dumps(report, ensure_ascii=False, indent=1)
    else:
        text = "\n\n".join(filter(None, [machine, peers, table(rows), verdict(rows), f"{_today()}, {took_s} s."]))
    print(text)
    for path in filter(None, [args.output, _result() if args.save else None]):
        path.write_text(f"{text}\n")
    return 1 if broken or not all(row.kept for row in rows) else 0


def _result() -> Path:
    commit = Checkout.wanted().commit.replace("+", "-changed")
    return Path(__file__).with_name("results") / f"{_today()}-{commit or 'bench'}.md"


def _today() -> str:
    return time.strftime("%Y-%m-%d", time.gmtime())


if __name__ == "__main__":
    sys.exit(main())
