"""A published state dict made into one of our models, strictly: all of it is used, dropped by name, or refused.

Sizes come from shapes (sizes.py); every name and shape is then compared with the model of those sizes, in the file's
own names, before anything is changed; what a user asked to be different is changed last. Values are never touched but
for a kernel that is inflated and tables that are resized (reference 1.8), and bf16 becoming float32.

D width, C channels, H and W pixels of a patch.
"""

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from configs.errors import UserError
from configs.loader import validate
from pretrain.checkpoint import ModelMeta, build_model
from pretrain.models.config import SIZES, JointConfig, VisionConfig
from pretrain.models.joint import JointModel
from pretrain.models.pos_embed import resize_spatial, resize_temporal
from pretrain.models.videomamba import VideoMamba
from pretrain.released.config import ImportConfig
from pretrain.released.names import SAID, TIED, VISION, Layout, detect, our_name, split_dropped, to_ours, to_theirs
from pretrain.released.sizes import joint_config, vision_config
from pretrain.weight_faults import require_fit, told
from pretrain.weight_files import State

IMAGE_FRAMES = 8
"""Frames of a video model that is made from an image model, as in the release's recipes."""


@dataclass
class Fitted:
    """The model, what it is, and what was done to the file's tensors, a sentence each."""

    model: VideoMamba | JointModel
    meta: ModelMeta
    layout: Layout
    notes: list[str] = field(default_factory=list)


class Identified(NamedTuple):
    """What a file holds: its layout, the tensors that a model of ours has by their names there, and that model."""

    layout: Layout
    kept: State
    meta: ModelMeta
    notes: list[str]


def identify(tensors: State, wanted: ImportConfig) -> Identified:
    """The layout and the model of a published state dict, by names and shapes alone; no number is looked at.

    Raises UserError naming everything that is missing, left over or of another shape.
    """
    layout = detect(tensors)
    kept, dropped = split_dropped(tensors)
    if layout == "joint":
        kept |= {name: kept[same] for name, same in TIED.items() if name not in kept and same in kept}
    meta = _by_shapes(to_ours(kept, layout), layout, wanted)
    with torch.device("meta"):
        expected = to_theirs(build_model(meta).state_dict(), layout)
    require_fit(
        {name: tuple(tensor.shape) for name, tensor in kept.items()},
        {name: tuple(tensor.shape) for name, tensor in expected.items()},
        f"As a published checkpoint ({SAID[layout]}), this file",
    )
    notes = [f"layout: {SAID[layout]} ({len(tensors)} tensors)", _size(meta.vision)]
    notes += [f"dropped: {what} ({count} tensors)" for what, count in dropped.items()]
    return Identified(layout, kept, meta, notes + _renamed(kept, layout))


def fit(tensors: State, wanted: ImportConfig) -> Fitted:
    """The model that `wanted` asks for, with the weights of a published state dict.

    As stage 2, a file without text gives the encoder alone, for a joint run to start from. Raises UserError as
    `identify` does, for numbers that are not finite, and for a head that the file does not have.
    """
    file = identify(tensors, wanted)
    _check_numbers(file.kept)
    meta = _target(file.meta, file.layout, wanted)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = build_model(meta)
    notes = [*file.notes]
    state = _select(to_ours(file.kept, file.layout), file.meta, meta, wanted, notes)
    fresh = {name: tensor for name, tensor in model.state_dict().items() if name not in state}
    model.load_state_dict(state | fresh)
    return Fitted(model.eval(), meta, file.layout, notes + _new(fresh))


def _new(fresh: State) -> list[str]:
    drawn = [name for name, tensor in fresh.items() if tensor.any()]
    zeros = [name for name in fresh if name not in drawn]
    return [f"new, {how}: {', '.join(told(names))}" for how, names in (("at random", drawn), ("zeros", zeros)) if names]


def _size(vision: VisionConfig) -> str:
    """The size by its published name, or that it has none: a file that lost its last layers shows only so."""
    name = next((name for name, size in SIZES.items() if size == (vision.depth, vision.width)), None)
    if name is not None:
        return f"size: {name}"
    known = ", ".join(f"{name} {depth} x {width}" for name, (depth, width) in SIZES.items())
    return f"size: {vision.depth} layers x {vision.width}, which is none of the published ones ({known})"


def _by_shapes(ours: State, layout: Layout, wanted: ImportConfig) -> ModelMeta:
    """The model that the file holds."""
    if layout == "joint":
        joint = joint_config(ours, wanted.heads, wanted.max_tokens)
        return ModelMeta(kind="joint", vision=joint.vision, joint=joint)
    return ModelMeta(kind="vision", vision=vision_config(ours))


def _check_numbers(kept: State) -> None:
    """UserError unless all are finite floating-point numbers, and what is one tensor under two names is one."""
    integers = [name for name, tensor in kept.items() if not tensor.is_floating_point()]
    if integers:
        kind = str(kept[integers[0]].dtype).removeprefix("torch.")
        raise UserError(
            f"These hold {kind} and not floating-point numbers: {', '.join(told(integers))}.",
            "Give a file that is not quantised.",
        )
    broken = [name for name, tensor in kept.items() if not torch.isfinite(tensor).all()]
    if broken:
        raise UserError(
            f"These hold numbers that are not finite: {', '.join(told(broken))}.", "Fetch the file again.", exit_code=1
        )
    for name, same in TIED.items():
        if name in kept and not torch.equal(kept[name], kept[same]):
            raise UserError(
                f"{name} and {same} are one tensor in the release and differ in this file.",
                "Give the file as published.",
            )


