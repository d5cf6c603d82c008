"""Fetches a file from a client's URL so that the client cannot reach what only this machine can reach.

The worker's owner lists the hosts. A host name is resolved once, every address that it has must be public, and the
connection goes to one of those addresses, so that nothing can change in between (DNS rebinding). Each redirect is
checked in full like the first URL. Time and size are bounded as a whole, whatever the server does.
"""

import contextlib
import http.client
import socket
import ssl
import threading
import time
from collections.abc import Callable, Collection, Iterable, Sequence
from urllib.parse import urljoin

import attrs

from gpuworker.engines.voxcpm.url_policy import DEFAULT_PORTS, PORTS, FetchRefused, Listed, Target, is_public, resolve

MAX_REDIRECTS = 3
#: Number of addresses of a host that are tried.
MAX_TRIES = 4
#: Time until a cancel is noticed.
POLL_S = 0.1
PIECE_BYTES = 65_536
#: How much longer than the time limit sockets live, so that the caller's thread is the one to report the timeout.
LATE_S = 1.0


def _never() -> bool:
    return False


def _listed(hosts: Iterable[str]) -> tuple[Listed, ...]:
    return tuple(map(Listed.parse, hosts))


@attrs.frozen
class Fetcher:
    """Fetches from listed hosts.

    Args:
        hosts: each in the form that `Listed` describes.
        resolve: (host, port) -> its addresses; raises OSError.
        allowed: whether an address may be connected to.
        tls: context that verifies https servers.
    """

    hosts: tuple[Listed, ...] = attrs.field(converter=_listed)
    resolve: Callable[[str, int], Sequence[str]] = resolve
    allowed: Callable[[str], bool] = is_public
    tls: Callable[[], ssl.SSLContext] = ssl.create_default_context

    def fetch(self, url: str, *, max_bytes: int, timeout_s: float, cancelled: Callable[[], bool] = _never) -> bytes:
        """Fetch the file at a URL; see `fetch`."""
        fetching = _Fetching(self, max_bytes, time.monotonic() + timeout_s)
        # In a thread, because nothing else bounds the total time: the resolver has no timeout, and a socket's timeout
        # starts again with each byte.
        threading.Thread(target=fetching.run, args=(url,), name="fetch", daemon=True).start()
        try:
            while not fetching.done.wait(min(POLL_S, max(0.0, fetching.left_s))):
                if cancelled():
                    raise FetchRefused("was cancelled")
                if fetching.left_s <= 0:
                    raise FetchRefused(f"did not arrive within {timeout_s:g} s")
        finally:
            fetching.stop()
        return fetching.result()


def fetch(
    url: str,
    hosts: Collection[str],
    *,
    max_bytes: int,
    timeout_s: float,
    cancelled: Callable[[], bool] = _never,
) -> bytes:
    """Fetch the file at a URL from a listed host with public addresses only. Proxies of the environment are not used.

    Args:
        url: http or https.
        hosts: each `example.org`, or `.example.org` for all its subdomains; ports 80 and 443, or the one in `:port`.
        max_bytes: a larger file is rejected; no more is read.
        timeout_s: for everything, from the name lookup to the last byte.
        cancelled: checked every `POLL_S`.

    Raises:
        FetchRefused: the file may not be fetched, or could not be fetched completely.
        OptionError: an entry of `hosts` is not valid.
    """
    return Fetcher(hosts).fetch(url, max_bytes=max_bytes, timeout_s=timeout_s, cancelled=cancelled)


