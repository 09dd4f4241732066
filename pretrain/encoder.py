"""An exported encoder as two functions: clips to vectors and texts to vectors, preprocessing included.

    from videomamba import load_encoder
    encoder = load_encoder("encoders")
    scores = encoder.encode_video(["a.mp4", "b.mp4"]) @ encoder.encode_text(["a dog catches a frisbee"]).T

B clips or texts, T frames, H and W pixels, C channels, L words, E joint width.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer
from torch import Tensor

from configs.errors import UserError
from configs.loader import validate
from data_pipeline.decode import decode_video
from data_pipeline.frames import middle_indices, middle_of
from data_pipeline.preprocess import TextPreprocess, VisualPreprocess
from data_pipeline.schema import SampleError
from data_pipeline.transforms import from_decoder, to_square
from pretrain.tokenizer import load_tokenizer, tokenize

PREPROCESS = "preprocessor_config.json"
Clip = str | Path | NDArray[np.uint8]
Vectors = NDArray[np.float32]


@dataclass(frozen=True)
class VideoEncoder:
    """`model` is a VideoMambaVideoModel; `visual` is what its pixels go through."""

    model: Any
    visual: VisualPreprocess

    def encode(self, clips: Sequence[Clip], batch: int = 16, normalise: bool = False) -> Vectors:
        """One vector a clip, (B, E): the mean of its unit frame vectors, or with `normalise` its direction.

        A clip is a path, or frames (T, H, W, 3) uint8 RGB in their order. Not normalised, the inner product with a
        text's vector is the published dual score. Raises UserError for a file that cannot be decoded.
        """
        device = next(self.model.parameters()).device
        vectors: list[Tensor] = []
        for start in range(0, len(clips), batch):
            frames = map(self.frames, clips[start : start + batch])
            for _, alike in groupby(frames, key=lambda frames_CTHW: frames_CTHW.shape):
                pixels = self.visual.normalise(torch.stack(list(alike)).to(device))
                with torch.inference_mode():
                    made = self.model(pixels)
                vectors.append(made.embedding if normalise else made.frame_embeddings.mean(1))
        return torch.cat(vectors).cpu().numpy() if vectors else np.empty((0, self.model.config.embed), np.float32)

    def frames(self, clip: Clip) -> Tensor:
        """A clip as the model sees it before normalisation: uint8 (C, T, S, S), T = 1 for a picture."""
        frames_TCHW = from_decoder(self._decode(clip) if isinstance(clip, str | Path) else self._chosen(clip))
        square = to_square(frames_TCHW, self.visual.image_size, self.visual.resize, self.visual.interpolation)
        return square.transpose(0, 1)

    def _decode(self, path: str | Path) -> NDArray[np.uint8]:
        try:
            return decode_video(
                Path(path).read_bytes(),
                lambda n, seconds: middle_of(n, seconds, self._count(n), self.visual.first_seconds),
            )
        except (OSError, SampleError) as error:
            raise UserError(f"{path} cannot be read as a clip: {error}.", "Give another file.") from error

    def _chosen(self, frames_THWC: NDArray[np.uint8]) -> NDArray[np.uint8]:
        if frames_THWC.ndim != 4 or frames_THWC.shape[-1] != 3 or frames_THWC.dtype != np.uint8:
            seen = f"{frames_THWC.dtype} of shape {frames_THWC.shape}"
            raise UserError(f"A clip is {seen}, not uint8 (frames, height, width, 3).", "Give RGB frames, or a path.")
        return frames_THWC[middle_indices(len(frames_THWC), self._count(len(frames_THWC)))]

    def _count(self, frames: int) -> int:
        return 1 if frames == 1 else self.visual.frames


@dataclass(frozen=True)
class TextEncoder:
    """`model` is a VideoMambaTextModel; `text` is how captions are cleaned and cut."""

    model: Any
    text: TextPreprocess
    tokenizer: Tokenizer

    def encode(self, captions: Sequence[str], batch: int = 256) -> Vectors:
        """One unit vector a caption, (B, E)."""
        device = next(self.model.parameters()).device
        cleaned = [self.text.clean_caption(caption) for caption in captions]
        vectors: list[Tensor] = []
        for start in range(0, len(cleaned), batch):
            ids_BL, mask_BL = tokenize(self.tokenizer, cleaned[start : start + batch], self.text.max_tokens)
            with torch.inference_mode():
                vectors.append(self.model(ids_BL.to(device), mask_BL.to(device)).embedding)
        return torch.cat(vectors).cpu().numpy() if vectors else np.empty((0, self.model.config.embed), np.float32)


@dataclass(frozen=True)
class Encoder:
    """Both encoders of an export."""

    video: VideoEncoder
    text: TextEncoder

    def encode_video(self, clips: Sequence[Clip], batch: int = 16, normalise: bool = False) -> Vectors:
        """See VideoEncoder.encode."""
        return self.video.encode(clips, batch, normalise)

    def encode_text(self, captions: Sequence[str], batch: int = 256) -> Vectors:
        """See TextEncoder.encode."""
        return self.text.encode(captions, batch)


def load_encoder(folder: str | Path, device: str = "cpu") -> Encoder:
    """The encoders in the `video` and `text` folders of an export; UserError if it is none."""
    from pretrain import export_hf

    folder = Path(folder)
    trees = {}
    for part in ("video", "text"):
        try:
            trees[part] = json.loads((folder / part / PREPROCESS).read_text())
        except (OSError, ValueError) as error:
            raise UserError(
                f"{folder} holds no exported encoders (no readable {part}/{PREPROCESS}).",
                "Make them with `videomamba export CHECKPOINT OUT`.",
            ) from error
    video, text = (export_hf.AutoModel.from_pretrained(folder / part).to(device).eval() for part in ("video", "text"))
    return Encoder(
        VideoEncoder(video, validate(trees["video"]["visual"], VisualPreprocess, str(folder / "video" / PREPROCESS))),
        TextEncoder(
            text,
            validate(trees["text"]["text"], TextPreprocess, str(folder / "text" / PREPROCESS)),
            load_tokenizer(folder / "text"),
        ),
    )
