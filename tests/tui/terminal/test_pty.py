"""The screen in a real terminal: how much it sends, and how it ends."""

import os
import signal
import termios
import time

import pyte
import pytest

from tests.tui.pty import START_S, PtyProcess, on_a_pty
from tui.terminal.exit_guard import EXIT_OF

DEMO = ["-m", "tui.cli", "--demo"]
#: Patience, not a promise: a loaded machine takes long to put Python down.
ENDS_S = 20.0
#: Long enough for several draws at 1 Hz.
LOOK_S = 5.0
IGNORABLE = (signal.SIGHUP, signal.SIGTERM, signal.SIGINT, signal.SIGPIPE, signal.SIGQUIT)


def settled(terminal: PtyProcess, text: str = "overview") -> None:
    """Shown, and done with what it has to say at first."""
    terminal.read_until(text)
    terminal.read_for(1.5)


def test_an_idle_relay_sends_nothing() -> None:
    with on_a_pty([*DEMO, "empty"]) as terminal:
        settled(terminal)
        assert terminal.read_for(LOOK_S) == b""


@pytest.mark.parametrize(("columns", "lines", "most_bytes_s"), [(80, 24, 4_000), (120, 40, 8_000)])
def test_a_busy_relay_stays_within_its_bytes(columns: int, lines: int, most_bytes_s: int) -> None:
    with on_a_pty([*DEMO, "busy"], columns=columns, lines=lines) as terminal:
        settled(terminal)
        sent = terminal.read_for(LOOK_S)
        assert 0 < len(sent) / LOOK_S <= most_bytes_s


@pytest.mark.parametrize("ignored", [(), IGNORABLE])
def test_it_ends_when_the_terminal_goes_away(ignored: tuple[signal.Signals, ...]) -> None:
    with on_a_pty(DEMO, ignored=ignored) as terminal:
        settled(terminal)
        terminal.hang_up()
        assert terminal.process.wait(ENDS_S) in (EXIT_OF["SIGHUP"], -signal.SIGHUP)


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP", "SIGINT"])
def test_a_signal_restores_the_terminal(name: str) -> None:
    with on_a_pty(DEMO) as terminal:
        before = terminal.settings()
        settled(terminal)
        assert not terminal.settings()[3] & termios.ECHO
        terminal.process.send_signal(getattr(signal, name))
        assert terminal.wait(ENDS_S) == EXIT_OF[name]
        assert_restored(terminal, before)


@pytest.mark.parametrize(("key", "code"), [("q", 0), ("\x03", 130)])
def test_q_and_ctrl_c_restore_the_terminal(key: str, code: int) -> None:
    with on_a_pty(DEMO) as terminal:
        before = terminal.settings()
        settled(terminal)
        terminal.press(key)
        assert terminal.wait(ENDS_S) == code
        assert_restored(terminal, before)


def assert_restored(terminal: PtyProcess, before: list[object]) -> None:
    terminal.read_for(0.2)
    assert terminal.settings() == before
    assert b"\x1b[?1049l" in terminal.output, "out of the alternate screen"
    assert terminal.output.rfind(b"\x1b[?25h") > terminal.output.rfind(b"\x1b[?25l"), "the cursor is there again"


def test_a_terminal_that_takes_nothing_does_not_keep_it_from_ending() -> None:
    with on_a_pty([*DEMO, "busy"], columns=200, lines=60) as terminal:
        before = terminal.settings()
        settled(terminal)
        for _ in range(12):  # each shows another screen, whole; nobody reads them
            terminal.press("12345678")
            time.sleep(0.1)
        terminal.process.send_signal(signal.SIGTERM)
        assert terminal.process.wait(ENDS_S) == EXIT_OF["SIGTERM"]
        assert terminal.settings() == before


