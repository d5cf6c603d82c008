import io
import json
import logging
import re
import warnings
from collections.abc import Iterator

import pytest
import structlog

from relayd.auth.tokens import TokenRegistry
from relayd.config.schema import LogConfig
from relayd.logs.setup import get_logger, set_level, set_up_logs

SECRET = TokenRegistry().create(role="worker", name="ann", now=0.0).text


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def _logging_as_it_was() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level, raising = root.handlers[:], root.level, logging.raiseExceptions
    yield
    root.handlers[:] = handlers
    root.setLevel(level)
    logging.raiseExceptions = raising
    logging.captureWarnings(False)
    structlog.reset_defaults()


def lines(stream: io.StringIO) -> list[dict[str, object]]:
    return [json.loads(line) for line in stream.getvalue().splitlines()]


def test_away_from_a_terminal_each_line_is_a_json_object() -> None:
    stream = io.StringIO()
    log = get_logger("relayd.test")
    set_up_logs(LogConfig(), stream)
    log.info("request %s", "accepted", request_id="7", words="语", raw=b"\xff")
    (line,) = lines(stream)
    assert str(line.pop("timestamp")).endswith("Z")
    assert line == {
        "event": "request accepted",
        "level": "info",
        "logger": "relayd.test",
        "request_id": "7",
        "words": "语",
        "raw": "b'\\xff'",
    }


def test_lines_name_their_place_in_the_code_where_that_is_asked_for() -> None:
    stream = io.StringIO()
    set_up_logs(LogConfig(callsite=True), stream)
    get_logger("relayd.x").info("here")
    logging.getLogger("other").warning("there")
    for line in stream.getvalue().splitlines():
        told = json.loads(line)
        assert told["module"] == "test_logs"
        assert told["func_name"].startswith("test_lines_name_their_place")
        assert told["lineno"] > 0


def test_on_a_terminal_lines_are_for_people() -> None:
    stream = Terminal()
    set_up_logs(LogConfig(), stream)
    get_logger("relayd.test").info("it runs", port=8765)
    assert "it runs" in stream.getvalue()
    assert "\x1b[" in stream.getvalue()
    with pytest.raises(json.JSONDecodeError):
        json.loads(stream.getvalue())


@pytest.mark.parametrize(("stream", "form", "is_json"), [(Terminal(), "json", True), (io.StringIO(), "console", False)])
def test_the_format_can_be_said(stream: io.StringIO, form: str, is_json: bool) -> None:
    set_up_logs(_config(form), stream)
    get_logger("x").info("hello")
    assert stream.getvalue().startswith("{") is is_json
    assert "\x1b[" not in stream.getvalue()


def _config(form: object) -> LogConfig:
    return LogConfig(format=form)  # type: ignore[arg-type]


@pytest.mark.parametrize("form", ["json", "console", "plain"])
def test_no_token_leaves_whatever_is_logged(form: str) -> None:
    stream = io.StringIO()
    set_up_logs(_config(form), stream)
    log = get_logger("x")
    log.info(f"got {SECRET}", token=SECRET, nested={"hello": [SECRET]}, raw=SECRET.encode())
    logging.getLogger("python_multipart").warning("header %s", SECRET)
    try:
        raise ValueError(SECRET)
    except ValueError:
        log.exception("failed")
    written = stream.getvalue()
    assert SECRET[6:] not in written
    assert written.count("rly_w_[secret]") >= 6


@pytest.mark.parametrize("form", ["json", "console", "plain"])
def test_other_libraries_logs_and_warnings_go_the_same_way(form: str) -> None:
    stream = io.StringIO()
    set_up_logs(_config(form), stream)
    logging.getLogger("some.library").warning("old %s", "style", extra={"connection_id": "c1"})
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.warn("careful", stacklevel=1)
    first, second = stream.getvalue().splitlines()
    assert all(word in first for word in ("old style", "some.library", "connection_id", "c1"))
    assert "warning" in first.lower()
    assert "careful" in second


