"""The rows of `videomamba bench retrieval` about re-ranking: its rate, and its memory at the size of ActivityNet.

`rerank` (pairs a second) against `decoder`, a loop over the clips that calls the model's own matching head as the
published code does, and `rerank-keys` against the same loop written by hand to make a clip's keys and values once.

`memory-<V>` is the most anonymous memory of a process that re-ranks a whole set and measures it, in a process of its
own: the joint model at its released size with V clips' synthetic tokens on disk. One clip is scored by the decoder at
its full width with texts of the longest kind, as many words at once as it ever takes; all pairs of the set, then, by
a narrow stand-in decoder, since those of the full one would take a day here.
"""

import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from configs.processes import TreeMemory
from videomamba.bench_table import Row, interleave
from videomamba.memory import alone, anonymous_bytes

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from pretrain.models.joint import JointModel
    from retrieval_eval.chunks import ChunkRows

LIMIT = 4e9
"""Bytes of anonymous memory that re-ranking ActivityNet may take."""


@dataclass(frozen=True)
class RerankSize:
    """How many clips, each with as many texts of 8 to 32 words."""

    clips: int = 2
    texts: int = 48
    patches: int = 1568
    repeats: int = 2


@dataclass(frozen=True)
class SetSize:
    """A set of clips with one text each. `full_texts` of the `longest` kind go through the decoder at full width."""

    clips: int
    patches: int
    longest: int
    full_texts: int
    top: int
    vocabulary: int
    depth: int
    text_layers: int


RERANK = RerankSize()
ACTIVITYNET = SetSize(
    clips=4917, patches=1568, longest=150, full_texts=80, top=128, vocabulary=30522, depth=32, text_layers=9
)


def rerank_rows(size: RerankSize) -> Iterator[Row]:
    """Pairs a second of ours and of both loops."""
    import numpy as np
    import torch

    from retrieval_eval.decoder import PairScorer
    from retrieval_eval.rerank import match_clip
    from retrieval_eval.store import RowWriter, read_rows
    from retrieval_eval.texts import TextStates
    from videomamba.baselines import match_clip_by_clip, match_keys_once

    model, generator = _joint(depth=1, vocabulary=64, text_layers=0), np.random.default_rng(2)
    lengths = generator.integers(8, 33, size.clips * size.texts)
    hidden = torch.from_numpy(
        generator.standard_normal((len(lengths), 32, model.text_encoder.config.width), dtype=np.float32)
    )
    mask = (torch.arange(32)[None] < torch.from_numpy(lengths)[:, None]).long()
    texts = list(generator.permutation(len(lengths)).reshape(size.clips, size.texts))
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        with RowWriter(Path(folder) / "tokens.f16", np.float16) as writer:
            writer.write(generator.standard_normal((size.clips, size.patches, 576), dtype=np.float32))
        tokens = read_rows(Path(folder) / "tokens.f16")
        scorer = PairScorer(model)
        states = TextStates(scorer.start(hidden, mask).numpy(), lengths)

        def ours() -> "NDArray[np.float32]":
            return np.concatenate([match_clip(tokens, clip, own, states, scorer) for clip, own in enumerate(texts)])

        loops = {"rerank": ("decoder", match_clip_by_clip), "rerank-keys": ("decoder, keys once", match_keys_once)}
        for name, (said, loop) in loops.items():
            plain: list[NDArray[np.float32]] = []  # kept, so that the slow loop need not run once more

            def bare(loop: Any = loop, plain: Any = plain) -> None:
                plain.append(loop(model, tokens, hidden, mask, texts))

            times = interleave(ours, bare, size.repeats)
            assert np.allclose(ours(), plain[0], atol=1e-3), float(np.abs(ours() - plain[0]).max())
            rate, base = (1000 * len(lengths) / spent for spent in times)
            yield Row(name, round(rate, 1), round(base, 1), said, "pairs/s", round(rate / base, 3))


def memory_row(size: SetSize) -> Row:
    """Megabytes of anonymous memory, beside the limit."""
    imports = ["retrieval_eval.evaluate", "pretrain.models.joint"]
    peak = alone(_peak_bytes, [(size,)], imports)[0]
    return Row(f"memory-{size.clips}", round(peak / 1e6, 1), LIMIT / 1e6, "limit", "MB", round(LIMIT / peak, 3))


def _peak_bytes(size: SetSize) -> int:
    with TreeMemory(os.getpid(), 0.02, anonymous_bytes) as memory, tempfile.TemporaryDirectory() as folder:
        _rerank_a_set(size, Path(folder))
    return memory.peak


