"""`videomamba bench plan`: what `videomamba plan` says of a step against what the step really takes, on this CPU.

Seven shapes of run, each through the very engine of the trainer: it is built, and two steps are taken. The
memory compared is the most that torch's CPU allocator had given out at a time, from before the model was built
(weights, optimizer, gradients, batch, graph, and what kernels take for themselves); with ZeRO, DeepSpeed's buffer for
gradients, which is of a fixed 2 GB, is given BUCKET elements on both sides, since it would drown the rest. The FLOPs
are those of a step by torch's own counter, our operators counted from the shapes they are called with
(cost/measure.py).

`held_out` shapes were written down and first run when the estimates were finished.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated, Any
from unittest.mock import patch

import typer

from configs.loader import merge, validate
from videomamba.bench_table import Row, report

if TYPE_CHECKING:
    from data_pipeline.batches import Batch
    from pretrain.config import PretrainConfig

TEXT = {
    "width": 64, "heads": 4, "layers": 2, "fusion_layers": 1, "intermediate": 128, "vocab_size": 256,
    "positions": 64, "max_tokens": 16, "dropout": 0.0,
}  # fmt: skip
BUCKET = 500_000
WORDS = ["a", "red", "square", "moves", "left", "over", "the", "blue", "ball", "then", "it", "stops"]


@dataclass(frozen=True)
class Shape:
    """A run to compare: what its config says beside the common part, its clips, and its teacher's sizes, if any."""

    config: dict[str, Any]
    side: int
    frames: int
    clips: int
    teacher: dict[str, int] = field(default_factory=dict)
    held_out: bool = False


