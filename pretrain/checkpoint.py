"""Checkpoints: complete, whole or not there, checked when read.

A run folder holds `checkpoints/step-0000500/`, which has that name only when it is complete, and
`checkpoints/latest`, a file with the name of the newest. In a checkpoint:

    model.safetensors    the weights under their plain names, for anyone to read
    config.yaml          the run's resolved config
    preprocess.json      what the model was fed: pixels, and captions where it reads them
    tokenizer/           in stage 2
    state/               DeepSpeed's own files: optimizer, and the weights as it partitions them
    meta.json            step, model, versions and the sha256 of every other file; written last

Random state needs no file: torch's generator is seeded at every step from (seed, step, rank), and
everything else is drawn from the samples' own seeds.
"""

import errno
import hashlib
import json
import logging
import os
import platform
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from configs.errors import UserError
from configs.files import disk_errors, sync_folder, write_whole
from configs.loader import Frozen, read_tree, to_yaml, validate
from data_pipeline.preprocess import TextPreprocess, VisualPreprocess
from pretrain import distributed
from pretrain.config import PretrainConfig
from pretrain.models.config import JointConfig, VisionConfig

if TYPE_CHECKING:
    from pretrain.models.joint import JointModel
    from pretrain.models.videomamba import VideoMamba

log = logging.getLogger(__name__)

STATE = "state"
LATEST = "latest"
WRITE_FAILED = ("inline_container.cc", "iostream error", "PytorchStreamWriter", "No space left", "File too large")
"""What torch and safetensors say when a write fails, for the system's number of the error is lost."""

NAME = re.compile(r"step-(\d{7,})$")


class Preprocess(Frozen):
    """Everything a model's inputs went through: pixels, and captions where it reads them."""

    visual: VisualPreprocess
    text: TextPreprocess | None = None


class ModelMeta(Frozen):
    """The model as it was built, with what only the run knew (such as the teacher's width) filled in."""

    kind: Literal["vision", "joint"]
    vision: VisionConfig
    joint: JointConfig | None = None


class Imported(Frozen):
    """Where the weights of an imported checkpoint come from: a published file, and what was done to its tensors."""

    file: str
    sha256: str
    layout: str
    target: str
    notes: tuple[str, ...] = ()


class Meta(Frozen):
    """meta.json: where the run stood, what was built, and what every file must hash to."""

    format: int = 1
    step: int
    task: str
    config: str
    ranks: int
    zero_stage: int
    model: ModelMeta
    counters: dict[str, Any] = {}
    imported: Imported | None = None
    versions: dict[str, str]
    files: dict[str, str] = {}


def versions() -> dict[str, str]:
    """The versions that wrote a checkpoint."""
    return {"python": platform.python_version(), "torch": torch.__version__, "deepspeed": version("deepspeed")}


def checkpoints(run: Path) -> list[Path]:
    """The complete checkpoints of a run folder, oldest first."""
    folders = [path for path in (run / "checkpoints").glob("step-*") if path.is_dir() and NAME.match(path.name)]
    return sorted(folders, key=lambda path: int(path.name.removeprefix("step-")))


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


def save(
    engine: Any,
    model: nn.Module,
    config: PretrainConfig,
    meta: Meta,
    preprocess: Preprocess,
    tokenizer: Path | None,
) -> Path:
    """Write a checkpoint of the run `config.out` at `meta.step`; every rank calls this. Returns its folder.

    Nothing appears under the final name before it is complete and on the disk; `latest` moves after that, and
    only then are checkpoints beyond `config.checkpoint.keep` removed. Raises UserError if the disk is full.
    """
    root = Path(config.out) / "checkpoints"
    final = root / f"step-{meta.step:07d}"
    aside = root / f".{final.name}.part"
    on_first(lambda: _prepare(root, aside))
    try:
        with writing(final):
            engine.save_checkpoint(str(aside), tag=STATE, client_state={"run": {"step": meta.step}}, save_latest=False)
        named = whole_weights(engine, model)
        on_first(lambda: _complete(named, config, meta, preprocess, tokenizer, aside, final))
    except UserError:
        if distributed.rank() == 0:
            shutil.rmtree(aside, ignore_errors=True)
        raise
    on_first(lambda: prune(root, config.checkpoint.keep))
    return final


