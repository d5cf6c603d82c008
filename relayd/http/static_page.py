"""The relay's page: files of the package, as they are, under a policy that lets nothing in from elsewhere.

The page speaks the WebSocket protocol; nothing here knows of spaces or requests.
"""

import base64
import hashlib
import re
from importlib.resources import files

import attrs
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

#: A browser asks whether its copy is still the one, each time: a relay that was updated shows its new page at once.
CACHE = "no-cache"
MEDIA_TYPES = {".html": "text/html; charset=utf-8", ".js": "text/javascript; charset=utf-8"}
_STYLE = re.compile(r"<style>(.*?)</style>", re.DOTALL)
#: A host as a browser writes it; what else is sent as one has no place in a header.
_HOST = re.compile(r"(?:[A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+\])(?::[0-9]{1,5})?")


@attrs.frozen
class File:
    """A file of the page."""

    body: bytes
    media_type: str
    etag: str

    async def serve(self, request: Request) -> Response:
        """The file, or 304 to who has it."""
        headers = {"cache-control": CACHE, "etag": self.etag, **self.policy(request)}
        if _names(request.headers.get("if-none-match", ""), self.etag):
            return Response(status_code=304, headers=headers)
        return Response(self.body, media_type=self.media_type, headers=headers)

    def policy(self, request: Request) -> dict[str, str]:
        """Headers for a document; scripts need none of their own."""
        del request
        return {}


@attrs.frozen
class Document(File):
    """The page itself; `style` is the digest of its style sheet, which stands in it."""

    style: str

    def policy(self, request: Request) -> dict[str, str]:
        """What the page may load, connect to and use."""
        host = request.headers.get("host", "")
        # 'self' is to cover the WebSocket of the same host (CSP 3), and does not in every browser in use.
        sockets = f" ws://{host} wss://{host}" if _HOST.fullmatch(host) else ""
        rules = (
            "default-src 'none'",
            "script-src 'self'",
            f"style-src '{self.style}'",
            f"connect-src 'self'{sockets}",
            "img-src data:",  # its icon
            "media-src blob:",  # what was recorded, to be listened to before it is sent
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
    """`/` and the modules that it loads."""
    served: list[BaseRoute] = []
    for entry in sorted(files("relayd.http").joinpath("static").iterdir(), key=lambda entry: entry.name):
        suffix = entry.name[entry.name.rfind(".") :]
        if suffix in MEDIA_TYPES:
            file = _file(entry.read_bytes(), MEDIA_TYPES[suffix])
            path = "/" if entry.name == "index.html" else f"/{entry.name}"
            served.append(Route(path, file.serve, methods=["GET"], include_in_schema=False))
    return served


def _file(body: bytes, media_type: str) -> File:
    etag = f'"{hashlib.sha256(body).hexdigest()[:32]}"'
    style = _STYLE.search(body.decode())
    if style is None or not media_type.startswith("text/html"):
        return File(body, media_type, etag)
    digest = base64.b64encode(hashlib.sha256(style[1].encode()).digest()).decode()
    return Document(body, media_type, etag, f"sha256-{digest}")


def _names(if_none_match: str, etag: str) -> bool:
    """Whether a client's copy is the one (RFC 9110 §13.1.2: compared weakly)."""
    named = {tag.strip().removeprefix("W/") for tag in if_none_match.split(",")}
    return etag in named or "*" in named
