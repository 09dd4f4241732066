"""What a checkpoint holds, in lines for a reader: `videomamba checkpoint inspect`."""

from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

from torch import Size

from pretrain.checkpoint.folder import checkpoints, resolve, step_of, verify
from pretrain.checkpoint.meta import FORMAT, Meta
from pretrain.checkpoint.restore import StoredTensors, optimizer_files
from pretrain.checkpoint.snapshot import EMA, MODEL


def described(path: Path) -> Iterator[tuple[str, str]]:
    """Names and values, after every file was found to be as written. Raises UserError for what is no checkpoint."""
    folder = resolve(path)
    meta = verify(folder)
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    model = StoredTensors(folder / MODEL).shapes()
    yield "checkpoint", str(folder)
    if others := [step_of(one) for one in checkpoints(folder.parent.parent) if one != folder]:
        yield "beside it", f"steps {', '.join(map(str, others))}"
    yield "task", f"{meta.task}, step {meta.step}, written by {meta.ranks} rank(s) at ZeRO {meta.zero_stage}"
    yield "config", f"{meta.config} (config.yaml beside it)"
    yield "model", f"{meta.model.kind}, {len(model)} tensors, {_numbers(model):,} numbers"
    yield from _parts(model)
    yield from _optimizer(folder, meta)
    if (folder / EMA).is_file():
        averaged = StoredTensors(folder / EMA).shapes()
        yield "average", f"{len(averaged)} tensors, {_numbers(averaged):,} numbers (convert --ema writes them)"
    yield "files", f"{len(meta.files)}, {size / 2**20:.1f} MiB, all as written"
    if meta.imported is not None:
        yield "from", f"{meta.imported.file}, sha256 {meta.imported.sha256}"
    yield "versions", ", ".join(f"{package} {version}" for package, version in meta.versions.items())
    yield "data", f"{meta.counters.get('seen', 0):,} samples seen, lost: {meta.counters.get('lost') or 'none'}"
    if meta.metrics:
        chosen = [name for name in meta.metrics if name == "loss" or name.startswith(("losses/", "grad_norm", "eval"))]
        yield "metrics", ", ".join(f"{name} {meta.metrics[name]:.4g}" for name in chosen)


def _optimizer(folder: Path, meta: Meta) -> Iterator[tuple[str, str]]:
    """What is there to go on with: tensors and numbers by the optimizer's own names for them."""
    files = optimizer_files(folder, meta)
    if meta.format != FORMAT:
        yield "optimizer", f"of format {meta.format}, which this version does not read"
    elif not files:
        yield "optimizer", "none: weights alone"
    else:
        by_key: defaultdict[str, dict[str, tuple[int, ...]]] = defaultdict(dict)
        for name, shape in StoredTensors(*files).shapes().items():
            by_key[name.partition("/")[0]][name] = shape
        said = ", ".join(f"{key} {_numbers(shapes):,} of {len(shapes)}" for key, shapes in sorted(by_key.items()))
        yield "optimizer", f"in {len(files)} file(s), for any number of ranks at any ZeRO stage"
        yield "", f"numbers, and tensors they are of: {said}"


def _parts(model: dict[str, tuple[int, ...]]) -> Iterator[tuple[str, str]]:
    """The numbers of each part of the model, by the first word of its tensors' names."""
    parts: defaultdict[str, int] = defaultdict(int)
    for name, shape in model.items():
        parts[name.partition(".")[0]] += Size(shape).numel()
    yield "", ", ".join(f"{part} {count:,}" for part, count in parts.items())


def _numbers(shapes: dict[str, tuple[int, ...]]) -> int:
    return sum(Size(shape).numel() for shape in shapes.values())


def listed(path: Path) -> Iterator[str]:
    """Every tensor in every file with its shape."""
    folder = resolve(path)
    for file in sorted(folder.glob("*.safetensors")):
        yield f"{file.name}:"
        for name, shape in StoredTensors(file).shapes().items():
            yield f"  {name:<72}{'x'.join(map(str, shape)) or 'a number'}"
