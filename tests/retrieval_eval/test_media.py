"""Media by name: what belongs to which entry, and an evaluation of a test set over a folder, faults included."""

import json
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import numpy as np
import pytest
import torch

from configs.errors import UserError
from configs.loader import validate
from data_pipeline.decode import decode_video
from data_pipeline.schema import LossReason, SampleError
from data_pipeline.shards import Corpus
from retrieval_eval.benchmarks import Entry
from retrieval_eval.config import RetrievalConfig
from retrieval_eval.embed import read_clips
from retrieval_eval.encoders import Encoders
from retrieval_eval.evaluate import evaluate
from retrieval_eval.media import BenchmarkCorpus, match
from retrieval_eval.store import Store, read_identity


def places(names: list[str], files: list[str]) -> list[int | str]:
    return match([Entry(name, ("a",)) for name in names], files)


def test_files_belong_to_entries_by_name_with_or_without_extension() -> None:
    assert places(["video7020", "b.mov", "-_x_1_2"], ["sub/-_x_1_2.avi", "b.mov", "video7020.MP4"]) == [2, 1, 0]
    assert places(["b.mov"], ["b.mp4"]) == [0], "a file that was converted"
    assert places(["1010_T_00.41.32.072-00.41.40.196"], ["1010_T_00.41.32.072-00.41.40.196.avi"]) == [0]
    assert places(["flickr_429505c4de."], ["flickr_429505c4de.mp4"]) == [0], "DiDeMo's names that end in a dot"


def test_two_names_with_one_stem_do_not_share_a_file() -> None:
    assert places(["x.mov", "x.mp4"], ["x.mp4", "x.mov"]) == [1, 0]
    assert places(["x.mov", "x.mp4"], ["x.mp4"]) == ["x.mp4 is another video of the set", 0]


def test_what_is_not_there_says_why() -> None:
    assert places(["a"], ["b.mp4"]) == ["no file is called a"]
    assert places(["a"], ["one/a.mp4", "two/a.avi"]) == ["2 files are called a, and none of them a"]