def _renamed(kept: State, layout: Layout) -> list[str]:
    notes = [f"renamed: {name} -> {our_name(name, layout)}" for name in kept if our_name(name, layout) != name]
    if layout == "joint" and kept["temp"].dim() == 0:
        notes.append("reshaped: temp, a scalar, to (1,)")
    types = sorted({str(tensor.dtype).removeprefix("torch.") for tensor in kept.values()} - {"float32"})
    return [*notes, f"converted: {', '.join(types)} to float32"] if types else notes


def _target(source: ModelMeta, layout: Layout, wanted: ImportConfig) -> ModelMeta:
    """The model that is asked for."""
    vision = _target_vision(source.vision, layout, wanted)
    if wanted.target == "stage2" and source.joint is not None:
        joint = JointConfig(vision=vision, text=source.joint.text, embed=source.joint.embed)
        return ModelMeta(kind="joint", vision=vision, joint=joint)
    return ModelMeta(kind="vision", vision=vision)


def _target_vision(source: VisionConfig, layout: Layout, wanted: ImportConfig) -> VisionConfig:
    tubelet = wanted.tubelet or source.tubelet
    if tubelet != source.tubelet and source.tubelet > 1:
        raise UserError(
            f"The patch kernel of this file has {source.tubelet} frames; only one frame can be made {tubelet}.",
            f"Leave --tubelet out, or give {source.tubelet}.",
        )
    stays_image = wanted.target == "classifier" and wanted.classes is None and tubelet == 1
    frames = wanted.frames or (IMAGE_FRAMES if layout == "image" and not stays_image else source.frames)
    changes: dict[str, Any] = {
        "frames": frames, "tubelet": tubelet, "image_size": wanted.image_size or source.image_size, "classes": 0,
    }  # fmt: skip
    if wanted.target == "classifier":
        changes |= {"classes": wanted.classes or source.classes, "align_width": 0, "pool": "cls"}
        if not changes["classes"]:
            raise UserError(f"This file ({SAID[layout]}) has no head.", "Give --classes N for a new one.")
    keeps_alignment = bool(source.align_width) and wanted.target != "classifier"
    changes["align_source"] = wanted.align_source if keeps_alignment else "output"
    changes["pool_norm"] = layout == "joint" and wanted.target == "stage2"
    return validate({**source.model_dump(), **changes}, VisionConfig, "what this import asks for")


def _select(whole: State, source: ModelMeta, meta: ModelMeta, wanted: ImportConfig, notes: list[str]) -> State:
    """What of the file the target model has, resized and inflated, in float32; what it leaves out is noted."""
    state = dict(whole)
    if source.joint is not None and meta.joint is None:
        state = {name.removeprefix(VISION): tensor for name, tensor in whole.items() if name.startswith(VISION)}
        notes.append(f"left out: the text tower, projections and matching head ({len(whole) - len(state)} tensors)")
    prefix = VISION if meta.joint is not None else ""
    _reshape(state, prefix, meta.vision, wanted.inflate, notes)
    with torch.device("meta"):
        names = build_model(meta).state_dict().keys()
    own_head = wanted.classes is None
    unused = [name for name in state if name not in names or (not own_head and name.startswith("head."))]
    notes += [f"left out: {', '.join(told(unused))}"] if unused else []
    return {name: tensor.float() for name, tensor in state.items() if name not in unused}


def _reshape(state: State, prefix: str, vision: VisionConfig, inflate: str, notes: list[str]) -> None:
    """Bring the patch kernel and both position tables to the sizes of `vision`, as their own shapes need it."""
    tokens, rows, columns = vision.grid
    kernel = f"{prefix}patch_embed.proj.weight"
    changed = {kernel: _inflated(state[kernel], vision.tubelet, inflate)}
    place, time = f"{prefix}pos_embed", f"{prefix}temporal_pos_embedding"
    changed[place] = resize_spatial(state[place], (rows, columns))
    if time in state:
        changed[time] = resize_temporal(state[time], tokens)
    how = {kernel: f"inflated ({inflate})", place: "resized (bicubic)", time: "resized (linear)"}
    for name, tensor in changed.items():
        if tensor.shape != state[name].shape:
            before, after = ("x".join(map(str, value.shape)) for value in (state[name], tensor))
            notes.append(f"{how[name]}: {name} {before} -> {after}")
        state[name] = tensor


def _inflated(kernel_DC1HW: Tensor, frames: int, how: str) -> Tensor:
    """A patch kernel of one frame as one of `frames`: in the middle one, zeros elsewhere, or an equal share in each."""
    if kernel_DC1HW.shape[2] == frames:
        return kernel_DC1HW
    if how == "average":
        return kernel_DC1HW.expand(-1, -1, frames, -1, -1) / frames
    inflated = kernel_DC1HW.new_zeros(*kernel_DC1HW.shape[:2], frames, *kernel_DC1HW.shape[3:])
    inflated[:, :, frames // 2] = kernel_DC1HW[:, :, 0]
    return inflated
