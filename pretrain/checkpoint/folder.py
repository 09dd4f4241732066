"""The folders of checkpoints: which there are, whether they are whole, and which stay."""

import hashlib
import json
import logging
import math
import re
import shutil
from pathlib import Path

from configs.errors import UserError
from configs.loader import validate
from pretrain.checkpoint.meta import Meta
from pretrain.checkpoint_config import CheckpointConfig

log = logging.getLogger(__name__)

LATEST = "latest"
NAME = re.compile(r"step-(\d{7,})$")


def step_of(folder: Path) -> int:
    """The step that a checkpoint's name tells."""
    return int(folder.name.removeprefix("step-"))


def checkpoints(run: Path) -> list[Path]:
    """The complete checkpoints of a run folder, oldest first."""
    folders = [path for path in (run / "checkpoints").glob("step-*") if path.is_dir() and NAME.match(path.name)]
    return sorted(folders, key=step_of)


def latest(run: Path) -> Path | None:
    """The checkpoint that `latest` names, else the newest there is, else None."""
    pointer = run / "checkpoints" / LATEST
    if pointer.is_file():
        named = pointer.with_name(pointer.read_text().strip())
        if named.is_dir():
            return named
    found = checkpoints(run)
    return found[-1] if found else None


def resolve(path: str | Path) -> Path:
    """The checkpoint folder that a run folder or a checkpoint folder means; UserError if there is none."""
    folder = Path(path)
    if (folder / "meta.json").is_file():
        return folder
    newest = latest(folder)
    if newest is None:
        raise UserError(
            f"{folder} holds no checkpoint (no meta.json, no checkpoints/step-*).",
            "Give the folder of a run that has saved, or one of its checkpoints.",
        )
    return newest


def read_meta(folder: Path) -> Meta:
    """meta.json of a checkpoint; UserError if it is missing or not readable."""
    try:
        tree = json.loads((folder / "meta.json").read_text())
    except (OSError, ValueError) as error:
        raise _damaged(folder, "meta.json cannot be read") from error
    return validate(tree, Meta, str(folder / "meta.json"))


def _damaged(folder: Path, what: str) -> UserError:
    return UserError(
        f"The checkpoint {folder} is damaged: {what}.", "Remove that folder; an older one is used then.", exit_code=1
    )


def verify(folder: Path) -> Meta:
    """The meta of a checkpoint whose files all have the hashes it names; UserError (exit code 1) otherwise."""
    meta = read_meta(folder)
    for name, expected in meta.files.items():
        if not (folder / name).is_file():
            raise _damaged(folder, f"{name} is missing")
        if sha256(folder / name) != expected:
            raise _damaged(folder, f"{name} does not have the content that was written")
    return meta


def sha256(path: Path) -> str:
    """The sha256 of a file, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def newest_whole(run: Path) -> Path | None:
    """The newest checkpoint that verifies; a damaged one is named in a warning and passed over.

    Raises UserError if there are checkpoints and none is whole.
    """
    candidates = checkpoints(run)
    for folder in reversed(candidates):
        try:
            verify(folder)
            return folder
        except UserError as error:
            log.warning("%s Going back to the one before it.", error.cause)
    if candidates:
        raise UserError(
            f"None of the {len(candidates)} checkpoints in {run} is whole.", "Start again with --fresh.", exit_code=1
        )
    return None


def prune(root: Path, config: CheckpointConfig) -> None:
    """Remove what `config` does not keep; each loses its name first, so that none is ever half there."""
    found = checkpoints(root.parent)
    kept = set(found[-config.keep :])
    if config.keep_every is not None:
        kept |= {folder for folder in found if step_of(folder) % config.keep_every == 0}
    if config.keep_best is not None:
        kept |= {folder for folder in [best(found, config.keep_best, config.best == "lowest")] if folder is not None}
    for folder in found:
        if folder not in kept:
            gone = folder.with_name(f".{folder.name}.old")
            folder.rename(gone)
            shutil.rmtree(gone)


def best(folders: list[Path], metric: str, lowest: bool) -> Path | None:
    """The checkpoint with the best `metric`, the newest among equals; None where none was taken with it."""
    scored = []
    for folder in folders:
        try:
            value = read_meta(folder).metrics.get(metric)
        except UserError:  # a damaged one is no candidate; resuming tells of it
            continue
        if value is not None and math.isfinite(value):
            scored.append((-value if lowest else value, step_of(folder), folder))
    return max(scored)[2] if scored else None
