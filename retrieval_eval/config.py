"""An evaluation as a value. Needs no torch, so a wrong key or number is said at once."""

from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from configs.loader import Frozen
from data_pipeline.preprocess import TextRule

Control = Literal["shuffled", "single"]
KeyRule = Literal["name", "stem"]
Stage = Literal["embed", "rerank"]
Paragraph = Literal["none", "file", "number", "start"]

PUBLISHED: dict[str, dict[str, Any]] = {
    "msrvtt": {"key": "name", "paragraph": "none", "max_tokens": 32},
    "msvd": {"key": "name", "paragraph": "none", "max_tokens": 64},
    "didemo": {"key": "name", "paragraph": "file", "max_tokens": 64, "first_seconds": 30.0},
    "activitynet": {"key": "name", "paragraph": "file", "max_tokens": 150},
    "lsmdc": {"key": "name", "paragraph": "none", "max_tokens": 96},
    "processed": {"key": "name", "paragraph": "none", "max_tokens": 32},
}
"""What VideoMamba's published numbers were made with, set by set (reference/videomamba.md, section 4)."""


class RetrievalData(Frozen):
    """What is searched: a folder of shards, each clip with its captions.

    `captions` "all" makes every caption a query, "first" only the first of each clip. `workers` decode beside
    this process; 0 decodes in it.
    """

    type: Literal["shards"] = "shards"
    path: str
    captions: Literal["all", "first"] = "all"
    workers: int = Field(2, ge=0)


class BenchmarkData(Frozen):
    """One of the published test sets: the authors' annotation file, and the media it names.

    `annotations` is the raw file (readers.py says of what form); MSVD needs `videos`, the list of its test ids, too.
    `media` is a folder of video or image files, or of shards. Every other field is a choice that changes the number;
    left out, it is the published one of that set:

    key            what one video is. "name": the name as the annotation writes it; "stem": without its extension.
                   DiDeMo has 33 stems under two names, so "name" gives 1,037 videos (the paper's table counts
                   1,036) and "stem" 1,004 (CE and VINDLU count 1,003).
    paragraph      "none": every sentence is a caption. Otherwise a video's sentences are joined by one space to one
                   caption, in the order of the "file", of the annotation's "number", or of its "start" in the video.
                   DiDeMo and ActivityNet are paragraph sets; how the published DiDeMo file ordered them is not
                   documented, so the order of the authors' file is taken.
    captions       "all": each caption is a query, and the best placed of a video's captions counts the other way
                   (MSVD, 27,763 queries). "first": one a video.
    max_tokens     where texts are cut, [CLS] and [SEP] included: 32, and 64, 150, 96, 64 for DiDeMo, ActivityNet,
                   LSMDC, MSVD. UMT's own LSMDC script has 64.
    clean          how captions are cleaned; null: as the checkpoint was trained.
    first_seconds  only this much of a video is seen. DiDeMo was annotated on the first 30 seconds.
    """

    type: Literal["msrvtt", "msvd", "didemo", "activitynet", "lsmdc", "processed"]
    annotations: str
    videos: str | None = None
    media: str
    key: KeyRule = "name"
    paragraph: Paragraph = "none"
    captions: Literal["all", "first"] = "all"
    max_tokens: int = Field(32, ge=3)
    clean: TextRule | None = None
    first_seconds: float | None = Field(None, gt=0)
    workers: int = Field(2, ge=0)

    @model_validator(mode="before")
    @classmethod
    def _published(cls, values: Any) -> Any:
        return PUBLISHED.get(str(values.get("type")), {}) | values if isinstance(values, dict) else values

    @model_validator(mode="after")
    def _msvd_has_a_list(self) -> Self:
        if (self.type == "msvd") != (self.videos is not None):
            raise ValueError("`videos`, the list of the split's ids, belongs to msvd and to no other set.")
        return self


class RerankConfig(Frozen):
    """Re-ranking by the cross-modal decoder: the first `top` of each query, both ways; 0 leaves it out.

    `words` is how many words of texts are scored with one clip at once, a bound on memory that changes no result.
    """

    top: int = Field(128, ge=0)
    words: int = Field(8192, ge=1)
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
    data: Annotated[RetrievalData | BenchmarkData, Field(discriminator="type")]
    out: str
    chunk: int = Field(32, ge=1)
    """Clips whose embeddings are kept as one piece: the unit that ranks and parts share, and what a kill loses."""
    batch: int = Field(32, ge=1)
    text_batch: int = Field(256, ge=1)
    rerank: RerankConfig = RerankConfig()
    controls: tuple[Control, ...] = ("shuffled", "single")
    ties: Literal["expected", "published"] = "expected"
    dual_softmax: bool = False
    """A column more: the dual scores weighed by a softmax over all queries, with the checkpoint's temperature."""
    bootstrap: int = Field(1000, ge=0)
    listed: int = Field(5, ge=1)
    """How many found clips queries.jsonl names for each query."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Of the matrix products; scores are float32 in both."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    threads: int | None = Field(None, ge=1)
    seed: int = 0

    @model_validator(mode="before")
    @classmethod
    def _shards_unless_said(cls, values: Any) -> Any:
        data = values.get("data") if isinstance(values, dict) else None
        return values | {"data": {"type": "shards"} | data} if isinstance(data, dict) else values

    @model_validator(mode="after")
    def _controls_are_distinct(self) -> Self:
        if len(set(self.controls)) != len(self.controls):
            raise ValueError(f"controls names one twice: {', '.join(self.controls)}. Name each once.")
        return self
