"""Who may ask: anyone on this machine's own address, or whoever knows the token.

A program sends it as `Authorization: Bearer TOKEN`. A person types it once into a page, and gets a cookie that stands
for it until the server ends: HttpOnly, SameSite=Strict, and made by a secret of this process, so that it tells nothing
about the token.
"""

import hashlib
import hmac
import secrets
import time
from collections import deque
from http.cookies import CookieError, SimpleCookie

from retrieval_eval.server.refusals import Refused

COOKIE = "videomamba"
DAY = 24 * 3600


class Access:
    """The token, if there is one, and the wrong ones of the last minute."""

    def __init__(self, token: str | None, wrong_a_minute: int = 10) -> None:
        self._token = None if token is None else token.encode()
        self._session = hmac.new(secrets.token_bytes(32), b"session", hashlib.sha256).hexdigest()
        self._wrong: deque[float] = deque(maxlen=wrong_a_minute)

    @property
    def needed(self) -> bool:
        """Whether a token is asked for."""
        return self._token is not None

    def allowed(self, authorization: str | None, cookie: str | None) -> bool:
        """Whether a request may pass, by these two headers. Raises Refused (429) as `check` does."""
        if self._token is None or (cookie is not None and self._is_session(cookie)):
            return True
        scheme, _, given = (authorization or "").partition(" ")
        return scheme.lower() == "bearer" and self.check(given.strip())

    def check(self, token: str) -> bool:
        """Whether `token` is the one, compared in a time that does not depend on where they differ.

        The right one always passes, whatever others try; it is long enough (run.py) not to be found by trying.
        """
        if self._token is not None and hmac.compare_digest(token.encode(), self._token):
            return True
        now = time.monotonic()
        if len(self._wrong) == self._wrong.maxlen and now - self._wrong[0] < 60:
            wait = int(60 - (now - self._wrong[0])) + 1
            reason = f"Too many wrong tokens. Try again in {wait} s."
            raise Refused(429, "too_many_wrong_tokens", reason, {"Retry-After": str(wait)})
        self._wrong.append(now)
        return False

    def cookie(self) -> str:
        """The Set-Cookie header of somebody who gave the token."""
        return f"{COOKIE}={self._session}; Path=/; HttpOnly; SameSite=Strict; Max-Age={DAY}"

    def _is_session(self, header: str) -> bool:
        try:
            found = SimpleCookie(header).get(COOKIE)
        except CookieError:
            return False
        return found is not None and hmac.compare_digest(found.value.encode(), self._session.encode())
