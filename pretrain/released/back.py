"""The way back: a checkpoint of ours as a file in a published layout, for the release's own code to load.

Values are copied bit for bit; only names and the shapes of `temp` and of an image model's kernel change. What the
release's code cannot compute is refused, since it would load such a file and silently be another model.
"""

import os
from pathlib import Path

import torch
from safetensors.torch import save_file

from configs.errors import UserError
from configs.files import part_name, sync_folder
from pretrain import checkpoint
from pretrain.checkpoint import ModelMeta
from pretrain.models.config import VisionConfig
from pretrain.released.names import SAID, VISION, Layout, to_theirs
from pretrain.weight_faults import told
from pretrain.weight_files import State

PARTS: dict[Layout, tuple[str, ...]] = {
    "image": ("clip_decoder.", "pool_norm.", "temporal_pos_embedding"),
    "video": ("clip_decoder.", "pool_norm."),
    "masked": ("head.", "pool_norm."),
    "joint": (f"{VISION}head.",),
}
"""What a model of ours may have and a layout has no place for."""

ORDER = "spatial_first"
RELEASED = {"stem": "linear", "scan_order": ORDER, "head_pool": "cls"}
"""The only form that the release's code has of what is an option here."""


def natural_layout(meta: ModelMeta) -> Layout:
    """The layout that has a place for all of a model."""
    if meta.joint is not None:
        return "joint"
    if meta.vision.frames == 1:
        return "image"
    return "video" if meta.vision.classes else "masked"


def to_released(state: State, meta: ModelMeta, layout: Layout | None = None) -> tuple[State, list[str]]:
    """A model's weights in a published layout, and the names of what that layout leaves out.

    Raises UserError for a layout that the model does not fit, and for what the release cannot compute.
    """
    layout = layout or natural_layout(meta)
    if (layout == "joint") != (meta.joint is not None):
        kind = "a joint model" if meta.joint is not None else "a vision model"
        raise UserError(f"The checkpoint is {kind}, and --layout {layout} is for the other.", "Leave --layout out.")
    _check_computable(meta.vision, layout)
    kept = {name: tensor for name, tensor in state.items() if not name.startswith(PARTS[layout])}
    return to_theirs(kept, layout), [name for name in state if name not in kept]


def _check_computable(vision: VisionConfig, layout: Layout) -> None:
    ours = vision.model_dump() | {"scan_order": next((o for o in vision.orders if o != ORDER), ORDER)}
    only = RELEASED | ({"tubelet": 1} if layout == "image" else {})
    strange = [f"vision.{key} is {ours[key]}, there it is {value}" for key, value in only.items() if ours[key] != value]
    if strange:
        raise UserError(
            f"The release's code would not compute this model: {'; '.join(strange)}.", "It stays in our own layout."
        )


def convert(path: str | Path, out: str | Path, layout: Layout | None = None, ema: bool = False) -> list[str]:
    """Write the weights of a run or checkpoint folder to `out` in a published layout; what was done, line by line.

    `ema` takes their average, where the run kept one.
    `out` ends in .pth (weights under the key `model`, as published) or .safetensors. Raises UserError as above.
    """
    folder, target = checkpoint.resolve(path), Path(out)
    if target.suffix not in (".pth", ".safetensors"):
        raise UserError(f"{target} ends neither in .pth nor in .safetensors.", "Name it with one of them.")
    meta = checkpoint.verify(folder).model
    layout = layout or natural_layout(meta)
    theirs, left_out = to_released(checkpoint.load_weights(folder, ema), meta, layout)
    part = part_name(target)
    with checkpoint.writing(target):
        try:
            if target.suffix == ".pth":
                torch.save({"model": theirs}, part)
            else:
                save_file({name: tensor.contiguous() for name, tensor in theirs.items()}, part, {"format": "pt"})
            with part.open("rb") as file:
                os.fsync(file.fileno())
            part.replace(target)
            sync_folder(target.absolute().parent)
        finally:
            part.unlink(missing_ok=True)
    lines = [f"layout: {SAID[layout]}, {len(theirs)} tensors", *(f"left out: {name}" for name in told(left_out))]
    return [*lines, f"written: {target} (sha256 {checkpoint.sha256(target)})"]
