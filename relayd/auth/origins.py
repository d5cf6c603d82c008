"""Which browser pages may send requests to the relay."""


def may_come_from(origin: str, host: str, allowed: tuple[str, ...]) -> bool:
    """Whether a browser's page may send requests here.

    Args:
        origin: the request's `Origin`; "" where it has none, as requests of other programs do.
        host: the request's `Host`. The relay's own page has it as its origin; behind a proxy its scheme may differ.
        allowed: `allowed_origins`.
    """
    if not origin or origin in allowed or "*" in allowed:
        return True
    scheme, _, authority = origin.partition("://")
    return scheme in ("http", "https") and authority.lower() == host.lower()
