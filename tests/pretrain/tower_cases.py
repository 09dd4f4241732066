"""Small visual towers of each make that open_clip builds, at random, and by which rule each is read."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from data_pipeline.torchvision_shim import ensure_torchvision

ensure_torchvision()
import timm  # noqa: E402
from open_clip.model import CLIP  # noqa: E402
from open_clip.modified_resnet import ModifiedResNet  # noqa: E402
from open_clip.timm_model import TimmModel  # noqa: E402
from open_clip.transformer import VisionTransformer  # noqa: E402

SMALL_VIT = {"img_size": 32, "patch_size": 8, "depth": 2, "embed_dim": 24, "num_heads": 3}
WIDTH = 10  # that a tower puts out


def clip_vit(**options: Any) -> VisionTransformer:
    """open_clip's own, 32 pixels in 4x4 patches, 24 wide."""
    return VisionTransformer(32, 8, 24, 2, 3, 2.0, output_dim=WIDTH, **options)


def small_timm(name: str, image_size: int = 32, pool: str = "", proj: str | None = None, **small: Any) -> TimmModel:
    """A tower as open_clip builds it, of a timm model made small; it gives timm no sizes itself."""
    if not small or "global_pool" in small:
        small = (SMALL_VIT if "vit" in name or "eva" in name else {}) | small
    create = timm.create_model
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("open_clip.timm_model.timm.create_model", lambda *a, **k: create(*a, **{**k, **small}))
        return TimmModel(name, WIDTH, image_size=image_size, pool=pool, proj=proj)


@torch.no_grad()
def shake(visual: nn.Module) -> None:
    """Move every weight: many begin at zero or one, which would hide a mistake."""
    for weight in visual.parameters():
        weight += 0.2 * torch.randn_like(weight) * max(weight.std().item() if weight.numel() > 1 else 0.0, 0.1)


CONVNEXT = {"depths": (1, 1, 2, 1), "dims": (8, 12, 16, 24)}
SWIN = {"img_size": 64, "patch_size": 2, "window_size": 4, "embed_dim": 8, "depths": (1, 1, 1), "num_heads": (2, 2, 2)}
FASTVIT = {"layers": (1, 1, 1, 1), "embed_dims": (64, 64, 64, 64)}

POOLED: dict[str, Callable[[], nn.Module]] = {
    "CoCa": lambda: clip_vit(attentional_pool=True, attn_pooler_heads=2, attn_pooler_queries=5),
    "CLIPA": lambda: clip_vit(pool_type="avg", final_ln_after_pool=True),
    "CLIP ResNet": lambda: ModifiedResNet([1, 1, 1, 1], WIDTH, 4, image_size=128, width=4),
    "SigLIP": lambda: small_timm("vit_base_patch16_siglip_224", pool="map", proj="none", **SMALL_VIT),
    "PE-Core, cls and attention pooling": lambda: small_timm("vit_pe_core_base_patch16_224", pool="map", **SMALL_VIT),
    "PE-Core, attention pooling alone": lambda: small_timm(
        "vit_pe_core_base_patch16_224", pool="map", class_token=False, **SMALL_VIT
    ),
    "ViT of means": lambda: small_timm("vit_medium_patch16_gap_256", proj="linear", **SMALL_VIT),
    "ViTamin": lambda: small_timm("vitamin_small_224", 64, proj="linear", img_size=64, depth=1),
    "ConvNeXt, linear": lambda: small_timm("convnext_tiny", 128, proj="linear", **CONVNEXT),
    "ConvNeXt, mlp": lambda: small_timm("convnext_tiny", 128, proj="mlp", **CONVNEXT),
    "FastViT": lambda: small_timm("fastvit_mci1", 128, pool="avg", **FASTVIT),
    "Swin": lambda: small_timm("swin_base_patch4_window7_224", 64, proj="linear", **SWIN),
}
"""Towers that sum a frame up by a mean or an attention pooling. All of them put out WIDTH numbers but SigLIP's."""

BY_MEAN = ("CLIPA", "ViT of means", "ViTamin", "ConvNeXt, linear", "ConvNeXt, mlp", "FastViT", "Swin")

CLIPA = {"image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8} | {
    "pool_type": "avg",
    "final_ln_after_pool": True,
}


def clip_folder(folder: Path, vision: dict[str, Any]) -> str:
    """A CLIP at random, of a vision_cfg, in a folder as open_clip writes it."""
    text = {"context_length": 16, "vocab_size": 64, "width": 32, "heads": 2, "layers": 1}
    settings = {"embed_dim": 24, "vision_cfg": vision, "text_cfg": text}
    torch.manual_seed(0)
    weights = {name: tensor.contiguous() for name, tensor in CLIP(**settings).state_dict().items()}
    save_file(weights, folder / "open_clip_model.safetensors")
    described = {"model_cfg": settings, "preprocess_cfg": {"size": [32, 32], "mode": "RGB"}}
    (folder / "open_clip_config.json").write_text(json.dumps(described))
    return str(folder)
