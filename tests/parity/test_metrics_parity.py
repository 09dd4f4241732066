"""The metrics against the published code's answers (golden/retrieval_metrics.npz)."""

import json
import os
from pathlib import Path

import numpy as np
import pytest

from retrieval_eval import metrics

GOLDEN = Path(os.environ.get("GOLDEN_DIR", Path(__file__).parents[2].parent / "shared" / "golden"))
FILE = GOLDEN / "retrieval_metrics.npz"


@pytest.mark.skipif(not FILE.is_file(), reason=f"no golden file {FILE}; set GOLDEN_DIR")
@pytest.mark.parametrize("ties", ["expected", "published"])
@pytest.mark.parametrize("case", ["single", "multi", "ragged"])
def test_recalls_equal_the_published_code(case: str, ties: metrics.Ties) -> None:
    with np.load(FILE) as golden:
        scores_VC = golden[f"{case}_scores"]
        owner_C = golden[f"{case}_text_to_video"] if case != "single" else np.arange(scores_VC.shape[1])
        expected = json.loads(str(golden["expected"]))[case]
    table, _ = metrics.both_directions(scores_VC, scores_VC, owner_C, ties, samples=0)
    for ours, theirs in (("v2t", "txt"), ("t2v", "img")):
        recalls = [table[ours][f"R@{k}"] for k in (1, 5, 10)]
        assert [round(value, 2) for value in recalls] == [expected[f"{theirs}_r{k}"] for k in (1, 5, 10)]
        assert round(float(np.mean(recalls)), 2) == expected[f"{theirs}_r_mean"]
