"""Where a run's lines go: TensorBoard, wandb offline, the console without a terminal, and what a line holds."""

import copy
import logging
import sys

import pytest
import torch

from configs.errors import ConfigError, UserError
from pretrain import trainer
from pretrain.cost.devices import find_peak
from pretrain.cost.step import step_flops
from pretrain.metrics_log import MetricsLog, flatten, read_log
from pretrain.tasks import build_task

pytestmark = pytest.mark.usefixtures("alone")


@pytest.fixture
def exact(stage1_tree):
    return copy.deepcopy(stage1_tree) | {"precision": "fp32", "steps": 3, "checkpoint": {}}


def line(step, **more):
    return {
        "step": step, "samples": 4 * step, "loss": 1.0, "losses": {"alignment": 1.0}, "metrics": {}, "lr": {"all": 0.1},
        "grad_norm": 2.0, "skipped": 0, "lost": 0, "step_s": 0.5, "clips_per_s": 8.0, "clips_per_s_device": 8.0,
        "data_wait": 0.25, "tflops_device": 0.01, "mfu": 0.2, "eta_s": 65.0, "memory_mb": 10.0, "memory_now_mb": 9.0,
        **more,
    }  # fmt: skip


def test_utilisation_is_flops_over_time_and_peak(runs, exact, monkeypatch):
    peak = find_peak(torch.device("cpu"), "fp32")
    monkeypatch.setattr("pretrain.cost.meter.find_peak", lambda *_: peak)
    config = runs.config(exact, "ours")
    assert trainer.train(config) == 0
    see = build_task(config, torch.device("cpu")).see
    from pretrain.cost.measure import frame_flops

    parts = step_flops(config, see.vision, "video", 4, None, frame_flops(see.teacher))
    for number, said in enumerate(runs.log("ours"), start=1):
        flops = sum(part.model for part in parts)
        assert said["tflops_device"] * 1e12 * said["step_s"] == pytest.approx(flops)
        assert said["mfu"] == pytest.approx(said["tflops_device"] * 1e12 / peak.flops)
        assert 0 < said["mfu"] < 1
        assert said["samples"] == 4 * number
        assert (said["lost"], said["skipped"], said["start"]) == (0, 0, 0)
        assert 0 < said["memory_now_mb"] <= 1.05 * said["memory_mb"]  # two readings of the system, a moment apart


def test_a_peak_that_is_not_known_is_null_with_a_reason(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Some GPU")
    found = find_peak(torch.device("cuda"), "bf16")
    assert found.flops is None
    assert "'Some GPU' is not in the table" in found.source
    assert find_peak(torch.device("cuda"), "fp32").flops is None


def test_wandb_offline_goes_on_in_the_same_run(runs, exact):
    pytest.importorskip("wandb")
    exact["log"] = {"tensorboard": False, "wandb": {"project": "p", "mode": "offline"}}
    config = runs.config(exact, "kept")
    folder = runs.folder / "kept"
    folder.mkdir()
    for start, step in ((0, 2), (1, 2)):
        with MetricsLog(folder, start, config) as log:
            log.write(line(step))
    identity = (folder / "wandb_id").read_text()
    kept = list((folder / "wandb").glob(f"offline-run-*-{identity}"))
    assert len(kept) == 2 or len(list(kept[0].glob("*.wandb"))) >= 1
    assert [one["start"] for one in read_log(folder)] == [1]


def test_wandb_that_is_not_installed_is_said_in_a_sentence(runs, exact, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    exact["log"] = {"tensorboard": False, "wandb": {"project": "p", "mode": "offline"}}
    (runs.folder / "none").mkdir()
    with pytest.raises(UserError, match="wandb is not installed") as error:
        MetricsLog(runs.folder / "none", 0, runs.config(exact, "none")).__enter__()
    assert "videomamba[wandb]" in error.value.cure


def test_the_console_says_evaluations_and_nothing_else_without_a_terminal(runs, exact, caplog):
    folder = runs.folder / "said"
    folder.mkdir()
    exact["log"] = {"tensorboard": True}
    with caplog.at_level(logging.INFO), MetricsLog(folder, 0, runs.config(exact, "said")) as log:
        log.advance(1)
        log.write(line(1))
        log.write({"step": 1, "samples": 4, "evaluation": {"t2v_R@1": 12.5, "t2v_MedR": 3.0}, "seconds": 1.0})
    said = [record.getMessage() for record in caplog.records if record.name.startswith("pretrain")]
    assert len(said) == 2
    assert "loss 1.000" in said[0]
    assert "MFU 20%" in said[0]
    assert said[1].endswith("zero-shot t2v R@1 12.5")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tensorboard")).Reload()
    assert {"loss", "mfu", "losses/alignment", "evaluation/t2v_R@1"} <= set(events.Tags()["scalars"])
    assert flatten(read_log(folder)[1])["evaluation/t2v_MedR"] == 3.0


def test_stage_1_is_refused_an_evaluation_at_once(runs, exact):
    exact["evaluate"] = {"every_steps": 2, "config": "demo/retrieval"}
    with pytest.raises(ConfigError, match="stage1 has no text tower") as error:
        runs.config(exact, "no")
    assert "Leave evaluate out" in str(error.value)
