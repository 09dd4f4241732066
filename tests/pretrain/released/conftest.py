"""Published checkpoints, small, written from a list of their names and shapes: an account that shares no code with
`pretrain.released`, so that a mistake there is not repeated here.

d width, e inner width (2 d), r rank of the time step (d / 16 rounded up), n state 16; w text width, v words.
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

WIDTH, DEPTH, SIDE, PATCH, FRAMES, CLASSES, TAUGHT, SPACE = 48, 3, 4, 8, 4, 7, 24, 20
TEXT, HEADS, WORDS, PLACES, LAYERS, FIRST_FUSION = 32, 4, 40, 64, 3, 2


def encoder(d: int = WIDTH, depth: int = DEPTH, norm: str = "norm", kernel: tuple[int, ...] = (1, PATCH, PATCH),
            frames: int | None = FRAMES) -> dict[str, tuple[int, ...]]:  # fmt: skip
    """What every layout has of the encoder."""
    e, r = 2 * d, (d + 15) // 16
    shapes: dict[str, tuple[int, ...]] = {
        "cls_token": (1, 1, d),
        "pos_embed": (1, SIDE * SIDE + 1, d),
        "patch_embed.proj.weight": (d, 3, *kernel),
        "patch_embed.proj.bias": (d,),
        f"{norm}.weight": (d,),
    }
    if frames is not None:
        shapes["temporal_pos_embedding"] = (1, frames, d)
    for i in range(depth):
        m = f"layers.{i}.mixer."
        shapes |= {
            f"{m}A_log": (e, 16), f"{m}A_b_log": (e, 16), f"{m}D": (e,), f"{m}D_b": (e,),
            f"{m}in_proj.weight": (2 * e, d), f"{m}out_proj.weight": (d, e),
            f"{m}conv1d.weight": (e, 1, 4), f"{m}conv1d.bias": (e,),
            f"{m}conv1d_b.weight": (e, 1, 4), f"{m}conv1d_b.bias": (e,),
            f"{m}x_proj.weight": (r + 32, e), f"{m}x_proj_b.weight": (r + 32, e),
            f"{m}dt_proj.weight": (e, r), f"{m}dt_proj.bias": (e,),
            f"{m}dt_proj_b.weight": (e, r), f"{m}dt_proj_b.bias": (e,),
            f"layers.{i}.norm.weight": (d,),
        }  # fmt: skip
    return shapes


def decoder(d: int = WIDTH, count: int = 1, taught: int = TAUGHT) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {}
    for k in range(count):
        shapes |= {
            f"clip_decoder.{k}.head.weight": (taught, d), f"clip_decoder.{k}.head.bias": (taught,),
            f"clip_decoder.{k}.norm.weight": (taught,), f"clip_decoder.{k}.norm.bias": (taught,),
        }  # fmt: skip
    return shapes


def head(d: int = WIDTH, classes: int = CLASSES) -> dict[str, tuple[int, ...]]:
    return {"head.weight": (classes, d), "head.bias": (classes,)}


def bert(w: int = TEXT, d: int = WIDTH, v: int = WORDS, places: int = PLACES, layers: int = LAYERS,
         first_fusion: int = FIRST_FUSION) -> dict[str, tuple[int, ...]]:  # fmt: skip
    """BERT as the release keeps it: a masked-word model without a pooler, cross-attention in its last layers."""
    b = "bert.embeddings."
    shapes: dict[str, tuple[int, ...]] = {
        f"{b}position_ids": (1, places),
        f"{b}word_embeddings.weight": (v, w), f"{b}position_embeddings.weight": (places, w),
        f"{b}token_type_embeddings.weight": (2, w), f"{b}LayerNorm.weight": (w,), f"{b}LayerNorm.bias": (w,),
    }  # fmt: skip
    for i in range(layers):
        layer = f"bert.encoder.layer.{i}."
        parts = [("attention", w)] + ([("crossattention", d)] if i >= first_fusion else [])
        for part, seen in parts:
            for name, columns in (("query", w), ("key", seen), ("value", seen)):
                shapes |= {f"{layer}{part}.self.{name}.weight": (w, columns), f"{layer}{part}.self.{name}.bias": (w,)}
            shapes |= {f"{layer}{part}.output.dense.weight": (w, w), f"{layer}{part}.output.dense.bias": (w,)}
            shapes |= {f"{layer}{part}.output.LayerNorm.{kind}": (w,) for kind in ("weight", "bias")}
        shapes |= {f"{layer}intermediate.dense.weight": (4 * w, w), f"{layer}intermediate.dense.bias": (4 * w,)}
        shapes |= {f"{layer}output.dense.weight": (w, 4 * w), f"{layer}output.dense.bias": (w,)}
        shapes |= {f"{layer}output.LayerNorm.{kind}": (w,) for kind in ("weight", "bias")}
    c = "cls.predictions."
    return shapes | {
        f"{c}bias": (v,), f"{c}decoder.weight": (v, w), f"{c}decoder.bias": (v,),
        f"{c}transform.dense.weight": (w, w), f"{c}transform.dense.bias": (w,),
        f"{c}transform.LayerNorm.weight": (w,), f"{c}transform.LayerNorm.bias": (w,),
    }  # fmt: skip


def joint(
    vision: dict[str, tuple[int, ...]], text: dict[str, tuple[int, ...]], space: int
) -> dict[str, tuple[int, ...]]:
    """The joint model of an encoder and a BERT, with the teacher that the release leaves in it."""
    d, w = vision["cls_token"][2], text["bert.embeddings.LayerNorm.weight"][0]
    return (
        {f"vision_encoder.{name}": shape for name, shape in vision.items()}
        | {f"text_encoder.{name}": shape for name, shape in text.items()}
        | {
            "vision_proj.weight": (space, d), "vision_proj.bias": (space,),
            "text_proj.weight": (space, w), "text_proj.bias": (space,),
            "itm_head.weight": (2, w), "itm_head.bias": (2,), "temp": (),
            "clip_teacher.conv1.weight": (16, 3, 1, PATCH, PATCH), "clip_teacher.proj": (16, 8),
        }
    )  # fmt: skip


NAMES: dict[str, dict[str, tuple[int, ...]]] = {
    "image": encoder(norm="norm_f", kernel=(PATCH, PATCH), frames=None) | head(),
    "distilled": encoder(norm="norm_f", kernel=(PATCH, PATCH), frames=None) | head()
    | {"distill_head.0.weight": (WIDTH,), "distill_head.1.weight": (8, WIDTH), "distill_head.1.bias": (8,)},
    "video": encoder(norm="norm_f") | head(),
    "masked": encoder() | decoder(),
    "joint": joint(encoder() | decoder() | {"pool_norm.weight": (WIDTH,), "pool_norm.bias": (WIDTH,)}, bert(), SPACE),
}  # fmt: skip
"""Every published layout: name -> shape."""


def tensors(shapes: dict[str, tuple[int, ...]], dtype: torch.dtype = torch.float32, seed: int = 0) -> dict[str, Tensor]:
    """Numbers of a size that keeps a model calm, and what is tied, tied."""
    generator = torch.Generator().manual_seed(seed)
    made = {name: (torch.randn(shape, generator=generator) * 0.1).to(dtype) for name, shape in shapes.items()}
    for name in made:
        if name.endswith("position_ids"):
            made[name] = torch.arange(made[name].shape[1])[None]
        if name == "temp":
            made[name] = torch.tensor(0.05, dtype=dtype)
    c = "text_encoder.cls.predictions."
    if f"{c}bias" in made:
        made[f"{c}decoder.weight"] = made["text_encoder.bert.embeddings.word_embeddings.weight"]
        made[f"{c}decoder.bias"] = made[f"{c}bias"]
    return made


class Published:
    """Writes published files of a layout into a folder, as the release's programs do."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.names = NAMES

    def state(self, layout: str, **changed: Any) -> dict[str, Tensor]:
        return tensors(NAMES[layout], **changed)

    def file(self, layout: str, state: dict[str, Tensor] | None = None, beside: dict[str, Any] | None = None) -> Path:
        path = self.folder / f"{layout}.pth"
        state = self.state(layout) if state is None else state
        if beside is None and layout == "masked":
            beside = {"optimizer": {"state": {}}, "epoch": 800, "scaler": {},
                      "args": argparse.Namespace(model="videomamba_middle", lr=1.5e-4)}  # fmt: skip
        torch.save({"model": state} | (beside or {}), path)
        return path


@pytest.fixture
def published(tmp_path: Path) -> Published:
    return Published(tmp_path)


@pytest.fixture
def published_shapes() -> Callable[[str, int, int], dict[str, Tensor]]:
    """`published_shapes(layout, depth, width)`: a full-size file as tensors without numbers."""

    def shapes(layout: str, depth: int, width: int) -> dict[str, Tensor]:
        norm, kernel = ("norm", (1, 16, 16)) if layout in ("masked", "joint") else ("norm_f", (1, 16, 16))
        if layout == "image":
            kernel = (16, 16)
        listed = encoder(width, depth, norm, kernel, None if layout == "image" else 8) | {"pos_embed": (1, 197, width)}
        if layout in ("image", "video"):
            listed |= head(width, 1000 if layout == "image" else 400)
        else:
            listed |= decoder(width, taught=512)
        if layout == "joint":
            listed |= {"pool_norm.weight": (width,), "pool_norm.bias": (width,)}
            listed = joint(listed, bert(768, width, 30522, 512, 12, 9), 512)
        return {name: torch.empty(shape, device="meta") for name, shape in listed.items()}

    return shapes
