"""The page's files, read once: each has an address of its own, so that no path is ever made of what a client sends."""

from pathlib import Path
from urllib.parse import parse_qs

from starlette.requests import Request
from starlette.responses import RedirectResponse, Response
from starlette.routing import Route

from retrieval_eval.server.login import Access
from retrieval_eval.server.refusals import Refused

FOLDER = Path(__file__).with_name("page")
SHARED = Path(__file__).parents[1]  # with the report: colours and the button that changes them
FILES = {
    "/": FOLDER / "index.html",
    "/login": FOLDER / "login.html",
    "/page/app.js": FOLDER / "app.js",
    "/page/login.js": FOLDER / "login.js",
    "/page/style.css": FOLDER / "style.css",
    "/page/theme.css": SHARED / "theme.css",
    "/page/theme.js": SHARED / "theme.js",
}
TYPES = {
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".css": "text/css; charset=utf-8",
}
FORM_BYTES = 4096


def page_routes(access: Access) -> list[Route]:
    """The routes of the page and of the login."""

    async def log_in(request: Request) -> Response:
        token = await _token(request)
        if not access.check(token):
            raise Refused(401, "wrong_token", "That is not the token.")
        return RedirectResponse("/", 303, {"Set-Cookie": access.cookie()})

    return [*(_file(path, file) for path, file in FILES.items()), Route("/login", log_in, methods=["POST"])]


def _file(path: str, file: Path) -> Route:
    content, kind = file.read_bytes(), TYPES[file.suffix]

    async def show(_: Request) -> Response:
        return Response(content, media_type=kind, headers={"Cache-Control": "no-cache"})

    return Route(path, show, methods=["GET"])


async def _token(request: Request) -> str:
    """The field `token` of a small form."""
    if request.headers.get("content-type", "").partition(";")[0] != "application/x-www-form-urlencoded":
        raise Refused(415, "unsupported_type", "Send the token as a form.")
    form = b""
    async for part in request.stream():
        form += part
        if len(form) > FORM_BYTES:
            raise Refused(413, "form_too_large", f"The form is larger than {FORM_BYTES} bytes.")
    fields = parse_qs(form.decode("utf-8", "replace"), max_num_fields=4)
    return fields.get("token", [""])[0]
