"""The one training loop, on DeepSpeed for every number of ranks, one CPU process among them.

    videomamba pretrain CONFIG            starts the run, or goes on from its last checkpoint

A task gives a model and losses; nothing here knows which. What a run writes: run_folder.py, metrics_log.py and
checkpoint/. The position is the step consumed; torch's own generator is seeded at every step from (seed,
step, rank), so a resumed run needs nothing but the checkpoint.
"""

import logging
import time
from dataclasses import dataclass
from typing import Any

import torch

from data_pipeline.loader import Batch, TrainLoader
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
        loop = Loop(config, world, task, engine, loader, lost, meter, metrics, saver, evaluation, requests, step)
        loop.run()
    if world.first:
        requests.obeyed()
    if loop.step < config.steps:
        log.warning("asked to stop at step %d of %d; the same command goes on from there", loop.step, config.steps)
        if world.first and not loop.interrupted:
            tell_unfinished(folder.path, loop.step, config.steps)
        return 130 if loop.interrupted else 0
    distributed.barrier()
    if world.first:
        folder.finish({"step": loop.step, "config": run_digest(config), "ranks": world.size})
    return 0


@dataclass
class Loop:
    """The steps of a run, and what is done at their edges. Every rank has one, and all do the same.

    `step` counts the steps taken; `interrupted` says that a Ctrl-C ended the run.
    """

    config: PretrainConfig
    world: World
    task: Task
    engine: Engine
    loader: TrainLoader
    lost: LostCsv
    meter: Meter
    metrics: MetricsLog
    saver: Saver
    evaluation: Evaluation
    requests: StopRequests
    step: int
    interrupted: bool = False

    def __post_init__(self) -> None:
        self.guard = Guard(self.config, self.engine, self.world)
        self.window = Window()
        self.stopping = False
        self.seen = 0
        self.last: dict[str, Any] = {}  # the newest of every logged number, by which checkpoints are called best

    def run(self) -> None:
        """Take steps until the end or a wish to stop; the step reached is saved."""
        self._heed(_sum_of(distributed.gather_objects(self.requests.told())))
        batches = iter(self.loader)
        while self.step < self.config.steps and not self.stopping:
            began = time.perf_counter()
            batch = next(batches)
            said, rates, taken = self._take(batch, time.perf_counter() - began)
            self.step += 1
            saving = said.pop("saving")
            self._heed(said)
            self._count(batch, said, taken)
            self._tell(rates)
            self._evaluate()
            self.saver.edge(saving)
            self._save()

    def _take(self, batch: Batch, waited: float) -> tuple[dict[str, float], dict[str, float], bool]:
        """One step: what all ranks said of it, the learning rates, and whether it was finite and taken."""
        optim = self.config.optim
        torch.manual_seed(step_seed(self.config, self.step, self.world.rank))
        factor = warmup_cosine(self.step, self.config.steps, optim.warmup_steps, optim.min_lr / optim.lr)
        rates = self.engine.set_learning_rates(factor)
        values = self.engine.backward(batch)
        norm = self.engine.gradient_norm()
        told = {
            **self.requests.told(),
            **self.saver.told(),
            "lost": self.loader.lost.total(),
            "lost_here": len(batch.losses),
            "seen": self.loader.seen,
            "waited": waited,
        }
        said = share(values, norm, told, self.world)
        with self.saver.before_refusing():
            taken = self.guard.passes(said, self.step, batch)
        if taken:
            self.engine.step(norm)
        return said, rates, taken

    def _heed(self, said: dict[str, float]) -> None:
        """Whether any rank was asked to stop, and whether by a Ctrl-C."""
        self.interrupted = said.pop("interrupt") > 0
        self.stopping = said.pop("stop") > 0 or self.interrupted

    def _count(self, batch: Batch, said: dict[str, float], taken: bool) -> None:
        """Bring a step into the sums of the next line, and what it lost into lost.csv."""
        lost_here, lost, self.seen = (int(said.pop(name)) for name in ("lost_here", "lost", "seen"))
        if lost_here:  # the same number on every rank, so all of them gather, or none
            note_losses(self.lost, self.step - 1, batch, self.world)
        with self.saver.before_refusing():
            check_bad_fraction(lost, self.seen, self.config.data.max_bad_fraction)
        clips, waited = len(batch) * self.world.size, said.pop("waited") / self.world.size
        self.window.add(said, clips, waited, self.meter.flops(batch.kind, clips, self.task.words), taken)
        self.window.reached(self.seen, lost)
        self.metrics.advance(self.step)

    def _tell(self, rates: dict[str, float]) -> None:
        """A line of the log, where one is due."""
        if self.step % self.config.log.every_steps == 0 or self._last_step():
            line = record(self.step, self.window, rates, self.task, self.config, self.world, self.meter.peak.flops)
            self.metrics.write(line)
            self.last |= line
            self.window = Window()

    def _evaluate(self) -> None:
        """Zero-shot retrieval, where it is due and nobody waits for us to leave."""
        if self.stopping or not self.evaluation.due(self.step):
            return
        found = self.evaluation.line(self.step, self.seen)
        if found is not None:
            self.metrics.write(found)
            self.last |= found
            self.window.pause(found["seconds"])

    def _save(self) -> None:
        """A checkpoint, where one is due."""
        every = self.config.checkpoint.every_steps
        if self.stopping:
            self.saver.hurry()
        if self._last_step() or (every is not None and self.step % every == 0):
            save(self.saver, self.engine, self.config, self.world, self.step, counters(self.loader), flatten(self.last))

    def _last_step(self) -> bool:
        return self.stopping or self.step == self.config.steps


def _sum_of(told: list[dict[str, float]]) -> dict[str, float]:
    """What ranks told, summed by name."""
    return {name: sum(one[name] for one in told) for name in told[0]}


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
