"""One global batch of stage 2, cut in every way among ranks and micro-batches: the same losses, the same gradients.

Real processes under gloo, all four losses, negatives of the whole batch, dropout 0, float32.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from configs.loader import validate
from data_pipeline.loader import TrainLoader
from pretrain import stage2
from pretrain.config import PretrainConfig
from pretrain.stage2 import Stage2
from pretrain.tokenizer import train_tokenizer

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")

# argv: config, tokenizer, folder of results; the modules are imported once, and each rank is a fork
RANKS = """
import os, sys
from pathlib import Path
import torch
import torch.distributed as dist
from configs.loader import load_config
from data_pipeline.loader import TrainLoader
from pretrain import distributed
from pretrain.config import PretrainConfig
from pretrain.launch import World, free_port, rank_environment
from pretrain.tasks import build_task

from data_pipeline.torchvision_shim import ensure_torchvision

ensure_torchvision()
import open_clip  # noqa: F401
import transformers.models.bert.modeling_bert  # noqa: F401

config = load_config(sys.argv[1], PretrainConfig, [])

def one_rank(rank, ranks, parts):
    dist.init_process_group("gloo")
    task = build_task(config, torch.device("cpu"), Path(sys.argv[2]))
    task.model.train()
    batch = next(iter(TrainLoader(config.data, 0, rank, ranks, 0, 1)))
    batch.identity[:] = batch.index // 3  # some samples share a medium
    micro = len(batch) // parts
    pieces = [batch] if parts == 1 else [batch.part(n * micro, (n + 1) * micro) for n in range(parts)]
    known = [None] if parts == 1 else task.survey(pieces)
    means = {}
    for piece, about in zip(pieces, known, strict=True):
        losses = task.losses(piece, about)
        (sum(losses.values()) / parts).backward()
        for name, loss in losses.items():
            means[name] = means.get(name, 0) + loss.detach() / parts
    means = {name: distributed.all_reduce_mean(value) for name, value in means.items()}
    grads = {
        name: distributed.all_reduce_mean(torch.zeros_like(p) if p.grad is None else p.grad)
        for name, p in task.model.named_parameters()
    }
    if rank == 0:
        torch.save((means, grads), Path(sys.argv[3]) / f"{ranks}x{parts}.pt")
    distributed.finish()

for ranks, parts in ((1, 1), (1, 4), (2, 2), (4, 1)):
    port, children = free_port(), []
    for rank in range(ranks):
        child = os.fork()
        if child == 0:
            os.environ.update(rank_environment(World(rank, rank, ranks), "127.0.0.1", port))
            code = 1
            try:
                one_rank(rank, ranks, parts)
                code = 0
            finally:
                sys.stdout.flush(), sys.stderr.flush()
                os._exit(code)
        children.append(child)
    assert not any(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children), (ranks, parts)
"""


@pytest.fixture(scope="module")
def words(tmp_path_factory) -> Path:
    captions = [f"a {colour} square moves {way}" for colour in ("red", "green", "blue") for way in ("left", "right")]
    return train_tokenizer(captions, tmp_path_factory.mktemp("words") / "words", 200)


@pytest.fixture(scope="module")
def results(tmp_path_factory, stage2_tree, words):
    folder = tmp_path_factory.mktemp("layouts")
    data = stage2_tree["data"] | {"batch": 8, "train": stage2_tree["data"]["train"][:1]}
    tree = stage2_tree | {
        "precision": "fp32", "out": str(folder), "data": data, "losses": {"matching": {"negatives": "global"}},
    }  # fmt: skip
    (folder / "run.yaml").write_text(yaml.safe_dump(tree))
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", RANKS, str(folder / "run.yaml"), str(words), str(folder)],
        env=environment, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return {path.stem: torch.load(path) for path in folder.glob("*.pt")}


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.parametrize("layout", ["1x4", "2x2", "4x1"])
def test_losses_and_gradients_do_not_depend_on_the_layout(results, layout):
    whole_losses, whole = results["1x1"]
    losses, gradients = results[layout]
    assert set(losses) == {"contrastive", "matching", "mlm", "alignment"}
    for name, value in whole_losses.items():
        assert float(losses[name]) == pytest.approx(float(value), rel=2e-5), name
    assert float(whole["temp"].abs()) > 1e-3
    floor = 1e-6 * max(float(g.norm()) for g in whole.values())  # an attention key's bias has none but rounding
    for name, gradient in whole.items():
        off = float((gradients[name] - gradient).norm())
        assert off <= 2e-4 * float(gradient.norm()) + floor, f"{name}: {off} of {float(gradient.norm())}"


def test_dropout_falls_alike_in_the_survey_and_in_the_replay(runs, stage2_tree, words, monkeypatch):
    tree = stage2_tree | {"precision": "fp32", "text": stage2_tree["text"] | {"dropout": 0.3}}
    config = runs.config(tree, "dropout")
    torch.manual_seed(0)
    task = Stage2(config, CPU, words)
    task.model.train()
    surveyed, replayed = [], []
    cached_gradients, replay = stage2.cached_gradients, stage2.replay
    monkeypatch.setattr(stage2, "cached_gradients", lambda f, *x: surveyed.extend(x) or cached_gradients(f, *x))
    monkeypatch.setattr(stage2, "replay", lambda c, x: replayed.append(x) or replay(c, x))
    batch = next(batch for batch in TrainLoader(config.data, 0, 0, 1, 0, 50) if batch.kind == "video")
    pieces = [batch.part(0, 2), batch.part(2, 4)]
    for piece, about in zip(pieces, task.survey(pieces), strict=True):
        task.losses(piece, about)
    for column in (0, 1):
        torch.testing.assert_close(torch.cat([part[column] for part in replayed]), surveyed[column], rtol=0, atol=0)
    again = task.survey(pieces)[0].contrastive.gradients[1]
    assert not torch.equal(again, task.survey(pieces)[0].contrastive.gradients[1])  # or nothing was dropped


def test_the_survey_passes_over_the_clips_only_where_it_has_to(runs, stage2_tree, words, monkeypatch):
    tree = stage2_tree | {"losses": {"contrastive": {"weight": 0}}}
    config = validate(tree | {"out": "x"}, PretrainConfig, "x")
    task = Stage2(config, CPU, words)
    batch = next(iter(TrainLoader(config.data, 0, 0, 1, 0, 50)))
    monkeypatch.setattr(task.joint.vision_encoder, "forward", lambda *_: pytest.fail("a forward pass for nothing"))
    known = task.survey([batch.part(0, 2), batch.part(2, 4)])
    assert [about.contrastive for about in known] == [None, None]
    assert known[0].asked > 0
