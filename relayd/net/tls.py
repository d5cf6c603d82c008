"""TLS for the relay's listeners: loads the certificate."""

import ssl

from relayd.config.loader import Config
from relayd.config.schema import Tls

#: For TLS 1.2, beside those of TLS 1.3: with forward secrecy and authenticated encryption, so none in CBC mode.
TLS12_CIPHERS = "ECDHE+AESGCM:ECDHE+CHACHA20"


class ListenError(Exception):
    """A listener cannot be opened; the message says which, and what to do."""


def make_tls_context(config: Config) -> ssl.SSLContext | None:
    """Return the TLS context with the configured certificate, or None for plain TCP.

    Raises:
        ListenError: the certificate or its key cannot be used.
    """
    if config.tls is None:
        return None
    tls_context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    tls_context.set_ciphers(TLS12_CIPHERS)
    tls_context.set_alpn_protocols(["http/1.1"])
    load_certificate(tls_context, config.tls)
    return tls_context


def load_certificate(tls_context: ssl.SSLContext, tls: Tls) -> None:
    """Load the configured certificate into `tls_context`, for all handshakes from now on.

    Raises:
        ListenError: the certificate or its key cannot be used; the context must then be discarded.
    """
    try:
        tls_context.load_cert_chain(tls.cert, tls.key, password=_no_password)
    except (OSError, ssl.SSLError) as fault:
        raise ListenError(f"cannot use the certificate {tls.cert} with the key {tls.key}: {fault}") from fault


def _no_password() -> str:
    """Refuse a key with a password; OpenSSL would otherwise ask for it at the terminal, and the daemon would hang."""
    raise OSError("the key is protected by a password, which relayd cannot ask for; use a key without one")
