"""`videomamba bench loader`: what the loader delivers, what resuming costs, and whether its memory stays flat.

Rows: `1-worker` against `pyav` (a bare loop over the same clips as files) and against `webdataset` (its own pipeline
over the same shards, with the same decode), `2-workers` against `1-worker`, in clips a second once everything runs;
`resume` at step 1,000,000 against step 1 (the first batch, from a loader made anew); `memory` of the process and its
worker after many samples against an early moment, the slope in the row's name. The clips are made first: H.264 of
320 x 240 at 25 frames a second, four seconds, one keyframe, eight frames each resized to 224.
"""

import io
import itertools
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from videomamba.bench_table import Row, interleave, report, row

if TYPE_CHECKING:
    from data_pipeline.config import DataConfig

FAR = 1_000_000  # the late step


@dataclass(frozen=True)
class Size:
    """How large the measured problem is."""

    clips: int = 24
    frames: int = 100
    width: int = 320
    height: int = 240
    batch: int = 8
    image_size: int = 224
    measured: int = 6  # batches, after as many as the workers may have in the making
    repeats: int = 5
    samples: int = 20_000  # for the memory, of small clips
    corpus: int = 10_000_000  # samples of the order that is resumed


QUICK = Size(clips=8, frames=12, width=64, height=48, image_size=32, measured=2, repeats=1, samples=320, corpus=20_000)


