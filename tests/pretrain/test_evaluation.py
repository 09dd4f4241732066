"""In-loop evaluation: the numbers are those of `videomamba eval`, and training is bit for bit what it was without."""

import copy
import signal

import pytest
import torch
from safetensors.torch import load_file

from configs.errors import UserError
from configs.loader import validate
from pretrain import trainer
from pretrain.checkpoint import resolve
from retrieval_eval.config import RetrievalConfig
from retrieval_eval.evaluate import evaluate
from videomamba.joined import Joined

MEASURED = ("grad_norm", "loss", "losses", "lr", "metrics", "samples", "step")


@pytest.fixture
def tree(stage2_tree, corpora):
    """A stage-2 run with dropout, which draws from torch's generator, measured after its second and fourth step."""
    asked = {
        "every_steps": 2, "config": "demo/retrieval",
        "overrides": [f"data.path={corpora['video']}", "data.workers=0", "batch=5", "text_batch=7", "threads=1"],
    }  # fmt: skip
    text = {**stage2_tree["text"], "dropout": 0.1}
    return copy.deepcopy(stage2_tree) | {"text": text, "steps": 4, "checkpoint": {"every_steps": 2}, "evaluate": asked}


def steps_of(runs, name):
    return [{key: line[key] for key in MEASURED} for line in runs.log(name) if "loss" in line]


def evaluations(runs, name):
    return {line["step"]: line["evaluation"] for line in runs.log(name) if "evaluation" in line}


@pytest.mark.usefixtures("alone")
def test_training_is_the_same_with_and_without(runs, tree):
    assert trainer.train(runs.config(tree, "with"), evaluator=Joined().evaluator) == 0
    assert trainer.train(runs.config(tree | {"evaluate": None}, "without")) == 0
    assert steps_of(runs, "with") == steps_of(runs, "without")
    ours, theirs = (load_file(resolve(runs.folder / name) / "model.safetensors") for name in ("with", "without"))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert list(evaluations(runs, "with")) == [2, 4]


@pytest.mark.usefixtures("alone")
def test_numbers_are_those_of_the_evaluation_of_the_checkpoint(runs, tree, corpora):
    assert trainer.train(runs.config(tree, "run"), evaluator=Joined().evaluator) == 0
    asked = {
        "checkpoint": str(runs.folder / "run"), "data": {"path": corpora["video"], "workers": 0},
        "out": str(runs.folder / "eval"), "rerank": {"top": 0}, "controls": [], "bootstrap": 0, "threads": 1,
    }  # fmt: skip
    result = evaluate(validate(asked, RetrievalConfig, "asked"))
    column = result["results"]["dual"]
    found = evaluations(runs, "run")[4]
    for way in ("t2v", "v2t"):
        for name in ("R@1", "R@5", "R@10", "MedR", "MeanR"):
            assert found[f"{way}_{name}"] == pytest.approx(column[way][name])


@pytest.mark.usefixtures("alone")
def test_the_best_checkpoint_is_kept_by_a_number_of_it(runs, tree):
    tree["checkpoint"] |= {"keep": 1, "keep_best": "evaluation/t2v_R@1"}
    made = iter([90.0, 10.0])
    factory = lambda config, task: lambda stopping: {"t2v_R@1": next(made)}  # noqa: E731
    assert trainer.train(runs.config(tree, "best"), evaluator=factory) == 0
    kept = sorted(path.name for path in (runs.folder / "best" / "checkpoints").glob("step-*"))
    assert kept == ["step-0000002", "step-0000004"]  # the best, and the last


@pytest.mark.usefixtures("alone")
def test_a_signal_during_it_is_obeyed(runs, tree):
    rounds = []

    def factory(config, task):
        evaluator = Joined().evaluator(config, task)

        def measured(stopping):
            def asked():
                if len(rounds) == 1:
                    signal.raise_signal(signal.SIGTERM)
                rounds.append(1)
                return stopping()

            return evaluator(asked)

        return measured

    assert trainer.train(runs.config(tree, "cut"), evaluator=factory) == 0
    assert len(rounds) == 2  # it stopped between two batches, of five and more
    assert evaluations(runs, "cut") == {}
    assert not (runs.folder / "cut" / "done.json").exists()
    assert trainer.train(runs.config(tree, "cut"), evaluator=Joined().evaluator) == 0
    assert [line["step"] for line in steps_of(runs, "cut")] == [1, 2, 3, 4]


@pytest.mark.usefixtures("alone")
def test_a_trainer_without_an_evaluator_refuses_the_wish_for_one(runs, tree):
    with pytest.raises(UserError, match="nobody gave the trainer an evaluator"):
        trainer.train(runs.config(tree, "none"))


def test_a_test_set_that_is_missing_is_said_before_the_run_begins(runs, tree):
    tree["evaluate"]["overrides"][0] = "data.path=nowhere"
    done = runs.run(runs.write(tree, "missing"))
    assert done.returncode == 2
    assert "nowhere" in done.stderr
    assert not (runs.folder / "missing").exists()


@pytest.mark.slow
def test_two_ranks_measure_together(runs, tree):
    """Each rank half of the clips and texts; the recalls are those of one rank, for the weights are the same."""
    tree = tree | {"text": {**tree["text"], "dropout": 0.0}, "precision": "fp32"}
    for name, ranks in (("one", "1"), ("two", "2")):
        done = runs.run(runs.write(tree, name), "--ranks", ranks)
        assert done.returncode == 0, done.stderr
    one, two = evaluations(runs, "one")[2], evaluations(runs, "two")[2]
    assert one == pytest.approx(two)
