"""Where a run stands: saved at a step, found again, with the counters of what its data lost."""

import logging
from collections import Counter
from typing import Any

from configs.loader import to_yaml
from data_pipeline.loader import Batch, TrainLoader
from data_pipeline.lost import LostCsv
from pretrain import checkpoint, distributed
from pretrain.config import PretrainConfig
from pretrain.engine import Engine
from pretrain.launch import World
from pretrain.run_folder import RunFolder, run_digest

log = logging.getLogger(__name__)


def resume(engine: Engine, folder: RunFolder) -> tuple[int, dict[str, Any] | None]:
    """Load the newest whole checkpoint, if there is one; the step to go on from, and the loader's counters."""
    found: list[Any] = [None]

    def look() -> None:
        found[0] = checkpoint.newest_whole(folder.path)

    distributed.on_first(look)
    newest = distributed.gather_objects(found[0])[0]
    if newest is None:
        return 0, None
    meta = checkpoint.restore(engine.deepspeed, engine.task.model, newest)
    if engine.ema is not None:
        engine.ema.load_state_dict(checkpoint.stored_ema(newest))
    log.info("going on from %s", newest)
    ranks, stage = distributed.world_size(), engine.stage
    if (meta.ranks, meta.zero_stage) != (ranks, stage):
        log.info("written by %d ranks at ZeRO %d, now %d at ZeRO %d", meta.ranks, meta.zero_stage, ranks, stage)
    return meta.step, meta.counters


def save(
    saver: checkpoint.Saver,
    engine: Engine,
    config: PretrainConfig,
    world: World,
    step: int,
    counted: dict[str, Any],
    metrics: dict[str, float],
) -> None:
    """Begin a checkpoint at `step`; `metrics` are numbers of that step by name. Every rank calls this."""
    task = engine.task
    meta = checkpoint.Meta(
        step=step,
        task=config.task,
        config=run_digest(config),
        ranks=world.size,
        zero_stage=config.zero_stage,
        model=task.meta,
        counters=counted,
        metrics=metrics,
        versions=checkpoint.versions(),
    )
    beside = checkpoint.Surroundings(to_yaml(config), task.preprocess, task.tokenizer_folder)
    average = None if engine.ema is None else engine.ema.state_dict()
    saver.save(engine.deepspeed, task.model, meta, beside, average)


def counters(loader: TrainLoader) -> dict[str, Any]:
    """What all ranks together have seen, lost and found bad; after a resume rank 0 goes on counting from it."""
    states = distributed.gather_objects(loader.state_dict())
    lost: Counter[str] = Counter()
    for state in states:
        lost.update(state["lost"])
    bad = sorted({tuple(sample) for state in states for sample in state["bad"]})
    return {"seen": sum(state["seen"] for state in states), "lost": dict(lost), "bad": bad}


def note_losses(lost: LostCsv, step: int, batch: Batch, world: World) -> None:
    """Bring what all ranks lost in a step into the run's lost.csv; every rank calls this."""
    by_rank = distributed.gather_objects(batch.losses)
    if world.first:
        lost.add(step, by_rank)
