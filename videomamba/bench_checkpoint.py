"""`videomamba bench checkpoint`: how long a save keeps training from its next step, against DeepSpeed's own saving.

Both write weights and AdamW's state of one encoder at ZeRO 0. DeepSpeed's `save_checkpoint` pickles them and returns
when the system has taken the bytes; ours besides hashes every file, waits until the disk has them, and names the
checkpoint last. `pause` is the time until the call returns. `added to a run` is how much longer some steps take with
one save among them than without, the save being over at the end.
"""

import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from videomamba.bench_table import Row, report, row

BASELINE = "DeepSpeed's save_checkpoint"
Name = Literal["tiny", "small", "middle", "base"]


class Trained:
    """An encoder under DeepSpeed after its first step, and three ways to save it under `folder`.

    A way begins a save, after which training could go on, and returns what waits for the save's end.
    """

    def __init__(self, name: Name, folder: Path) -> None:
        import torch
        from torch import nn

        from pretrain import distributed
        from pretrain.groups import parameter_groups
        from pretrain.models.config import VisionConfig
        from pretrain.models.videomamba import VideoMamba
        from pretrain.optim import Optimizer
        from pretrain.optim_config import OptimConfig

        device = "cuda" if torch.cuda.is_available() else "cpu"
        distributed.init(device)
        self.folder, self.saves = folder, 0
        self.config = VisionConfig.model_validate({"name": name, "frames": 2, "image_size": 64})
        holder = nn.Module()
        self.model = holder.model = VideoMamba(self.config).to(device)
        self.clip = torch.randn(1, 3, 2, 64, 64, device=device)
        optimizer = Optimizer(parameter_groups(self.model.named_parameters(), OptimConfig()))
        settings = {"train_batch_size": 1, "zero_allow_untested_optimizer": True, "zero_optimization": {"stage": 0}}
        self.engine: Any
        self.engine, *_ = distributed.quiet_deepspeed().initialize(model=holder, optimizer=optimizer, config=settings)
        self.step()
        for parameter in self.model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()

    def step(self) -> None:
        """What training does meanwhile: a forward and a backward pass."""
        self.model(self.clip).tokens_BLD.square().mean().backward()
        if self.clip.is_cuda:
            import torch

            torch.cuda.synchronize()

    def deepspeed(self) -> Callable[[], None]:
        """DeepSpeed's own: everything is done before it returns."""
        self.saves += 1
        self.engine.save_checkpoint(str(self.folder / "deepspeed"), tag=str(self.saves % 2), save_latest=True)
        return lambda: None

    def ours(self, background: bool) -> Callable[[], None]:
        """Ours, beside training or before it goes on."""
        from data_pipeline.preprocess import VisualPreprocess
        from pretrain import checkpoint
        from pretrain.checkpoint_config import CheckpointConfig

        self.saves += 1
        saver = checkpoint.Saver(self.folder, CheckpointConfig(background=background, keep=1))
        model = checkpoint.ModelMeta(kind="vision", vision=self.config)
        meta = checkpoint.Meta(
            step=self.saves, task="bench", config="", ranks=1, zero_stage=0, model=model, versions=checkpoint.versions()
        )
        fed = checkpoint.Preprocess(visual=VisualPreprocess(frames=2, image_size=64))
        saver.save(self.engine, self.model, meta, checkpoint.Surroundings("", fed))
        return saver.finish


def measure(trained: Trained, steps: int, repeats: int) -> Iterator[Row]:
    """Medians of `repeats` turns, in seconds."""
    ways: dict[str, Callable[[], Callable[[], None]]] = {
        "background": lambda: trained.ours(background=True),
        "waiting": lambda: trained.ours(background=False),
        "deepspeed": trained.deepspeed,
    }
    pauses: dict[str, list[float]] = {name: [] for name in ways}
    added: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(repeats + 1):
        alone = _seconds(trained, steps, lambda: lambda: None)[1]
        for name, way in ways.items():
            pause, whole = _seconds(trained, steps, way)
            if turn:  # the first is a warm-up
                pauses[name].append(pause)
                added[name].append(whole - alone)
    for said, times in (("pause", pauses), (f"added to a run of {steps} steps", added)):
        middle = {name: max(1e-4, statistics.median(values)) for name, values in times.items()}
        for name in ("background", "waiting"):
            yield row(f"{said}, {name}", middle[name], middle["deepspeed"], BASELINE, "s")


def _seconds(trained: Trained, steps: int, way: Callable[[], Callable[[], None]]) -> tuple[float, float]:
    """How long `way` takes to return, and how long it takes with `steps` steps after it until all is over."""
    began = time.perf_counter()
    finish = way()
    pause = time.perf_counter() - began
    for _ in range(steps):
        trained.step()
    finish()
    return pause, time.perf_counter() - began


def checkpoint(
    model: Annotated[Name, typer.Option(help="The encoder whose state is saved.")] = "middle",
    steps: Annotated[int, typer.Option(min=1, help="Steps that are taken beside a save.")] = 10,
    repeats: Annotated[int, typer.Option(min=1, help="Timed saves of each.")] = 5,
    folder: Annotated[Path, typer.Option(help="On the disk that is measured; what is written is removed.")] = Path(),
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the result here as well.")] = None,
) -> None:
    """How long a save keeps training waiting, against DeepSpeed's own."""
    with tempfile.TemporaryDirectory(dir=folder) as here:
        report("checkpoint", list(measure(Trained(model, Path(here)), steps, repeats)), json_file)
