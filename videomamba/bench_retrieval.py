"""`videomamba bench retrieval`: exact search, a whole dual evaluation, and re-ranking, each against its plain form.

Rows: `flat-<V>x<E>` against a bare FAISS index; `dual-<V>`, from the vectors of V clips and as many texts to all
numbers with their intervals (ours with every query's listing and ranks on disk), against the same numbers by numpy; and
those of bench_rerank.py.
"""

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from videomamba.bench_rerank import ACTIVITYNET, RERANK, RerankSize, SetSize, memory_row, rerank_rows
from videomamba.bench_table import Row, interleave, report, row

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


@dataclass(frozen=True)
class Size:
    """How large the measured problem is."""

    vectors: int = 1_000_000
    width: int = 512
    queries: int = 100
    clips: int = 1000
    rerank: RerankSize = RERANK
    memory: SetSize = ACTIVITYNET
    repeats: int = 5


QUICK = Size(
    vectors=20_000,
    width=64,
    queries=20,
    clips=60,
    rerank=RerankSize(clips=2, texts=4, patches=32, repeats=2),
    memory=SetSize(clips=70, patches=32, longest=20, full_texts=8, top=16, vocabulary=100, depth=1, text_layers=0),
    repeats=2,
)


def measure(size: Size) -> Iterator[Row]:
    """Every row, one after the other; what takes most memory in a process of its own."""
    yield _flat(size)
    yield _dual(size)
    yield from rerank_rows(size.rerank)
    yield memory_row(size.memory)


def _unit(generator: "np.random.Generator", rows: int, width: int) -> "NDArray[np.float32]":
    import numpy as np

    vectors = generator.standard_normal((rows, width), dtype=np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors


def _flat(size: Size) -> Row:
    import numpy as np

    from retrieval_eval.index import FlatIndex
    from videomamba.baselines import faiss_flat

    generator = np.random.default_rng(0)
    vectors, queries = (_unit(generator, rows, size.width) for rows in (size.vectors, size.queries))
    ours, bare = FlatIndex(vectors), faiss_flat(vectors)
    del vectors
    assert (ours.search(queries, 10)[1] == bare.search(queries, 10)[1]).all()
    times = interleave(lambda: ours.search(queries, 10), lambda: bare.search(queries, 10), size.repeats)
    return row(f"flat-{_short(size.vectors)}x{size.width}", *times, "faiss")


def _dual(size: Size) -> Row:
    """From vectors to everything that an evaluation writes, but for the protocol."""
    import numpy as np

    from retrieval_eval import results
    from retrieval_eval.comparison import write_ranks
    from retrieval_eval.config import RerankConfig, RetrievalConfig, RetrievalData
    from retrieval_eval.embed import ClipList
    from retrieval_eval.index import FlatIndex
    from retrieval_eval.listing import write_listing
    from videomamba.baselines import recalls_by_argsort

    generator = np.random.default_rng(1)
    clips, texts = (_unit(generator, size.clips, size.width) for _ in range(2))
    owner, names = np.arange(size.clips), [f"clip {n}" for n in range(size.clips)]
    listed = ClipList(names, owner.tolist(), [[name] for name in names], [])
    config = RetrievalConfig(
        checkpoint="", data=RetrievalData(path=""), out="", rerank=RerankConfig(top=0), controls=()
    )

    def ours() -> dict[str, Any]:
        scores = results.Scores(np.ascontiguousarray(FlatIndex(clips).scores(texts).T))
        made, ranks = results.tables(config, {"clips": scores}, owner, owner, None)
        with tempfile.TemporaryDirectory() as folder:
            write_listing(Path(folder) / "q", listed, names, owner, owner, scores.dual_VU, None, 5, config.ties)
            write_ranks(Path(folder), ranks)
        return dict(made["dual"])

    found, (plain, _) = ours(), recalls_by_argsort(clips, texts)
    assert all(abs(found[way][name] - value) < 1e-9 for way, table in plain.items() for name, value in table.items())
    times = interleave(ours, lambda: recalls_by_argsort(clips, texts), size.repeats)
    return row(f"dual-{size.clips}", *times, "numpy argsort")


def _short(count: int) -> str:
    return f"{count // 1_000_000}M" if count % 1_000_000 == 0 else f"{count // 1000}k"


def retrieval(
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the result here as well.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Small sizes, to see that it runs.")] = False,
) -> None:
    """Exact search, a dual evaluation and re-ranking against FAISS, numpy and the bare decoder; memory of the last."""
    report("retrieval", list(measure(QUICK if quick else Size())), json_file)
