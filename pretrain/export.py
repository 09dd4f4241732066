"""A stage-2 checkpoint to two folders that load elsewhere: `video/` and `text/`.

Each holds config.json, model.safetensors, preprocessor_config.json and README.md, the text one its tokenizer too;
`export.json` beside them says what they were made from. Before they get their names, a fresh process loads them
from disk, and its embeddings of drawn clips and texts must equal the checkpoint's.

B clips or texts, C channels, T frames, H and W pixels, L words, E joint width.
"""

import json
import logging
import os
import shutil
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from configs.errors import UserError
from configs.files import sync_folder
from data_pipeline.preprocess import TextPreprocess, VisualPreprocess
from pretrain.checkpoint import Preprocess, load_model, read_meta, resolve, tokenizer_of, writing
from pretrain.config import PretrainConfig
from pretrain.encoder import PREPROCESS
from pretrain.export_card import model_card
from pretrain.export_hf import (
    VideoMambaTextConfig,
    VideoMambaTextModel,
    VideoMambaVideoConfig,
    VideoMambaVideoModel,
)
from pretrain.models.joint import JointModel
from pretrain.tokenizer import load_tokenizer, tokenize

log = logging.getLogger(__name__)

LIMIT = 1e-5
SUMMARY = "export.json"
CLIPS, TEXTS = 2, 4


@dataclass(frozen=True)
class ExportSummary:
    """What an export came to; the differences are the largest between any two numbers of unit vectors."""

    out: str
    checkpoint: str
    checkpoint_sha256: str
    step: int
    video_difference: float
    text_difference: float
    video_parameters: int
    text_parameters: int


def export(checkpoint: str | Path, out: str | Path, result: Path | None = None) -> ExportSummary:
    """Write `out`/video and `out`/text from a run or checkpoint folder of stage 2, whole or not at all.

    `result` is a result.json whose numbers go onto the model cards. An earlier export in `out` is replaced. Raises
    UserError for another kind of checkpoint, an `out` that holds something else, a full disk, and where the
    embeddings of the exported models differ from the checkpoint's by more than 1e-5.
    """
    folder, target = resolve(checkpoint), Path(out).resolve()
    _check_target(target)
    model, config, preprocess = load_model(folder)
    if not isinstance(model, JointModel) or preprocess.text is None:
        raise UserError(f"{folder} is a checkpoint of stage 1, which has no text encoder.", "Give one of stage 2.")
    tokenizer_of(folder)
    meta = read_meta(folder)
    aside = target.with_name(f".{target.name}.part")
    with writing(target):
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        try:
            counts = _write(model, config, preprocess, preprocess.text, folder, aside, result)
            video, text = check(model, preprocess.visual, preprocess.text, tokenizer_of(folder), aside)
            summary = ExportSummary(
                str(target), str(folder), meta.files["model.safetensors"], meta.step, video, text, *counts
            )
            (aside / SUMMARY).write_text(json.dumps(asdict(summary), indent=2))
            _put(aside, target)
        finally:
            shutil.rmtree(aside, ignore_errors=True)
    return summary


def _check_target(target: Path) -> None:
    if target.exists() and (not target.is_dir() or (any(target.iterdir()) and not (target / SUMMARY).is_file())):
        raise UserError(f"{target} is not empty and holds no export.", "Give another folder, or empty it yourself.")


