"""What a result says of how it was made: every choice that changes a number, and the hashes of what went in."""

from importlib import metadata
from typing import Any

from configs.loader import digest
from retrieval_eval.config import RetrievalConfig
from retrieval_eval.embed import ClipList
from retrieval_eval.encoders import Encoders
from retrieval_eval.testset import TestSet
from retrieval_eval.texts import TextTable


def describe(
    config: RetrievalConfig,
    encoders: Encoders,
    found: TestSet,
    clips: ClipList,
    texts: TextTable,
    captions: list[str],
) -> dict[str, Any]:
    """The protocol of an evaluation. `queries_digest` is equal where the same texts were asked of the same clips."""
    visual, text = encoders.visual, encoders.text
    return {
        "checkpoint": str(encoders.folder),
        "checkpoint_digest": encoders.digest,
        "checkpoint_step": encoders.meta.step,
        **found.protocol,
        "clips": len(clips.keys),
        "captions": len(captions),
        "queries_digest": digest({"clips": list(zip(clips.keys, clips.captions, strict=True)), "captions": captions}),
        "different_texts": len(texts.texts),
        "caption_policy": found.captions,
        "frames": visual.frames,
        "frame_rule": "the middle frame of each of as many equal intervals",
        "visual": visual.model_dump(mode="json"),
        "text": text.model_dump(mode="json"),
        "texts_cut_at_max_tokens": texts.cut,
        "dual_score": "mean over frames of cosines, as the inner product of the text's unit vector with the mean of "
        "the clip's unit frame vectors (FAISS IndexFlatIP)",
        "rerank_top": config.rerank.top,
        "rerank_score": "match logit of class 1 in float32 for the first of each query by the dual score, both ways; "
        "the rest keeps its dual order behind them",
        "ties": config.ties,
        "bootstrap": {"samples": config.bootstrap, "seed": config.seed, "level": 0.95, "over": "queries"},
        "controls": list(config.controls),
        "controls_seed": config.seed,
        "precision": encoders.precision,
        "device": str(encoders.device),
        "versions": _versions(),
    }


def _versions() -> dict[str, str]:
    found = {}
    for package in ("videomamba", "torch", "faiss-cpu", "faiss-gpu-cu12", "numpy", "transformers"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:  # one of the two faiss, or a checkout that is not installed
            continue
    return found