class _Fetching:
    """One fetch: `run` is called in its own thread, the other methods in the caller's."""

    def __init__(self, rules: Fetcher, max_bytes: int, deadline: float) -> None:
        self._rules = rules
        self._max_bytes = max_bytes
        self._deadline = deadline
        self._lock = threading.Lock()
        self._stopped = False
        self._wire: socket.socket | None = None
        self._result: bytes | Exception = b""
        self.done = threading.Event()

    @property
    def left_s(self) -> float:
        return self._deadline - time.monotonic()

    def result(self) -> bytes:
        if isinstance(self._result, Exception):
            raise self._result
        return self._result

    def stop(self) -> None:
        """Make `run` end soon, whatever it is doing."""
        with self._lock:
            self._stopped = True
            self._hang_up()

    def _hang_up(self) -> None:
        if self._wire is not None:
            with contextlib.suppress(OSError):  # the connection has been closed already
                self._wire.shutdown(socket.SHUT_RDWR)
            self._wire.close()
            self._wire = None

    def run(self, url: str) -> None:
        try:
            self._result = self._follow(url)
        except Exception as fault:  # noqa: BLE001 - the caller's thread reports it
            self._result = fault
        self.done.set()

    def _follow(self, url: str) -> bytes:
        before = ""
        target = Target.parse(url)
        for _ in range(MAX_REDIRECTS + 1):
            try:
                found = self._get(target)
            except FetchRefused as refused:
                raise FetchRefused(before + str(refused)) from None
            if isinstance(found, bytes):
                return found
            before = "redirects: "
            try:
                following = Target.parse(_joined(target, found))
            except FetchRefused as refused:
                raise FetchRefused(f"redirects to a URL that {refused}") from None
            if target.scheme == "https" and following.scheme == "http":
                raise FetchRefused("redirects from https to http; give a URL that stays on https")
            target = following
        raise FetchRefused(f"redirects more than {MAX_REDIRECTS} times; give the URL of the file itself")

    def _addresses(self, target: Target) -> list[str]:
        if not any(listed.allows(target.host, target.port) for listed in self._rules.hosts):
            asked = target.host if target.port in PORTS else target.authority
            raise FetchRefused(f"host {asked!r} is not listed; the worker's owner lists hosts with -o url_hosts=…")
        try:
            addresses = list(self._rules.resolve(target.host, target.port))
        except (OSError, UnicodeError):
            addresses = []
        if not addresses:
            raise FetchRefused(f"host {target.host!r} has no address; check its name")
        # Do not name the address: a client need not learn how names resolve in this network.
        if not all(map(self._rules.allowed, addresses)):
            raise FetchRefused(f"host {target.host!r} has an address that is not public; nothing is fetched from it")
        return addresses[:MAX_TRIES]

    def _get(self, target: Target) -> bytes | str:
        """Return the file, or the URL it redirects to."""
        connection = _Pinned(self, target, self._addresses(target), self._rules.tls)
        try:
            connection.request("GET", target.path, headers={"Accept-Encoding": "identity", "User-Agent": "gpuworker"})
            with connection.getresponse() as response:
                if response.status in (301, 302, 303, 307, 308) and (location := response.getheader("Location")):
                    return location
                return self._body(target, response)
        except FetchRefused:
            raise
        except ssl.SSLCertVerificationError as fault:
            raise FetchRefused(f"host {target.host!r} has no valid certificate: {fault.verify_message}") from None
        except OSError as fault:
            reason = (fault.reason if isinstance(fault, ssl.SSLError) else fault.strerror) or type(fault).__name__
            raise FetchRefused(f"host {target.host!r} cannot be reached: {reason}") from None
        except (http.client.HTTPException, ValueError) as fault:
            raise FetchRefused(
                f"host {target.host!r} closed the connection, or did not answer with HTTP: {type(fault).__name__}"
            ) from None
        finally:
            connection.close()
            with self._lock:
                self._hang_up()

    def _body(self, target: Target, response: http.client.HTTPResponse) -> bytes:
        if response.status != http.HTTPStatus.OK:
            phrase = http.client.responses.get(response.status, "")
            raise FetchRefused(f"host {target.host!r} answered {response.status} {phrase}".rstrip())
        if (coding := response.getheader("Content-Encoding", "identity").strip().lower()) not in ("", "identity"):
            raise FetchRefused(
                f"host {target.host!r} sends it compressed ({coding[:20]!r}); have it send the file as it is"
            )
        expected = response.length
        if expected is not None and expected > self._max_bytes:
            raise FetchRefused(f"has {expected:,} bytes; give at most {self._max_bytes:,}")
        data = bytearray()
        while piece := response.read(min(PIECE_BYTES, self._max_bytes + 1 - len(data))):
            data += piece
            if len(data) > self._max_bytes:
                raise FetchRefused(f"has more than {self._max_bytes:,} bytes; give at most that")
        if expected is not None and len(data) < expected:
            raise FetchRefused(f"host {target.host!r} closed the connection after {len(data):,} of {expected:,} bytes")
        return bytes(data)

    def connect(self, address: str, port: int, within_s: float) -> socket.socket:
        """Connect to an address; `stop` can cut the connection."""
        wire = socket.create_connection((address, port), timeout=max(0.01, within_s))
        with self._lock:
            if self._stopped:
                wire.close()
                raise FetchRefused("was stopped")
            # A second handle of the same connection, because TLS takes ownership of the first.
            self._wire = wire.dup()
        wire.settimeout(self.left_s + LATE_S)
        return wire


class _Pinned(http.client.HTTPConnection):
    """Connects to known addresses, but uses the host's name in what it sends and verifies."""

    def __init__(
        self, fetching: _Fetching, target: Target, addresses: Sequence[str], tls: Callable[[], ssl.SSLContext]
    ) -> None:
        super().__init__(target.host, target.port)
        self.default_port = DEFAULT_PORTS[target.scheme]  # omitted from the Host header
        self._fetching = fetching
        self._target = target
        self._addresses = addresses
        self._tls = tls

    def connect(self) -> None:
        """Connect to the first address that answers."""
        self.sock = self._first()
        if self._target.scheme == "https":
            self.sock = self._tls().wrap_socket(self.sock, server_hostname=self._target.host)

    def _first(self) -> socket.socket:
        *others, last = self._addresses
        for place, address in enumerate(others):
            with contextlib.suppress(OSError):
                share = len(self._addresses) - place
                return self._fetching.connect(address, self._target.port, self._fetching.left_s / share)
        return self._fetching.connect(last, self._target.port, self._fetching.left_s + LATE_S)


def _joined(target: Target, location: str) -> str:
    try:
        return urljoin(f"{target.scheme}://{target.authority}{target.path}", location)
    except ValueError:
        return location
