"""Finding clips by a sentence: the order of the dual score, and the checkpoint that made the index or none."""

import json
import shutil
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from configs.errors import UserError
from data_pipeline.loader import EvalLoader
from retrieval_eval.approximate import build
from retrieval_eval.encoders import Encoders
from retrieval_eval.search import Searcher, embed_corpus, find, write_index
from retrieval_eval.store import RowWriter, Store, read_rows


@pytest.fixture(scope="module")
def index(run_folder: Path, clips: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("search") / "index"
    assert embed_corpus(clips, out, run_folder, batch=5, device="cpu") == 13
    return out


def test_hits_are_the_best_dual_scores(index: Path, run_folder: Path, clips: Path) -> None:
    encoders = Encoders.load(run_folder, "cpu")
    batches = list(EvalLoader(clips, encoders.visual, 4))
    clips_VE = np.concatenate([encoders.clips(batch.frames).vectors_BE.numpy() for batch in batches])
    keys = [key for batch in batches for key in batch.keys]
    scores_V = clips_VE @ encoders.texts(["A blue square moves right!"]).vectors_BE.numpy()[0]
    best = np.argsort(-scores_V)[:4]
    hits = find("A blue square moves right!", index, top=4, device="cpu")
    assert [hit.key for hit in hits] == [keys[row] for row in best]
    assert [hit.score for hit in hits] == pytest.approx(scores_V[best].tolist(), abs=1e-5)
    assert len(find("blue", index, top=100, device="cpu")) == 13


def test_another_checkpoint_is_refused(index: Path, make_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    other = make_checkpoint(tmp_path / "other", seed=5)
    with pytest.raises(UserError, match="is not the checkpoint that made"):
        find("red", index, checkpoint=other, device="cpu")


def test_an_index_whose_checkpoint_moved_says_so(index: Path, tmp_path: Path) -> None:
    said = json.loads((index / "source.json").read_text())
    (index / "source.json").write_text(json.dumps(said | {"checkpoint": str(tmp_path / "gone")}))
    with pytest.raises(UserError, match="holds no checkpoint"):
        find("red", index, device="cpu")
    assert find("red", index, 1, Path(said["checkpoint"]), "cpu")[0].key.startswith("clip")


def test_an_index_that_was_built_is_asked_and_says_its_recall(index: Path, run_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(index, folder)
    before = find("a red square", folder, 13, run_folder, "cpu")
    assert Searcher.open(folder, run_folder, "cpu").kind == "flat"
    found = write_index(folder, "hnsw")
    assert (found.percent, found.queries) == (100.0, 13), "a graph of 13 vectors misses none"
    searcher = Searcher.open(folder, run_folder, "cpu")
    assert searcher.kind == "hnsw"
    assert searcher.find("a red square", top=13) == before
    assert json.loads((folder / "index/index.json").read_text())["recall"]["percent"] == 100.0
    with pytest.raises(UserError, match="13 vectors are too few"):
        write_index(folder, "ivfpq")
    (folder / "index/index.faiss").write_bytes(build("hnsw", np.eye(4, 16, dtype=np.float32)).to_bytes())
    with pytest.raises(UserError, match="holds 4 vectors, the embeddings 13"):
        Searcher.open(folder, run_folder, "cpu")


def test_rows_survive_and_a_cut_file_is_refused(tmp_path: Path) -> None:
    rows = np.random.default_rng(0).standard_normal((7, 3, 2)).astype(np.float16)
    with RowWriter(tmp_path / "rows.f16", np.float16) as writer:
        writer.write(rows[:4])
        writer.write(rows[4:])
    assert (read_rows(tmp_path / "rows.f16") == rows).all()
    with (tmp_path / "rows.f16").open("r+b") as file:
        file.truncate(50)
    with pytest.raises(UserError, match="has 50 bytes, not 84"):
        read_rows(tmp_path / "rows.f16")


def test_a_store_of_another_format_names_what_differs(tmp_path: Path) -> None:
    Store(tmp_path / "store", {"checkpoint": "a", "corpus": "b"})
    Store(tmp_path / "store", {"checkpoint": "a", "corpus": "b"})
    with pytest.raises(UserError, match="corpus is b there and c here"):
        Store(tmp_path / "store", {"checkpoint": "a", "corpus": "c"})


def test_an_index_that_was_killed_goes_on_where_it_was(
    python: Callable[..., subprocess.CompletedProcess[str]], index: Path, run_folder: Path, clips: Path, tmp_path: Path
) -> None:
    out = tmp_path / "index"
    script = (
        "import os, signal\nfrom pathlib import Path\nfrom retrieval_eval.search import embed_corpus\n"
        "def tell(what, done, total):\n    if done >= 8:\n        os.kill(os.getpid(), signal.SIGKILL)\n"
        f"embed_corpus(Path({str(clips)!r}), Path({str(out)!r}), Path({str(run_folder)!r}), batch=2, device='cpu',\n"
        "             tell=tell, chunk=4)\n"
    )
    assert python("-c", script).returncode == -signal.SIGKILL
    made = {path: path.stat().st_mtime_ns for path in out.rglob("vectors.npy")}
    assert len(made) == 2, "two chunks of four clips"
    assert embed_corpus(clips, out, run_folder, batch=2, device="cpu", chunk=4) == 13
    assert {path: path.stat().st_mtime_ns for path in made} == made, "what was finished was not made again"
    again, whole = Searcher.open(out, run_folder, "cpu"), Searcher.open(index, run_folder, "cpu")
    assert again.clips == whole.clips
    assert again.vectors_VE == pytest.approx(whole.vectors_VE, abs=1e-6)