def on_first(work: Callable[[], None]) -> None:
    """Do `work` on rank 0 while the others wait; if it fails there, every rank raises the same UserError."""
    failure: UserError | None = None
    if distributed.rank() == 0:
        try:
            work()
        except UserError as error:
            failure = error
    failures = [error for error in distributed.gather_objects(failure) if error is not None]
    if failures:
        raise failures[0]


def whole_weights(engine: Any, model: nn.Module) -> dict[str, Tensor]:
    """The weights under their plain names; ZeRO 3, which cuts them up, gathers them on rank 0."""
    if engine.zero_optimization_stage() < 3:
        return model.state_dict()
    gathered = engine._zero3_consolidated_16bit_state_dict() or {}
    return {name.removeprefix("model."): tensor for name, tensor in gathered.items()}


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


def _prepare(root: Path, aside: Path) -> None:
    with disk_errors(root):
        root.mkdir(parents=True, exist_ok=True)
        for left in [*root.glob(".step-*.part"), *root.glob(".step-*.old")]:  # of a run that was killed
            shutil.rmtree(left)
        aside.mkdir()


def _complete(
    named: dict[str, Tensor],
    config: PretrainConfig,
    meta: Meta,
    preprocess: Preprocess,
    tokenizer: Path | None,
    aside: Path,
    final: Path,
) -> None:
    publish(named, to_yaml(config), meta, preprocess, tokenizer, aside, final)
    write_whole(final.parent / LATEST, f"{final.name}\n".encode())


def publish(
    named: dict[str, Tensor],
    config_yaml: str,
    meta: Meta,
    preprocess: Preprocess,
    tokenizer: Path | None,
    aside: Path,
    final: Path,
) -> None:
    """Complete the checkpoint begun in the folder `aside` and give it its name, once all of it is on the disk.

    `meta.files` is filled here, from everything in `aside`. Raises UserError if the disk is full.
    """
    with writing(final):
        save_file(_apart(named), aside / "model.safetensors", metadata={"format": "pt"})
        (aside / "config.yaml").write_text(config_yaml, encoding="utf-8")
        (aside / "preprocess.json").write_text(json.dumps(preprocess.model_dump(mode="json"), indent=2))
        if tokenizer is not None:
            shutil.copytree(tokenizer, aside / "tokenizer")
        written = sorted(path for path in aside.rglob("*") if path.is_file())
        files = {str(path.relative_to(aside)): sha256(path) for path in written}
        whole = meta.model_copy(update={"files": files})
        (aside / "meta.json").write_text(json.dumps(whole.model_dump(mode="json"), indent=2))
        for path in [*written, aside / "meta.json"]:
            _sync(path)
        for folder in [*(path for path in aside.rglob("*") if path.is_dir()), aside]:
            sync_folder(folder)
        if final.exists():
            shutil.rmtree(final)
        aside.rename(final)
        sync_folder(final.parent)


