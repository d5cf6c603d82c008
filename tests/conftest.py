"""What holds for all tests."""

import asyncio
import functools
import gc
import inspect
import signal
import threading
from collections.abc import Awaitable, Callable, Generator
from typing import Any

import hypothesis
import pytest
import trio

# How long an example takes is that of the machine. `make mutants` has a profile of its own.
if hypothesis.settings.get_current_profile_name() == "default":
    slow = [hypothesis.HealthCheck.too_slow]
    hypothesis.settings.register_profile("any machine", deadline=None, suppress_health_check=slow)
    hypothesis.settings.load_profile("any machine")

# A shell that runs the tests in the background has them, and what they start, ignore Ctrl+C; some tests send it.
signal.signal(signal.SIGINT, signal.default_int_handler)

Test = Callable[..., Awaitable[None]]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addini("async_limit_s", "real time after which an asynchronous test fails, with the lines at which it waits")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Limit asynchronous tests; whatever else hangs, `faulthandler_timeout` ends its process."""
    limit_s = float(config.getini("async_limit_s"))
    for item in items:
        if isinstance(item, pytest.Function) and inspect.iscoroutinefunction(item.obj):
            item.obj = (_limited_trio if item.get_closest_marker("trio") else _limited_asyncio)(item.obj, limit_s)


@pytest.fixture(scope="module", autouse=True)
def _what_stays_is_collected_once() -> None:
    """Collect garbage among what is new only: all tests and modules together take a second each time, in mid-test."""
    gc.collect()
    gc.freeze()


def _limited_asyncio(test: Test, limit_s: float) -> Test:
    @functools.wraps(test)
    async def limited(**fixtures: Any) -> None:
        async with asyncio.timeout(limit_s):
            await test(**fixtures)

    return limited


def _limited_trio(test: Test, limit_s: float) -> Test:
    """A thread's timer, as the test's own clock may be a mock."""

    @functools.wraps(test)
    async def limited(**fixtures: Any) -> None:
        with trio.CancelScope() as scope:
            timer = threading.Timer(limit_s, trio.lowlevel.current_trio_token().run_sync_soon, [scope.cancel])
            timer.daemon = True
            timer.start()
            try:
                await test(**fixtures)
            except BaseException as hung:
                if scope.cancel_called:
                    raise TimeoutError(f"the test took longer than {limit_s:g} s") from hung
                raise
            finally:
                timer.cancel()

    return limited


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Half a character in what a test logs, which some do on purpose, cannot go from one process to another."""
    report = yield
    report.sections = [(name, text.encode(errors="backslashreplace").decode()) for name, text in report.sections]
    return report
