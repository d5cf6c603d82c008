"""Fetching from a URL that a client names: redirects, limits on size and time, and servers that fail."""

import gzip
import itertools
import socket
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from gpuworker.engines.voxcpm.fetch import Fetcher
from gpuworker.engines.voxcpm.url_policy import FetchRefused
from tests.gpuworker.engines.voxcpm.fetch_server import (
    WAV,
    Names,
    Script,
    Server,
    answer,
    fetcher,
    names,
    no_fetch_goes_on,
    only_this_machine,
    refusal,
    served,
    trusting,
)

pytestmark = pytest.mark.usefixtures("no_thread_is_left")


def redirect(*locations: str) -> Script:
    """Each request is sent on to the next of these; the last one for ever."""
    following = itertools.chain(locations, itertools.repeat(locations[-1]))
    return lambda _head: [answer(b"", "302 Found", f"Location: {next(following)}")]


# -- redirects ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("status", ["301 Moved", "302 Found", "303 See Other", "307 Temporary", "308 Permanent"])
def test_a_redirect_is_followed_with_its_host_looked_up_anew(status: str) -> None:
    with Server(served()) as server:
        location = f"Location: http://cdn.example:{server.port}/there.wav"
        with Server(lambda _: [answer(b"elsewhere", status, location)]) as first:
            resolver = names("files.example", "cdn.example")
            fetching = Fetcher(
                [f"files.example:{first.port}", f"cdn.example:{server.port}"], resolver, only_this_machine
            )
            assert fetching.fetch(f"http://files.example:{first.port}/", max_bytes=2_000, timeout_s=10) == WAV
    assert resolver.asked == ["files.example", "cdn.example"]
    assert server.heads[0].startswith("GET /there.wav HTTP/1.1\r\nHost: cdn.example:")


def test_a_relative_redirect_stays_at_its_host() -> None:
    script = iter([redirect("../b.wav?c=d"), served()])
    with Server(lambda head: next(script)(head)) as server:
        url = f"http://files.example:{server.port}/a/a.wav"
        assert fetcher(server.port).fetch(url, max_bytes=2_000, timeout_s=10) == WAV
    assert server.heads[1].startswith("GET /b.wav?c=d HTTP/1.1\r\n")


@pytest.mark.parametrize(
    ("location", "words"),
    [
        ("http://169.254.169.254/latest/meta-data", "redirects: host '169.254.169.254' is not listed; the worker's"),
        ("http://inside.example/", "redirects: host 'inside.example' has an address that is not public; nothing is"),
        ("//other.example/", "redirects: host 'other.example' is not listed; the worker's owner lists hosts with"),
        ("http://files.example:22/", "redirects: host 'files.example:22' is not listed; the worker's owner lists"),
        ("file:///etc/passwd", "redirects to a URL that is not an http or https URL"),
        ("http://me:secret@inside.example/", "redirects to a URL that contains a user name or password; leave it out"),
        ("http://[", "redirects to a URL that has no valid host; give https://HOST/PATH"),
        ("http://a/" + "b" * 3_000, "redirects to a URL that has 3009 characters; the limit is 2048"),
    ],
)
def test_a_redirect_gets_no_further_than_a_first_url(location: str, words: str) -> None:
    with Server(redirect(location)) as server:
        resolver = Names({"files.example": [["127.0.0.1"]], "inside.example": [["10.0.0.1"]]})
        fetching = Fetcher([f"files.example:{server.port}", "inside.example"], resolver, only_this_machine)
        assert refusal(fetching, f"http://files.example:{server.port}/").startswith(words)
    assert server.connections == 1


def test_a_host_that_turns_private_between_two_hops_is_refused() -> None:
    with Server(redirect("/again")) as server:
        resolver = Names({"files.example": [["127.0.0.1"], ["10.0.0.1"]]})
        words = refusal(fetcher(server.port, resolver=resolver), f"http://files.example:{server.port}/")
    assert words.startswith("redirects: host 'files.example' has an address that is not public")
    assert server.connections == 1


