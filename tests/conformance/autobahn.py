"""`python -m tests.conformance.autobahn`: the Autobahn test suite's fuzzing client against the relay's echo.

The suite is Python 2.7 and not part of the set-up; README.md beside this file says how to install it. Its cases of
compression (12 and 13) are left out: the relay speaks no extension.
"""

import argparse
import collections
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

HOW_TO_GET_IT = (
    "no wstest here: install the suite as tests/conformance/README.md says, and name its wstest with --wstest"
)
#: What a case may come to. NON-STRICT: right, but a message that came before the fault was not answered any more.
PASSED = ("OK", "NON-STRICT", "INFORMATIONAL", "UNIMPLEMENTED")
AGENT = "relayd"


@contextmanager
def open_echo() -> Iterator[str]:
    """The URL of an echo of our own."""
    command = [sys.executable, "-m", "tests.conformance.echo_server", "--listen", "127.0.0.1:0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as echo:
        assert echo.stdout is not None
        try:
            yield echo.stdout.readline().removeprefix("listening ").strip()
        finally:
            echo.terminate()


def hold(wstest: str, url: str, cases: list[str], reports: Path) -> Mapping[str, Mapping[str, Any]]:
    """Run the suite.

    Args:
        wstest: its program.
        url: of the server to test.
        cases: `*`, or such as `6.*` and `7.1.1`.
        reports: a folder for its pages.

    Returns:
        Case -> what it says of it.

    Raises:
        subprocess.CalledProcessError: it did not get to the end.
    """
    spec = reports / "spec.json"
    servers = [{"agent": AGENT, "url": url, "options": {"version": 18}}]
    asked = {"outdir": str(reports), "servers": servers, "cases": cases, "exclude-cases": ["12.*", "13.*"]}
    spec.write_text(json.dumps(asked | {"exclude-agent-cases": {}}))
    with (reports / "wstest.log").open("wb") as log:
        command = [wstest, "--mode", "fuzzingclient", "--spec", str(spec)]
        subprocess.run(command, check=True, stdout=log, stderr=subprocess.STDOUT)
    told: Mapping[str, Mapping[str, Any]] = json.loads((reports / "index.json").read_text())[AGENT]
    return told


def main() -> int:
    """The command: 0 where no case failed, 1 where one did, 2 where the suite is not there."""
    parser = argparse.ArgumentParser(prog="python -m tests.conformance.autobahn", description=__doc__)
    parser.add_argument("--wstest", default=shutil.which("wstest"), metavar="PATH", help="the suite's program")
    parser.add_argument("--url", help="a server to test in place of an echo of our own: ws://127.0.0.1:PORT")
    parser.add_argument("--reports", metavar="DIR", help="keep the suite's pages there; index.html is the first")
    parser.add_argument("cases", nargs="*", default=["*"], help="such as '6.*' or 7.1.1; all by default")
    options = parser.parse_args()
    if options.wstest is None or shutil.which(options.wstest) is None:
        print(HOW_TO_GET_IT, file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory() as folder:
        reports = Path(options.reports or folder).absolute()
        reports.mkdir(parents=True, exist_ok=True)
        if options.url:
            told = hold(options.wstest, options.url, options.cases, reports)
        else:
            with open_echo() as url:
                told = hold(options.wstest, url, options.cases, reports)
    came_to: dict[str, list[str]] = collections.defaultdict(list)
    for case, one in told.items():
        bad = [word for word in (one["behavior"], one["behaviorClose"]) if word not in PASSED]
        came_to[bad[0] if bad else one["behavior"]].append(case)
    print(f"{len(told)} cases:", ", ".join(f"{len(cases)} {word}" for word, cases in came_to.items()))
    for word, cases in came_to.items():
        if word != "OK":
            print(f"{word}:", ", ".join(cases))
    return 0 if told and all(word in PASSED for word in came_to) else 1


if __name__ == "__main__":
    sys.exit(main())
