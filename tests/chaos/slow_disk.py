"""`relayd` with a slow disk: anything answered before its commit is lost by a kill right after the answer.

On a fast disk the commit usually wins that race. `python -m tests.chaos.slow_disk serve ...` is `relayd serve ...`.
At SIGUSR2 it also writes how much its objects occupy into the file `BLOCKS`.
"""

import gc
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

from relayd.cli import main
from relayd.store.base import StoreError
from relayd.store.database import Database, Statement

#: Delay of each transaction before it is written.
DELAY_S = 0.03
#: In its working directory: the number of blocks of memory that Python's objects occupy.
BLOCKS = Path("blocks")
_write = Database.write


def _slow_write(database: Database, statements: Sequence[Statement]) -> StoreError | None:
    time.sleep(DELAY_S * bool(statements))
    return _write(database, statements)


def _count_blocks(number: int, frame: FrameType | None) -> None:
    gc.collect()
    written = BLOCKS.with_suffix(".new")
    written.write_text(str(sys.getallocatedblocks()))
    written.rename(BLOCKS)


if __name__ == "__main__":
    signal.signal(signal.SIGUSR2, _count_blocks)
    Database.write = _slow_write  # type: ignore[method-assign, assignment]
    sys.exit(main())