def test_a_redirect_from_https_to_http_is_refused() -> None:
    with Server(redirect("http://localhost/v.wav"), tls=True) as server:
        fetching = Fetcher([f"localhost:{server.port}", "localhost"], names("localhost"), only_this_machine, trusting)
        assert refusal(fetching, f"https://localhost:{server.port}/") == (
            "redirects from https to http; give a URL that stays on https"
        )


def test_redirects_that_lead_round_end_after_three() -> None:
    with Server(redirect("/b", "/a")) as server:
        assert refusal(fetcher(server.port), f"http://files.example:{server.port}/a") == (
            "redirects more than 3 times; give the URL of the file itself"
        )
    assert server.connections == 4


# -- how much, and how long ---------------------------------------------------------------------------------------


def test_a_file_that_says_it_is_too_large_is_not_read() -> None:
    with Server(served(b"", length=10**12)) as server:
        assert refusal(fetcher(server.port), f"http://files.example:{server.port}/") == (
            "has 1,000,000,000,000 bytes; give at most 10,000"
        )


@pytest.mark.parametrize("head", ["HTTP/1.0 200 OK\r\n\r\n", "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"])
def test_a_file_that_does_not_end_is_cut_off(head: str) -> None:
    piece = (b"fff0\r\n" + bytes(0xFFF0) + b"\r\n") if "chunked" in head else bytes(0xFFF0)
    sent = 0

    def script(_head: str) -> Iterator[bytes]:
        nonlocal sent
        yield head.encode()
        while True:
            sent += len(piece)
            yield piece

    with Server(script) as server:
        words = refusal(fetcher(server.port), f"http://files.example:{server.port}/", max_bytes=1_000_000)
        assert words == "has more than 1,000,000 bytes; give at most that"
    assert sent < 50_000_000  # what the sockets' buffers take


def test_what_is_packed_is_not_unpacked() -> None:
    bomb = gzip.compress(bytes(5_000_000))
    with Server(served(bomb, "200 OK", "Content-Encoding: gzip")) as server:
        assert refusal(fetcher(server.port), f"http://files.example:{server.port}/") == (
            "host 'files.example' sends it compressed ('gzip'); have it send the file as it is"
        )


def drip(head: bytes, server_over: Callable[[], threading.Event]) -> Script:
    def script(_head: str) -> Iterator[bytes]:
        yield head
        while not server_over().wait(0.01):
            yield b"x"

    return script


@pytest.mark.parametrize(
    "head",
    [b"", b"HTTP/1.1 200 OK\r\nX: ", b"HTTP/1.1 200 OK\r\n\r\n", b"HTTP/1.1 200 OK\r\nContent-Length: 9999\r\n\r\n"],
)
@pytest.mark.parametrize("tls", [False, True])
def test_a_server_that_trickles_is_cut_off_when_the_time_is_over(head: bytes, tls: bool) -> None:
    with Server(drip(head, lambda: server.over), tls=tls) as server:
        url = f"{'https' if tls else 'http'}://localhost:{server.port}/"
        before = time.monotonic()
        assert refusal(fetcher(server.port, "localhost"), url, timeout_s=0.3) == "did not arrive within 0.3 s"
        assert time.monotonic() - before < 5
        no_fetch_goes_on()


def test_a_server_that_never_greets_is_cut_off_in_the_midst_of_tls() -> None:
    with socket.create_server(("127.0.0.1", 0)) as mute:
        port = mute.getsockname()[1]
        words = refusal(fetcher(port, "localhost"), f"https://localhost:{port}/", timeout_s=0.2)
        assert words == "did not arrive within 0.2 s"
        no_fetch_goes_on()


