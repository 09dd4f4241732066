"""The numbers of a result against naive loops: dual softmax, multiple choice."""

import json
from pathlib import Path

import numpy as np
import pytest

from configs.errors import UserError
from configs.loader import validate
from retrieval_eval import metrics
from retrieval_eval.config import RetrievalConfig
from retrieval_eval.evaluate import evaluate
from retrieval_eval.results import dual_softmax


def test_dual_softmax_weighs_by_a_softmax_over_the_queries() -> None:
    scores = np.random.default_rng(0).uniform(-1, 1, (5, 7)).astype(np.float32)
    t2v, v2t = dual_softmax(scores, 0.05)
    for v in range(5):
        for u in range(7):
            over_texts = sum(np.exp(float(scores[v, k]) / 0.05) for k in range(7))
            over_clips = sum(np.exp(float(scores[k, u]) / 0.05) for k in range(5))
            power = np.exp(float(scores[v, u]) / 0.05)
            assert t2v[v, u] == pytest.approx(scores[v, u] * power / over_texts, rel=1e-6)
            assert v2t[v, u] == pytest.approx(scores[v, u] * power / over_clips, rel=1e-6)


def test_a_hub_that_fits_every_text_loses_its_place_by_dual_softmax() -> None:
    scores = np.eye(4) * 0.5
    scores[0] = 0.6  # clip 0 is nearest to every text
    t2v, _ = dual_softmax(scores, 0.05)
    owner = np.arange(4)
    assert metrics.text_to_video_ranks(scores, owner)[1:].tolist() == [2.0, 2.0, 2.0]
    assert metrics.text_to_video_ranks(t2v, owner)[1:].tolist() == [1.0, 1.0, 1.0]


def test_choice_ranks_look_at_a_clips_own_captions() -> None:
    owner = np.array([0, 0, 0, 1, 1])
    scores = np.array([[0.1, 0.9, 0.2, 5.0, 5.0], [9.0, 9.0, 9.0, 0.3, 0.3]])
    ranks = metrics.choice_ranks(scores, owner, np.array([1, 0]))
    assert ranks.tolist() == [1.0, 1.5]
    with pytest.raises(UserError, match="has 2 captions, and its answer is number 2"):
        metrics.choice_ranks(scores, owner, np.array([1, 2]))


def test_multiple_choice_asks_each_clip_for_its_own_captions(run_folder: Path, clips: Path, tmp_path: Path) -> None:
    texts = ["a red square moves left", "a blue square moves right", "take 3: white goes right"]
    entries = [{"video": f"clip{n:03d}.mp4", "caption": texts, "answer": n % 3} for n in range(14) if n != 2]
    (tmp_path / "mc.json").write_text(json.dumps(entries))
    data = {"type": "processed", "annotations": str(tmp_path / "mc.json"), "media": str(clips), "workers": 0}
    tree = {"checkpoint": str(run_folder), "data": data | {"max_tokens": 12}, "out": str(tmp_path / "out")}
    result = evaluate(
        validate(tree | {"batch": 4, "device": "cpu", "bootstrap": 50, "controls": []}, RetrievalConfig, "test")
    )
    assert result["pairs_reranked"] == 12 * 3, "the clip that is no video has no pairs"
    found = [json.loads(line) for line in (tmp_path / "out/queries.jsonl").read_text().splitlines()]
    assert len(found) == 36
    for scoring in ("dual", "reranked"):
        choice = result["results"][scoring]["choice"]
        assert choice["n"] == 12
        assert 0 <= choice["accuracy"] <= 100
    vectors = np.load(tmp_path / "out/embeddings/clips/000000/vectors.npy")
    piece = next((tmp_path / "out/embeddings").glob("texts-*/000000"))
    named, texts_UE = json.loads((piece / "texts.json").read_text())["texts"], np.load(piece / "vectors.npy")
    order = [named.index(text.replace(":", "")) for text in texts]
    answers = [entry["answer"] for entry in entries if entry["video"] != "clip005.mp4"]
    right = [
        int(np.argmax(vector @ texts_UE[order].T)) == answer for vector, answer in zip(vectors, answers, strict=True)
    ]
    assert result["results"]["dual"]["choice"]["accuracy"] == pytest.approx(100 * np.mean(right))
