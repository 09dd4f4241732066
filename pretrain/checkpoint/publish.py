"""A checkpoint gets its name when all of it is on the disk, and not before."""

import errno
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError
from torch import Tensor

from configs.files import disk_errors, sync_folder
from pretrain.checkpoint.folder import sha256
from pretrain.checkpoint.meta import Meta, Preprocess
from pretrain.checkpoint.snapshot import MODEL
from pretrain.checkpoint.tensors import entries_of, write_tensors

WRITE_FAILED = ("inline_container.cc", "iostream error", "PytorchStreamWriter", "No space left", "File too large")
"""What torch and safetensors say when a write fails, for the system's number of the error is lost."""


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """`disk_errors`, also for torch's and safetensors' own words for a write that failed."""
    with disk_errors(path):
        try:
            yield
        except (RuntimeError, SafetensorError) as error:
            said = str(error)
            if any(words in said for words in WRITE_FAILED):
                raise OSError(errno.ENOSPC, said) from error
            raise


@dataclass(frozen=True)
class Surroundings:
    """What stands beside the tensors in a checkpoint: the run's config, its preprocessing, its tokenizer."""

    config_yaml: str
    preprocess: Preprocess
    tokenizer: Path | None = None


def prepare(root: Path, aside: Path) -> None:
    """Make the folder in which a checkpoint is put together, and remove what killed runs left of theirs."""
    with disk_errors(root):
        root.mkdir(parents=True, exist_ok=True)
        for left in [*root.glob(".step-*.part"), *root.glob(".step-*.old")]:
            shutil.rmtree(left)
        aside.mkdir()


def publish(aside: Path, final: Path, meta: Meta, beside: Surroundings, hashes: dict[str, str]) -> None:
    """Complete the checkpoint begun in the folder `aside`, whose files of tensors have `hashes`, and name it `final`.

    `meta.files` is filled here, from everything in `aside`. Raises UserError if the disk is full.
    """
    with disk_errors(final):
        (aside / "config.yaml").write_text(beside.config_yaml, encoding="utf-8")
        (aside / "preprocess.json").write_text(json.dumps(beside.preprocess.model_dump(mode="json"), indent=2))
        if beside.tokenizer is not None:
            shutil.copytree(beside.tokenizer, aside / "tokenizer")
        # Not the files with hashes: who wrote them has brought them to the disk, and a list may not show them here yet.
        small = {str(path.relative_to(aside)): path for path in aside.rglob("*") if path.is_file()}
        small = {name: path for name, path in small.items() if name not in hashes}
        files = {**hashes, **{name: sha256(path) for name, path in small.items()}}
        whole = meta.model_copy(update={"files": dict(sorted(files.items()))})
        (aside / "meta.json").write_text(json.dumps(whole.model_dump(mode="json"), indent=2))
        for path in [*small.values(), aside / "meta.json"]:
            _sync(path)
        for folder in [*(path for path in aside.rglob("*") if path.is_dir()), aside]:
            sync_folder(folder)
        if final.exists():
            shutil.rmtree(final)
        aside.rename(final)
        sync_folder(final.parent)


def publish_weights(final: Path, named: dict[str, Tensor], meta: Meta, beside: Surroundings, aside: Path) -> None:
    """A checkpoint of weights alone, without a run: an imported model, say. `aside` is there, and may hold more."""
    with disk_errors(final):
        digest = write_tensors(aside / MODEL, entries_of(named), named.values())
    publish(aside, final, meta, beside, {MODEL: digest})


def _sync(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())
