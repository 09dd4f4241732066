"""The one training loop, on DeepSpeed for every number of ranks, one CPU process among them.

    videomamba pretrain CONFIG            starts the run, or goes on from its last checkpoint

A task gives a model and losses; nothing here knows which. What a run writes: run_folder.py, metrics_log.py and
checkpoint.py. The position is the step consumed; torch's own generator is seeded at every step from (seed,
step, rank), so a resumed run needs nothing but the checkpoint.
"""

import logging
import signal
import time

import torch

from data_pipeline.draws import derive
from data_pipeline.loader import TrainLoader
from data_pipeline.lost import LostCsv, check_bad_fraction
from pretrain import checkpoint, distributed
from pretrain.config import PretrainConfig, check_world
from pretrain.engine import Engine
from pretrain.finite import require_finite, share
from pretrain.launch import World
from pretrain.metrics_log import MetricsLog
from pretrain.records import Window, record
from pretrain.resume import note_losses, resume, save
from pretrain.run_folder import RunFolder, run_digest
from pretrain.schedule import warmup_cosine
from pretrain.setup import find_tokenizer, pick_device, set_threads
from pretrain.stopping import stop_signals
from pretrain.tasks import Task, build_task

log = logging.getLogger(__name__)


def train(config: PretrainConfig, fresh: bool = False) -> int:
    """Run `config` to its end, from where its folder says; returns the exit code (130 or 143 after a signal).

    Every rank calls this. Raises UserError for what a user can mend, on every rank alike where one rank finds it.
    """
    device = torch.device(pick_device(config))
    set_threads(config)
    world = distributed.init(device.type)
    check_world(config, world.size)
    with RunFolder(config) as folder:
        return _run(config, device, world, folder) if _open(folder, fresh) else 0


def _run(config: PretrainConfig, device: torch.device, world: World, folder: RunFolder) -> int:
    """Build everything, take the steps that are left, and say how it ended as an exit code."""
    task = build_task(config, device, find_tokenizer(config, folder))
    engine = Engine(config, task, world.size)
    step, counted = resume(engine, folder)
    loader = TrainLoader(
        config.data, config.seed, world.rank, world.size, step, config.steps, pin_memory=device.type == "cuda"
    )
    if counted is not None:
        loader.load_state_dict(counted, count=world.first)
    lost = LostCsv(folder.path / "lost.csv")
    if world.first:
        lost.start(step)
    title = f"{config.task} {folder.path.name}"
    with (
        stop_signals() as received,
        MetricsLog(folder.path, step, config.steps, title, config.log.tensorboard, world.first) as metrics,
    ):
        step = _loop(config, task, engine, loader, world, metrics, lost, received, step)
    if step < config.steps:
        log.warning("stopped by a signal at step %d of %d; the same command goes on from there", step, config.steps)
        return 128 + received[0] if received else 128 + signal.SIGTERM
    distributed.barrier()
    if world.first:
        folder.finish({"step": step, "config": run_digest(config), "ranks": world.size})
    return 0


def _loop(
    config: PretrainConfig,
    task: Task,
    engine: Engine,
    loader: TrainLoader,
    world: World,
    metrics: MetricsLog,
    lost: LostCsv,
    received: list[int],
    step: int,
) -> int:
    """Take steps until the end or a signal; returns the step reached, which is saved."""
    optim, every = config.optim, config.checkpoint.every_steps
    window, stopping = Window(), False
    batches = iter(loader)
    while step < config.steps and not stopping:
        began = time.perf_counter()
        batch = next(batches)
        waited = time.perf_counter() - began
        torch.manual_seed(derive(config.seed, "torch", step, world.rank))
        factor = warmup_cosine(step, config.steps, optim.warmup_steps, optim.min_lr / optim.lr)
        rates = engine.set_learning_rates(factor)

        values = engine.backward(batch)
        norm = engine.gradient_norm()
        told = {
            "stopping": bool(received),
            "lost": loader.lost.total(),
            "lost_here": len(batch.losses),
            "seen": loader.seen,
            "waited": waited,
        }
        said = share(values, norm, told, world)
        require_finite(said, values, norm, step, batch)
        engine.step(norm)

        step += 1
        stopping = said.pop("stopping") > 0
        lost_here, seen = int(said.pop("lost_here")), int(said.pop("seen"))
        if lost_here:  # the same number on every rank, so all of them gather, or none
            note_losses(lost, step - 1, batch, world)
        check_bad_fraction(int(said.pop("lost")), seen, config.data.max_bad_fraction)
        window.add(said, len(batch) * world.size, said.pop("waited") / world.size)
        metrics.advance(step)
        if step % config.log.every_steps == 0 or step == config.steps or stopping:
            metrics.write(record(step, window, rates, task, config, world))
            window = Window()
        if stopping or step == config.steps or (every is not None and step % every == 0):
            save(config, task, engine, loader, world, step)
    return step


def _open(folder: RunFolder, fresh: bool) -> bool:
    """Claim the run folder on rank 0; False, on every rank, if the run is finished."""

    def claim() -> None:
        if fresh:
            folder.clear()
        folder.check()
        if folder.done is None:
            folder.claim()

    checkpoint.on_first(claim)
    done = distributed.gather_objects(folder.done is not None)[0]
    if done:
        log.info("%s is finished, nothing to do (--fresh begins again)", folder.path)
    return not done
