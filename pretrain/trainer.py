"""The one training loop, on DeepSpeed for every number of ranks, one CPU process among them.

    videomamba pretrain CONFIG            starts the run, or goes on from its last checkpoint

A task gives a model and losses; nothing here knows which. What a run writes: run_folder.py, metrics_log.py and
checkpoint.py. The position is the step consumed; torch's own generator is seeded at every step from (seed,
step, rank), so a resumed run needs nothing but the checkpoint.
"""

import logging
import time
from typing import Any

import torch

from data_pipeline.loader import TrainLoader
from data_pipeline.lost import LostCsv, check_bad_fraction
from pretrain import distributed
from pretrain.checkpoint import Saver
from pretrain.config import PretrainConfig
from pretrain.config_checks import check_world
from pretrain.cost.meter import Meter
from pretrain.engine import Engine
from pretrain.evaluation import Evaluation, Factory
from pretrain.finite import Guard, share, step_seed
from pretrain.launch import World
from pretrain.length import resolve_length
from pretrain.metrics_log import MetricsLog, flatten
from pretrain.records import Window, record
from pretrain.resume import counters, note_losses, resume, save
from pretrain.run_folder import RunFolder, run_digest
from pretrain.schedule import warmup_cosine
from pretrain.setup import check_compiler, find_tokenizer, pick_device, set_threads
from pretrain.stopping import Signals, StopRequests, listening, tell_unfinished
from pretrain.tasks import Task, build_task

log = logging.getLogger(__name__)


def train(
    config: PretrainConfig, fresh: bool = False, heard: Signals | None = None, evaluator: Factory | None = None
) -> int:
    """Run `config` to its end, from where its folder says, or until it is asked to stop (stopping.py).

    Returns the exit code: 0, or 130 after a Ctrl-C. Every rank calls this. `heard` are signals that the caller has
    been listening to; `evaluator` makes what `config.evaluate` asks for (evaluation.py). Raises UserError for what a
    user can mend, on every rank alike where one rank finds it.
    """
    if heard is None:
        with listening() as heard:
            return train(config, fresh, heard, evaluator)
    config = resolve_length(config)
    device = torch.device(pick_device(config))
    check_compiler(config, device.type)
    set_threads(config)
    world = distributed.init(device.type)
    check_world(config, world.size)
    with RunFolder(config) as folder:
        return _run(config, device, world, folder, heard, evaluator) if _open(folder, fresh) else 0


def _run(
    config: PretrainConfig,
    device: torch.device,
    world: World,
    folder: RunFolder,
    heard: Signals,
    evaluator: Factory | None,
) -> int:
    """Build everything, take the steps that are left, and say how it ended as an exit code."""
    task = build_task(config, device, find_tokenizer(config, folder))
    requests = StopRequests(heard, folder.path, world.first)
    evaluation = Evaluation(config, task, evaluator, requests, device)
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
    meter = Meter(config, task.see, device)
    if world.first:
        meter.announce()
    with (
        MetricsLog(folder.path, step, config, world.first) as metrics,
        Saver(folder.path, config.checkpoint) as saver,
    ):
        step, interrupted = _loop(
            config, task, engine, loader, world, meter, metrics, lost, saver, evaluation, requests, step
        )
    if world.first:
        requests.obeyed()
    if step < config.steps:
        log.warning("asked to stop at step %d of %d; the same command goes on from there", step, config.steps)
        if world.first and not interrupted:
            tell_unfinished(folder.path, step, config.steps)
        return 130 if interrupted else 0
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
    meter: Meter,
    metrics: MetricsLog,
    lost: LostCsv,
    saver: Saver,
    evaluation: Evaluation,
    requests: StopRequests,
    step: int,
) -> tuple[int, bool]:
    """Take steps until the end or a wish to stop; the step reached, which is saved, and whether by a Ctrl-C."""
    optim, every = config.optim, config.checkpoint.every_steps
    window, guard, line = Window(), Guard(config, engine, world), dict[str, Any]()
    stopping, interrupted = _agreed(requests)
    batches = iter(loader)
    while step < config.steps and not stopping:
        began = time.perf_counter()
        batch = next(batches)
        waited = time.perf_counter() - began
        torch.manual_seed(step_seed(config, step, world.rank))
        factor = warmup_cosine(step, config.steps, optim.warmup_steps, optim.min_lr / optim.lr)
        rates = engine.set_learning_rates(factor)

        values = engine.backward(batch)
        norm = engine.gradient_norm()
        told = {
            **requests.told(),
            **saver.told(),
            "lost": loader.lost.total(),
            "lost_here": len(batch.losses),
            "seen": loader.seen,
            "waited": waited,
        }
        said = share(values, norm, told, world)
        saving = said.pop("saving")
        with saver.before_refusing():
            taken = guard.passes(said, step, batch)
        if taken:
            engine.step(norm)

        step += 1
        interrupted = said.pop("interrupt") > 0
        stopping = said.pop("stop") > 0 or interrupted
        lost_here, lost_all, seen = (int(said.pop(name)) for name in ("lost_here", "lost", "seen"))
        if lost_here:  # the same number on every rank, so all of them gather, or none
            note_losses(lost, step - 1, batch, world)
        with saver.before_refusing():
            check_bad_fraction(lost_all, seen, config.data.max_bad_fraction)
        clips, waited = len(batch) * world.size, said.pop("waited") / world.size
        window.add(said, clips, waited, meter.flops(batch.kind, clips, task.words), taken)
        window.reached(seen, lost_all)
        metrics.advance(step)
        if step % config.log.every_steps == 0 or step == config.steps or stopping:
            metrics.write(told_now := record(step, window, rates, task, config, world, meter.peak.flops))
            line |= told_now
            window = Window()
        if evaluation.due(step) and not stopping and (found := evaluation.line(step, seen)) is not None:
            line |= found
            metrics.write(found)
            window.pause(found["seconds"])
        saver.edge(saving)
        if stopping:
            saver.hurry()
        if stopping or step == config.steps or (every is not None and step % every == 0):
            save(saver, engine, config, world, step, counters(loader), flatten(line))
    return step, interrupted


def _agreed(requests: StopRequests) -> tuple[bool, bool]:
    """Before the first step: whether any rank was asked to stop, and whether by a Ctrl-C."""
    told = distributed.gather_objects(requests.told())
    interrupted = any(one["interrupt"] for one in told)
    return interrupted or any(one["stop"] for one in told), interrupted


def _open(folder: RunFolder, fresh: bool) -> bool:
    """Claim the run folder on rank 0; False, on every rank, if the run is finished."""

    def claim() -> None:
        if fresh:
            folder.clear()
        folder.check()
        if folder.done is None:
            folder.claim()

    distributed.on_first(claim)
    done = distributed.gather_objects(folder.done is not None)[0]
    if done:
        log.info("%s is finished, nothing to do (--fresh begins again)", folder.path)
    return not done
