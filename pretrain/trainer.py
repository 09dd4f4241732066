"""The one training loop, on DeepSpeed for every number of ranks, one CPU process among them.

    videomamba pretrain CONFIG            starts the run, or goes on from its last checkpoint

A task gives a model and losses; nothing here knows which. What a run writes: run_folder.py, metrics_log.py and
checkpoint.py. The position is the step consumed; torch's own generator is seeded at every step from (seed,
step, rank), so a resumed run needs nothing but the checkpoint.
"""

import logging
import math
import os
import resource
import signal
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from configs.errors import UserError
from data_pipeline.draws import derive
from data_pipeline.loader import Batch, TrainLoader
from data_pipeline.lost import LostCsv, check_bad_fraction
from pretrain import checkpoint, distributed
from pretrain.config import PretrainConfig, check_world
from pretrain.engine import Engine
from pretrain.launch import World
from pretrain.metrics_log import MetricsLog, Window
from pretrain.run_folder import RunFolder, run_digest
from pretrain.schedule import warmup_cosine
from pretrain.tasks import Task, build_task
from pretrain.tokenizer import train_tokenizer

log = logging.getLogger(__name__)

ECHO = 2.0  # seconds


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
    task = build_task(config, device, _tokenizer(config, folder))
    engine = Engine(config, task, world.size)
    step, counted = _resume(engine, folder)
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


def describe(config: PretrainConfig, ranks: int) -> list[str]:
    """What the run would train on, built and opened as it would be but not started; UserError where it could not."""
    from data_pipeline.loader import open_order

    check_world(config, ranks)
    RunFolder(config).check()
    order = open_order(config.data, config.seed)
    order.batch(0)
    lines = [
        f"{config.task}, {config.steps} steps of {config.data.batch} samples on {ranks} rank(s), {config.deepspeed}"
    ]
    lines += [f"corpus {corpus.name}: {corpus.size} {corpus.kind}s" for corpus in order.corpora]
    if config.text is not None and config.tokenizer is None:
        return [*lines, "the tokenizer will be trained from the captions when the run starts"]
    task = build_task(config, torch.device("cpu"), None if config.tokenizer is None else Path(config.tokenizer))
    lines += [
        f"parameters {group['name']}: {sum(p.numel() for p in group['params']):,} ({group['method']}, "
        f"lr {group['lr']:g}, weight decay {group['weight_decay']:g})"
        for group in task.parameter_groups()
    ]
    return [*lines, "this run can start"]


def pick_device(config: PretrainConfig) -> str:
    """cpu or cuda. Raises UserError if cuda is asked for and not there."""
    if config.device == "cuda" and not torch.cuda.is_available():
        raise UserError("device=cuda, but torch sees no GPU here.", "Use device=cpu, or see `videomamba doctor`.")
    if config.device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return config.device


