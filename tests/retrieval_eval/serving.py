"""Servers to ask over real HTTP: the command in its own process, or the application in a thread with other bounds."""

import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPConnection, HTTPResponse
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import uvicorn

from retrieval_eval.collection import Collection
from retrieval_eval.server.address import bind
from retrieval_eval.server.app import make_app
from retrieval_eval.server.limits import Limits
from retrieval_eval.server.login import Access
from retrieval_eval.server.run import configuration, describe

ROOT = Path(__file__).parents[2]
DEFAULT = Limits()


class Answer(NamedTuple):
    """What came back; `json` of a body that is JSON."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def code(self) -> str:
        return self.json["error"]["code"]


class Client:
    """Asks one server, a connection a request."""

    def __init__(self, address: str) -> None:
        self.host, self.port = urlsplit(address).hostname, urlsplit(address).port
        self.address = address

    def ask(self, path: str, method: str = "GET", body: Any = None, **headers: str) -> Answer:
        connection = HTTPConnection(self.host, self.port, timeout=60)
        try:
            named = {name.replace("_", "-"): value for name, value in headers.items()}
            connection.request(method, path, body, named)
            response: HTTPResponse = connection.getresponse()
            return Answer(response.status, {k.lower(): v for k, v in response.getheaders()}, response.read())
        finally:
            connection.close()

    def upload(self, clip: Any, path: str = "/api/search", kind: str = "video/mp4", **headers: str) -> Answer:
        return self.ask(path, "POST", clip, **{"Content-Type": kind, **headers})


@contextmanager
def command(*arguments: str, **environment: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """`videomamba serve` with these arguments on a free port, once it has said where; killed at the end."""
    process = subprocess.Popen(
        [sys.executable, "-P", "-m", "videomamba", "serve", *arguments, "--port", "0", "--device", "cpu"],
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    said = []
    try:
        for line in process.stdout:
            said.append(line)
            if found := re.search(r"Serving at (http://\S+?)/", line):
                break
        else:
            raise AssertionError("".join(said))
        yield process, found.group(1)
    finally:
        if process.poll() is None:
            process.kill()
        process.stdout.close()
        process.wait()


@contextmanager
def application(
    collection: Collection, limits: Limits = DEFAULT, token: str | None = None, loopback: bool = True
) -> Iterator[tuple[Client, Any]]:
    """The application over real sockets in this process; gives a client, and the Starlette app."""
    listening = bind("127.0.0.1", 0)
    app = make_app(collection, Access(token, limits.wrong_tokens), loopback, limits, describe(collection, limits))
    server = uvicorn.Server(configuration(app, limits))
    ready = threading.Event()
    started = server.startup

    async def startup(sockets: Any = None) -> None:
        await started(sockets)
        ready.set()

    server.startup = startup
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
    thread.start()
    assert ready.wait(60)
    try:
        yield Client("http://{}:{}".format(*listening.getsockname()[:2])), app
    finally:
        server.should_exit = True
        thread.join(30)
        listening.close()
        assert not thread.is_alive()
