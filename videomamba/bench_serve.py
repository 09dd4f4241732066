"""`videomamba bench serve`: searches a second over HTTP, and how long the slowest take, beside the bare searcher.

The server runs in this process, its clients in another, all on 127.0.0.1; each level of concurrency is a fixed number
of requests. Every sentence is new, so each costs a pass through the text tower (BERT-base, of random weights) and an
exact search of 512-wide vectors, and 12 members of a shard are read for the answer.

Rows: `requests-C` against the searcher in a loop without HTTP (requests/s), and `p99-C` (ms) against C times the loop's
99th percentile, which is what the last of C that come at once would wait for. `memory` is what the process gained
from the first level to the last.
"""

import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from videomamba.bench_clients import WORDS, sentence
from videomamba.bench_table import Row, report, row

if TYPE_CHECKING:
    from retrieval_eval.collection import Collection
    from retrieval_eval.encoders import Encoders

CLIENTS = (1, 8, 32)
PAGE = 12


@dataclass(frozen=True)
class Size:
    """How large the measured problem is."""

    clips: int = 20_000
    text_layers: int = 9
    text_width: int = 768
    requests: int = 320  # a level


QUICK = Size(clips=200, text_layers=1, text_width=64, requests=32)


def measure(size: Size) -> Iterator[Row]:
    """Both rows of every level, the bare loop before each; then the memory."""
    import numpy as np

    from videomamba.memory import anonymous_bytes

    with tempfile.TemporaryDirectory() as folder:
        collection = make_collection(Path(folder), size)
        with served(collection) as address:
            _agree(address, collection)
            _clients(address, 8, size.requests, salt=1)  # warms both sides
            held = anonymous_bytes(os.getpid())
            for level, clients in enumerate(CLIENTS, start=2):
                bare = np.array(
                    [_search(collection, sentence(level, -1 - number)) for number in range(size.requests // 4)]
                )
                spent, together = _clients(address, clients, size.requests, level)
                rate, alone = size.requests / together, 1 / bare.mean()
                yield Row(f"requests-{clients}", round(rate, 1), round(alone, 1), "searcher in a loop", "requests/s",
                          round(rate / alone, 3))  # fmt: skip
                slow, wait = (1000 * float(np.percentile(values, 99)) for values in (spent, bare))
                yield row(f"p99-{clients}", slow, wait * clients, "the loop, in turn")
            gained = max(1, anonymous_bytes(os.getpid()) - held) / 2**20
            yield row("memory", gained, 64.0, "limit", "MiB")


def make_collection(folder: Path, size: Size) -> "Collection":
    """A collection of drawn vectors over shards of small members, with a text tower of the published size."""
    import numpy as np

    from data_pipeline.schema import Sample
    from data_pipeline.shards import Corpus, ShardWriter
    from retrieval_eval.collection import Collection
    from retrieval_eval.embed import ClipList
    from retrieval_eval.index import FlatIndex
    from retrieval_eval.search import Searcher
    from retrieval_eval.store import Store

    shards = folder / "shards"
    shards.mkdir()
    captions = [sentence(0, number) for number in range(size.clips)]
    with ShardWriter(shards, "clips", 10_000) as writer:
        for number, caption in enumerate(captions):
            writer.write(
                Sample(f"{number:09d}", bytes(1024), "mp4", "video", (caption,), "", "0" * 64, {"duration": 1.0})
            )
    vectors = np.random.default_rng(0).standard_normal((size.clips, 512), dtype=np.float32) / 512**0.5
    corpus = Corpus.open(shards)
    clips = ClipList(corpus.keys, list(range(size.clips)), [[caption] for caption in captions], [])
    identity = {"checkpoint": "drawn", "step": 0, "corpus": corpus.digest[:16]}
    store = Store(folder / "index", identity)
    searcher = Searcher(_encoders(folder, size), clips, vectors, FlatIndex(vectors), "flat", identity)
    return Collection(store.folder, corpus, searcher)


def _encoders(folder: Path, size: Size) -> "Encoders":
    import torch

    from data_pipeline.preprocess import TextPreprocess, VisualPreprocess
    from pretrain.checkpoint import Meta, ModelMeta
    from pretrain.models.config import JointConfig, TextConfig, VisionConfig
    from pretrain.models.joint import JointModel
    from pretrain.tokenizer import load_tokenizer, train_tokenizer
    from retrieval_eval.encoders import Encoders

    torch.manual_seed(0)
    vision = VisionConfig(depth=1, width=192, pool_norm=True)
    text = TextConfig(layers=size.text_layers, width=size.text_width, heads=size.text_width // 64, fusion_layers=0)
    config = JointConfig(vision=vision, text=text)
    tokenizer = load_tokenizer(train_tokenizer(WORDS, folder / "tokenizer", 512))
    about = ModelMeta(kind="joint", vision=vision, joint=config)
    meta = Meta(step=0, task="stage2", config="", ranks=1, zero_stage=0, model=about, versions={})
    model = JointModel(config).eval()
    return Encoders(model, VisualPreprocess(), TextPreprocess(), tokenizer, folder, meta, torch.device("cpu"))


@contextmanager
def served(collection: "Collection") -> Iterator[str]:
    """The server over a collection, in a thread, on a free port of 127.0.0.1; gives its address."""
    import uvicorn

    from retrieval_eval.server.address import open_address
    from retrieval_eval.server.app import make_app
    from retrieval_eval.server.limits import Limits
    from retrieval_eval.server.login import Access
    from retrieval_eval.server.run import configuration

    limits, address = Limits(), open_address("127.0.0.1", 0, None)
    app = make_app(collection, Access(None), True, limits, {})
    server = uvicorn.Server(configuration(app, limits))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [address.listening]}, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    try:
        yield address.url
    finally:
        server.should_exit = True
        thread.join()


def _search(collection: "Collection", text: str) -> float:
    """Seconds of one search with what is said of its hits, as the server's answer has it."""
    began = time.perf_counter()
    for hit in collection.searcher.find(text, PAGE):
        collection.about(hit.row)
    return time.perf_counter() - began


def _agree(address: str, collection: "Collection") -> None:
    from urllib.request import urlopen

    with urlopen(f"{address}api/search?q=red+square") as answer:
        hits = json.load(answer)["hits"]
    assert [hit["key"] for hit in hits] == [hit.key for hit in collection.searcher.find("red square", PAGE)]


def _clients(address: str, clients: int, requests: int, salt: int) -> tuple[list[float], float]:
    path = os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-P", "-m", "videomamba.bench_clients", address, *map(str, (clients, requests, salt))],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(done.stderr)
    told = json.loads(done.stdout)
    return told["seconds"], float(told["together"])


def serve(
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the result here as well.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Small sizes, to see that it runs.")] = False,
) -> None:
    """Searches a second over HTTP with 1, 8 and 32 clients, and the 99th percentile of their time."""
    report("serve", list(measure(QUICK if quick else Size())), json_file)
