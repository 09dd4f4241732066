"""`videomamba bench teacher-cache CONFIG`: a training step that reads the teacher's features against one that asks it.

The step is the run's own (losses and backward pass of one micro-batch) on its first batch; the cache is a temporary
one of that batch. Beside the times stands how near the cached features are: the mean cosine of a token's.
"""

import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from configs.errors import UserError
from configs.loader import load_config
from videomamba.bench_table import Row, interleave, report, row

if TYPE_CHECKING:
    from data_pipeline.batches import Batch
    from pretrain.config import PretrainConfig
    from pretrain.models.teacher import TeacherOutput
    from pretrain.teacher_cache import TeacherCache


def measure(run: "PretrainConfig", repeats: int) -> Iterator[Row]:
    """For fp16 and int8: milliseconds a step, and the mean cosine between cached and live features (baseline 1)."""
    import torch
    from torch.nn import functional as F

    from data_pipeline.loader import TrainLoader
    from pretrain.setup import pick_device, set_threads
    from pretrain.tasks import build_task

    assert run.teacher is not None  # the command's rule
    device = torch.device(pick_device(run))
    set_threads(run)
    asked = run.model_copy(update={"teacher": run.teacher.model_copy(update={"cache": None})})
    task = build_task(asked, device, Path(run.tokenizer) if run.tokenizer else None)
    see = task.see
    assert see.teacher is not None  # the run has one
    whole = next(iter(TrainLoader(run.data, run.seed, steps=1)))
    batch = whole.part(0, run.micro_batch or len(whole))
    live = see.teacher(batch.frames.to(device))

    def step() -> float:
        task.model.zero_grad()
        with torch.autocast(device.type, torch.bfloat16, enabled=run.precision == "bf16"):
            loss = torch.stack(list(task.losses(batch).values())).sum()
        loss.backward()
        return float(loss.detach())

    def with_cache(cache: "TeacherCache | None") -> float:
        see.cache = cache
        return step()

    for width in ("fp16", "int8"):
        with tempfile.TemporaryDirectory() as folder:
            cache = _kept(Path(folder), batch, live, width)
            held = cache.read(batch, device)
            near = float(F.cosine_similarity(held.features_JBLC, live.features_JBLC, dim=-1).mean())
            if abs(with_cache(cache) - with_cache(None)) > 0.02:
                raise UserError(f"A step with {width} features gives another loss.", "Please report this.", exit_code=1)
            times = interleave(partial(with_cache, cache), partial(with_cache, None), repeats)
        yield row(f"step of {len(batch)} clips, {width}", *times, "live teacher")
        yield Row(f"features, {width}", round(near, 6), 1.0, "live teacher", "cosine", round(near, 6))


def _kept(folder: Path, batch: "Batch", live: "TeacherOutput", width: str) -> "TeacherCache":
    """A cache of one batch, whose clips become samples 0, 1, ... of it."""
    import torch

    from data_pipeline.feature_cache import FeatureShards, FeatureSpec
    from pretrain.teacher_cache import TeacherCache

    store = FeatureShards(folder, FeatureSpec("bench", len(batch), "", "", width), "")  # type: ignore[arg-type]
    batch.index = torch.arange(len(batch))
    features_BJLC = live.features_JBLC.transpose(0, 1)
    for shard in store.missing():
        start, stop = store.span(shard)
        attention = {} if live.attention_BKN is None else {"attention": live.attention_BKN[start:stop]}
        store.write(shard, range(start, stop), {"features": features_BJLC[start:stop]}, attention)
    return TeacherCache([store] * (batch.corpus + 1))


def teacher_cache(
    config: Annotated[str, typer.Argument(help="A YAML file of stage 1 or 2 whose clips nothing changes.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="Assignments over it.", metavar="[KEY=VALUE]...")
    ] = None,
    repeats: Annotated[int, typer.Option(min=1, help="Timed steps of each.")] = 5,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the result here as well.")] = None,
) -> None:
    """A training step with the teacher's features cached, against one that asks the teacher."""
    from pretrain.config import PretrainConfig
    from pretrain.config_checks import check_inputs

    with tempfile.TemporaryDirectory() as folder:  # named, so that a run whose view changes is refused with its reason
        run = load_config(config, PretrainConfig, [*(overrides or []), f"teacher.cache={folder}"])
    check_inputs(run)
    if run.task == "stage2" and run.tokenizer is None:
        raise UserError("stage2 reads text, and the config names no tokenizer.", "Give tokenizer=FOLDER.")
    report("teacher-cache", list(measure(run, repeats)), json_file)
