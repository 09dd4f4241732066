"""What a request can be refused for: a status, a short code for programs, and a reason for people, as JSON."""

from collections.abc import Mapping
from http import HTTPStatus
from typing import Any

from starlette.responses import JSONResponse


class Refused(Exception):
    """A request that is answered with `status` and `{"error": {"status", "code", "reason"}}`."""

    def __init__(self, status: int, code: str, reason: str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(reason)
        self.status, self.code, self.reason = status, code, reason
        self.headers = dict(headers or {})

    def response(self) -> JSONResponse:
        """The refusal as a response."""
        return JSONResponse(body(self.status, self.code, self.reason), self.status, self.headers)


def body(status: int, code: str, reason: str) -> dict[str, Any]:
    """The JSON of a refusal."""
    return {"error": {"status": status, "code": code, "reason": reason}}


def of_status(status: int, headers: Mapping[str, str] | None = None) -> Refused:
    """The refusal for a status that the router gives (404, 405) or that has no words of its own."""
    said = {404: ("not_found", "There is nothing at this address."),
            405: ("method_not_allowed", "This address does not take that method.")}  # fmt: skip
    phrase = HTTPStatus(status).phrase
    code, reason = said.get(status, (phrase.lower().replace(" ", "_"), f"{phrase}."))
    return Refused(status, code, reason, headers)


def busy(what: str, seconds: int = 1) -> Refused:
    """503 with the time after which to ask again."""
    return Refused(503, "busy", f"{what} Ask again in {seconds} s.", {"Retry-After": str(seconds)})
