"""What every request passes before a handler sees it, and every answer on its way out.

On a loopback address the Host header must name one: a page elsewhere may point a name of its own at 127.0.0.1 (DNS
rebinding), and its requests then bear that name. Requests that another site's page makes are refused as well, but for
following a link to a page here. There are no CORS headers, so no other origin may read an answer.
"""

from http import HTTPStatus
from urllib.parse import urlsplit

from starlette.responses import RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from retrieval_eval.server.address import is_loopback
from retrieval_eval.server.limits import Limits
from retrieval_eval.server.login import Access
from retrieval_eval.server.refusals import Refused

HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; "
    "media-src 'self' blob:; connect-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), microphone=(), geolocation=()",
}
OPEN = frozenset({"/login", "/page/theme.css", "/page/style.css", "/page/login.js"})
"""What is seen without a token: the page that asks for it."""


def host_name(header: str) -> str:
    """The name in a Host header, without its port; empty for what is none."""
    try:
        return urlsplit(f"//{header}").hostname or ""
    except ValueError:
        return ""


class Guard:
    """ASGI middleware: refuses what may not pass, and adds HEADERS to every answer."""

    def __init__(self, app: ASGIApp, access: Access, loopback: bool, limits: Limits) -> None:
        self.app, self.access, self.loopback, self.limits = app, access, loopback, limits

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or answer it."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                there = {name for name, _ in message["headers"]}
                more = HEADERS if b"cache-control" in there else HEADERS | {"Cache-Control": "no-store"}
                added = [(name.lower().encode(), value.encode()) for name, value in more.items()]
                message = {**message, "headers": [*message["headers"], *added]}
            await send(message)

        try:
            answer = self._answer(scope)
        except Refused as refused:
            answer = refused.response()
        await (answer or self.app)(scope, receive, send_with_headers)

    def _answer(self, scope: Scope) -> Response | None:
        """The answer to a request that goes no further; None for one that does."""
        headers = {name: value.decode("latin-1") for name, value in scope["headers"]}
        if len(scope["raw_path"]) + len(scope["query_string"]) > self.limits.address_bytes:
            raise Refused(414, "address_too_long", f"The address is longer than {self.limits.address_bytes} bytes.")
        if sum(len(name) + len(value) for name, value in scope["headers"]) > self.limits.head_bytes:
            raise Refused(431, "headers_too_large", f"The headers hold more than {self.limits.head_bytes} bytes.")
        if self.loopback and not is_loopback(host_name(headers.get(b"host", ""))):
            raise Refused(400, "wrong_host", "The Host header does not name this machine's own address.")
        self._refuse_other_sites(scope, headers)
        if scope["path"] in OPEN or self.access.allowed(headers.get(b"authorization"), headers.get(b"cookie")):
            return None
        if "text/html" in headers.get(b"accept", "") and scope["method"] == "GET":
            return RedirectResponse("/login", HTTPStatus.SEE_OTHER)
        reason = "This server asks for a token: `Authorization: Bearer TOKEN`, or the page /login."
        raise Refused(401, "token_needed", reason, {"WWW-Authenticate": "Bearer"})

    def _refuse_other_sites(self, scope: Scope, headers: dict[bytes, str]) -> None:
        site = headers.get(b"sec-fetch-site", "none")
        followed = headers.get(b"sec-fetch-mode") == "navigate" and scope["method"] in ("GET", "HEAD")
        if site not in ("same-origin", "none") and not followed:
            raise Refused(403, "other_site", "Requests that another site's page makes are not answered.")
        origin = headers.get(b"origin")
        if origin is not None and origin.partition("://")[2] != headers.get(b"host"):
            raise Refused(403, "other_site", "Requests that another site's page makes are not answered.")
