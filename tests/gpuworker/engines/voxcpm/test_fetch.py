"""Fetching from a URL that a client names: which URLs, hosts and addresses are allowed."""

import socket

import pytest

from gpuworker.engines.base import OptionError
from gpuworker.engines.voxcpm.fetch import Fetcher, fetch
from gpuworker.engines.voxcpm.url_policy import FetchRefused, Listed, is_public, parse_hosts
from tests.gpuworker.engines.voxcpm.fetch_server import (
    WAV,
    Names,
    Server,
    fetcher,
    names,
    only_this_machine,
    refusal,
    served,
)

pytestmark = pytest.mark.usefixtures("no_thread_is_left")

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
        assert words.startswith("host 'files.example' has no valid certificate: Hostname mismatch")
        strangers = Fetcher([f"localhost:{server.port}"], names("localhost"), only_this_machine)
        words = refusal(strangers, url)
        assert words.startswith("host 'localhost' has no valid certificate: self-signed certificate")
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
    assert Listed.parse(entry).allows(host, port) is takes


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
        ("http://", "has no valid host; give https://HOST/PATH"),
        ("http:files.example", "has no valid host; give https://HOST/PATH"),
        ("http://[::1", "has no valid host; give https://HOST/PATH"),
        ("http://files.example:99999/", "has no valid host; give https://HOST/PATH"),
        ("http://a..b/", "has no valid host; give https://HOST/PATH"),
        ("http://a%00b/", "has no valid host; give https://HOST/PATH"),
        ("http://me:secret@files.example/", "contains a user name or password; leave it out"),
        ("http://files.example@10.0.0.1/", "contains a user name or password; leave it out"),
        ("http://files.example/a b", "contains a space or a character that is not allowed in a URL; percent-encode it"),
        (
            "http://files.example/\r\nX: y",
            "contains a space or a character that is not allowed in a URL; percent-encode it",
        ),
        (
            "http://files.example\\@10.0.0.1/",
            "contains a space or a character that is not allowed in a URL; percent-encode it",
        ),
        ("http://files.example/" + "a" * 3_000, "has 3021 characters; the limit is 2048"),
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
