"""One connection: what uvicorn's HTTP/1.1 does, and bounds on time and on how many there are.

uvicorn itself waits as long as a client likes for the head of a request, so a few hundred idle sockets would keep
everybody else out.
"""

import asyncio
import json

from uvicorn.protocols.http.h11_impl import H11Protocol

from retrieval_eval.server.limits import Limits
from retrieval_eval.server.refusals import body


def protocol_of(limits: Limits) -> type[H11Protocol]:
    """The protocol class for a server with these limits (uvicorn makes the objects)."""

    class Bounded(BoundedProtocol):
        bounds = limits

    return Bounded


class BoundedProtocol(H11Protocol):
    """HTTP/1.1 with a limit on connections, and on how long a head, or a body that nobody wants any more, may take."""

    bounds = Limits()
    _overdue: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Take a connection, or answer 503 and close it where there are too many."""
        super().connection_made(transport)
        if len(self.connections) > self.bounds.connections:
            self._say(503, "too_many_connections", f"There are {self.bounds.connections} connections already.")
        else:
            self._arm()

    def data_received(self, data: bytes) -> None:
        """Take bytes; the clock stops when they complete a head."""
        if self.transport.is_closing():
            return
        self._arm()
        super().data_received(data)
        if getattr(self.cycle, "response_complete", True) is False:
            self._disarm()

    def on_response_complete(self) -> None:
        """Give what is left of a body that was not read a time to end."""
        answered = self.cycle
        super().on_response_complete()
        if self.cycle is answered and answered.more_body and not self.transport.is_closing():
            self._arm()

    def connection_lost(self, exc: Exception | None) -> None:
        """The other side has gone."""
        self._disarm()
        super().connection_lost(exc)

    def send_400_response(self, msg: str) -> None:
        """What is no HTTP, or has a head that h11 gives up on."""
        self._say(400, "not_http", msg)

    def _say(self, status: int, code: str, reason: str) -> None:
        """Answer without the application, and close. Plain bytes: the state machine may be past answering."""
        said = json.dumps(body(status, code, reason)).encode()
        head = f"HTTP/1.1 {status} Refused\r\ncontent-type: application/json\r\ncontent-length: {len(said)}\r\n"
        self.transport.write(f"{head}x-content-type-options: nosniff\r\nconnection: close\r\n\r\n".encode() + said)
        self.transport.close()

    def _arm(self) -> None:
        if self._overdue is None:
            self._overdue = self.loop.call_later(self.bounds.head_seconds, self._close)

    def _disarm(self) -> None:
        if self._overdue is not None:
            self._overdue.cancel()
            self._overdue = None

    def _close(self) -> None:
        self._overdue = None
        if not self.transport.is_closing():
            self.transport.abort()
