"""The JSON API over real HTTP: what is found, what is sent, and that nothing else is let in or out."""

import os
import random
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from data_pipeline.loader import EvalLoader
from retrieval_eval.collection import Collection
from retrieval_eval.search import Searcher, embed_corpus
from retrieval_eval.server.limits import Limits
from retrieval_eval.server.openapi import document
from tests.retrieval_eval.serving import Client, application

SMALL = Limits(upload_bytes=50_000, upload_seconds=1, decode_seconds=1, head_seconds=1, connections=12, queued=2,
               model_seconds=20, remembered=3, wrong_tokens=3)  # fmt: skip


@pytest.fixture(scope="module")
def index(run_folder: Path, clips: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("served") / "index"
    embed_corpus(clips, out, run_folder, batch=5, device="cpu")
    return out


@pytest.fixture(scope="module")
def collection(index: Path) -> Collection:
    return Collection.open(index, device="cpu")


@pytest.fixture(scope="module")
def client(collection: Collection) -> Iterator[Client]:
    with application(collection) as (client, _):
        yield client


@pytest.fixture(scope="module")
def small(collection: Collection) -> Iterator[tuple[Client, object]]:
    """A server with bounds that a test can reach."""
    with application(collection, SMALL) as served:
        yield served


def raw(client: Client, data: bytes, ends: bool = True) -> bytes:
    """What comes back for these bytes; `ends` closes our half behind them."""
    with socket.create_connection((client.host, client.port), timeout=30) as connection:
        connection.sendall(data)
        if ends:
            connection.shutdown(socket.SHUT_WR)
        said = b""
        try:
            while part := connection.recv(65536):
                said += part
        except ConnectionResetError:  # it closed with bytes of ours unread
            pass
        return said


def test_a_sentence_finds_what_the_searcher_finds_page_by_page(client: Client, collection: Collection) -> None:
    pages = [client.ask(f"/api/search?q=A+red+square!&per_page=5&page={page}").json for page in (1, 2, 3)]
    hits = [hit for page in pages for hit in page["hits"]]
    wanted = collection.searcher.find("A red square!", 13)
    assert [hit["key"] for hit in hits] == [hit.key for hit in wanted]
    assert [hit["rank"] for hit in hits] == list(range(1, 14))
    assert [hit["score"] for hit in hits] == pytest.approx([hit.score for hit in wanted], abs=1e-6)
    assert (pages[0]["pages"], pages[0]["clips"], pages[0]["query"]) == (3, 13, {"text": "A red square!"})
    first = hits[0]
    assert first["caption"] == wanted[0].caption
    assert first["time"] == "0.0–1.5 s"
    assert first["shard"].endswith(".tar")
    beyond = client.ask("/api/search?q=A+red+square!&per_page=5&page=4").json
    assert beyond["hits"] == []


def test_a_clip_as_the_query_is_seen_as_the_index_saw_its_own(
    client: Client, collection: Collection, clips: Path
) -> None:
    sample = collection.corpus.read(3)
    found = client.upload(sample.media, "/api/search?per_page=4").json
    frames = next(iter(EvalLoader(clips, collection.searcher.encoders.visual, 1, spans=[(3, 4)]))).frames
    wanted = collection.searcher.nearest(collection.searcher.clip_vector(frames), 13)
    assert [hit["score"] for hit in found["hits"]] == pytest.approx([hit.score for hit in wanted[:4]], abs=1e-6)
    name = found["query"]["clip"]
    second = client.ask(f"/api/search?clip={name}&per_page=4&page=2").json
    assert [hit["key"] for hit in second["hits"]] == [hit.key for hit in wanted[4:8]]
    like = client.ask("/api/search?like=clip003&per_page=4").json
    assert [hit["key"] for hit in like["hits"]] == [hit["key"] for hit in found["hits"]]


def test_media_come_whole_and_in_ranges(client: Client, collection: Collection) -> None:
    media = collection.corpus.read(2).media
    whole = client.ask("/api/media/clip002")
    assert (whole.status, whole.body) == (200, media)
    assert whole.headers["content-type"] == "video/mp4"
    assert whole.headers["accept-ranges"] == "bytes"
    size, etag = len(media), whole.headers["etag"]
    for asked, first, stop in (("bytes=0-9", 0, 10), ("bytes=100-", 100, size), ("bytes=-7", size - 7, size),
                               (f"bytes=5-{size * 9}", 5, size), ("bytes=-999999", 0, size)):  # fmt: skip
        part = client.ask("/api/media/clip002", Range=asked)
        assert (part.status, part.body) == (206, media[first:stop]), asked
        assert part.headers["content-range"] == f"bytes {first}-{stop - 1}/{size}"
    for ignored in ("bytes=0-1,5-6", "lines=0-1", "bytes=9-2", "bytes=-", "bytes=a-b", "bytes=" + "9" * 200):
        assert client.ask("/api/media/clip002", Range=ignored).status == 200, ignored
    for past in (f"bytes={size}-", "bytes=-0"):
        refused = client.ask("/api/media/clip002", Range=past)
        assert (refused.status, refused.headers["content-range"]) == (416, f"bytes */{size}")
    assert client.ask("/api/media/clip002", Range="bytes=0-9", If_Range='"other"').status == 200
    assert client.ask("/api/media/clip002", Range="bytes=0-9", If_Range=etag).status == 206
    assert client.ask("/api/media/clip002", If_None_Match=etag)[::2] == (304, b"")
    head = client.ask("/api/media/clip002", "HEAD")
    assert (head.headers["content-length"], head.body) == (str(size), b"")


def test_a_clip_and_its_shard_tell_of_themselves(client: Client) -> None:
    clip = client.ask("/api/clips/clip003").json
    assert clip["captions"] == ["a white square moves right, take 3", "take 3: white goes right"]
    assert clip["probe"]["fps"] == 8.0
    shard = client.ask(f"/api/shards/{clip['shard']}?per_page=3&page=2").json
    assert [one["key"] for one in shard["clips"]] == ["clip003", "clip004"], "the sixth clip of that shard is no video"
    assert shard["total"] == 5


@pytest.mark.parametrize(
    "path, status, code",
    [
        ("/api/search", 400, "one_query"),
        ("/api/search?q=a&like=b", 400, "one_query"),
        ("/api/search?q=", 422, "empty_query"),
        ("/api/search?q=%20%09", 422, "empty_query"),
        ("/api/search?q=!?", 422, "empty_query"),
        ("/api/search?q=" + "a" * 1001, 422, "query_too_long"),
        ("/api/search?q=" + "red+" * 100, 422, "query_too_long"),
        ("/api/search?q=%ff%fe", 400, "not_utf8"),
        ("/api/search?q=a&q=b", 400, "doubled_parameter"),
        ("/api/search?q=a&x=b", 400, "unknown_parameter"),
        ("/api/search?" + "&".join(f"a{i}=1" for i in range(99)), 400, "too_many_parameters"),
        ("/api/search?q=a&page=0", 422, "out_of_bounds"),
        ("/api/search?q=a&page=-1", 400, "not_a_number"),
        ("/api/search?q=a&page=1e3", 400, "not_a_number"),
        ("/api/search?q=a&page=\u0663".encode().decode("latin-1").replace("\xd9\xa3", "%D9%A3"), 400, "not_a_number"),
        ("/api/search?q=a&page=99999999999", 400, "not_a_number"),
        ("/api/search?q=a&page=81", 422, "out_of_bounds"),
        ("/api/search?q=a&per_page=1000", 422, "out_of_bounds"),
        ("/api/search?q=" + "a" * 9000, 414, "address_too_long"),
        ("/api/search?clip=0123", 404, "clip_forgotten"),
        ("/api/search?like=nothing", 404, "no_such_clip"),
        ("/api/clips/clip005", 404, "no_such_clip"),
        ("/api/clips/", 404, "no_such_clip"),
        ("/api/clips/clip003?x=1", 400, "unknown_parameter"),
        ("/api/shards/none.tar", 404, "no_such_shard"),
        ("/api", 404, "not_found"),
        ("/api/search/", 404, "not_found"),
        ("/page/../app.js", 404, "not_found"),
        ("/.env", 404, "not_found"),
    ],
)
def test_a_wrong_request_has_a_reason(client: Client, path: str, status: int, code: str) -> None:
    answer = client.ask(path)
    assert (answer.status, answer.code) == (status, code)
    assert answer.json["error"]["status"] == status
    assert answer.json["error"]["reason"].endswith(".")
    assert "Traceback" not in answer.body.decode()
    assert answer.headers["x-content-type-options"] == "nosniff"


@pytest.mark.parametrize("name", ["/etc/passwd", "../../../../etc/passwd", "..%2f..%2fetc%2fpasswd", "clips-000000.idx",
                                  "%2e%2e/%2e%2e/etc/passwd", "clip003.mp4", "clip003%00", "clip003/", "file:///etc/passwd",
                                  "%ff%fe", "..\\..\\x", "clip003;x"])  # fmt: skip
def test_names_are_looked_up_and_never_opened(client: Client, name: str) -> None:
    for kind in ("media", "clips", "shards"):
        said = raw(
            client, f"GET /api/{kind}/{name} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode(), False
        )
        assert said.startswith(b"HTTP/1.1 404"), (kind, said[:100])
        assert b"root:" not in said


def test_methods_are_refused_by_name(client: Client) -> None:
    for method, path in (
        ("POST", "/api/health"),
        ("DELETE", "/api/search"),
        ("PUT", "/api/media/clip003"),
        ("POST", "/"),
    ):
        answer = client.ask(path, method)
        assert (answer.status, answer.code) == (405, "method_not_allowed")
        assert "GET" in answer.headers["allow"]


def test_every_answer_has_the_headers_that_keep_a_page_in(client: Client) -> None:
    for path in ("/", "/page/app.js", "/api/health", "/nothing", "/api/media/clip003"):
        headers = client.ask(path).headers
        policy = headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "unsafe" not in policy
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["referrer-policy"] == "no-referrer"
        assert not any(name.startswith("access-control") for name in headers)
    page = client.ask("/").body.decode()
    assert "style=" not in page
    assert "<script>" not in page


def test_other_names_and_other_sites_are_kept_out(client: Client) -> None:
    for host in ("evil.example", "evil.example:8080", "127.0.0.1.evil.example", "", "10.0.0.1", "[", "localhost@evil"):
        answer = client.ask("/api/health", Host=host)
        assert (answer.status, answer.code) == (400, "wrong_host"), host
    for host in ("localhost", "localhost:9999", "127.0.0.1", "[::1]:80", "127.9.9.9"):
        assert client.ask("/api/health", Host=host).status == 200, host
    for site in ("cross-site", "same-site"):
        assert client.ask("/api/search?q=a", Sec_Fetch_Site=site, Sec_Fetch_Mode="cors").status == 403
        assert client.ask("/?q=a", Sec_Fetch_Site=site, Sec_Fetch_Mode="navigate").status == 200
        assert client.upload(b"x", Sec_Fetch_Site=site, Sec_Fetch_Mode="navigate").status == 403
    assert client.upload(b"x", Origin="https://evil.example").status == 403
    assert client.upload(b"x", Origin="null").status == 403


@pytest.mark.parametrize(
    "kind", ["text/plain", "multipart/form-data; boundary=x", "application/x-www-form-urlencoded", ""]
)
def test_only_a_clip_may_be_sent(client: Client, kind: str) -> None:
    answer = client.upload(b"x", kind=kind)
    assert (answer.status, answer.code) == (415, "unsupported_type")


def test_uploads_that_are_no_clip(client: Client, collection: Collection) -> None:
    assert client.upload(b"").code == "empty_upload"
    refused = client.upload(b"not a video " * 100)
    assert (refused.status, refused.code) == (422, "not_media")
    media = collection.corpus.read(2).media
    assert client.upload(media[: len(media) // 2]).code == "not_media"
    assert client.upload(media, Content_Encoding="gzip").code == "unsupported_encoding"
    assert client.upload(media, kind="application/octet-stream").status == 200, (
        "the bytes decide, not what they are called"
    )


def test_a_large_upload_is_refused_before_it_is_read(small: tuple[Client, object]) -> None:
    client, _ = small
    head = b"POST /api/search HTTP/1.1\r\nHost: localhost\r\nContent-Type: video/mp4\r\n"
    promised = raw(client, head + b"Content-Length: 50001\r\nExpect: 100-continue\r\n\r\n", ends=False)
    assert promised.startswith(b"HTTP/1.1 413"), "no byte of the body was asked for"
    chunk = b"%x\r\n" % 30_000 + b"0" * 30_000 + b"\r\n"
    streamed = raw(client, head + b"Transfer-Encoding: chunked\r\n\r\n" + chunk * 2, ends=False)
    assert b"HTTP/1.1 413" in streamed


def test_a_slow_and_a_broken_upload_hold_nobody_up(small: tuple[Client, object]) -> None:
    client, _ = small
    head = b"POST /api/search HTTP/1.1\r\nHost: localhost\r\nContent-Type: video/mp4\r\nContent-Length: 1000\r\n\r\n"
    assert raw(client, head + b"half", ends=False).startswith(b"HTTP/1.1 408")
    for _ in range(2 * SMALL.uploads):
        raw(client, head + b"half")
    assert client.upload(b"no clip").code == "not_media", "no place is taken by what broke off"


def test_connections_that_say_nothing_are_closed_and_counted(small: tuple[Client, object]) -> None:
    client, _ = small
    assert raw(client, b"GET / HTTP/1.1\r\nHost: loc", ends=False) == b"", "the head never came"
    held = [socket.create_connection((client.host, client.port), timeout=30) for _ in range(SMALL.connections)]
    try:
        with socket.create_connection((client.host, client.port), timeout=30) as one_more:
            assert b"too_many_connections" in b"".join(iter(lambda: one_more.recv(65536), b""))
    finally:
        for connection in held:
            connection.close()


@pytest.mark.parametrize("blow", [signal.SIGSTOP, signal.SIGKILL])
def test_a_decoder_that_hangs_or_dies_is_replaced(
    small: tuple[Client, object], collection: Collection, blow: signal.Signals
) -> None:
    client, _ = small
    media = collection.corpus.read(2).media
    assert client.upload(media).status == 200
    (decoder,) = decoders_of(SMALL)
    os.kill(decoder, blow)
    struck = client.upload(media)
    # One that hangs is seen by the clock; one that is gone before it is asked is simply begun again.
    assert struck.status == (422 if blow == signal.SIGSTOP else 200) or struck.code == "decode_error"
    assert blow != signal.SIGSTOP or struck.code == "timeout"
    assert client.upload(media).status == 200
    assert decoders_of(SMALL) != [decoder]


def test_what_decodes_uploads_can_open_nothing(small: tuple[Client, object], collection: Collection) -> None:
    client, _ = small
    assert client.upload(collection.corpus.read(2).media).status == 200
    (decoder,) = decoders_of(SMALL)
    limits = Path(f"/proc/{decoder}/limits").read_text().splitlines()
    (files,) = [line.split()[3:5] for line in limits if line.startswith("Max open files")]
    assert files == ["0", "0"]


def decoders_of(limits: Limits) -> list[int]:
    """The processes that decode for a server of these limits."""
    found = []
    for listing in Path("/proc/self/task").glob("*/children"):
        for child in listing.read_text().split():
            words = Path(f"/proc/{child}/cmdline").read_text().split("\0")
            if "retrieval_eval.server.decode_process" in words and str(limits.decode_seconds) in words:
                found.append(int(child))
    return found


def test_a_full_queue_says_when_to_come_back(
    small: tuple[Client, object], collection: Collection, monkeypatch: pytest.MonkeyPatch
) -> None:
    client, _ = small
    begun, release = threading.Event(), threading.Event()
    encode = partial(Searcher.text_vectors, collection.searcher)

    def held_up(queries: list[str]) -> np.ndarray:
        passes.append(len(queries))
        begun.set()
        assert release.wait(30)
        return encode(queries)

    monkeypatch.setattr(Searcher, "text_vectors", lambda _, queries: held_up(queries))
    answers: list[int] = []
    passes: list[int] = []
    waiting = [threading.Thread(target=lambda i=i: answers.append(client.ask(f"/api/search?q=red+{i}").status))
               for i in range(3)]  # fmt: skip
    waiting[0].start()
    assert begun.wait(30)
    for thread in waiting[1:]:
        thread.start()
    while client.ask("/api/health").json["waiting"] < 2:
        pass
    refused = client.ask("/api/search?q=one+too+many")
    assert (refused.status, refused.code) == (503, "busy")
    assert int(refused.headers["retry-after"]) >= 1
    release.set()
    for thread in waiting:
        thread.join(30)
    assert answers == [200] * 3
    assert passes == [1, 2], "what waited went through the text tower together"


def test_vectors_of_old_queries_are_forgotten(small: tuple[Client, object], collection: Collection) -> None:
    client, _ = small
    name = client.upload(collection.corpus.read(2).media).json["query"]["clip"]
    assert client.ask(f"/api/search?clip={name}").status == 200
    for number in range(SMALL.remembered):
        assert client.ask(f"/api/search?q=red+{number}").status == 200
    assert client.ask(f"/api/search?clip={name}").code == "clip_forgotten"


def test_a_fault_of_ours_is_told_without_its_traceback(
    client: Client, collection: Collection, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(_: list[str]) -> np.ndarray:
        raise ZeroDivisionError("secret of the house")

    monkeypatch.setattr(Searcher, "text_vectors", lambda _, queries: broken(queries))
    answer = client.ask("/api/search?q=red+blue")
    assert (answer.status, answer.code) == (500, "failed")
    assert b"secret" not in answer.body
    assert client.ask("/api/health").status == 200


def test_what_is_no_http_is_answered_as_well_as_it_can_be(client: Client) -> None:
    draw = random.Random(7)
    assert client.ask("/", X="a" * 20_000).code == "headers_too_large"
    endless = raw(client, b"GET / HTTP/1.1\r\nHost: localhost\r\nX: " + b"a" * 500_000, ends=False)
    assert endless in (b"", endless.partition(b"not_http")[0] + b"not_http" + endless.partition(b"not_http")[2])
    assert b'"not_http"' in raw(client, b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n")
    pieces = [b"GET ", b"POST ", b"/api/search", b"/api/media/", b"?q=", b"%", b"\x00", b"\xff", b" HTTP/1.1\r\n",
              b"Host: localhost\r\n", b"Content-Length: 5\r\n", b"Transfer-Encoding: chunked\r\n", b"Range: bytes=",
              b"\r\n\r\n", b"0\r\n\r\n", b"Content-Type: video/mp4\r\n", b"Content-Length: -1\r\n",
              b"Cookie: a=\x80\r\n"]  # fmt: skip
    for _ in range(150):
        said = raw(client, b"".join(draw.choices(pieces, k=draw.randint(1, 9))))
        assert b"HTTP/1.1 500" not in said
        assert b"Traceback" not in said
    assert client.ask("/api/health").json["status"] == "ok"


def test_with_a_token_nobody_else_is_answered(collection: Collection) -> None:
    token = "correct-horse-battery"
    with application(collection, SMALL, token, loopback=False) as (client, _):
        assert client.ask("/api/health", Host="any.name.example").code == "token_needed"
        assert client.ask("/api/media/clip003").status == 401
        assert client.ask("/", Accept="text/html").headers["location"] == "/login"
        assert client.ask("/login").status == 200
        assert client.ask("/api/health", Authorization=f"Bearer {token}").status == 200
        form = {"Content_Type": "application/x-www-form-urlencoded"}
        entered = client.ask("/login", "POST", f"token={token}", **form)
        cookie = entered.headers["set-cookie"]
        assert entered.status == 303
        assert "HttpOnly" in cookie
        assert "SameSite=Strict" in cookie
        assert token not in cookie
        assert client.ask("/api/health", Cookie=cookie.partition(";")[0]).status == 200
        assert client.ask("/api/health", Cookie="videomamba=x; \x7f").status == 401
        assert client.ask("/login", "POST", "token=" + "a" * 5000, **form).code == "form_too_large"
        wrong = [client.ask("/api/health", Authorization="Bearer wrong") for _ in range(SMALL.wrong_tokens + 1)]
        assert [one.status for one in wrong] == [401] * SMALL.wrong_tokens + [429]
        assert int(wrong[-1].headers["retry-after"]) >= 1
        assert client.ask("/login", "POST", "token=wrong", **form).status == 429
        assert client.ask("/api/health", Authorization=f"Bearer {token}").status == 200, "the right one still passes"


def test_the_document_describes_every_address(client: Client, small: tuple[Client, object]) -> None:
    _, app = small
    served = {(route.path.replace(":path", ""), method.lower()) for route in app.routes if route.path.startswith("/api")
              for method in route.methods - {"HEAD"}}  # fmt: skip
    said = document(Limits())
    assert {(path, method) for path, methods in said["paths"].items() for method in methods} == served
    assert client.ask("/api/openapi.json").json == said
    hit = client.ask("/api/search?q=red").json["hits"][0]
    described = said["components"]["schemas"]["Hits"]["properties"]["hits"]["items"]["properties"]
    assert hit.keys() == described.keys()


def test_another_checkpoint_and_other_shards_are_refused(
    index: Path, collection: Collection, clips: Path, make_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    from configs.errors import UserError
    from data_pipeline.shards import ShardWriter

    with pytest.raises(UserError, match="is not the checkpoint that made"):
        Collection.open(index, checkpoint=make_checkpoint(tmp_path / "other", seed=9), device="cpu")
    (tmp_path / "fewer").mkdir()
    with ShardWriter(tmp_path / "fewer", "clips", 6) as writer:
        writer.write(collection.corpus.read(0))
    with pytest.raises(UserError, match="are not those that"):
        Collection.open(index, shards=tmp_path / "fewer", device="cpu")
    with pytest.raises(UserError, match="are not in"):
        Collection.open(index, shards=tmp_path / "nowhere", device="cpu")


def test_a_key_that_several_shards_use_is_named_with_its_shard(
    collection: Collection, run_folder: Path, tmp_path: Path
) -> None:
    from dataclasses import replace

    from data_pipeline.shards import ShardWriter

    (tmp_path / "twice").mkdir()
    for name, place in (("a", 0), ("b", 6)):  # shards of others often count from 0 again
        with ShardWriter(tmp_path / "twice", name, 2) as writer:
            writer.write(replace(collection.corpus.read(place), key="00/0000"))
            writer.write(replace(collection.corpus.read(place + 1), key=f"<b>{name}</b>"))
    embed_corpus(tmp_path / "twice", tmp_path / "index", run_folder, device="cpu")
    with application(Collection.open(tmp_path / "index", device="cpu")) as (client, _):
        hits = {hit["name"]: hit for hit in client.ask("/api/search?q=red").json["hits"]}
        assert set(hits) == {"a-000000.tar:00/0000", "b-000000.tar:00/0000", "<b>a</b>", "<b>b</b>"}
        for name, place in (("a-000000.tar:00/0000", 0), ("b-000000.tar:00/0000", 6), ("<b>b</b>", 7)):
            assert client.ask(hits[name]["media"]).body == collection.corpus.read(place).media
            assert client.ask(hits[name]["info"]).json["name"] == name
