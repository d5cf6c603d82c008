"""TLS for the relay's listeners: the certificate, and how it is loaded."""

import ssl

from relayd.config.loader import Config
from relayd.config.schema import Tls


class ListenError(Exception):
    """A door cannot be opened; the text says which and what to do."""


def make_tls_context(config: Config) -> ssl.SSLContext | None:
    """The certificate to show, or None for plain TCP.

    Raises:
        ListenError: it cannot be used.
    """
    if config.tls is None:
        return None
    tls_context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    load_certificate(tls_context, config.tls)
    return tls_context


def load_certificate(tls_context: ssl.SSLContext, tls: Tls) -> None:
    """Have `context` show what `tls` names, in all handshakes from now on.

    Raises:
        ListenError: it cannot be used; the context is then good for nothing.
    """
    try:
        tls_context.load_cert_chain(tls.cert, tls.key, password=_no_password)
    except (OSError, ssl.SSLError) as fault:
        raise ListenError(f"cannot use the certificate {tls.cert} with the key {tls.key}: {fault}") from fault


def _no_password() -> str:
    """Without this OpenSSL would ask at the terminal for the password of a locked key, and a daemon would hang."""
    raise OSError("the key is locked with a password, which relayd cannot ask for; give it without one")