def _put(aside: Path, target: Path) -> None:
    for path in aside.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
    old = target.with_name(f".{target.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        target.rename(old)
    aside.rename(target)
    sync_folder(target.parent)
    shutil.rmtree(old, ignore_errors=True)


def _write(
    model: JointModel,
    config: PretrainConfig | None,
    preprocess: Preprocess,
    text: TextPreprocess,
    folder: Path,
    aside: Path,
    result: Path | None,
) -> tuple[int, int]:
    """Both folders; returns how many parameters each model has."""
    video_model, text_model = to_video(model), to_text(model)
    trees: dict[str, dict[str, Any]] = {
        "video": {"visual": preprocess.visual.model_dump(mode="json"), "digest": preprocess.visual.digest},
        "text": {"text": text.model_dump(mode="json"), "digest": text.digest},
    }
    results = json.loads(result.read_text()) if result is not None else None
    shutil.copytree(tokenizer_of(folder), aside / "text")
    counts = []
    for part, exported in (("video", video_model), ("text", text_model)):
        (aside / part).mkdir(exist_ok=True)
        weights = {name: tensor.detach().contiguous() for name, tensor in exported.state_dict().items()}
        save_file(weights, aside / part / "model.safetensors", metadata={"format": "pt"})
        exported.config.architectures = [type(exported).__name__]
        (aside / part / "config.json").write_text(exported.config.to_json_string())
        (aside / part / PREPROCESS).write_text(json.dumps(trees[part], indent=2))
        (aside / part / "README.md").write_text(model_card(part, config, read_meta(folder), results), encoding="utf-8")
        counts.append(sum(weight.numel() for weight in exported.parameters()))
    return counts[0], counts[1]


def to_video(model: JointModel) -> VideoMambaVideoModel:
    """The video half of a joint model: its own weights, without the alignment decoder."""
    vision = model.config.vision.model_copy(update={"align_width": 0})
    settings = VideoMambaVideoConfig(vision=vision.model_dump(mode="json"), embed=model.config.embed)
    video: VideoMambaVideoModel = _filled(VideoMambaVideoModel(settings), model)
    return video


def to_text(model: JointModel) -> VideoMambaTextModel:
    """The text half of a joint model: the layers that read text alone."""
    text = model.config.text.model_copy(update={"fusion_layers": 0, "init": None})
    settings = VideoMambaTextConfig(text=text.model_dump(mode="json"), embed=model.config.embed)
    words: VideoMambaTextModel = _filled(VideoMambaTextModel(settings), model)
    return words


def _filled(exported: Any, model: JointModel) -> Any:
    weights = model.state_dict()
    exported.load_state_dict({name: weights[name] for name in exported.state_dict()})
    return exported.eval()


def check(
    model: JointModel, visual: VisualPreprocess, text: TextPreprocess, tokenizer: Path, exported: Path
) -> tuple[float, float]:
    """The largest differences (video, text) between `model`'s embeddings and those of a fresh process.

    Both get the same drawn pixels and words; the fresh process knows nothing but the folder. Raises UserError
    (exit code 1) past 1e-5, or if that process fails.
    """
    frames_BCTHW, captions = _drawn(visual, tokenizer)
    given, taken = exported / ".check-in.safetensors", exported / ".check-out.safetensors"
    save_file({"frames": frames_BCTHW}, given, metadata={"captions": json.dumps(captions)})
    path = os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    process = subprocess.run(
        [sys.executable, "-P", "-m", "pretrain.export_check", str(exported), str(given), str(taken)],
        env={**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    if process.returncode != 0:
        last = (process.stderr.strip().splitlines() or ["no message"])[-1]
        raise UserError(f"The exported encoders do not load in a fresh process: {last}.", "Report this.", exit_code=1)
    found = load_file(taken)
    given.unlink()
    taken.unlink()
    with torch.inference_mode():
        seen = model.vision_encoder.forward_tokens(visual.normalise(frames_BCTHW))
        pooled = model.vision_encoder.pooled(seen.tokens_BLD, seen.frames, per_frame=True)
        ids_BL, mask_BL = tokenize(
            load_tokenizer(tokenizer), [text.clean_caption(caption) for caption in captions], text.max_tokens
        )
        hidden_BLD = model.text_encoder.encode(ids_BL, mask_BL)
        video = _difference(model.embed_video(pooled), found["frames"])
        words = _difference(model.embed_text(hidden_BLD), found["texts"])
    log.info("largest difference from the checkpoint: video %.1e, text %.1e", video, words)
    if not max(video, words) <= LIMIT:
        raise UserError(
            f"The exported encoders give other embeddings than the checkpoint (video {video:.1e}, text {words:.1e}, "
            f"limit {LIMIT:.0e}).",
            "Report this with the checkpoint's config.yaml.",
            exit_code=1,
        )
    return video, words


def _drawn(visual: VisualPreprocess, tokenizer: Path) -> tuple[Tensor, list[str]]:
    """Pixels uint8 (B, C, T, S, S) and captions of 1 to 2 * TEXTS words, always the same for one preprocessing."""
    generator = torch.Generator().manual_seed(0)
    size = (CLIPS, 3, visual.frames, visual.image_size, visual.image_size)
    frames_BCTHW = torch.randint(0, 256, size, generator=generator, dtype=torch.uint8)
    words = sorted(word for word in load_tokenizer(tokenizer).get_vocab() if word.isalnum())
    drawn = torch.randint(0, len(words), (TEXTS, 2 * TEXTS), generator=generator).tolist()
    return frames_BCTHW, [" ".join(words[i] for i in row[: 2 * n + 1]) for n, row in enumerate(drawn)]


def _difference(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).abs().max())