SHAPES: dict[str, Shape] = {
    "stage 1, attention mask": Shape(
        {"task": "stage1", "vision": {"depth": 4, "width": 128}, "mask": {"kind": "attention", "ratio": 0.8}},
        side=112, frames=8, clips=8, teacher={"width": 64, "layers": 3},
    ),
    "stage 2, masked, tubelets": Shape(
        {
            "task": "stage2", "embed": 64, "text": TEXT, "vision": {"depth": 3, "width": 96, "tubelet": 2},
            "mask": {"kind": "attention", "ratio": 0.5},
        },
        side=112, frames=8, clips=8, teacher={"width": 64, "layers": 3},
    ),
    "stage 2, unmasked, conv stem": Shape(
        {
            "task": "stage2", "embed": 64, "text": TEXT | {"attention": "eager"},
            "vision": {"depth": 2, "width": 128, "stem": "conv", "stem_width": 32},
            "losses": {"alignment": {"weight": 0}},
        },
        side=128, frames=4, clips=6,
    ),
    "stage 1, both orders, float32, Muon": Shape(
        {
            "task": "stage1", "vision": {"depth": 3, "width": 160, "tubelet": 2, "scan_order": "st_full", "d_state": 8},
            "mask": {"kind": "tube", "ratio": 0.6}, "precision": "fp32", "optim": {"method": "muon", "clip_norm": 1.0},
        },
        side=96, frames=4, clips=6, teacher={"width": 96, "layers": 2},
    ),
    "stage 2, micro-batches, ZeRO 1": Shape(
        {
            "task": "stage2", "embed": 48, "text": TEXT | {"layers": 1, "fusion_layers": 2, "width": 96, "heads": 6},
            "vision": {"depth": 3, "width": 144}, "losses": {"alignment": {"weight": 0}, "mlm": {"every": 2}},
            "micro_batch": 4, "deepspeed": "zero1",
        },
        side=80, frames=6, clips=12, held_out=True,
    ),
    "stage 1, checkpointed, two layers": Shape(
        {
            "task": "stage1",
            "vision": {"depth": 6, "width": 128, "stem": "conv", "align_layers": 2, "checkpoint_blocks": True},
            "mask": {"kind": "random", "ratio": 0.3}, "teacher": {"layers": 2},
        },
        side=128, frames=4, clips=6, teacher={"width": 48, "layers": 4}, held_out=True,
    ),
    "stage 2, two orders by turns, global negatives": Shape(
        {
            "task": "stage2", "embed": 32, "text": TEXT | {"layers": 3, "checkpoint_layers": True},
            "vision": {"depth": 4, "width": 96, "scan_order": ["spatial_first", "temporal_first"], "drop_path": 0.1},
            "losses": {"matching": {"negatives": "global"}}, "mask": {"kind": "frame_row", "ratio": 0.5},
            "micro_batch": 5, "optim": {"ema_decay": 0.99},
        },
        side=96, frames=8, clips=10, teacher={"width": 32, "layers": 2}, held_out=True,
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Compared:
    """Estimate and measurement of a shape, in FLOPs and bytes."""

    flops: float
    flops_measured: float
    memory: float
    memory_measured: float


def plan(
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the result here as well.")] = None,
) -> None:
    """Planned against measured: FLOPs and peak memory of a step of seven shapes of run, on this CPU."""
    report("plan", list(measure()), json_file)


def measure() -> Iterator[Row]:
    """Two rows a shape."""
    for name, shape in SHAPES.items():
        found = compare(shape)
        title = f"{name} (held out)" if shape.held_out else name
        for what, ours, measured, unit in (
            ("FLOPs", found.flops / 1e9, found.flops_measured / 1e9, "GFLOP"),
            ("memory", found.memory / 1e6, found.memory_measured / 1e6, "MB"),
        ):
            row_name = f"{what}, {title}"
            yield Row(row_name, round(ours, 3), round(measured, 3), "measured", unit, round(measured / ours, 3))


def compare(shape: Shape) -> Compared:
    """Plan and take a step of a shape, in this process."""
    with TemporaryDirectory() as folder:
        config = build_config(shape, Path(folder))
        (flops, memory), (counted, allocated) = _planned(config), _taken(config, shape, Path(folder))
        return Compared(flops, counted, memory, allocated)


def build_config(shape: Shape, folder: Path) -> "PretrainConfig":
    """The run of a shape, its teacher written into `folder`."""
    from pretrain.config import PretrainConfig

    clips = {"image_size": shape.side, "frames": shape.frames}
    tree: dict[str, Any] = {
        "out": str(folder / "run"), "steps": 10, "device": "cpu",
        "vision": {"patch_size": 16, **clips},
        "data": {
            "train": [{"path": "none"}], "batch": shape.clips, "image_size": shape.side,
            "frames": {"count": shape.frames},
        },
    }  # fmt: skip
    if shape.teacher:
        tree["teacher"] = {"source": str(_write_teacher(shape, folder / "teacher"))}
    return validate(merge(tree, shape.config), PretrainConfig, "shape")


def _write_teacher(shape: Shape, folder: Path) -> Path:
    """An untrained CLIP in a folder as open_clip writes it."""
    from safetensors.torch import save_file

    from data_pipeline.torchvision_shim import ensure_torchvision

    ensure_torchvision()
    from open_clip.model import CLIP

    settings: dict[str, Any] = {
        "embed_dim": 48,
        "vision_cfg": {"image_size": shape.side, "patch_size": 16, "head_width": 16, **shape.teacher},
        "text_cfg": {"context_length": 16, "vocab_size": 64, "width": 32, "heads": 2, "layers": 1},
    }
    folder.mkdir()
    save_file(dict(CLIP(**settings).state_dict()), folder / "open_clip_model.safetensors")
    described = {"model_cfg": settings, "preprocess_cfg": {"size": [shape.side, shape.side], "mode": "RGB"}}
    (folder / "open_clip_config.json").write_text(json.dumps(described))
    return folder


def _planned(config: "PretrainConfig") -> tuple[float, float]:
    """FLOPs and bytes of a step on one CPU, as `videomamba plan` counts them."""
    from pretrain.cost.memory import gradient_buffers, memory
    from pretrain.cost.plan import cut, dry_run_of, flops_of, muon_parameters

    words = TEXT["max_tokens"]
    assert isinstance(words, int)
    micro, parts = cut(config, "video", 1)
    run = dry_run_of(config, "video", words, 1, gpu=False)
    needed = memory(config, run, muon_parameters(config, words), 1, micro, parts, gpu=False)
    usual = gradient_buffers(config, 4 * run.trained, 1)
    flops = sum(part.model + part.beside for part in flops_of(config, "video", words, 1))
    return flops, needed.total - usual + (4 * BUCKET if config.zero_stage else 0)


def _taken(config: "PretrainConfig", shape: Shape, folder: Path) -> tuple[float, float]:
    """The same as measured."""
    import torch

    from pretrain import distributed, engine
    from pretrain.cost.measure import allocated, counted_flops
    from pretrain.tasks import build_task
    from pretrain.tokenizer import train_tokenizer

    distributed.init("cpu")
    train_tokenizer([" ".join(WORDS)], folder / "tokenizer", 256)
    held: list[Any] = []

    def step() -> None:
        trained, batch = held
        trained.set_learning_rates(1.0)
        trained.backward(batch)
        trained.step(trained.gradient_norm())

    def build_and_step() -> None:
        task = build_task(config, torch.device("cpu"), folder / "tokenizer")
        held.extend((engine.Engine(config, task, 1), make_batch(config, shape)))
        step()
        step()

    settings = engine.settings

    def with_small_buffers(*arguments: Any) -> dict[str, Any]:
        said = settings(*arguments)
        return merge(said, {"zero_optimization": {"reduce_bucket_size": BUCKET}})

    with patch.object(engine, "settings", with_small_buffers):
        peak = allocated(build_and_step).peak
    return sum(counted_flops(step).values()), float(peak)


def make_batch(config: "PretrainConfig", shape: Shape) -> "Batch":
    """Noise for clips, each with a caption as long as the config reads."""
    import torch

    from pretrain.cost.paper import paper_batch

    batch = paper_batch(config, "video", shape.clips)
    batch.frames.random_(0, 256)
    batch.seeds, batch.identity = torch.arange(shape.clips), torch.arange(shape.clips)
    batch.captions = [" ".join(WORDS[number % 7 :] + WORDS) for number in range(shape.clips)]
    return batch
