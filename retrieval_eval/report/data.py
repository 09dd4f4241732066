"""What a report shows, as one value: made by the demo or by an evaluation, written and read as JSON."""

from typing import Any

from configs.loader import Frozen


class StepTime(Frozen):
    """One step of a pipeline: what it took, what it was allowed, and the most memory it held."""

    name: str
    seconds: float
    budget_seconds: float | None = None
    peak_gb: float | None = None
    note: str = ""


class LostClip(Frozen):
    """A clip that did not become a sample, or that could not be read, and why."""

    name: str
    reason: str
    detail: str = ""


class LossCurve(Frozen):
    """The losses of one run, one value a logged step and series (none where a loss was not taken)."""

    title: str
    steps: tuple[int, ...]
    series: dict[str, tuple[float | None, ...]]
    note: str = ""


class Strip(Frozen):
    """Some frames of one clip: `image` is a base64 JPEG, `score` what the ranking gave it."""

    key: str
    caption: str
    image: str
    score: float | None = None
    right: bool = False


class QueryStrips(Frozen):
    """A query, the clip it was written for, and the first clips that were found; `group` says why it is shown."""

    group: str = ""
    text: str
    rank: float
    column: str
    truth: Strip
    found: tuple[Strip, ...]
    note: str = ""


class RankHistogram(Frozen):
    """How many queries, in percent, found their answer in each bin of ranks (histogram.py), by scoring."""

    direction: str
    gallery: int
    bars: dict[str, list[float]]


class Similarity(Frozen):
    """The matrix of dual scores: `image` is a base64 PNG of `side` blocks of `block` x `block` pairs, its colours
    running from `low` to `high`.
    """

    image: str
    side: int
    clips: int
    block: int
    low: float
    high: float


class Departure(Frozen):
    """One way in which this run's recipe differs from the released one."""

    what: str
    released: str
    here: str
    why: str = ""


class SingleFrameModel(Frozen):
    """A control trained apart: a model that only ever saw one frame; `origin` says which run, and when."""

    results: dict[str, Any]
    origin: str


class ReportData(Frozen):
    """Everything on the page. `result` is a result.json; `world` the sentence that says what the data are. `missing`
    are the clips that the evaluation could not read, `lost` those that building a corpus left out.
    """

    title: str
    result: dict[str, Any]
    world: str = ""
    facts: dict[str, str] = {}
    steps: tuple[StepTime, ...] = ()
    peak_gb: float | None = None
    missing: tuple[LostClip, ...] = ()
    histograms: tuple[RankHistogram, ...] = ()
    similarity: Similarity | None = None
    lost: tuple[LostClip, ...] = ()
    curves: tuple[LossCurve, ...] = ()
    queries: tuple[QueryStrips, ...] = ()
    single_frame: SingleFrameModel | None = None
    departures: tuple[Departure, ...] = ()
    export_checks: dict[str, str] = {}
