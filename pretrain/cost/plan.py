"""A run on paper: what it needs of each device, how long it takes and what it moves, before anything is submitted.

Parameters and memory come from a dry run of the very modules (dry_run.py), FLOPs from formulas (step.py); how long a
step takes follows from a utilisation that whoever asks has to state, since no formula knows it.
"""

import math
from collections import Counter
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from configs.errors import ConfigError
from data_pipeline.remote import is_address
from data_pipeline.schema import Kind
from pretrain.config import PretrainConfig
from pretrain.config_checks import check_world, micro_batch
from pretrain.cost.devices import Device
from pretrain.cost.dry_run import DryRun, dry_run
from pretrain.cost.measure import frame_flops
from pretrain.cost.memory import Memory, memory, network_bytes
from pretrain.cost.paper import fake_tensors, fill_with_fakes, paper_task, teacher_on_paper
from pretrain.cost.step import Part, muon_flops, step_flops

ROOM = 0.95
"""The share of a device's memory that a plan may fill: the rest is lost between the allocator's blocks."""
SAMPLED_STEPS = 2000


@dataclass(frozen=True)
class Asked:
    """What the reader of a plan states: devices, the share of their peak that is reached, and caption lengths."""

    gpus: int
    device: Device
    utilisation: float
    words: int | None = None


@dataclass(frozen=True)
class CorpusShare:
    """A corpus in a plan: what it holds, and what a rank sees of it."""

    path: str
    kind: Kind
    shards: int
    samples: int
    per_rank: float
    epochs: float


@dataclass(frozen=True)
class Plan:
    """Every figure of a plan; bytes, FLOPs and seconds as plain numbers."""

    gpus: int
    device: Device
    parameters: int
    batch: int
    micro_batch: int
    micro_batches: int
    memory: Memory
    memory_other: Memory
    """With activation checkpointing if the config has none, else without."""
    checkpointed: bool
    flops: dict[Kind, list[Part]]
    kinds: dict[Kind, float]
    """The share of steps that are of this kind."""
    utilisation: float
    step_seconds: float
    steps: int
    network: dict[str, float]
    checkpoint_bytes: int
    data: list[CorpusShare]
    notes: list[str]

    @property
    def days(self) -> float:
        """The whole run, in days."""
        return self.steps * self.step_seconds / 86400

    @property
    def fits(self) -> bool:
        """Whether every device has the memory, with a little room."""
        return self.memory.total <= ROOM * self.device.memory

    def tree(self) -> dict[str, Any]:
        """All of it as what JSON can hold."""
        return asdict(self) | {"memory_bytes": self.memory.total, "fits": self.fits, "days": self.days}