def test_after_a_stall_it_shows_the_screen_asked_for_last() -> None:
    with on_a_pty([*DEMO, "busy"], columns=200, lines=60) as terminal:
        settled(terminal)
        for _ in range(5):
            terminal.press("12345678")
            time.sleep(0.1)
        terminal.press("2")
        screen = pyte.Screen(200, 60)
        stream, fed = pyte.ByteStream(screen), 0

        def elsewhere() -> bool:
            nonlocal fed
            new, fed = terminal.output[fed:], len(terminal.output)
            stream.feed(new)
            return "relay › spaces" not in screen.display[1] or "Description" not in screen.display[2]

        terminal.read_while(elsewhere, 4 * START_S, "it was not shown")


def test_ctrl_l_draws_over_what_another_program_has_written() -> None:
    with on_a_pty([*DEMO, "empty"]) as terminal:
        settled(terminal)
        terminal.output = b""
        terminal.press("\x0c")
        terminal.read_until("overview")
        assert b"\x1b[2J" in terminal.output


def has_stopped(pid: int) -> bool:
    return os.waitpid(pid, os.WUNTRACED | os.WNOHANG)[0] != 0


def test_ctrl_z_hands_the_terminal_back_and_fg_draws_everything_again() -> None:
    with on_a_pty([*DEMO, "empty"]) as terminal:
        before = terminal.settings()
        settled(terminal)
        terminal.press("\x1a")
        terminal.read_while(lambda: not has_stopped(terminal.process.pid), ENDS_S, "it did not stop")
        assert_restored(terminal, before)
        assert b"\x1b[0m\x1b[?2004l" in terminal.output, "without a colour of ours"
        terminal.output = b""
        terminal.process.send_signal(signal.SIGCONT)
        terminal.read_until("overview")
        assert b"\x1b[?1049h" in terminal.output
        assert not terminal.settings()[3] & termios.ECHO


def test_thrifty_sends_no_colours_but_the_terminals_own_and_draws_every_2_s() -> None:
    with on_a_pty([*DEMO, "broken", "--thrifty"]) as terminal:
        settled(terminal, "0.5 Hz")
        for colour in (b"[38;", b";38;", b"[48;", b";48;"):
            assert colour not in terminal.output


def test_the_mouse_is_left_to_the_terminal() -> None:
    with on_a_pty(DEMO) as terminal:
        settled(terminal)
        assert b"\x1b[?1000h" not in terminal.output


def test_no_color_sends_no_colour() -> None:
    with on_a_pty([*DEMO, "broken"], NO_COLOR="1") as terminal:
        settled(terminal)
        for colour in (b"[38;", b";38;", b"[48;", b";48;", b"\x1b[31m", b"\x1b[32m"):
            assert colour not in terminal.output


def test_ascii_draws_with_ascii_alone() -> None:
    with on_a_pty([*DEMO, "empty", "--ascii"]) as terminal:
        settled(terminal)
        assert terminal.output.isascii()


def test_without_a_terminal_it_says_what_to_do_instead() -> None:
    with on_a_pty(["-c", "import sys; sys.__stdin__ = None; import tui.cli; sys.exit(tui.cli.main([]))"]) as terminal:
        assert terminal.wait(20) == 2
        terminal.read_for(0.1)
        assert b"use --once" in terminal.output


def test_a_wrong_url_is_told_before_there_is_a_screen() -> None:
    with on_a_pty(["-m", "tui.cli", "--url", "ftp://localhost"]) as terminal:
        assert terminal.wait(20) == 2
        terminal.read_for(0.1)
        assert b"\x1b[?1049h" not in terminal.output
        assert b"ws://" in terminal.output


def test_without_its_extra_it_says_what_to_install() -> None:
    missing = "import sys; sys.modules['textual'] = sys.modules['rich'] = None;"
    for args in ("[]", "['--once', '--demo']"):
        with on_a_pty(["-c", f"{missing} import tui.cli; sys.exit(tui.cli.main({args}))"]) as terminal:
            assert terminal.wait(20) == 2
            terminal.read_for(0.1)
            assert b"pip install '.[tui]' in a checkout" in terminal.output
