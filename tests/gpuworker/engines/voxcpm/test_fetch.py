"""Fetching from a URL that a client names: what is refused, and that nothing gets round it.

Loopback is not public, so the servers here are reached through a resolver and an address rule of the test's own.
"""

import contextlib
import gzip
import itertools
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Self

import attrs
import pytest

from gpuworker.engines.base import OptionError
from gpuworker.engines.voxcpm.fetch import Fetcher, fetch
from gpuworker.engines.voxcpm.url_policy import FetchRefused, Listed, is_public, parse_hosts

#: Self-signed, for localhost and 127.0.0.1 (tests/protocol/link/test_tls.py tells how it was made).
TLS = Path(__file__).parents[3] / "support" / "tls"
WAV = b"RIFF" + bytes(1_000)

Script = Callable[[str], Iterable[bytes]]


class Server:
    """Answers each connection with what its script yields for the request's head."""

    def __init__(self, script: Script, *, tls: bool = False, greets: bool = False) -> None:
        self._script = script
        self._greets = greets
        self._context: ssl.SSLContext | None = None
        if tls:
            self._context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
            self._context.load_cert_chain(TLS / "cert.pem", TLS / "key.pem")
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self.heads: list[str] = []
        self.connections = 0
        self.over = threading.Event()
        self._thread = threading.Thread(target=self._serve)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.over.set()
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._thread.join(10)
        self._listener.close()
        assert not self._thread.is_alive()

    def _serve(self) -> None:
        with contextlib.suppress(OSError):
            while not self.over.is_set():
                wire, _ = self._listener.accept()
                self.connections += 1
                with wire, contextlib.suppress(OSError):
                    wire.settimeout(10)
                    self._answer(wire)

    def _answer(self, wire: socket.socket) -> None:
        if self._context is not None:
            with self._context.wrap_socket(wire, server_side=True) as secured:
                self._answer_plain(secured)
        else:
            self._answer_plain(wire)

    def _answer_plain(self, wire: socket.socket) -> None:
        head = b""
        if self._greets:
            wire.sendall(b"220 ready\r\n")
        while b"\r\n\r\n" not in head:
            if not (piece := wire.recv(4_096)):
                return
            head += piece
        self.heads.append(head.decode())
        for piece in self._script(head.decode()):
            if self.over.is_set():
                return
            wire.sendall(piece)


def answer(body: bytes = WAV, status: str = "200 OK", *headers: str, length: int | None = None) -> bytes:
    told = f"Content-Length: {len(body) if length is None else length}"
    return "\r\n".join([f"HTTP/1.1 {status}", *headers, told, "", ""]).encode() + body


def served(body: bytes = WAV, status: str = "200 OK", *headers: str, length: int | None = None) -> Script:
    return lambda _head: [answer(body, status, *headers, length=length)]


def redirect(*locations: str) -> Script:
    """Each request is sent on to the next of these; the last one for ever."""
    following = itertools.chain(locations, itertools.repeat(locations[-1]))
    return lambda _head: [answer(b"", "302 Found", f"Location: {next(following)}")]


@attrs.define
class Names:
    """A resolver: name -> addresses, asked in turn where there are several answers."""

    known: dict[str, list[list[str]]]
    asked: list[str] = attrs.field(factory=list)

    def __call__(self, host: str, _port: int) -> list[str]:
        self.asked.append(host)
        answers = self.known.get(host)
        if not answers:
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        return answers.pop(0) if len(answers) > 1 else answers[0]


def names(*hosts: str) -> Names:
    return Names({host: [["127.0.0.1"]] for host in hosts or ("files.example",)})


def only_this_machine(address: str) -> bool:
    return address == "127.0.0.1"


def trusting() -> ssl.SSLContext:
    return ssl.create_default_context(cafile=TLS / "cert.pem")


def fetcher(port: int, *hosts: str, resolver: Names | None = None) -> Fetcher:
    listed = [f"{host}:{port}" for host in hosts or ("files.example",)]
    return Fetcher(listed, resolver or names(*hosts), only_this_machine, trusting)


def refusal(fetching: Fetcher, url: str, *, max_bytes: int = 10_000, timeout_s: float = 10) -> str:
    with pytest.raises(FetchRefused) as caught:
        fetching.fetch(url, max_bytes=max_bytes, timeout_s=timeout_s)
    return str(caught.value)


def no_fetch_goes_on() -> None:
    for thread in threading.enumerate():
        if thread.name == "fetch":
            thread.join(2)
            assert not thread.is_alive()


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    yield
    no_fetch_goes_on()


