"""Two results on the same queries: what differs in how they were made, and how far apart their numbers are.

A difference of two recalls says little without the queries' own scatter, so the queries are resampled in pairs: one
drawn set of queries measures both results. S resamplings, Q queries.
"""

import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from configs.errors import UserError
from configs.files import write_whole
from retrieval_eval.metrics import Ranks, measures

RESULT, RANKS = "result.json", "ranks.npz"
COMPARED = ("R@1", "R@5", "R@10", "MedR", "MeanR")
_DRAWN_AT_ONCE = 4_000_000


@dataclass(frozen=True)
class Difference:
    """One number of both results; `low` and `high` bound b - a with 95 % confidence.

    `p` is the share of resamplings, doubled and at most 1, that fall on the other side of zero.
    """

    scoring: str
    direction: str
    measure: str
    a: float
    b: float
    low: float
    high: float
    p: float


@dataclass(frozen=True)
class Comparison:
    """`protocol` holds the choices that differ, (a's, b's) by name."""

    differences: list[Difference]
    protocol: dict[str, tuple[Any, Any]]


def write_ranks(folder: Path, ranks: dict[str, Ranks]) -> None:
    """Keep the rank of every query, by "scoring.direction"."""
    held = io.BytesIO()
    np.savez_compressed(held, **ranks)  # type: ignore[arg-type]  # the stub takes the names of its own options only
    write_whole(folder / RANKS, held.getvalue())


def compare(a: Path, b: Path, samples: int = 10_000, seed: int = 0) -> Comparison:
    """Compare the results in two folders of `videomamba eval`.

    Raises UserError for a folder without a result, for different queries, and where no scoring is in both.
    """
    (said_a, ranks_a), (said_b, ranks_b) = _read(a), _read(b)
    if said_a["queries_digest"] != said_b["queries_digest"]:
        counts = " and ".join(f"{said['captions']} captions of {said['clips']} clips" for said in (said_a, said_b))
        raise UserError(
            f"{a} and {b} did not ask the same queries of the same clips ({counts}).",
            "Evaluate both on one corpus with one protocol; clips that only one of them could read count too.",
        )
    shared = [name for name in ranks_a if name in ranks_b]
    if not shared:
        raise UserError(f"{a} and {b} share no scoring.", "Re-rank both, or neither.")
    differences = [one for name in shared for one in _differences(name, ranks_a[name], ranks_b[name], samples, seed)]
    names = sorted(said_a.keys() | said_b.keys())
    differ = {name: (said_a.get(name), said_b.get(name)) for name in names if said_a.get(name) != said_b.get(name)}
    return Comparison(differences, differ)


def _read(folder: Path) -> tuple[dict[str, Any], dict[str, Ranks]]:
    folder = folder.parent if folder.name == RESULT else folder
    try:
        protocol = json.loads((folder / RESULT).read_text())["protocol"]
        with np.load(folder / RANKS) as file:
            ranks = {name: file[name] for name in file.files}
    except (OSError, ValueError, KeyError) as error:
        raise UserError(
            f"{folder} holds no result of an evaluation ({RESULT} and {RANKS}).",
            "Give a folder that `videomamba eval` wrote.",
        ) from error
    return dict(protocol), ranks


def _differences(name: str, a_Q: Ranks, b_Q: Ranks, samples: int, seed: int) -> list[Difference]:
    scoring, direction = name.split(".")
    generator = np.random.default_rng(seed)
    step = max(1, _DRAWN_AT_ONCE // len(a_Q))
    parts: dict[str, list[Ranks]] = {measure: [] for measure in COMPARED}
    for start in range(0, samples, step):
        drawn_SQ = generator.integers(0, len(a_Q), (min(step, samples - start), len(a_Q)))
        found_a, found_b = measures(a_Q[drawn_SQ]), measures(b_Q[drawn_SQ])
        for measure in COMPARED:
            parts[measure].append(found_b[measure] - found_a[measure])
    seen_a, seen_b = measures(a_Q[None]), measures(b_Q[None])
    made = []
    for measure in COMPARED:
        gap_S = np.concatenate(parts[measure])
        low, high = np.percentile(gap_S, [2.5, 97.5])
        p = min(1.0, 2 * float(min((gap_S <= 0).mean(), (gap_S >= 0).mean())))
        a, b = float(seen_a[measure][0]), float(seen_b[measure][0])
        made.append(Difference(scoring, direction, measure, a, b, float(low), float(high), p))
    return made
