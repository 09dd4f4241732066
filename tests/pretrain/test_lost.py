"""Lost samples in training: both ranks stop together, lost.csv names what was met, a resumed run knows it."""

import csv
import re
import shutil
from pathlib import Path

import pytest

from configs.errors import UserError
from data_pipeline.shards import Corpus
from pretrain import checkpoint, trainer


@pytest.fixture
def damaged(stage1_tree, tmp_path):
    """The stage-1 tree on a copy of its clips of which every sixth is no video."""
    copy = shutil.copytree(stage1_tree["data"]["train"][0]["path"], tmp_path / "damaged")
    corpus = Corpus.open(copy)
    for index in range(0, len(corpus), 6):
        with (copy / corpus.shard(index)).open("r+b") as shard:
            shard.seek(corpus.offset(index))
            shard.write(b"no video")
    data = stage1_tree["data"] | {"train": [{"path": str(copy)}], "max_bad_fraction": 0.5}
    return stage1_tree | {"data": data, "checkpoint": {"every_steps": 2}}


def rows(run: Path):
    with (run / "lost.csv").open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.slow
def test_two_ranks_stop_together_past_the_share(runs, damaged):
    damaged["data"]["max_bad_fraction"] = 0.002  # of a thousand: the third loss is one too many
    done = runs.run(runs.write(damaged, "two"), "--ranks", "2")
    assert done.returncode == 1, done.stderr
    said = re.findall(r"(\d+) of \d+ samples were lost, more than data.max_bad_fraction=0.002 allows", done.stderr)
    assert len(said) == 2, done.stderr  # each rank says so
    assert said[0] == said[1] > "2"
    assert "Traceback" not in done.stderr
    assert not (runs.folder / "two" / "done.json").exists()
    met = rows(runs.folder / "two")
    assert len(met) == int(said[0])
    assert {row["rank"] for row in met} <= {"0", "1"}
    corpus = Corpus.open(damaged["data"]["train"][0]["path"])
    for row in met:
        index = corpus.keys.index(row["key"])
        assert index % 6 == 0
        assert (row["shard"], int(row["offset"])) == (corpus.shard(index), corpus.offset(index))
        assert row["reason"] in ("not_media", "decode_error")


@pytest.mark.usefixtures("alone")
def test_a_resumed_run_knows_the_bad_samples_and_its_list_has_no_row_twice(runs, damaged):
    config = runs.config(damaged | {"steps": 6, "checkpoint": {"every_steps": 2, "keep": 3}}, "one")
    assert trainer.train(config) == 0
    run = runs.folder / "one"
    whole = (run / "lost.csv").read_bytes()
    assert {int(row["step"]) for row in rows(run)} - {0, 1, 2, 3}, "something has to be lost after the resume"
    losses = [line["loss"] for line in runs.log("one")]
    for folder in checkpoint.checkpoints(run)[2:]:
        shutil.rmtree(folder)
    (run / "done.json").unlink()
    meta = checkpoint.read_meta(checkpoint.resolve(run))
    assert meta.step == 4
    keys = Corpus.open(config.data.train[0].path).keys
    met = {keys.index(row["key"]) for row in rows(run) if int(row["step"]) < 4}
    assert [index for _, index, _ in meta.counters["bad"]] == sorted(met)
    assert trainer.train(config) == 0
    assert [row["step"] for row in rows(run)] == [line.split(b",")[0].decode() for line in whole.splitlines()[1:]]
    assert [line["loss"] for line in runs.log("one")] == losses


@pytest.mark.usefixtures("alone")
def test_one_rank_stops_past_the_share_and_the_limit_may_be_raised(runs, damaged):
    damaged["data"]["max_bad_fraction"] = 0.0
    with pytest.raises(UserError, match=r"[12] of \d+ samples were lost") as told:
        trainer.train(runs.config(damaged, "one"))
    assert told.value.exit_code == 1
    assert rows(runs.folder / "one")
    damaged["data"]["max_bad_fraction"] = 0.9
    assert trainer.train(runs.config(damaged, "one")) == 0