# -- what is fetched ----------------------------------------------------------------------------------------------


def test_a_file_of_a_listed_host_comes_whole() -> None:
    with Server(served()) as server:
        url = f"http://files.example:{server.port}/a%20b/v.wav?x=1&y=%2F#part"
        assert fetcher(server.port).fetch(url, max_bytes=len(WAV), timeout_s=10) == WAV
    lines = server.heads[0].split("\r\n")
    assert lines[0] == "GET /a%20b/v.wav?x=1&y=%2F HTTP/1.1"
    assert f"Host: files.example:{server.port}" in lines
    assert "Accept-Encoding: identity" in lines


@pytest.mark.parametrize("path", ["", "?q=1", "//two//slashes", "/声音.wav", "/%E5%A3%B0"])
def test_any_path_is_asked_for_as_it_is(path: str) -> None:
    with Server(served()) as server:
        fetcher(server.port).fetch(f"http://files.example:{server.port}{path}", max_bytes=2_000, timeout_s=10)
    wanted = {"": "/", "?q=1": "/?q=1", "/声音.wav": "/%E5%A3%B0%E9%9F%B3.wav"}.get(path, path)
    assert server.heads[0].split()[1] == wanted


def test_a_body_in_chunks_and_one_that_ends_with_the_connection_come_whole() -> None:
    chunks = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n4\r\nabcd\r\n2;x=y\r\nef\r\n0\r\n\r\n"
    for script in (lambda _: [chunks], lambda _: [b"HTTP/1.0 200 OK\r\n\r\n", b"abc", b"def"]):
        with Server(script) as server:
            url = f"http://files.example:{server.port}/"
            assert fetcher(server.port).fetch(url, max_bytes=6, timeout_s=10) == b"abcdef"


def test_https_is_verified_by_the_name_though_connected_by_address() -> None:
    with Server(served(), tls=True) as server:
        url = f"https://localhost:{server.port}/v.wav"
        assert fetcher(server.port, "localhost").fetch(url, max_bytes=2_000, timeout_s=10) == WAV
        # The certificate holds for 127.0.0.1, which is connected to, and not for this name.
        words = refusal(fetcher(server.port), f"https://files.example:{server.port}/v.wav")
        assert words.startswith("host 'files.example' has no certificate that holds: Hostname mismatch")
        strangers = Fetcher([f"localhost:{server.port}"], names("localhost"), only_this_machine)
        words = refusal(strangers, url)
        assert words.startswith("host 'localhost' has no certificate that holds: self-signed certificate")
    assert len(server.heads) == 1


def test_proxies_of_the_environment_are_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    with Server(served(b"proxy")) as proxy, Server(served(), tls=True) as secure, Server(served()) as server:
        for name in ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
            monkeypatch.setenv(name, f"http://127.0.0.1:{proxy.port}")
        for scheme, port, host in (("http", server.port, "files.example"), ("https", secure.port, "localhost")):
            assert fetcher(port, host).fetch(f"{scheme}://{host}:{port}/", max_bytes=2_000, timeout_s=10) == WAV
    assert proxy.connections == 0


# -- which hosts --------------------------------------------------------------------------------------------------


def test_a_host_that_is_not_listed_is_refused_before_its_name_is_looked_up() -> None:
    resolver = names()
    nobody = Fetcher(["other.example", ".files.example", "files.example:8443"], resolver, only_this_machine)
    for scheme in ("http", "https"):
        assert refusal(nobody, f"{scheme}://files.example/v.wav") == (
            "host 'files.example' is not listed; the worker's owner lists hosts with -o url_hosts=…"
        )
    assert refusal(nobody, "https://files.example:99/") == (
        "host 'files.example:99' is not listed; the worker's owner lists hosts with -o url_hosts=…"
    )
    assert resolver.asked == []
    with pytest.raises(FetchRefused, match=r"^host 'files.example' is not listed"):
        fetch("https://files.example/", [], max_bytes=1, timeout_s=1)


@pytest.mark.parametrize(
    ("entry", "host", "port", "takes"),
    [
        ("files.example", "files.example", 443, True),
        ("files.example", "files.example", 80, True),
        ("files.example", "files.example", 8080, False),
        ("files.example", "a.files.example", 443, False),
        ("Files.Example.", "files.example", 443, True),
        (".files.example", "a.b.files.example", 443, True),
        (".files.example", "files.example", 443, False),
        (".files.example", "evilfiles.example", 443, False),
        ("files.example:8443", "files.example", 8443, True),
        ("files.example:8443", "files.example", 443, False),
        ("[2606:4700::1]", "2606:4700::1", 443, True),
        ("bücher.example", "xn--bcher-kva.example", 443, True),
    ],
)
def test_a_listed_host_is_that_host_or_what_is_below_it(entry: str, host: str, port: int, takes: bool) -> None:
    assert Listed.parse(entry).takes(host, port) is takes


