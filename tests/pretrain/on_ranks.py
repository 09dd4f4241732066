"""Trains configs on one or several ranks: every rank a fork of one process, which has imported everything once.

`train_all` is for tests; it starts this file as a program. Beside each run's log, every rank leaves its exit code and
what was raised in `said.RANK.json`.
"""

import importlib
import json
import os
import subprocess
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple


class Job(NamedTuple):
    """A run to train, or to go on with, on some ranks. `plant`: a function of plants.py that every rank calls first."""

    name: str
    ranks: int
    tree: dict[str, Any]
    plant: str | None = None


def train_all(runs: Any, jobs: Sequence[Job]) -> None:
    """Train each job in `runs.folder`/name, one after the other."""
    listed = [{"config": str(runs.write(job.tree, job.name)), "ranks": job.ranks, "plant": job.plant} for job in jobs]
    plan = runs.folder / "jobs.json"
    plan.write_text(json.dumps(listed))
    done = subprocess.run(
        [sys.executable, "-P", "-m", "tests.pretrain.on_ranks", str(plan)],
        env=runs.environment(), capture_output=True, text=True, timeout=380, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]


def said(runs: Any, name: str) -> list[dict[str, Any]]:
    """How each rank of a job ended: its exit `code`, and the `error` if there was one."""
    return [json.loads(path.read_text()) for path in sorted((runs.folder / name).glob("said.*.json"))]


def _import_everything() -> None:
    """What a rank would import by itself, each of them again."""
    from data_pipeline.torchvision_shim import ensure_torchvision

    ensure_torchvision()
    for name in (
        "open_clip",
        "transformers.models.bert.modeling_bert",
        "deepspeed",
        "deepspeed.runtime.zero.stage3",
        "deepspeed.runtime.zero.stage_1_and_2",
        "pretrain.trainer",
    ):
        importlib.import_module(name)


def _one_rank(job: dict[str, Any]) -> None:
    """Train as one rank, and leave a word of how it ended."""
    import torch

    from configs.errors import UserError
    from configs.loader import load_config
    from pretrain import trainer
    from pretrain.config import PretrainConfig

    torch.set_num_threads(1)
    config = load_config(job["config"], PretrainConfig, [])
    ended: dict[str, Any] = {"code": 1, "error": None}
    try:
        if job["plant"]:
            getattr(importlib.import_module("tests.pretrain.plants"), job["plant"])()
        ended["code"] = trainer.train(config)
    except UserError as error:
        ended |= {"code": error.exit_code, "error": str(error)}
    except BaseException:  # noqa: BLE001
        ended["error"] = traceback.format_exc()
    Path(config.out).mkdir(parents=True, exist_ok=True)
    (Path(config.out) / f"said.{os.environ['RANK']}.json").write_text(json.dumps(ended))


def _run(job: dict[str, Any]) -> None:
    """Fork the ranks of a job, and wait for all of them."""
    from pretrain.launch import World, free_port, rank_environment

    ranks, port, children = job["ranks"], free_port(), []
    for rank in range(ranks):
        child = os.fork()
        if child == 0:
            os.environ.update(rank_environment(World(rank, rank, ranks), "127.0.0.1", port))
            code = 1
            try:
                _one_rank(job)
                code = 0
            finally:
                sys.stdout.flush(), sys.stderr.flush()
                os._exit(code)
        children.append(child)
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    if any(codes):
        raise SystemExit(f"{job}: {codes}")


if __name__ == "__main__":
    _import_everything()
    for each in json.loads(Path(sys.argv[1]).read_text()):
        _run(each)