def _apart(named: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors on the CPU, each with memory of its own: safetensors refuses tied weights."""
    seen: set[int] = set()
    apart: dict[str, Tensor] = {}
    for name, tensor in named.items():
        plain = tensor.detach().cpu().contiguous()
        apart[name] = plain.clone() if plain.data_ptr() in seen else plain
        seen.add(plain.data_ptr())
    return apart


def _sync(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def prune(root: Path, keep: int) -> None:
    """Remove all but the newest `keep` checkpoints; each loses its name first, so that none is ever half there."""
    for folder in checkpoints(root.parent)[:-keep]:
        gone = folder.with_name(f".{folder.name}.old")
        folder.rename(gone)
        shutil.rmtree(gone)


def restore(engine: Any, folder: Path) -> int:
    """Load model and optimizer into `engine` from a verified checkpoint; returns its step. Every rank calls this.

    Raises UserError where ZeRO has cut the state for another number of ranks.
    """
    meta = read_meta(folder)
    ranks, stage = distributed.world_size(), engine.zero_optimization_stage()
    if meta.zero_stage != stage:
        raise UserError(
            f"{folder} was written with deepspeed=zero{meta.zero_stage}, and this run has zero{stage}.",
            f"Use deepspeed=zero{meta.zero_stage}, or start another run with init={folder}.",
        )
    if stage and meta.ranks != ranks:
        raise UserError(
            f"{folder} holds ZeRO {stage} state cut for {meta.ranks} ranks, and this run has {ranks}.",
            f"Use {meta.ranks} ranks, or deepspeed=zero0, whose checkpoints fit any number.",
        )
    engine.load_checkpoint(str(folder), tag=STATE)
    return meta.step


def load_weights(folder: Path) -> dict[str, Tensor]:
    """The weights of a checkpoint by their plain names, on the CPU."""
    return load_file(folder / "model.safetensors")


def load_model(
    path: str | Path, device: str = "cpu"
) -> tuple["VideoMamba | JointModel", PretrainConfig | None, Preprocess]:
    """The model of a run or checkpoint folder, in eval mode, with the run's config and its preprocessing.

    Stage 1 gives a VideoMamba, stage 2 a JointModel, whose tokens `tokenizer_of` finds. An imported model has no run
    and no config (`meta.imported` says where it is from).
    Raises UserError for a folder without a checkpoint, or a damaged one.
    """
    folder = resolve(path)
    meta = verify(folder)
    config = None
    if meta.imported is None:
        config = validate(read_tree(folder / "config.yaml"), PretrainConfig, str(folder / "config.yaml"))
    preprocess = validate(json.loads((folder / "preprocess.json").read_text()), Preprocess, str(folder))
    model = build_model(meta.model)
    model.load_state_dict(load_weights(folder))
    return model.to(device).eval(), config, preprocess


def tokenizer_of(folder: Path) -> Path:
    """The tokenizer's folder in a checkpoint folder of stage 2. UserError where it was imported without one."""
    tokenizer = folder / "tokenizer"
    if not tokenizer.is_dir():
        raise UserError(
            f"{folder} has no tokenizer, so it cannot read text.",
            "Import it again with --tokenizer, a folder or a vocab.txt (bert-base-uncased's for the published models).",
        )
    return tokenizer


def build_model(meta: ModelMeta) -> "VideoMamba | JointModel":
    """The model that `meta` describes, freshly initialised."""
    from pretrain.models.joint import JointModel
    from pretrain.models.videomamba import VideoMamba

    if meta.joint is None:
        return VideoMamba(meta.vision)
    text = meta.joint.text.model_copy(update={"init": None})  # the checkpoint has every weight
    return JointModel(meta.joint.model_copy(update={"text": text}))


def load_init(model: nn.Module, path: str | Path) -> str:
    """Start `model` from the weights of a run or checkpoint folder; returns one sentence about what was loaded.

    A stage-1 encoder fills a joint model's `vision_encoder`; between models of one kind everything that both
    have is taken. Raises UserError if a shape disagrees or nothing fits: a checkpoint of another model.
    """
    folder = resolve(path)
    verify(folder)
    given, wanted = load_weights(folder), model.state_dict()
    prefix = "vision_encoder."
    joint_model, joint_given = (any(name.startswith(prefix) for name in names) for names in (wanted, given))
    if joint_model and not joint_given:
        given = {prefix + name: tensor for name, tensor in given.items()}
    elif joint_given and not joint_model:
        given = {name.removeprefix(prefix): tensor for name, tensor in given.items() if name.startswith(prefix)}
    common = [name for name in wanted if name in given]
    differ = [name for name in common if given[name].shape != wanted[name].shape]
    if differ or not common:
        seen = (
            f"{differ[0]} is {tuple(given[differ[0]].shape)} there and {tuple(wanted[differ[0]].shape)} here"
            if differ
            else "no weight has a name that this model knows"
        )
        raise UserError(
            f"{folder} is a checkpoint of another model: {seen}.",
            "Give init= a checkpoint of the same vision (and text) config, or leave it out.",
        )
    model.load_state_dict({name: given[name] for name in common}, strict=False)
    new, unused = len(wanted) - len(common), len(given) - len(common)
    return f"{len(common)} tensors from {folder}, {new} new here, {unused} unused there"