def make_plan(config: PretrainConfig, asked: Asked) -> Plan:
    """The plan of a run on so many devices. Raises UserError for a batch or a teacher that cannot be."""
    notes: list[str] = []
    check_world(config, asked.gpus)
    config, corpora, kinds = _with_data(config, asked.gpus, notes)
    words = asked.words or (config.text.max_tokens if config.text is not None else 1)
    micro, parts = cut(config, "video" if "video" in kinds else "image", asked.gpus)
    needed, run = _needed(config, kinds, words, asked.gpus)
    other, _ = _needed(_checkpointed(config, not config.vision.checkpoint_blocks), kinds, words, asked.gpus)
    flops = {kind: flops_of(config, kind, words, asked.gpus) for kind in kinds}
    done = sum(kinds[kind] * (part.model + part.beside) for kind, found in flops.items() for part in found)
    muon = muon_parameters(config, words)
    plan = Plan(
        gpus=asked.gpus,
        device=asked.device,
        parameters=run.parameters,
        batch=config.data.batch,
        micro_batch=micro,
        micro_batches=parts,
        memory=needed,
        memory_other=other,
        checkpointed=config.vision.checkpoint_blocks,
        flops=flops,
        kinds=kinds,
        utilisation=asked.utilisation,
        step_seconds=done / (asked.utilisation * asked.device.peak * asked.gpus),
        steps=config.steps,
        network=network_bytes(config, run, asked.gpus, config.data.batch // asked.gpus, parts),
        checkpoint_bytes=checkpoint_bytes(config, run, muon),
        data=corpora,
        notes=notes,
    )
    return replace(plan, notes=[*notes, *_advice(plan, config)])


def flops_of(config: PretrainConfig, kind: Kind, words: int, ranks: int) -> list[Part]:
    """The FLOPs of a step of a kind, of all ranks together."""
    teacher = teacher_on_paper(config)
    frame = 0.0
    if teacher is not None and not _cached(config):
        with fake_tensors(gpu=False):
            fill_with_fakes(teacher.visual)
            frame = frame_flops(teacher)
    align = teacher.width if teacher is not None and config.losses.alignment.weight else 0
    built = config.vision.model_copy(update={"align_width": align})
    in_parts = cut(config, kind, ranks)[1] > 1
    found = step_flops(config, built, kind, config.data.batch_of(kind), words, frame, in_parts)
    shapes = muon_shapes(config, words)
    return [*found, muon_flops(shapes)] if shapes else found


def dry_run_of(config: PretrainConfig, kind: Kind, words: int, ranks: int, gpu: bool) -> DryRun:
    """The dry run of a step of a kind on one of so many ranks."""
    micro, parts = cut(config, kind, ranks)
    return dry_run(config, kind, micro, words, gpu, rounds=min(parts, 2))


def _cached(config: PretrainConfig) -> bool:
    return config.teacher is not None and config.teacher.cache is not None


def cut(config: PretrainConfig, kind: Kind, ranks: int) -> tuple[int, int]:
    """A rank's micro-batch of a kind, and how many of them a step has."""
    share = config.data.batch_of(kind) // ranks
    micro = micro_batch(config, share)
    return micro, share // micro


def _checkpointed(config: PretrainConfig, wanted: bool) -> PretrainConfig:
    """The run with or without activation checkpointing, in both towers."""
    vision = config.vision.model_copy(update={"checkpoint_blocks": wanted})
    text = None if config.text is None else config.text.model_copy(update={"checkpoint_layers": wanted})
    return config.model_copy(update={"vision": vision, "text": text})


def _needed(config: PretrainConfig, kinds: dict[Kind, float], words: int, ranks: int) -> tuple[Memory, DryRun]:
    """The memory of the kind of step that takes the most, and its dry run."""
    muon, found = muon_parameters(config, words), []
    for kind in kinds:
        micro, parts = cut(config, kind, ranks)
        run = dry_run_of(config, kind, words, ranks, gpu=True)
        found.append((memory(config, run, muon, ranks, micro, parts, gpu=True), run))
    return max(found, key=lambda pair: pair[0].total)


def muon_shapes(config: PretrainConfig, words: int) -> list[tuple[int, ...]]:
    """The matrices that Muon updates, by the rules of groups.py."""
    if config.optim.method != "muon":
        return []
    groups = paper_task(config, words, teacher_on_paper(config)).parameter_groups()
    return [tuple(p.shape) for group in groups if group["method"] == "muon" for p in group["params"]]


def muon_parameters(config: PretrainConfig, words: int) -> int:
    """How many numbers Muon updates."""
    return sum(math.prod(shape) for shape in muon_shapes(config, words))


def checkpoint_bytes(config: PretrainConfig, run: DryRun, muon: int) -> int:
    """What one checkpoint takes on disk: the weights, the optimizer's state and the average, in float32."""
    moments = 2 * (run.trained - muon) + muon
    return 4 * (run.parameters + moments + (run.trained if config.optim.ema_decay else 0))


def _with_data(
    config: PretrainConfig, ranks: int, notes: list[str]
) -> tuple[PretrainConfig, list[CorpusShare], dict[Kind, float]]:
    """The run with its length in steps, its corpora, and which share of the steps is of which kind.

    Corpora that are not on this machine are not asked; then a length in epochs cannot be planned.
    """
    away = [one.path for one in config.data.train if not is_address(one.path) and not Path(one.path).is_dir()]
    if away:
        notes.append(f"{', '.join(away)} is not on this machine: samples, shards and epochs are left out")
        if config.epochs:
            raise ConfigError(
                f"The run is {config.epochs:g} epochs long, and {away[0]} is not here to be counted.",
                "Plan where the shards are, or give steps=N epochs=null.",
            )
        if config.samples:
            config = config.model_copy(update={"steps": config.samples // config.data.batch, "samples": None})
        return config, [], _shares_on_paper(config, notes)
    from data_pipeline.loader import open_order
    from pretrain.length import resolve_length

    config = resolve_length(config)
    order = open_order(config.data, config.seed)
    steps = min(config.steps, SAMPLED_STEPS)
    visits = Counter(order.corpus_of(step) for step in range(steps))
    corpora: list[CorpusShare] = []
    kinds: dict[Kind, float] = dict.fromkeys((item.kind for item in config.data.train), 0.0)
    for place, (item, known) in enumerate(zip(config.data.train, order.corpora, strict=True)):
        share = visits[place] / steps
        kinds[item.kind] += share
        shown = share * config.steps * config.data.batch_of(item.kind)
        corpora.append(
            CorpusShare(item.path, item.kind, len(known.shard_sizes), known.size, shown / ranks, shown / known.size)
        )
    return config, corpora, {kind: share for kind, share in kinds.items() if share}


def _shares_on_paper(config: PretrainConfig, notes: list[str]) -> dict[Kind, float]:
    """Kinds by the corpora's weights; where they have none, every step is taken for the dearest kind."""
    train = config.data.train
    kinds: dict[Kind, float] = {}
    if all(item.weight is not None for item in train):
        total = sum(item.weight or 0.0 for item in train)
        for item in train:
            kinds[item.kind] = kinds.get(item.kind, 0.0) + (item.weight or 0.0) / total
        return kinds
    kind: Kind = "video" if any(item.kind == "video" for item in train) else "image"
    if len({item.kind for item in train}) > 1:
        notes.append("steps of images cannot be told from those of clips without the corpora: all are taken for clips")
    return {kind: 1.0}


def _advice(plan: Plan, config: PretrainConfig) -> list[str]:
    """Where a plan does not fit: what would."""
    if plan.fits:
        return []
    limit = ROOM * plan.device.memory
    said = [
        f"does not fit: {plan.memory.total / 1e9:.1f} GB of {plan.device.memory / 1e9:.0f} GB "
        f"({ROOM:.0%} of which can be filled)"
    ]
    if not plan.checkpointed and plan.memory_other.total <= limit:
        said.append(
            f"vision.checkpoint_blocks=true would fit ({plan.memory_other.total / 1e9:.1f} GB), "
            "for a second forward pass of the blocks"
        )
    activations = plan.memory.parts.get("activations", 0)
    room = limit - (plan.memory.total - activations)
    micro = int(plan.micro_batch * room / activations) if activations else 0
    if micro >= 1:
        fitting = max(n for n in range(1, micro + 1) if (plan.batch // plan.gpus) % n == 0)
        said.append(f"micro_batch={fitting} would fit, as would about {-(-plan.batch // micro)} GPUs with this batch")
    elif config.zero_stage < 3:
        said.append(f"deepspeed=zero{config.zero_stage + 1} spreads more of what is there in every step")
    else:
        said.append("neither smaller micro-batches nor ZeRO make room enough: use a GPU with more memory")
    return said
