"""Servers on loopback for remote shards: plain HTTP with ranges, enough of S3 for s3fs, and their faults.

Started in a thread of the test's process; each request is noted, and `fault(path, number)` may spoil it, where
number counts the requests of that path from 0.
"""

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import escape

Fault = Callable[[str, int], str | None]


class Server:
    """What a running server tells: its address, the requests it got as (path, range), and its fault."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.requests: list[tuple[str, str | None]] = []
        self.counts: Counter[str] = Counter()
        self.fault: Fault = lambda path, number: None
        self.address = ""

    def bodies(self) -> int:
        """How many requests asked for a shard."""
        return sum(path.endswith(".tar") for path, _ in self.requests)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    state: Server

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._serve(body=False)

    def do_GET(self) -> None:
        self._serve(body=True)

    def _serve(self, body: bool) -> None:
        split = urlsplit(self.path)
        path, query = unquote(split.path), parse_qs(split.query)
        if "list-type" in query:
            return self._list(path.strip("/"), query)
        wanted = self.headers.get("Range")
        fault = None
        if body:
            fault = self.state.fault(path, self.state.counts[path])
            self.state.requests.append((path, wanted))
            self.state.counts[path] += 1
        if fault and fault.isdigit():
            return self._answer(int(fault), b"a fault\n")
        if fault == "stall":
            time.sleep(30)
        file = self.state.root / path.lstrip("/")
        if not file.is_file():
            return self._answer(404, b"<Error><Code>NoSuchKey</Code></Error>")
        data, status, extra = file.read_bytes(), 200, {}
        if wanted and fault != "no ranges":
            first, _, last = wanted.removeprefix("bytes=").partition("-")
            begin, end = int(first), min(int(last or len(data)) + 1, len(data))
            extra = {"Content-Range": f"bytes {begin}-{end - 1}/{len(data)}"}
            data, status = data[begin:end], 206
        self._answer(status, data, extra, body, cut=fault == "drop")
        return None

    def _answer(
        self, status: int, data: bytes, extra: dict | None = None, body: bool = True, cut: bool = False
    ) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), "ETag": '"x"', **(extra or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if body:
            self.wfile.write(data[: len(data) // 2] if cut else data)
        if cut:
            self.close_connection = True
            self.connection.close()

    def _list(self, bucket: str, query: dict[str, list[str]]) -> None:
        """S3's ListObjectsV2 in one page; what s3fs asks for a folder."""
        prefix = query.get("prefix", [""])[0]
        folder = self.state.root / bucket
        names = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
        contents = "".join(
            f"<Contents><Key>{escape(name)}</Key><Size>{(folder / name).stat().st_size}</Size>"
            "<LastModified>2026-01-01T00:00:00.000Z</LastModified><ETag>&quot;x&quot;</ETag></Contents>"
            for name in names
            if name.startswith(prefix)
        )
        page = f"<Name>{bucket}</Name><Prefix>{escape(prefix)}</Prefix><IsTruncated>false</IsTruncated>{contents}"
        self._answer(200, f'<?xml version="1.0"?><ListBucketResult>{page}</ListBucketResult>'.encode())


@contextmanager
def serving(root: Path) -> Iterator[Server]:
    """A server of the files under `root`: by their paths over HTTP, and to S3 each folder in it is a bucket."""
    state = Server(root)
    handler = type("Handler", (_Handler,), {"state": state})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    state.address = f"http://127.0.0.1:{server.server_port}"
    try:
        yield state
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