@pytest.mark.parametrize(
    "entry",
    ["", "*", "*.example.org", "https://example.org", "example.org/x", "a@b", "a b", "a:x", "a:0", "a:70000", "."],
)
def test_an_entry_that_is_no_host_is_refused_in_words(entry: str) -> None:
    with pytest.raises(OptionError, match=r"is not a host to fetch from; give names as example\.org"):
        Listed.parse(entry)


def test_the_option_is_a_list_with_commas() -> None:
    assert parse_hosts(" a.example, .b.example:8443 ,,") == ("a.example", ".b.example:8443")
    assert parse_hosts("") == ()
    with pytest.raises(OptionError, match=r"^'\*' is not a host"):
        parse_hosts("a.example, *")


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("file:///etc/passwd", "is not an http or https URL"),
        ("ftp://files.example/v.wav", "is not an http or https URL"),
        ("data:audio/wav;base64,UklGRg==", "is not an http or https URL"),
        ("files.example/v.wav", "is not an http or https URL"),
        ("//files.example/v.wav", "is not an http or https URL"),
        ("", "is not an http or https URL"),
        ("http://", "is no URL of a host; give https://HOST/PATH"),
        ("http:files.example", "is no URL of a host; give https://HOST/PATH"),
        ("http://[::1", "is no URL of a host; give https://HOST/PATH"),
        ("http://files.example:99999/", "is no URL of a host; give https://HOST/PATH"),
        ("http://a..b/", "is no URL of a host; give https://HOST/PATH"),
        ("http://a%00b/", "is no URL of a host; give https://HOST/PATH"),
        ("http://me:secret@files.example/", "has a user name or password in it; leave it out"),
        ("http://files.example@10.0.0.1/", "has a user name or password in it; leave it out"),
        ("http://files.example/a b", "holds a space or a sign that no URL has; percent-encode it"),
        ("http://files.example/\r\nX: y", "holds a space or a sign that no URL has; percent-encode it"),
        ("http://files.example\\@10.0.0.1/", "holds a space or a sign that no URL has; percent-encode it"),
        ("http://files.example/" + "a" * 3_000, "is a URL of 3021 characters; the limit is 2048"),
    ],
)
def test_what_is_no_plain_url_is_refused(url: str, words: str) -> None:
    assert refusal(Fetcher(["files.example"], names(), only_this_machine), url) == words


# -- which addresses ----------------------------------------------------------------------------------------------

NOT_PUBLIC = [
    "127.0.0.1",
    "127.8.8.8",
    "0.0.0.0",
    "10.0.0.1",
    "172.16.0.1",
    "192.168.1.1",
    "100.64.0.1",
    "100.100.100.200",  # Alibaba's metadata
    "169.254.169.254",  # nearly everybody's metadata
    "168.63.129.16",  # Azure's
    "192.0.0.192",  # Oracle's
    "192.0.2.1",
    "198.18.0.1",
    "224.0.0.1",
    "239.255.255.250",
    "192.88.99.1",
    "240.0.0.1",
    "255.255.255.255",
    "::",
    "::1",
    "::127.0.0.1",
    "::ffff:127.0.0.1",
    "::ffff:8.8.8.8",
    "::ffff:0:127.0.0.1",
    "64:ff9b::7f00:1",
    "64:ff9b::808:808",
    "64:ff9b:1::a00:1",
    "fe80::1",
    "fe80::1%eth0",
    "2606:4700::1111%eth0",
    "fec0::1",
    "fc00::1",
    "fd00:ec2::254",  # AWS's
    "ff02::1",
    "ff0e::1",
    "100::1",
    "2001::1",  # Teredo
    "2001:db8::1",
    "2002:7f00:1::1",  # 6to4
    "2002:808:808::1",
    "files.example",
    "0x7f.1",
    "",
]


@pytest.mark.parametrize("address", NOT_PUBLIC)
def test_an_address_that_is_not_public_is_refused(address: str) -> None:
    assert not is_public(address)
    resolver = Names({"files.example": [[address]]})
    assert refusal(Fetcher(["files.example"], resolver), "http://files.example/") == (
        "host 'files.example' has an address that is not public; nothing is fetched from it"
    )