def _rerank_a_set(size: SetSize, folder: Path) -> None:
    """What `videomamba eval` does after embedding: candidates, scores by chunks, numbers with intervals, listing."""
    import numpy as np
    import torch

    from pretrain.models.joint import JointModel
    from retrieval_eval import results
    from retrieval_eval.config import RerankConfig, RetrievalConfig, RetrievalData
    from retrieval_eval.decoder import PairScorer
    from retrieval_eval.embed import ClipList
    from retrieval_eval.index import FlatIndex
    from retrieval_eval.listing import write_listing
    from retrieval_eval.matches import Reranking
    from retrieval_eval.rerank import Candidates, joined, match_clip
    from retrieval_eval.store import Store
    from retrieval_eval.texts import TextStates

    generator = np.random.default_rng(3)
    count, store = size.clips, Store(folder / "store", {})
    tokens = _repeated(folder / "tokens", np.float16, (32, size.patches, 576), count, generator)
    model = _joint(size.depth, size.vocabulary, size.text_layers)
    long = _repeated(folder / "states", np.float32, (32, size.longest, 768), count, generator)
    match_clip(tokens, 0, np.arange(size.full_texts), TextStates(long, np.full(count, size.longest)), PairScorer(model))

    narrow = PairScorer(JointModel(_narrow(model.config)).eval())
    short = TextStates(_repeated(folder / "short", np.float32, (32, 1, 16), count, generator), np.ones(count, np.int64))
    clips, texts = (generator.standard_normal((count, 512), dtype=np.float32) for _ in range(2))

    def make() -> Candidates:
        return Candidates.by_dual(clips, texts, size.top)

    asked = Reranking.plan(store, "clips", {}, make, (count, count))
    asked.score(lambda clip, own: match_clip(tokens, clip, own, short, narrow), lambda *_: None)
    dual_VU = np.ascontiguousarray(FlatIndex(clips).scores(texts).T)
    made = joined(dual_VU, asked.read(), asked.t2v_VU, asked.v2t_VU)
    config = RetrievalConfig(
        checkpoint="", data=RetrievalData(path=""), out="", rerank=RerankConfig(top=size.top), controls=()
    )
    owner, names = np.arange(count), [f"clip {n}" for n in range(count)]
    scores = results.Scores(dual_VU, made.t2v_VU, made.v2t_VU, made.pairs)
    results.tables(config, {"clips": scores}, owner, owner, None)
    listed = ClipList(names, owner.tolist(), [[name] for name in names], [])
    write_listing(folder / "q", listed, names, owner, owner, dual_VU, made.t2v_VU, 5, config.ties)
    torch.set_grad_enabled(True)


def _repeated(
    folder: Path, dtype: Any, shape: tuple[int, ...], count: int, generator: "np.random.Generator"
) -> "ChunkRows":
    """`count` rows in files of `shape`, of which only the first is on the disk: the others are links to it."""
    import numpy as np

    from retrieval_eval.chunks import ChunkRows
    from retrieval_eval.store import RowWriter

    folder.mkdir()
    with RowWriter(folder / "0", dtype) as writer:
        for _ in range(shape[0]):
            writer.write(generator.standard_normal((1, *shape[1:]), dtype=np.float32))
    for number in range(1, -(-count // shape[0])):
        for ending in ("", ".json"):
            os.link(folder / f"0{ending}", folder / f"{number}{ending}")
    paths = [folder / str(number) for number in range(-(-count // shape[0]))]
    return ChunkRows(paths, [shape[0]] * len(paths))


def _joint(depth: int, vocabulary: int, text_layers: int) -> "JointModel":
    """A joint model with the released widths: BERT-base's fusion layers on a vision tower of 576."""
    import torch

    from pretrain.models.config import JointConfig, TextConfig, VisionConfig
    from pretrain.models.joint import JointModel

    torch.manual_seed(0)
    vision = VisionConfig(depth=depth, width=576, frames=8, pool_norm=True)
    text = TextConfig(layers=text_layers, vocab_size=vocabulary, dropout=0.0)
    return JointModel(JointConfig(vision=vision, text=text)).eval()


def _narrow(config: Any) -> Any:
    """One fusion layer of 16 on the same tokens."""
    text = config.text.model_copy(
        update={"layers": 0, "fusion_layers": 1, "width": 16, "heads": 1, "intermediate": 16, "vocab_size": 64}
    )
    return config.model_copy(update={"vision": config.vision.model_copy(update={"depth": 1}), "text": text})
