"""What holds for all tests."""

import signal
from collections.abc import Generator

import pytest

# A shell that runs the tests in the background has them, and what they start, ignore Ctrl+C; some tests send it.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Half a character in what a test logs, which some do on purpose, cannot go from one process to another."""
    report = yield
    report.sections = [(name, text.encode(errors="backslashreplace").decode()) for name, text in report.sections]
    return report
