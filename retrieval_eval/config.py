"""An evaluation as a value. Needs no torch, so a wrong key or number is said at once."""

from typing import Literal, Self

from pydantic import Field, model_validator

from configs.loader import Frozen

Control = Literal["shuffled", "single"]


class RetrievalData(Frozen):
    """What is searched: a folder of shards, each clip with its captions.

    `captions` "all" makes every caption a query, "first" only the first of each clip. `workers` decode beside
    this process; 0 decodes in it.
    """

    type: Literal["shards"] = "shards"
    path: str
    captions: Literal["all", "first"] = "all"
    workers: int = Field(2, ge=0)


class RerankConfig(Frozen):
    """Re-ranking by the cross-modal decoder: the first `top` of each query, both ways; 0 leaves it out.

    `pairs` is how many texts are scored with one clip at once, a bound on memory that changes no result.
    """

    top: int = Field(128, ge=0)
    pairs: int = Field(256, ge=1)
    controls: bool = False
    """Re-rank the controls too; they are scored by the dual encoder in any case."""


class RetrievalConfig(Frozen):
    """Zero-shot retrieval of one checkpoint on one corpus.

    `checkpoint` is a run folder of stage 2 (its newest checkpoint) or a checkpoint folder; frames, pixels and the
    cleaning of captions are what was stored in it. `controls` are the same clips with their frames in a drawn,
    wrong order ("shuffled") and with their middle frame repeated ("single"). `ties` and `bootstrap` (resamplings
    for the 95 % intervals, 0 for none) are explained in metrics.py. `out` gets result.json, queries.jsonl and the
    embeddings, which are used again when everything they depend on is equal.
    """

    checkpoint: str
    data: RetrievalData
    out: str
    batch: int = Field(32, ge=1)
    text_batch: int = Field(256, ge=1)
    rerank: RerankConfig = RerankConfig()
    controls: tuple[Control, ...] = ("shuffled", "single")
    ties: Literal["expected", "published"] = "expected"
    bootstrap: int = Field(1000, ge=0)
    listed: int = Field(5, ge=1)
    """How many found clips queries.jsonl names for each query."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Of the matrix products; scores are float32 in both."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    threads: int | None = Field(None, ge=1)
    seed: int = 0

    @model_validator(mode="after")
    def _controls_are_distinct(self) -> Self:
        if len(set(self.controls)) != len(self.controls):
            raise ValueError(f"controls names one twice: {', '.join(self.controls)}. Name each once.")
        return self