def set_threads(config: PretrainConfig) -> None:
    """Torch's threads for this rank: as the config or OMP_NUM_THREADS says, else the cores shared by the ranks here."""
    if config.threads is None and "OMP_NUM_THREADS" in os.environ:
        return
    here = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("WORLD_SIZE") or 1)
    torch.set_num_threads(config.threads or max(1, len(os.sched_getaffinity(0)) // here))


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


def _tokenizer(config: PretrainConfig, folder: RunFolder) -> Any:
    """The folder of the run's tokenizer, trained by rank 0 from the corpora's captions where none is given."""
    if config.text is None:
        return None
    if config.tokenizer is not None:
        return Path(config.tokenizer)
    own, vocab_size = folder.path / "tokenizer", config.text.vocab_size

    def make() -> None:
        if not own.is_dir():
            from data_pipeline.shards import Corpus

            captions = (
                config.text_preprocess.clean_caption(caption)
                for corpus in config.data.train
                for meta in Corpus.open(corpus.path, config.data.remote).metas()
                for caption in meta["captions"]
            )
            train_tokenizer(captions, own, vocab_size)

    checkpoint.on_first(make)
    return own


def _resume(engine: Engine, folder: RunFolder) -> tuple[int, dict[str, Any] | None]:
    """Load the newest whole checkpoint, if there is one; the step to go on from, and the loader's counters."""
    found: list[Any] = [None]

    def look() -> None:
        found[0] = checkpoint.newest_whole(folder.path)

    checkpoint.on_first(look)
    newest = distributed.gather_objects(found[0])[0]
    if newest is None:
        return 0, None
    step = checkpoint.restore(engine.deepspeed, newest)
    log.info("going on from %s", newest)
    return step, checkpoint.read_meta(newest).counters


def share(values: dict[str, Tensor], norm: Tensor, told: dict[str, float], world: World) -> dict[str, float]:
    """The losses' means over ranks by name (`loss/...`), the norm, and the sums over ranks of what each has `told`."""
    numbers = [*values.values(), norm.to(torch.float32).reshape(())]
    names = [*(f"loss/{name}" for name in values), "grad_norm"]
    if world.size == 1:
        return dict(zip(names, torch.stack(numbers).tolist(), strict=True)) | told
    row = torch.cat([torch.stack(numbers).double().cpu(), torch.tensor([*told.values()], dtype=torch.float64)])
    total = distributed.all_reduce_sum(row.to(norm.device)).tolist()
    means = {name: value / world.size for name, value in zip(names, total[: len(names)], strict=True)}
    return means | dict(zip(told, total[len(names) :], strict=True))


def require_finite(said: dict[str, float], values: dict[str, Tensor], norm: Tensor, step: int, batch: Batch) -> None:
    """Raise UserError on every rank, naming ranks, step and sample keys, unless all losses and the norm are finite."""
    if all(math.isfinite(value) for value in said.values()):
        return
    bad = [name for name, value in values.items() if not bool(value.isfinite())]
    mine = (bad, batch.keys[:8])
    everyone = distributed.gather_objects(mine)
    ranks = {number: entry for number, entry in enumerate(everyone) if entry[0]}
    if ranks:
        seen = "; ".join(f"rank {n}: {', '.join(names)} of {', '.join(keys)}" for n, (names, keys) in ranks.items())
        cause = f"A loss is not finite at step {step} ({seen})."
    else:
        keys = ", ".join(everyone[0][1])
        cause = f"The gradient norm is {float(norm)} at step {step}, with finite losses (rank 0's samples: {keys})."
    raise UserError(
        f"{cause} The step was not applied; the last checkpoint stands.",
        "Lower the learning rate, set optim.clip_norm, or use precision=fp32, with another out=.",
        exit_code=1,
    )


def record(
    step: int, window: Window, rates: dict[str, float], task: Task, config: PretrainConfig, world: World
) -> dict[str, Any]:
    """A line of the log, as metrics_log.py describes it."""
    means = window.means()
    losses = {name.removeprefix("loss/"): value for name, value in means.items() if name.startswith("loss/")}
    return {
        "step": step,
        "loss": sum(losses.values()),
        "losses": losses,
        "metrics": {name: float(value) for name, value in task.metrics.items()},
        "lr": rates,
        "grad_norm": means["grad_norm"],
        **window.rates(world.size, config.steps - step),
        "memory_mb": peak_memory_mb(),
    }


def peak_memory_mb() -> float:
    """The most memory used so far: of the GPU where there is one, else of this process."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def save(config: PretrainConfig, task: Task, engine: Engine, loader: TrainLoader, world: World, step: int) -> None:
    """A checkpoint at `step`; every rank calls this."""
    meta = checkpoint.Meta(
        step=step,
        task=config.task,
        config=run_digest(config),
        ranks=world.size,
        zero_stage=config.zero_stage,
        model=task.meta,
        counters=counters(loader),
        versions=checkpoint.versions(),
    )
    checkpoint.save(engine.deepspeed, task.model, config, meta, task.preprocess, task.tokenizer_folder)


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


@contextmanager
def stop_signals() -> Iterator[list[int]]:
    """Collect SIGINT and SIGTERM, so that the loop stops at a step's edge; a second one stops at once.

    One Ctrl-C may come twice, from the terminal to its whole process group and from the launcher, which passes it on:
    what comes within ECHO seconds of the first is the first.
    """
    received: list[int] = []
    first = 0.0

    def take(number: int, _: Any) -> None:
        nonlocal first
        if received and time.monotonic() - first > ECHO:
            raise KeyboardInterrupt
        first = first if received else time.monotonic()
        received.append(number)

    previous = {number: signal.signal(number, take) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
