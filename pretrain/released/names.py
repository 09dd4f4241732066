"""The published layouts, and how their names and shapes differ from ours (reference: the release's own state dicts).

    image    supervised on images: final norm `norm_f`, a 2-D patch kernel, no temporal embedding, `head`
    video    supervised on videos: final norm `norm_f`, a 3-D patch kernel, `temporal_pos_embedding`, `head`
    masked   stage 1: final norm `norm`, `clip_decoder.*`, no head
    joint    stage 2: `vision_encoder.*` (as masked, with `pool_norm`), `text_encoder.*`, projections, a scalar `temp`

Ours are those of masked and joint, with `temp` (1,), since DeepSpeed cannot broadcast a scalar. Dropped by name: a
teacher kept inside the model, BERT's table of positions (an arange), and the head that image models were distilled by.
"""

from typing import Literal

from configs.errors import UserError
from pretrain.weight_files import State

Layout = Literal["image", "video", "masked", "joint"]
SAID: dict[Layout, str] = {
    "image": "supervised on images",
    "video": "supervised on videos",
    "masked": "stage 1, mask-pretrained",
    "joint": "stage 2, joint",
}

VISION = "vision_encoder."
DROPPED = {
    "clip_teacher.": "the frozen teacher",
    "distill_head.": "the head that the image model was distilled by",
    "text_encoder.bert.embeddings.position_ids": "BERT's table of positions, which is 0, 1, 2, ...",
}
"""Beginnings of names that no model of ours has, and what they are."""

WORDS, DECODER = "text_encoder.bert.embeddings.word_embeddings.weight", "text_encoder.cls.predictions.decoder.weight"
BIAS, DECODER_BIAS = "text_encoder.cls.predictions.bias", "text_encoder.cls.predictions.decoder.bias"
TIED = {DECODER: WORDS, DECODER_BIAS: BIAS}
"""One tensor under two names; a file may hold either name alone."""


def detect(tensors: State) -> Layout:
    """Which layout the names are of. Raises UserError where they are no VideoMamba's."""
    if any(name.startswith(VISION) for name in tensors):
        return "joint"
    if not any(name.startswith("layers.") and ".mixer." in name for name in tensors):
        first = ", ".join(list(tensors)[:5])
        raise UserError(
            f"These are not the weights of a VideoMamba: no `layers.*.mixer.*` among {len(tensors)} tensors ({first}).",
            "Give a file of the VideoMamba release; teachers and BERTs have keys of their own (teacher, text.init).",
        )
    kernel = tensors.get("patch_embed.proj.weight")
    if "temporal_pos_embedding" not in tensors and (kernel is None or kernel.dim() == 4):
        return "image"
    supervised = "norm_f.weight" in tensors or ("norm.weight" not in tensors and "head.weight" in tensors)
    return "video" if supervised else "masked"


def split_dropped(tensors: State) -> tuple[State, dict[str, int]]:
    """The tensors that a model of ours can have, and how many were dropped by name, a line for each kind."""
    dropped: dict[str, int] = {}
    kept: State = {}
    for name, tensor in tensors.items():
        what = next((what for start, what in DROPPED.items() if name.startswith(start)), None)
        if what is None:
            kept[name] = tensor
        else:
            dropped[what] = dropped.get(what, 0) + 1
    return kept, dropped


def our_name(name: str, layout: Layout) -> str:
    """A published name as ours."""
    return "norm.weight" if name == "norm_f.weight" and layout in ("image", "video") else name


def their_name(name: str, layout: Layout) -> str:
    """Our name as the layout has it."""
    return "norm_f.weight" if name == "norm.weight" and layout in ("image", "video") else name


def to_ours(tensors: State, layout: Layout) -> State:
    """A published state dict under our names and shapes; tensors are shared, not copied."""
    ours = {our_name(name, layout): tensor for name, tensor in tensors.items()}
    if layout == "joint" and "temp" in ours:
        ours["temp"] = ours["temp"].reshape(-1)
    for name, tensor in ours.items():
        if name.endswith("patch_embed.proj.weight") and tensor.dim() == 4:
            ours[name] = tensor.unsqueeze(2)
    return ours


def to_theirs(state: State, layout: Layout) -> State:
    """Our state dict under a layout's names and shapes; tensors are shared, not copied.

    For `image` the patch kernel has one frame, which the 2-D kernel leaves out, and there is no time.
    """
    theirs = {their_name(name, layout): tensor for name, tensor in state.items()}
    if layout == "joint":
        theirs["temp"] = theirs["temp"].reshape(())
    if layout == "image":
        theirs["patch_embed.proj.weight"] = theirs["patch_embed.proj.weight"].squeeze(2)
        theirs.pop("temporal_pos_embedding", None)
    return theirs