def measure(size: Size) -> Iterator[Row]:
    """Every row, one after the other."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        make_clips(root / "clips", size.clips, size.frames, size.width, size.height)
        yield from _speed(root / "clips", size)
        yield from _resume(root / "clips", size)
        make_clips(root / "small", 64, 12, 64, 48)
        yield _memory(root / "small", size)


def make_clips(folder: Path, clips: int, frames: int, width: int, height: int) -> None:
    """Shards of clips whose pattern drifts under noise, and each clip as a file beside them."""
    from data_pipeline.schema import Sample, content_digest
    from data_pipeline.shards import ShardWriter

    (folder / "files").mkdir(parents=True)
    with ShardWriter(folder, "bench", 16) as writer:
        for number in range(clips):
            media = _clip(number, frames, width, height)
            (folder / "files" / f"{number:05d}.mp4").write_bytes(media)
            probe = {"frames": frames, "width": width, "height": height}
            captions = (f"clip {number}",)
            writer.write(Sample(f"{number:05d}", media, "mp4", "video", captions, "made", content_digest(media), probe))


def _clip(number: int, frames: int, width: int, height: int) -> bytes:
    import av
    import numpy as np

    y, x = (axis.astype(np.uint8) for axis in np.mgrid[:height, :width])
    noise = np.random.default_rng(number).integers(0, 24, (height, width, 3), dtype=np.uint8)
    start = np.stack([2 * x, 2 * y + np.uint8(number % 256), x + y], axis=-1)
    drift = np.array([3, 1, 5])
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        stream: Any = container.add_stream("libx264", rate=25, options={"preset": "veryfast", "g": "250"})
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for t in range(frames):
            frame = start + (t * drift % 256).astype(np.uint8) + np.roll(noise, t, axis=1)  # uint8: it wraps round
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    return file.getvalue()


def _config(folder: Path, size: Size, workers: int) -> "DataConfig":
    from data_pipeline.config import CorpusConfig, DataConfig, FrameConfig

    return DataConfig(
        train=(CorpusConfig(path=str(folder)),),
        batch=size.batch,
        frames=FrameConfig(count=8, rule="middle"),
        image_size=size.image_size,
        crop_scale=(1.0, 1.0),
        workers=workers,
    )


def _speed(folder: Path, size: Size) -> Iterator[Row]:
    """Clips a second of one worker, two workers, the bare loop and webdataset, taken in turns."""
    from data_pipeline.loader import TrainLoader
    from videomamba.baselines import pyav_clips, webdataset_batches

    visual = _config(folder, size, 1).visual()
    files = sorted((folder / "files").iterdir())
    _require_same(folder, size)

    def ours(workers: int) -> Iterator[Any]:
        return iter(TrainLoader(_config(folder, size, workers), 0, steps=FAR))

    def bare() -> Iterator[Any]:
        clips = pyav_clips(itertools.cycle(files), visual.frames, size.image_size)
        return (list(itertools.islice(clips, size.batch)) for _ in itertools.count())

    shards = sorted(str(path) for path in folder.glob("*.tar"))
    ways: dict[str, Callable[[], Iterator[Any]]] = {
        "1-worker": lambda: ours(1),
        "pyav": bare,
        "webdataset": lambda: webdataset_batches(shards, visual, size.batch),
        "2-workers": lambda: ours(2),
    }
    rates: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(size.repeats):
        for name, way in ways.items():
            rates[name].append(_rate(way(), size))
    median = {name: statistics.median(taken) for name, taken in rates.items()}
    for name, baseline in (("1-worker", "pyav"), ("2-workers", "1-worker"), ("1-worker", "webdataset")):
        mine, theirs = median[name], median[baseline]
        yield Row(name, round(mine, 1), round(theirs, 1), baseline, "clips/s", round(mine / theirs, 3))


def _rate(batches: Iterator[Any], size: Size) -> float:
    """Clips a second of the batches that come once everything runs."""
    for _ in range(4):  # what two workers have in the making: from here on a batch that comes is a batch that is made
        next(batches)
    began = time.perf_counter()
    for _ in range(size.measured):
        next(batches)
    spent = time.perf_counter() - began
    del batches  # ends its workers
    return size.measured * size.batch / spent


def _require_same(folder: Path, size: Size) -> None:
    """The loader's clips are the bare loop's, up to how colours are rounded on the way from YUV."""
    from data_pipeline.loader import TrainLoader
    from videomamba.baselines import pyav_clips

    batch = next(iter(TrainLoader(_config(folder, size, 0), 0, steps=1)))
    files = [folder / "files" / f"{key}.mp4" for key in batch.keys]
    for mine, theirs in zip(batch.frames, pyav_clips(iter(files), 8, size.image_size), strict=True):
        apart = (mine.transpose(0, 1).int() - theirs.int()).abs().float()
        assert float(apart.mean()) < 3, float(apart.mean())


def _resume(folder: Path, size: Size) -> Iterator[Row]:
    """The first batch of a loader made anew, and the plan alone of a corpus of millions, late against early."""
    from data_pipeline.loader import TrainLoader
    from data_pipeline.order import Order, OrderCorpus

    def first_batch(step: int) -> object:
        return next(iter(TrainLoader(_config(folder, size, 0), 0, start_step=step, steps=step + 1)))

    def plan(step: int) -> object:
        shards = (size.corpus // 1000,) * 1000
        corpus = OrderCorpus("large", size.corpus, 256, shard_sizes=shards, window=16)
        return Order([corpus], 0).batch(step)

    for name, call in ((f"resume, {size.clips} clips", first_batch), (f"plan, {size.corpus:,} clips", plan)):
        late, early = interleave(partial(call, FAR), partial(call, 1), 2 * size.repeats + 1)
        yield row(f"{name}, step {FAR:,}", late, early, "step 1")


def _memory(folder: Path, size: Size) -> Row:
    """MiB of this process and its worker after all samples against an early moment; the slope by least squares."""
    import numpy as np

    from configs.processes import tree_bytes
    from data_pipeline.loader import TrainLoader

    small = Size(batch=32, image_size=32)
    steps = size.samples // small.batch
    taken = [  # of the whole tree: workers are children of the server that they start from, a child of this process
        (batch.step * small.batch / 1000, tree_bytes(os.getpid()) / 2**20)
        for batch in TrainLoader(_config(folder, small, 1), 0, steps=steps)
        if batch.step >= steps // 10 and batch.step % max(1, steps // 40) == 0
    ]
    thousands, mebibytes = np.array(taken).T
    slope = float(np.polyfit(thousands, mebibytes, 1)[0])
    name = f"memory, {size.samples:,} samples ({slope:+.3f} MiB a thousand)"
    return row(name, float(mebibytes[-1]), float(mebibytes[0]), f"after {size.samples // 10:,}", "MiB")


def loader(
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the result here as well.")] = None,
    repeats: Annotated[int, typer.Option(min=1, help="Timed runs of each.")] = Size.repeats,
    quick: Annotated[bool, typer.Option("--quick", help="Small sizes, to see that it runs.")] = False,
) -> None:
    """The loader against a bare loop of PyAV, webdataset's pipeline and itself: speed, resuming, memory."""
    report("loader", list(measure(QUICK if quick else Size(repeats=repeats))), json_file)
