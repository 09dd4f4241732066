"""A checkpoint whose weights are the average that a run kept: for evaluation, export, search, or to start from."""

import shutil
from pathlib import Path

from configs.errors import UserError
from pretrain import checkpoint


def write_average(path: str | Path, out: str | Path) -> Path:
    """Write the average of the weights in a run or checkpoint folder as a checkpoint of its own, whole or not at all.

    Every command that takes a checkpoint takes `out`. Raises UserError where there is no average, or `out` is not
    empty.
    """
    folder, target = checkpoint.resolve(path), Path(out)
    meta = checkpoint.verify(folder)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UserError(f"{target} is not empty.", "Give another folder, or empty it yourself.")
    named = checkpoint.load_weights(folder, ema=True)
    preprocess = checkpoint.load_model(folder)[2]
    tokenizer = folder / "tokenizer"
    beside = checkpoint.Surroundings(
        (folder / "config.yaml").read_text(encoding="utf-8"), preprocess, tokenizer if tokenizer.is_dir() else None
    )
    aside = target.with_name(f".{target.name}.part")
    with checkpoint.writing(target):
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        try:
            checkpoint.publish_weights(target, named, meta, beside, aside)
        finally:
            shutil.rmtree(aside, ignore_errors=True)
    return target
