"""One short storm over real processes; `make chaos` runs a long one."""

from pathlib import Path

import pytest
import trio

from tests.chaos.run import report, run_chaos
from tests.chaos.stage import Settings

#: All of it, on a machine that does other things as well; by itself it takes about 25 s.
PATIENCE_S = 220.0


@pytest.mark.trio
async def test_in_a_storm_of_cuts_and_kills_every_listener_gets_its_samples_and_its_end(tmp_path: Path) -> None:
    settings = Settings(
        seed=20,
        storm_s=10.0,
        spare_relay_s=2.0,
        tls=False,
        clients=5,
        web=2,
        hostile=False,
        burst=20,
        slots=2,
        relay_gap_s=(1.5, 4.0),
        retain_s=300.0,
        wait_retention=False,
    )
    with trio.fail_after(PATIENCE_S):
        ledger = await run_chaos(tmp_path, settings)
    told = report(ledger, settings, tmp_path)
    assert ledger.complaints == [], told
    assert ledger.counts["requests"] > settings.clients, told
    assert ledger.counts["samples compared"] > 100_000, told
    assert {"relay", "worker", "client"} <= {fault.target.split()[0] for fault in ledger.faults}, told
