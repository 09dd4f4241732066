"""A teacher small enough for tests: an untrained CLIP in a folder as open_clip writes it."""

import json
from pathlib import Path

import torch


def write_tiny_clip(folder: Path, side: int) -> Path:
    """Write it for pictures of `side` x `side`, in patches of 8 x 8; the same weights every time."""
    from data_pipeline.torchvision_shim import ensure_torchvision

    ensure_torchvision()
    from open_clip.model import CLIP
    from safetensors.torch import save_file

    torch.manual_seed(0)
    settings = {
        "embed_dim": 24,
        "vision_cfg": {"image_size": side, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8},
        "text_cfg": {"context_length": 16, "vocab_size": 64, "width": 32, "heads": 2, "layers": 1},
    }
    folder.mkdir(parents=True, exist_ok=True)
    save_file(dict(CLIP(**settings).state_dict()), folder / "open_clip_model.safetensors")
    described = {"model_cfg": settings, "preprocess_cfg": {"size": [side, side], "mode": "RGB"}}
    (folder / "open_clip_config.json").write_text(json.dumps(described))
    return folder