@pytest.fixture(scope="module")
def folder(clips: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The clips of the test corpus as files, the sixth no video, and a list that names one more."""
    folder = tmp_path_factory.mktemp("files")
    corpus = Corpus.open(clips)
    listed = []
    for i in range(len(corpus)):
        sample = corpus.read(i)
        (folder / f"{sample.key}.mp4").write_bytes(sample.media)
        listed.append({"video": f"{sample.key}.mp4", "caption": list(sample.captions)})
    listed.insert(3, {"video": "gone.mp4", "caption": "a video that nobody has"})
    (folder / "list.json").write_text(json.dumps(listed))
    return folder


def config(run: Path, folder: Path, media: Path, out: Path, **data: Any) -> RetrievalConfig:
    tree = {"type": "processed", "annotations": str(folder / "list.json"), "media": str(media), "workers": 0}
    tree = {"checkpoint": str(run), "data": tree | {"max_tokens": 12} | data, "out": str(out), "batch": 4}
    return validate(tree | {"device": "cpu", "bootstrap": 0, "controls": []}, RetrievalConfig, "test")


def test_a_folder_and_shards_give_the_same_numbers_and_name_what_is_missing(
    run_folder: Path, folder: Path, clips: Path, tmp_path: Path
) -> None:
    files = evaluate(config(run_folder, folder, folder, tmp_path / "files"))
    shards = evaluate(config(run_folder, folder, clips, tmp_path / "shards"))
    plain = {"checkpoint": str(run_folder), "data": {"path": str(clips), "workers": 0}, "out": str(tmp_path / "plain")}
    plain |= {"batch": 4, "device": "cpu", "bootstrap": 0, "controls": []}
    corpus = evaluate(validate(plain, RetrievalConfig, "test"))
    assert files["results"] == shards["results"] == corpus["results"]
    for result in (files, shards):
        assert result["status"] == "partial"
        lost = {loss["clip"].split(" ")[0]: loss["reason"] for loss in result["missing"]}
        assert lost == {"gone.mp4": "missing_file", "clip005.mp4": "not_media"}
    benchmark = files["protocol"]["benchmark"]
    assert (benchmark["type"], benchmark["key"], benchmark["videos"]) == ("processed", "name", 15)
    assert len(benchmark["files"]["list.json"]) == 64


def test_the_sets_token_limit_decides_and_is_bounded_by_the_model(
    run_folder: Path, folder: Path, tmp_path: Path
) -> None:
    evaluate(config(run_folder, folder, folder, tmp_path / "long", max_tokens=30))
    evaluate(config(run_folder, folder, folder, tmp_path / "short", max_tokens=5))
    stores = [tmp_path / name / "embeddings" for name in ("long", "short")]
    texts = [np.load(next(store.glob("texts-*/000000/vectors.npy"))) for store in stores]
    assert len({read_identity(store)["text"] for store in stores}) == 2
    assert not np.allclose(texts[0], texts[1])
    with pytest.raises(UserError, match="up to 77 tokens, the checkpoint's text tower 32"):
        evaluate(config(run_folder, folder, folder, tmp_path / "too_long", max_tokens=77))


def test_only_the_first_seconds_are_seen(run_folder: Path, folder: Path, tmp_path: Path) -> None:
    """The clips last 1.5 s at 8 frames a second; of half a second there are four frames, all of which are seen."""
    evaluate(config(run_folder, folder, folder, tmp_path / "whole"))
    evaluate(config(run_folder, folder, folder, tmp_path / "part", first_seconds=0.5))
    whole, part = (np.load(tmp_path / name / "embeddings/clips/000000/vectors.npy") for name in ("whole", "part"))
    assert not np.allclose(whole, part)
    encoders = Encoders.load(run_folder, "cpu")
    file = decode_video((folder / "clip001.mp4").read_bytes(), lambda n, seconds: np.arange(4))
    frames = torch.from_numpy(file).permute(3, 0, 1, 2)[None]
    assert np.allclose(encoders.clips(frames).vectors_BE.numpy()[0], part[1], atol=1e-5)


def test_a_changed_file_is_another_corpus(run_folder: Path, folder: Path, tmp_path: Path) -> None:
    media = tmp_path / "media"
    media.mkdir()
    for path in folder.glob("*.mp4"):
        (media / path.name).write_bytes(path.read_bytes())
    entries = [Entry("clip000.mp4", ("a",)), Entry("clip001.mp4", ("b",))]
    before = BenchmarkCorpus(entries, media)
    assert BenchmarkCorpus(entries, media).digest == before.digest
    assert BenchmarkCorpus([entries[0], Entry("clip001.mp4", ("c",))], media).digest != before.digest
    (media / "clip001.mp4").write_bytes((media / "clip002.mp4").read_bytes() + b"x")
    assert BenchmarkCorpus(entries, media).digest != before.digest
    (media / "clip001.mp4").unlink()
    with pytest.raises(SampleError) as lost:
        before.read(1)
    assert lost.value.reason == LossReason.MISSING_FILE


def test_a_folder_without_media_and_one_without_the_sets_own(run_folder: Path, folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="There is no folder of media"):
        evaluate(config(run_folder, folder, tmp_path / "no", tmp_path / "out"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="holds no media files"):
        evaluate(config(run_folder, folder, tmp_path / "empty", tmp_path / "out"))
    (tmp_path / "empty/other.mp4").write_bytes(b"x")
    with pytest.raises(UserError, match="Not one of the 15 videos of this set is in"):
        evaluate(config(run_folder, folder, tmp_path / "empty", tmp_path / "out"))


def test_check_data_names_what_is_missing_and_opens_no_checkpoint(
    videomamba: Callable[..., CompletedProcess[str]], folder: Path
) -> None:
    arguments = ("eval", "retrieval/msrvtt", "--check-data", "data.type=processed")
    found = videomamba(*arguments, f"data.annotations={folder / 'list.json'}", f"data.media={folder}")
    assert found.returncode == 1, found.stderr
    assert "processed: 22 sentences, 15 videos, 14 found" in found.stdout
    assert "missing gone.mp4: no file is called gone.mp4" in found.stdout


def test_a_store_remembers_clips_in_the_sets_order(run_folder: Path, folder: Path, tmp_path: Path) -> None:
    evaluate(config(run_folder, folder, folder, tmp_path))
    identity = {k: v for k, v in read_identity(tmp_path / "embeddings").items() if k != "format"}
    clips, vectors = read_clips(Store(tmp_path / "embeddings", identity))
    assert clips.keys == [f"clip{n:03d}.mp4" for n in range(14) if n != 5]
    assert len(vectors) == 13


def test_one_text_on_many_videos_is_scored_once_and_ties(run_folder: Path, folder: Path, tmp_path: Path) -> None:
    """MSR-VTT has texts that stand on two or three videos: their scores are equal to the last bit, in both columns."""
    texts = {"clip000": "A man talks.", "clip001": "a man talks", "clip002": "a man  talks!", "clip003": "a dog runs"}
    (tmp_path / "list.json").write_text(json.dumps([{"video": f"{v}.mp4", "caption": t} for v, t in texts.items()]))
    evaluate(config(run_folder, tmp_path, folder, tmp_path / "out"))
    with np.load(tmp_path / "out/ranks.npz") as ranks:
        for scoring in ("dual", "reranked"):
            t2v, v2t = ranks[f"{scoring}.t2v"], ranks[f"{scoring}.v2t"]
            assert sorted(t2v[:3]) in ([1, 2, 3], [1, 2, 4], [1, 3, 4], [2, 3, 4]), "three queries of one text"
            # of three equal texts one's own stands second among them: alone at the top, or behind the fourth
            assert set(v2t[:3]) <= {2.0, 3.0}
            assert v2t[3] in (1.0, 4.0)
