"""Trains configs on one or several ranks: every rank a fork of one process, which has imported everything once.

    python -P on_ranks.py JOBS.json

JOBS is a list of {"config": path, "ranks": n, "overrides": [...], "plant": name or absent}; `plant` names a function of
plants.py that is called in every rank before it trains. Beside each run's log the exit code and what was raised are
left in `said.RANK.json`.
"""

import importlib
import json
import os
import sys
import traceback
from pathlib import Path

import torch

from configs.errors import UserError
from configs.loader import load_config
from data_pipeline.torchvision_shim import ensure_torchvision
from pretrain import trainer
from pretrain.config import PretrainConfig
from pretrain.launch import World, free_port, rank_environment


def import_everything() -> None:
    """What a rank would import by itself, each of them again."""
    ensure_torchvision()
    for name in (
        "open_clip",
        "transformers.models.bert.modeling_bert",
        "deepspeed",
        "deepspeed.runtime.zero.stage3",
        "deepspeed.runtime.zero.stage_1_and_2",
    ):
        importlib.import_module(name)


def one_rank(job: dict, rank: int) -> int:
    """Train as one rank; says how it ended."""
    torch.set_num_threads(1)
    config = load_config(job["config"], PretrainConfig, job.get("overrides", []))
    said = {"code": 1, "error": None}
    try:
        if job.get("plant"):
            getattr(importlib.import_module("plants"), job["plant"])()
        said["code"] = trainer.train(config)
    except UserError as error:
        said |= {"code": error.exit_code, "error": str(error)}
    except BaseException:  # noqa: BLE001
        said["error"] = traceback.format_exc()
    Path(config.out).mkdir(parents=True, exist_ok=True)
    (Path(config.out) / f"said.{rank}.json").write_text(json.dumps(said))
    return 0


def run(job: dict) -> None:
    """Fork the ranks of a job, and wait for all of them."""
    ranks, port, children = job["ranks"], free_port(), []
    for rank in range(ranks):
        child = os.fork()
        if child == 0:
            os.environ.update(rank_environment(World(rank, rank, ranks), "127.0.0.1", port))
            code = 1
            try:
                code = one_rank(job, rank)
            finally:
                sys.stdout.flush(), sys.stderr.flush()
                os._exit(code)
        children.append(child)
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    if any(codes):
        raise SystemExit(f"{job}: {codes}")


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    import_everything()
    for each in json.loads(Path(sys.argv[1]).read_text()):
        run(each)