def test_the_level_can_be_changed_while_loggers_are_in_use() -> None:
    stream = io.StringIO()
    log = get_logger("x")
    set_up_logs(LogConfig(level="warning"), stream)
    log.info("one")
    set_level("debug")
    log.debug("two")
    logging.getLogger("python_multipart").debug("every message")
    set_level("error")
    log.warning("three")
    assert [line["event"] for line in lines(stream)] == ["two"]


def test_an_exception_is_logged_with_its_traceback_in_one_line_of_json() -> None:
    stream = io.StringIO()
    set_up_logs(LogConfig(), stream)
    try:
        raise ExceptionGroup("two", [ValueError("a"), KeyError("b")])
    except ExceptionGroup:
        get_logger("x").exception("failed", request_id="7")
    (line,) = lines(stream)
    assert line["request_id"] == "7"
    assert "ValueError: a" in str(line["exception"])
    assert "KeyError: 'b'" in str(line["exception"])


def test_plain_lines_are_those_of_other_servers() -> None:
    stream = io.StringIO()
    set_up_logs(_config("plain"), stream)
    log = get_logger("relayd.x")
    log.info("WebSocket connected:", connection_id="user_6", user_id=6, token=SECRET)
    log.warning("nothing more")
    logging.getLogger("y").warning("old %s", "style", extra={"n": 1})
    log.info("one\nline", who="a\n2025-12-29 - x - INFO - forged")
    first, second, third, fourth = stream.getvalue().splitlines()
    known = f"connection_id=user_6, user_id=6, token={SECRET[:6]}[secret]"
    at = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} - "
    assert re.fullmatch(at + re.escape(f"relayd.x - INFO - WebSocket connected: {known}"), first)
    assert re.fullmatch(at + re.escape("relayd.x - WARNING - nothing more"), second)
    assert re.fullmatch(at + re.escape("y - WARNING - old style n=1"), third)
    assert fourth.endswith(r"relayd.x - INFO - one\nline who=a\n2025-12-29 - x - INFO - forged")


def test_a_plain_traceback_is_indented_so_that_it_imitates_no_line() -> None:
    stream = io.StringIO()
    set_up_logs(_config("plain"), stream)
    try:
        raise ValueError("a\n2025-12-29 12:00:00,000 - x - INFO - forged")
    except ValueError:
        get_logger("x").exception("failed", request_id="7")
    first, *others = stream.getvalue().splitlines()
    assert first.endswith("x - ERROR - failed request_id=7")
    assert len(others) > 3
    assert all(line.startswith("  | ") for line in others)


@pytest.mark.parametrize("form", ["console", "plain"])
def test_what_a_peer_sends_cannot_steer_the_terminal(form: str) -> None:
    stream = io.StringIO()
    set_up_logs(_config(form), stream)
    log = get_logger("x")
    evil = "\x1b]0;owned\x07\nFAKE line\x9b31m"
    log.info("hello " + evil, agent=evil, listed=[evil])
    logging.getLogger("y").warning("header %s", evil)
    try:
        raise ValueError(evil)
    except ValueError:
        log.exception("failed")
    written = stream.getvalue()
    assert not {"\x1b", "\x07", "\x9b"} & set(written)
    assert len(written.splitlines()) > 5


def test_setting_up_twice_does_not_log_twice() -> None:
    stream = io.StringIO()
    set_up_logs(LogConfig(), stream)
    set_up_logs(LogConfig(), stream)
    get_logger("x").info("once")
    assert len(lines(stream)) == 1


def test_context_is_in_every_line_of_its_task() -> None:
    stream = io.StringIO()
    set_up_logs(LogConfig(), stream)
    with structlog.contextvars.bound_contextvars(connection_id="c1"):
        get_logger("x").info("inside")
    get_logger("x").info("outside")
    inside, outside = lines(stream)
    assert inside["connection_id"] == "c1"
    assert "connection_id" not in outside
