"""Which browser pages may send requests to the relay."""


def may_come_from(origin: str, host: str, allowed: tuple[str, ...]) -> bool:
    """Whether a page of this origin may send requests to the relay.

    Args:
        origin: the request's `Origin`; "" if it has none, as in requests of programs other than browsers.
        host: the request's `Host`. It is the origin of the relay's own page; behind a proxy the scheme may differ.
        allowed: `allowed_origins`.
    """
    if not origin or origin in allowed or "*" in allowed:
        return True
    scheme, _, authority = origin.partition("://")
    return scheme in ("http", "https") and authority.lower() == host.lower()
