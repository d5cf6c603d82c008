"""`python -m tests.chaos`: one long run, with its table on stdout; exit code 1 if a promise was broken."""

import argparse
import sys
import tempfile
from pathlib import Path

import trio

from tests.chaos.processes import clear
from tests.chaos.run import report, run_chaos
from tests.chaos.stage import Settings
from tests.chaos.workload import DICTATED, KINDS, PIPED

#: Fraction of the run, at its end, in which the relay's process is left alone, to see what an old process keeps.
SPARED = 0.1


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=__doc__)
    parser.add_argument("--seed", type=int, default=1, help="seed of all random choices (default: 1)")
    parser.add_argument("--minutes", type=float, default=1.0, help="minutes with faults (default: 1)")
    parser.add_argument("--clients", type=int, default=6, help="concurrent listeners (default: 6)")
    parser.add_argument("--plain", action="store_true", help="no TLS: all peers come over plain TCP")
    parser.add_argument("--slots", type=int, default=3, help="slots of each of the three workers (default: 3)")
    parser.add_argument("--dictated", action="store_true", help="the listeners only dictate: live inputs")
    parser.add_argument("--piped", action="store_true", help="the listeners only speak what other requests put out")
    parser.add_argument("--talking", action="store_true", help="the listeners only hold conversations")
    parser.add_argument("-o", "--output", type=Path, help="also write the table to this file")
    given = parser.parse_args()
    storm_s = given.minutes * 60
    chosen = (*DICTATED * given.dictated, *PIPED * given.piped) or tuple(KINDS)
    settings = Settings(
        seed=given.seed,
        storm_s=storm_s,
        spare_relay_s=storm_s * SPARED,
        tls=not given.plain,
        clients=0 if given.talking else given.clients,
        **({"web": 0, "burst": 0, "talkers": given.clients} if given.talking else {}),
        kinds={kind: KINDS[kind] for kind in chosen},
        slots=given.slots,
    )
    folder = Path(tempfile.mkdtemp(prefix="relayd-chaos-"))
    ledger = trio.run(run_chaos, folder, settings)
    told = report(ledger, settings, folder)
    print(told, flush=True)
    if given.output:
        given.output.write_text(told + "\n")
    if ledger.complaints:
        return 1
    clear(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