@pytest.mark.parametrize("address", ["8.8.8.8", "93.184.216.34", "2606:4700:4700::1111", "2a00:1450:4001::1"])
def test_a_public_address_is_taken(address: str) -> None:
    assert is_public(address)


def test_a_host_with_one_private_address_among_public_ones_is_refused_without_a_connection() -> None:
    with Server(served()) as server:
        for answers in (["127.0.0.1", "10.0.0.1"], ["10.0.0.1", "127.0.0.1"], ["127.0.0.1"] * 9 + ["::1"]):
            resolver = Names({"files.example": [answers]})
            words = refusal(fetcher(server.port, resolver=resolver), f"http://files.example:{server.port}/")
            assert words == "host 'files.example' has an address that is not public; nothing is fetched from it"
    assert server.connections == 0


@pytest.mark.parametrize("host", ["127.0.0.1", "[::1]", "localhost", "2130706433", "0x7f000001", "127.1"])
def test_this_machine_is_refused_by_the_real_resolver_even_where_it_is_listed(host: str) -> None:
    with Server(served()) as server, pytest.raises(FetchRefused, match=r"not public|no address"):
        fetch(f"http://{host}:{server.port}/", [f"{host}:{server.port}"], max_bytes=10_000, timeout_s=10)
    assert server.connections == 0


def test_a_name_that_changes_its_address_is_asked_once_and_that_answer_is_connected_to() -> None:
    with Server(served()) as server:
        resolver = Names({"files.example": [["127.0.0.1"], ["10.0.0.1"]]})
        url = f"http://files.example:{server.port}/"
        assert fetcher(server.port, resolver=resolver).fetch(url, max_bytes=2_000, timeout_s=10) == WAV
        assert resolver.asked == ["files.example"]
        assert "not public" in refusal(fetcher(server.port, resolver=resolver), url)
    assert server.connections == 1


def test_another_address_of_the_host_is_tried_where_one_does_not_answer() -> None:
    with Server(served()) as server:
        resolver = Names({"files.example": [["127.0.0.2", "127.0.0.1"]]})
        fetching = Fetcher([f"files.example:{server.port}"], resolver, lambda address: address.startswith("127."))
        assert fetching.fetch(f"http://files.example:{server.port}/", max_bytes=2_000, timeout_s=10) == WAV


def test_a_host_without_an_address_and_one_where_nobody_listens_are_told() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    assert refusal(fetcher(port, resolver=Names({})), f"http://files.example:{port}/") == (
        "host 'files.example' has no address; check its name"
    )
    assert refusal(fetcher(port), f"http://files.example:{port}/") == (
        "host 'files.example' cannot be reached: Connection refused"
    )


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
        ("file:///etc/passwd", "redirects to what is not an http or https URL"),
        ("http://me:secret@inside.example/", "redirects to what has a user name or password in it; leave it out"),
        ("http://[", "redirects to what is no URL of a host; give https://HOST/PATH"),
        ("http://a/" + "b" * 3_000, "redirects to what is a URL of 3009 characters; the limit is 2048"),
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
            "redirects from https to http; give a URL that stays with https"
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
            "is 1,000,000,000,000 bytes; give at most 10,000"
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
        assert words == "is more than 1,000,000 bytes; give at most that"
    assert sent < 50_000_000  # what the sockets' buffers take


def test_what_is_packed_is_not_unpacked() -> None:
    bomb = gzip.compress(bytes(5_000_000))
    with Server(served(bomb, "200 OK", "Content-Encoding: gzip")) as server:
        assert refusal(fetcher(server.port), f"http://files.example:{server.port}/") == (
            "host 'files.example' sends it packed ('gzip'); have it send the file as it is"
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
            "host 'files.example' broke off after 4 of 8 bytes"
        )
    with Server(lambda _: [b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n8\r\nhalf"]) as server:
        words = refusal(fetcher(server.port), f"http://files.example:{server.port}/")
        assert words.startswith("host 'files.example' broke off, or speaks no HTTP")


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
    assert words.startswith(("host 'files.example' broke off, or speaks no HTTP", "host 'files.example' cannot be"))


def test_a_server_that_speaks_no_tls_is_told() -> None:
    with Server(served(), greets=True) as server:
        words = refusal(fetcher(server.port, "localhost"), f"https://localhost:{server.port}/", timeout_s=1)
    assert words.startswith(
        ("host 'localhost' cannot be reached: ", "did not arrive within 1 s", "host 'localhost' did")
    )
