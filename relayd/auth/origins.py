"""Which browser pages may send requests to the relay."""

import attrs
import structlog

log = structlog.get_logger("relayd.auth")

#: Refused origins that are logged; anyone can make up more.
MAX_LOGGED = 50
#: Ports that browsers leave out of an origin.
_DEFAULT_PORTS = {"http": ":80", "https": ":443"}


def may_come_from(origin: str, host: str, allowed: tuple[str, ...]) -> bool:
    """Whether a page of this origin may send requests to the relay.

    Args:
        origin: the request's `Origin`; "" if it has none, as in requests of programs other than browsers.
        host: the request's `Host`. It is the origin of the relay's own page; behind a proxy the scheme may differ.
        allowed: `allowed_origins`.
    """
    if not origin or is_listed(origin, allowed):
        return True
    scheme, _, _authority = origin.partition("://")
    return scheme in _DEFAULT_PORTS and _normal(origin) == _normal(f"{scheme}://{host}")


def is_listed(origin: str, allowed: tuple[str, ...]) -> bool:
    """Whether `allowed_origins` lists an origin; case and default ports do not matter."""
    return "*" in allowed or _normal(origin) in map(_normal, allowed)


def refusal_message(origin: str) -> str:
    """Say why a page may not send requests, and what its owner can do."""
    if origin == "null":  # pages from files, in sandboxed frames, behind some redirects
        return 'the page has no origin of its own (null); only allowed_origins = ["*"] in relayd.toml lets it in'
    return f"origin {origin} is not in allowed_origins of relayd.toml"


@attrs.define(eq=False)
class RefusedOrigins:
    """Logs each refused origin once: a page cannot read why it was refused, so the operator has to see it."""

    _logged: set[str] = attrs.field(factory=set)

    def add(self, origin: str) -> None:
        """Log an origin that was refused."""
        if origin not in self._logged and len(self._logged) < MAX_LOGGED:
            self._logged.add(origin)
            log.warning("origin refused", origin=origin, why=refusal_message(origin))


def _normal(origin: str) -> str:
    origin = origin.lower()
    return origin.removesuffix(_DEFAULT_PORTS.get(origin.partition("://")[0], ""))