def test_redirects_share_one_time() -> None:
    def script(_head: str) -> Iterator[bytes]:
        server.over.wait(0.15)
        yield answer(b"", "302 Found", "Location: /again")

    with Server(script) as server:
        url = f"http://files.example:{server.port}/"
        assert refusal(fetcher(server.port), url, timeout_s=0.3) == "did not arrive within 0.3 s"


def test_a_resolver_that_does_not_answer_is_not_waited_for() -> None:
    answered = threading.Event()

    def resolver(_host: str, _port: int) -> list[str]:
        answered.wait(10)
        return ["127.0.0.1"]

    with Server(served()) as server:
        fetching = Fetcher([f"files.example:{server.port}"], resolver, only_this_machine)
        assert refusal(fetching, f"http://files.example:{server.port}/", timeout_s=0.2) == "did not arrive within 0.2 s"
        answered.set()
        no_fetch_goes_on()
    assert server.heads == []


def test_a_cancel_ends_a_fetch_soon() -> None:
    asked = threading.Event()

    def script(_head: str) -> Iterator[bytes]:
        asked.set()
        yield from drip(b"HTTP/1.1 200 OK\r\n\r\n", lambda: server.over)("")

    with Server(script) as server:
        before = time.monotonic()
        with pytest.raises(FetchRefused, match=r"^was cancelled$"):
            fetcher(server.port).fetch(
                f"http://files.example:{server.port}/", max_bytes=10**9, timeout_s=60, cancelled=asked.is_set
            )
        assert time.monotonic() - before < 10
        no_fetch_goes_on()


# -- servers that err ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("status", "words"),
    [
        ("404 Nope\x1b[31m", "host 'files.example' answered 404 Not Found"),
        ("403 x", "host 'files.example' answered 403 Forbidden"),
        ("500 x", "host 'files.example' answered 500 Internal Server Error"),
        ("204 x", "host 'files.example' answered 204 No Content"),
        ("206 x", "host 'files.example' answered 206 Partial Content"),
        ("302 x", "host 'files.example' answered 302 Found"),
        ("799 x", "host 'files.example' answered 799"),
    ],
)
def test_an_answer_that_is_no_file_is_told_by_its_number(status: str, words: str) -> None:
    with Server(served(b"an error page", status)) as server:
        assert refusal(fetcher(server.port), f"http://files.example:{server.port}/") == words


def test_half_a_file_is_no_file() -> None:
    with Server(served(b"half", length=8)) as server:
        assert refusal(fetcher(server.port), f"http://files.example:{server.port}/") == (
            "host 'files.example' closed the connection after 4 of 8 bytes"
        )
    with Server(lambda _: [b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n8\r\nhalf"]) as server:
        words = refusal(fetcher(server.port), f"http://files.example:{server.port}/")
        assert words.startswith("host 'files.example' closed the connection, or did not answer with HTTP")


@pytest.mark.parametrize(
    "sent",
    [
        b"",
        b"SSH-2.0-OpenSSH_9.2\r\n",
        b"\0" * 100,
        b"HTTP/1.1 abc OK\r\n\r\n",
        b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 1_000 + b"\r\n",
        b"HTTP/1.1 200 OK\r\nX: " + b"y" * 100_000 + b"\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n-5\r\nabcde\r\n",
        b"HTTP/1.1 100 Continue\r\n\r\n" * 1_000,
    ],
)
def test_what_is_no_http_is_refused(sent: bytes) -> None:
    with Server(lambda _: [sent]) as server:
        words = refusal(fetcher(server.port), f"http://files.example:{server.port}/")
    assert words.startswith(
        ("host 'files.example' closed the connection, or did not answer with HTTP", "host 'files.example' cannot be")
    )


def test_a_server_that_speaks_no_tls_is_told() -> None:
    with Server(served(), greets=True) as server:
        words = refusal(fetcher(server.port, "localhost"), f"https://localhost:{server.port}/", timeout_s=1)
    assert words.startswith(
        ("host 'localhost' cannot be reached: ", "did not arrive within 1 s", "host 'localhost' did")
    )
