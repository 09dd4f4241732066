"""`videomamba bench retrieval`: exact search, a whole dual evaluation, and re-ranking, each against its plain form.

Rows: `flat-<V>x<E>` against a bare FAISS index, `dual-<V>` (the scores and metrics of V clips and as many texts)
against the same by numpy, and `rerank` (pairs a second) against a loop over the model's own decoder.
"""

import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from videomamba.bench_table import Row, interleave, report, row

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from pretrain.models.joint import JointModel


@dataclass(frozen=True)
class Size:
    """How large the measured problem is."""

    vectors: int = 1_000_000
    width: int = 512
    queries: int = 100
    clips: int = 1000
    pairs_clips: int = 24
    top: int = 32
    patches: int = 1568
    repeats: int = 5


QUICK = Size(vectors=20_000, width=64, queries=20, clips=60, pairs_clips=4, top=4, patches=32, repeats=2)


def measure(size: Size) -> Iterator[Row]:
    """Every row, one after the other."""
    yield _flat(size)
    yield _dual(size)
    yield from _rerank(size)


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
    """From vectors to recalls, both ways, without intervals."""
    import numpy as np

    from retrieval_eval import metrics
    from retrieval_eval.index import FlatIndex
    from videomamba.baselines import recalls_by_argsort

    generator = np.random.default_rng(1)
    clips, texts = (_unit(generator, size.clips, size.width) for _ in range(2))
    owner = np.arange(size.clips)

    def ours() -> dict[str, Any]:
        scores = FlatIndex(clips).scores(texts).T
        return metrics.both_directions(scores, scores, owner, samples=0)[0]

    found, plain = ours(), recalls_by_argsort(clips, texts)
    assert all(abs(found[way][name] - value) < 1e-9 for way, table in plain.items() for name, value in table.items())
    times = interleave(ours, lambda: recalls_by_argsort(clips, texts), size.repeats)
    return row(f"dual-{size.clips}", *times, "numpy argsort")


def _rerank(size: Size) -> Iterator[Row]:
    import numpy as np
    import torch

    from retrieval_eval.decoder import PairScorer
    from retrieval_eval.rerank import Candidates, rerank
    from retrieval_eval.store import RowWriter, read_rows
    from retrieval_eval.texts import TextStates
    from videomamba.baselines import match_pair_by_pair

    model, clips, words = _decoder(), size.pairs_clips, 24
    width, vision = model.text_encoder.config.width, model.config.vision.width
    generator = np.random.default_rng(2)
    hidden = torch.from_numpy(generator.standard_normal((clips, words, width), dtype=np.float32))
    lengths = np.full(clips, words)
    mask = torch.ones(clips, words, dtype=torch.long)
    dual = generator.standard_normal((clips, clips), dtype=np.float32)
    order = np.argsort(-dual, axis=1)[:, : size.top]
    candidates = Candidates(np.argsort(-dual, axis=0).T[:, : size.top], order)
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        with RowWriter(Path(folder) / "tokens.f16", np.float16) as writer:
            for _ in range(clips):
                writer.write(generator.standard_normal((1, size.patches, vision), dtype=np.float32))
        tokens = read_rows(Path(folder) / "tokens.f16")
        scorer = PairScorer(model)
        states = TextStates(scorer.start(hidden, mask).numpy(), lengths)
        wanted = np.logical_or(*candidates.marked(clips, clips))
        pairs = [(clip, text) for clip, text in np.argwhere(wanted).tolist()]

        def ours() -> Any:
            return rerank(dual, candidates, tokens, states, scorer)

        def plain() -> Any:
            return match_pair_by_pair(model, tokens, hidden, mask, pairs)

        began = time.perf_counter()
        made, naive = ours(), plain()
        spent = time.perf_counter() - began
        found = np.array([np.nanmax([made.t2v_VU[p], made.v2t_VU[p]]) for p in pairs])
        assert np.allclose(found, naive, atol=1e-3), float(np.abs(found - naive).max())
        repeats = size.repeats if spent < 10 else 2
        mine, theirs = interleave(ours, plain, repeats)
        rate, base = (1000 * len(pairs) / spent for spent in (mine, theirs))
        yield Row("rerank", round(rate, 1), round(base, 1), "decoder", "pairs/s", round(rate / base, 3))


def _decoder() -> "JointModel":
    """A joint model with the released text tower's fusion layers (BERT-base) and a vision tower that is not run."""
    import torch

    from pretrain.models.config import JointConfig, TextConfig, VisionConfig
    from pretrain.models.joint import JointModel

    torch.manual_seed(0)
    vision = VisionConfig(depth=1, width=576, frames=8, pool_norm=True)
    return JointModel(JointConfig(vision=vision, text=TextConfig(layers=0, vocab_size=64, dropout=0.0))).eval()


def _short(count: int) -> str:
    return f"{count // 1_000_000}M" if count % 1_000_000 == 0 else f"{count // 1000}k"


def retrieval(
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the result here as well.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Small sizes, to see that it runs.")] = False,
) -> None:
    """Exact search, a dual evaluation and re-ranking against FAISS, numpy and the bare decoder."""
    report("retrieval", list(measure(QUICK if quick else Size())), json_file)
