"""An evaluation of real clips against loops over the model, and what it refuses."""

import json
import resource
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from configs.errors import UserError
from configs.loader import validate
from data_pipeline.loader import EvalLoader
from data_pipeline.shards import Corpus
from pretrain.checkpoint import load_model
from pretrain.models.joint import JointModel
from pretrain.tokenizer import load_tokenizer, tokenize
from retrieval_eval.config import RetrievalConfig
from retrieval_eval.decoder import PairScorer
from retrieval_eval.embed import embed_clips, identity_of, read_clips, seen_as
from retrieval_eval.encoders import Encoders
from retrieval_eval.evaluate import evaluate
from retrieval_eval.listing import read_listing
from retrieval_eval.store import Store
from retrieval_eval.texts import TextPlan, embed_texts, read_states, read_texts

CONTROLS = {"clips": "normal", "clips-shuffled": "shuffled", "clips-single": "repeated"}


def config(run: Path, clips: Path, out: Path, **changes: Any) -> RetrievalConfig:
    tree = {"checkpoint": str(run), "data": {"path": str(clips), "workers": 0}, "out": str(out), "batch": 4}
    return validate(tree | {"text_batch": 3, "device": "cpu", "bootstrap": 20} | changes, RetrievalConfig, "test")


@pytest.fixture(scope="module")
def out(run_folder: Path, clips: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an evaluation that re-ranks the first three, controls too."""
    folder = tmp_path_factory.mktemp("evaluation")
    evaluate(config(run_folder, clips, folder, rerank={"top": 3, "controls": True}))
    return folder


@pytest.fixture(scope="module")
def naive(run_folder: Path, clips: Path) -> dict[str, Any]:
    """Dual and match scores of every pair, one by one, for each view, straight from the checkpoint."""
    model, _, preprocess = load_model(run_folder)
    assert isinstance(model, JointModel)
    tokenizer = load_tokenizer(next(run_folder.glob("checkpoints/step-*")) / "tokenizer")
    found: dict[str, Any] = {"captions": [], "owner": []}
    for view, control in CONTROLS.items():
        batches = list(EvalLoader(clips, preprocess.visual, 5, control=control))
        frames = torch.cat([batch.frames for batch in batches])
        captions = [captions for batch in batches for captions in batch.all_captions]
        if view == "clips":
            found["captions"] = [caption for one in captions for caption in one]
            found["owner"] = [row for row, one in enumerate(captions) for _ in one]
        dual, match = np.empty((2, len(frames), len(found["captions"])))
        with torch.no_grad():
            for v in range(len(frames)):
                seen = model.vision_encoder(preprocess.visual.normalise(frames[v : v + 1]))
                video_FE = model.embed_video(model.vision_encoder.pooled(seen.tokens_BLD, seen.frames, per_frame=True))
                for c, caption in enumerate(found["captions"]):
                    ids, mask = tokenize(tokenizer, [preprocess.text.clean_caption(caption)], 12, multiple=1)
                    hidden = model.text_encoder.encode(ids, mask)
                    dual[v, c] = (video_FE[0] @ model.embed_text(hidden)[0]).mean()
                    match[v, c] = model.match_logits(hidden, mask, seen.patches)[0, 1]
        found[view] = (dual, match)
    return found


def _recalls(order_by: Callable[[int], list[int]], right: list[set[int]], k: int) -> float:
    return 100 * float(np.mean([bool(right[q] & set(order_by(q)[:k])) for q in range(len(right))]))


def _order(dual: np.ndarray, match: np.ndarray, top: int) -> list[int]:
    first = np.argsort(-dual)[:top]
    return [*sorted(first, key=lambda i: -match[i]), *np.argsort(-dual)[top:]]


@pytest.mark.parametrize("k", [1, 5])
@pytest.mark.parametrize("view", list(CONTROLS))
def test_every_number_equals_a_loop_over_pairs(out: Path, naive: dict[str, Any], view: str, k: int) -> None:
    result = json.loads((out / "result.json").read_text())
    results = result["results"] if view == "clips" else result["results"]["controls"][view.removeprefix("clips-")]
    (dual, match), owner = naive[view], naive["owner"]
    own = [{c for c, row in enumerate(owner) if row == v} for v in range(len(dual))]
    for name, top in (("dual", 0), ("reranked", 3)):
        t2v = _recalls(lambda c, top=top: _order(dual[:, c], match[:, c], top), [{row} for row in owner], k)
        v2t = _recalls(lambda v, top=top: _order(dual[v], match[v], top), own, k)
        assert results[name]["t2v"][f"R@{k}"] == pytest.approx(t2v)
        assert results[name]["v2t"][f"R@{k}"] == pytest.approx(v2t)


def test_the_views_are_the_loader_s_controls(run_folder: Path, clips: Path) -> None:
    visual = Encoders.load(run_folder, "cpu").visual
    for view, control in CONTROLS.items():
        plain, controlled = (
            next(iter(EvalLoader(clips, visual, 4, control=name, seed=7))) for name in ("normal", control)
        )
        assert torch.equal(seen_as(view, plain), controlled.frames), view
    assert not torch.equal(plain.frames, controlled.frames)


def test_the_result_says_how_it_was_made(out: Path, clips: Path, run_folder: Path) -> None:
    result = json.loads((out / "result.json").read_text())
    protocol = result["protocol"]
    assert result["columns"] == {"dual": "dual encoder", "reranked": "re-ranked, top 3"}
    assert protocol["corpus_digest"] == Corpus.open(clips).digest
    assert protocol["checkpoint_digest"] == Encoders.load(run_folder, "cpu").digest
    assert (protocol["clips"], protocol["captions"], protocol["different_texts"]) == (13, 19, 19)
    assert protocol["texts_cut_at_max_tokens"] == 0
    assert protocol["frames"] == 4
    assert {"torch", "numpy"} <= protocol["versions"].keys()
    assert result["chance"]["t2v"]["R@1"] == pytest.approx(100 / 13)
    low, high = result["results"]["dual"]["t2v"]["interval_95"]["R@5"]
    assert low <= result["results"]["dual"]["t2v"]["R@5"] <= high


def test_a_clip_that_cannot_be_read_is_named(out: Path) -> None:
    result = json.loads((out / "result.json").read_text())
    assert result["status"] == "partial"
    assert len(result["missing"]) == 1
    assert "clip005" in result["missing"][0]["clip"]
    assert result["missing"][0]["reason"] == "not_media"


def test_the_listing_has_what_was_found(out: Path, naive: dict[str, Any]) -> None:
    lines = read_listing(out / "queries.jsonl")
    dual, match = naive["clips"]
    assert [line["query"] for line in lines] == naive["captions"]
    for c, line in enumerate(lines):
        for name, top in (("dual", 0), ("reranked", 3)):
            order = _order(dual[:, c], match[:, c], top)
            assert line[name]["rank"] == order.index(naive["owner"][c]) + 1
            assert [hit["key"] for hit in line[name]["found"]] == [f"clip{v + (v >= 5):03d}" for v in order[:5]]
        assert line["dual"]["found"][0]["score"] == pytest.approx(dual[:, c].max(), abs=1e-5)


def test_finished_pieces_are_used_again(
    out: Path, run_folder: Path, clips: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "again"
    shutil.copytree(out, folder)
    before = json.loads((folder / "result.json").read_text())
    shutil.rmtree(next((folder / "embeddings").glob("texts-*")))  # as if killed before the texts were done
    (folder / "result.json").unlink()
    monkeypatch.setattr("retrieval_eval.embed.EvalLoader", None)  # decoding once more would fail
    after = evaluate(config(run_folder, clips, folder, rerank={"top": 3, "controls": True}))
    assert json.loads(json.dumps(after["results"])) == before["results"]


def test_embeddings_of_another_checkpoint_are_refused(
    out: Path, clips: Path, make_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    other = make_checkpoint(tmp_path / "other", seed=9)
    folder = tmp_path / "copy"
    shutil.copytree(out, folder)
    with pytest.raises(UserError, match=r"embeddings made otherwise \(checkpoint is"):
        evaluate(config(other, clips, folder))
    assert evaluate(config(other, clips, folder, rerank={"top": 0}), fresh=True)["columns"] == {"dual": "dual encoder"}


def test_a_killed_pass_leaves_nothing_half_written(
    run_folder: Path, clips: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoders, corpus = Encoders.load(run_folder, "cpu"), Corpus.open(clips)
    store = Store(tmp_path / "store", identity_of(encoders, corpus, 0, chunk=4))
    calls = iter(range(100))

    def stop(*_: object) -> None:
        if next(calls) == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        embed_clips(encoders, corpus, store, ["clips", "clips-single"], ["clips"], batch=4, tell=stop)
    for view in ("clips", "clips-single"):
        assert sorted(path.name for path in (store.folder / view).iterdir()) == ["000000", "000001"]
    with pytest.raises(UserError, match=r"2 of 4 pieces of .*/clips are not there"):
        read_clips(store)
    made = (store.folder / "clips/000001/vectors.npy").stat().st_mtime_ns
    embed_clips(encoders, corpus, store, ["clips", "clips-single"], ["clips"], batch=4)
    assert (store.folder / "clips/000001/vectors.npy").stat().st_mtime_ns == made, "what was there is taken"
    assert len(read_clips(store)[0].keys) == len(read_clips(store, "clips-single")[1]) == 13


def test_a_full_disk_is_one_sentence_and_leaves_no_piece(run_folder: Path, clips: Path, tmp_path: Path) -> None:
    encoders, corpus = Encoders.load(run_folder, "cpu"), Corpus.open(clips)
    store = Store(tmp_path / "store", identity_of(encoders, corpus, 0))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8000, hard))  # the system then refuses larger files
    try:
        with pytest.raises(UserError, match="grew past the size"):
            embed_clips(encoders, corpus, store, ["clips"], ["clips"], batch=4)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(store.folder.glob("*/*")) == []


def test_the_first_captions_alone(run_folder: Path, clips: Path, tmp_path: Path) -> None:
    changes = {"data": {"path": str(clips), "workers": 0, "captions": "first"}, "controls": [], "rerank": {"top": 0}}
    result = evaluate(config(run_folder, clips, tmp_path, **changes))
    assert result["protocol"]["captions"] == result["results"]["dual"]["t2v"]["n"] == 13
    assert result["results"]["controls"] == {}


def test_equal_texts_are_encoded_once_and_cut_ones_counted(run_folder: Path, tmp_path: Path) -> None:
    encoders = Encoders.load(run_folder, "cpu")
    store = Store(tmp_path / "store", {"checkpoint": encoders.digest})
    captions = ["Red moves.", "blue goes left", "red  moves", "red " * 30]
    plan = TextPlan(encoders, [*captions, "a caption of a clip that cannot be read"])
    embed_texts(encoders, plan, store, with_states=True)
    table = read_texts(plan, captions, store)
    cleaned = ["red moves", "blue goes left", "red moves", ("red " * 30).strip()]
    assert [table.texts[row] for row in table.text_of_C] == cleaned
    assert (len(table.texts), table.cut) == (3, 1)
    states = read_states(plan, table, store)
    assert states.lengths_U.max() == 12
    for row, text in enumerate(table.texts):
        alone = encoders.texts([text])
        assert np.allclose(table.vectors_UE[row], alone.vectors_BE[0], atol=1e-6)
        with torch.inference_mode():
            started = PairScorer(encoders.model).start(alone.hidden_BLD, alone.mask_BL)[0, : states.lengths_U[row]]
        assert np.allclose(states.take(np.array([row]))[0][0], started, atol=1e-5)


def test_a_stage_1_checkpoint_is_refused(clips: Path, make_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    run = make_checkpoint(tmp_path / "stage1", task="stage1")
    with pytest.raises(UserError, match="stage 1, which has no text encoder"):
        evaluate(config(run, clips, tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_a_folder_that_holds_something_else_is_refused(run_folder: Path, clips: Path, tmp_path: Path) -> None:
    (tmp_path / "embeddings").mkdir()
    (tmp_path / "embeddings" / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match="not empty and holds no embeddings"):
        evaluate(config(run_folder, clips, tmp_path), fresh=True)
    assert (tmp_path / "embeddings" / "thesis.txt").read_text() == "mine"
