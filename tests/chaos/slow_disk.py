"""`relayd` with a slow disk: anything answered before its commit is lost by a kill right after the answer.

On a fast disk the commit usually wins that race. `python -m tests.chaos.slow_disk serve ...` is `relayd serve ...`.
"""

import sys
import time
from collections.abc import Sequence

from relayd.cli import main
from relayd.store.base import StoreError
from relayd.store.database import Database, Statement

#: Delay of each transaction before it is written.
DELAY_S = 0.03
_write = Database.write


def _slow_write(database: Database, statements: Sequence[Statement]) -> StoreError | None:
    time.sleep(DELAY_S * bool(statements))
    return _write(database, statements)


if __name__ == "__main__":
    Database.write = _slow_write  # type: ignore[method-assign, assignment]
    sys.exit(main())
