"""Train a small CLIP with open_clip on frames and captions of one's own: a teacher where none can be fetched.

`videomamba teacher configs/demo/teacher.yaml` reads shards, trains, and writes a folder that open_clip itself
loads (`local-dir:FOLDER`): `open_clip_config.json`, `open_clip_model.safetensors`, `tokenizer/`, `log.jsonl`.
A published CLIP is the better teacher wherever its weights are at hand; this one exists so that nothing
has to be downloaded.
"""

import json
import logging
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer

from configs.errors import UserError
from configs.loader import digest, to_yaml
from data_pipeline.loader import Batch, TrainLoader
from data_pipeline.preprocess import CLIP_MEAN, CLIP_STD, clean_caption, normalise
from data_pipeline.shards import Corpus
from data_pipeline.torchvision_shim import ensure_torchvision
from pretrain.clip_config import ClipTinyConfig
from pretrain.schedule import warmup_cosine
from pretrain.tokenizer import load_tokenizer, tokenize, train_tokenizer

log = logging.getLogger(__name__)


def model_config(config: ClipTinyConfig, vocab_size: int) -> dict[str, Any]:
    """The `model_cfg` of open_clip for this size; text is pooled at its first token, which is [CLS]."""
    return {
        "embed_dim": config.embed,
        "vision_cfg": {
            "image_size": config.data.image_size,
            "layers": config.layers,
            "width": config.width,
            "head_width": config.head_width,
            "patch_size": config.patch_size,
        },
        "text_cfg": {
            "context_length": config.max_tokens,
            "vocab_size": vocab_size,
            "width": config.width,
            "heads": config.width // config.head_width,
            "layers": config.text_layers,
            "pool_type": "first",
            "no_causal_mask": True,
        },
    }


def train_clip(config: ClipTinyConfig) -> Path:
    """Train and save the teacher; returns its folder. A finished folder of the same config is left as it is.

    Raises UserError if the folder holds a teacher of another config.
    """
    out = Path(config.out)
    if is_done(config):
        log.info("teacher %s is finished, nothing to do", out)
        return out
    if out.exists():
        raise UserError(f"{out} holds the teacher of another config.", "Give another out=, or remove that folder.")
    aside = out.with_name(f".{out.name}.partial")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    ensure_torchvision()
    torch.manual_seed(config.seed)
    loader = TrainLoader(config.data, seed=config.seed, rank=0, world=1, start_step=0, steps=config.steps)
    train_tokenizer(_captions(config), aside / "tokenizer", vocab_size=config.vocab_size)
    tokenizer = load_tokenizer(aside / "tokenizer")
    settings = model_config(config, tokenizer.get_vocab_size())
    model = _build(settings)
    losses = _fit(model, loader, tokenizer, config, aside / "log.jsonl")
    _save(model, settings, config, aside)
    (aside / "done.json").write_text(json.dumps({"config": digest(config), "loss": losses[-1], "steps": config.steps}))
    aside.rename(out)
    return out


def is_done(config: ClipTinyConfig) -> bool:
    """Whether the out folder holds the finished teacher of exactly this config."""
    marker = Path(config.out) / "done.json"
    return marker.is_file() and json.loads(marker.read_text())["config"] == digest(config)


def _captions(config: ClipTinyConfig) -> Iterator[str]:
    for corpus in config.data.train:
        for meta in Corpus.open(corpus.path).metas():
            yield from (clean_caption(caption) for caption in meta["captions"])


def _build(settings: dict[str, Any]) -> torch.nn.Module:
    from open_clip.model import CLIP

    model: torch.nn.Module = CLIP(**settings)
    return model


def _fit(
    model: torch.nn.Module, loader: TrainLoader, tokenizer: Tokenizer, config: ClipTinyConfig, log_file: Path
) -> list[float]:
    from open_clip.loss import ClipLoss

    clip_loss = ClipLoss()
    decayed = [p for p in model.parameters() if p.ndim >= 2]
    plain = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": plain, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=config.lr, betas=(0.9, 0.98), fused=True)
    losses: list[float] = []
    model.train()
    with log_file.open("w") as lines:
        for step, (images, tokens) in enumerate(_batches(loader, tokenizer, config)):
            began = time.perf_counter()
            for group in optimizer.param_groups:
                group["lr"] = config.lr * warmup_cosine(step, config.steps, config.warmup_steps, 0.01)
            with torch.autocast("cpu", dtype=torch.bfloat16):
                image_features, text_features, scale = model(images, tokens)
            loss = clip_loss(image_features.float(), text_features.float(), scale)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            losses.append(loss.item())
            if (step + 1) % config.log_every == 0 or step + 1 == config.steps:
                mean = sum(losses[-config.log_every :]) / len(losses[-config.log_every :])
                seconds = time.perf_counter() - began
                lines.write(json.dumps({"step": step + 1, "loss": mean, "step_seconds": seconds}) + "\n")
                lines.flush()
                log.info("teacher: step %d/%d, loss %.3f", step + 1, config.steps, mean)
    return losses


def _batches(
    loader: TrainLoader, tokenizer: Tokenizer, config: ClipTinyConfig
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    for batch in loader:
        frames = normalise(batch.frames, CLIP_MEAN, CLIP_STD)
        yield frames[:, :, 0], _padded_tokens(tokenizer, batch, config.max_tokens)


def _padded_tokens(tokenizer: Tokenizer, batch: Batch, length: int) -> torch.Tensor:
    ids_BL, _ = tokenize(tokenizer, [clean_caption(caption) for caption in batch.captions], length, length=length)
    return ids_BL


def _save(model: torch.nn.Module, settings: dict[str, Any], config: ClipTinyConfig, folder: Path) -> None:
    from safetensors.torch import save_file

    weights = {name: tensor.detach().contiguous() for name, tensor in model.state_dict().items()}
    save_file(weights, folder / "open_clip_model.safetensors")
    size = config.data.image_size
    preprocess = {
        "size": [size, size], "mode": "RGB", "mean": list(CLIP_MEAN), "std": list(CLIP_STD),
        "interpolation": "bicubic", "resize_mode": "squash",
    }  # fmt: skip
    described = {"model_cfg": settings, "preprocess_cfg": preprocess}
    (folder / "open_clip_config.json").write_text(json.dumps(described, indent=2))
    (folder / "config.yaml").write_text(to_yaml(config))
