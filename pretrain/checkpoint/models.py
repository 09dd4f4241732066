"""Models out of checkpoints: loaded whole, or as what another run starts from."""

import json
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors.torch import load_file
from torch import Tensor, nn

from configs.errors import UserError
from configs.loader import read_tree, validate
from pretrain.checkpoint.folder import resolve, verify
from pretrain.checkpoint.meta import ModelMeta, Preprocess
from pretrain.checkpoint.restore import stored_ema
from pretrain.checkpoint.snapshot import MODEL
from pretrain.config import PretrainConfig

if TYPE_CHECKING:
    from pretrain.models.joint import JointModel
    from pretrain.models.videomamba import VideoMamba


def load_weights(folder: Path, ema: bool = False) -> dict[str, Tensor]:
    """The weights of a checkpoint by their plain names, on the CPU; with `ema` their average, UserError without one."""
    weights = load_file(folder / MODEL)
    return {**weights, **stored_ema(folder)} if ema else weights


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
