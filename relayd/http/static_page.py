"""Serves the relay's page and `/docs`: files of the package, under a policy that allows no foreign content.

The page uses the WebSocket protocol, and `/docs` draws `/openapi.json`; this module knows nothing of either.
"""

import base64
import hashlib
import re
from importlib.resources import files

import attrs
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

#: Browsers revalidate their copy each time, so that an updated relay shows its new page at once.
CACHE = "no-cache"
MEDIA_TYPES = {".html": "text/html; charset=utf-8", ".js": "text/javascript; charset=utf-8"}
#: Paths of the documents; every other file is served under its name.
DOCUMENTS = {"index.html": "/", "docs.html": "/docs"}
_STYLE = re.compile(r"<style>(.*?)</style>", re.DOTALL)
#: A host as browsers send it; other values are not copied into a header.
_HOST = re.compile(r"(?:[A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+\])(?::[0-9]{1,5})?")


@attrs.frozen
class File:
    """A file of the page."""

    body: bytes
    media_type: str
    etag: str

    async def serve(self, request: Request) -> Response:
        """Send the file, or 304 if the client has it."""
        headers = {"cache-control": CACHE, "etag": self.etag, **self.policy(request)}
        if _matches(request.headers.get("if-none-match", ""), self.etag):
            return Response(status_code=304, headers=headers)
        return Response(self.body, media_type=self.media_type, headers=headers)

    def policy(self, request: Request) -> dict[str, str]:
        """Return extra headers; only documents need some."""
        del request
        return {}


@attrs.frozen
class Document(File):
    """The HTML page; `style` is the digest of its inline style sheet."""

    style: str

    def policy(self, request: Request) -> dict[str, str]:
        """Return the headers that limit what the page may load, connect to and use."""
        host = request.headers.get("host", "")
        # In CSP 3, 'self' covers the WebSocket of the same host, but some browsers do not implement that.
        sockets = f" ws://{host} wss://{host}" if _HOST.fullmatch(host) else ""
        rules = (
            "default-src 'none'",
            "script-src 'self'",
            f"style-src '{self.style}'",
            f"connect-src 'self'{sockets}",
            "img-src data: blob:",  # its icon; results
            "media-src blob:",  # recordings before they are sent; results
            "base-uri 'none'",
            "form-action 'none'",
            "frame-ancestors 'none'",
            "require-trusted-types-for 'script'",
            "trusted-types 'none'",
        )
        return {
            "content-security-policy": "; ".join(rules),
            "permissions-policy": "microphone=(self), camera=(), geolocation=()",
        }


def routes() -> list[BaseRoute]:
    """Return the routes of the page and of its modules."""
    served: list[BaseRoute] = []
    for entry in sorted(files("relayd.http").joinpath("static").iterdir(), key=lambda entry: entry.name):
        suffix = entry.name[entry.name.rfind(".") :]
        if suffix in MEDIA_TYPES:
            file = _file(entry.read_bytes(), MEDIA_TYPES[suffix])
            path = DOCUMENTS.get(entry.name, f"/{entry.name}")
            served.append(Route(path, file.serve, methods=["GET"], include_in_schema=False))
    return served


def _file(body: bytes, media_type: str) -> File:
    etag = f'"{hashlib.sha256(body).hexdigest()[:32]}"'
    style = _STYLE.search(body.decode())
    if style is None or not media_type.startswith("text/html"):
        return File(body, media_type, etag)
    digest = base64.b64encode(hashlib.sha256(style[1].encode()).digest()).decode()
    return Document(body, media_type, etag, f"sha256-{digest}")


def _matches(if_none_match: str, etag: str) -> bool:
    """Whether the client's copy is current (RFC 9110 §13.1.2, weak comparison)."""
    tags = {tag.strip().removeprefix("W/") for tag in if_none_match.split(",")}
    return etag in tags or "*" in tags
