"""A stage-2 checkpoint as two functions: clips to vectors and patch tokens, texts to vectors and hidden states.

B clips or texts, C channels, T frames, H and W pixels, K token frames, N patch tokens, L words, D widths, E joint
width.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch
from tokenizers import Tokenizer
from torch import Tensor

from configs.errors import UserError
from configs.loader import digest
from data_pipeline.preprocess import TextPreprocess, TextRule, VisualPreprocess
from pretrain.checkpoint import Meta, load_model, read_meta, resolve, tokenizer_of
from pretrain.models.joint import JointModel
from pretrain.tokenizer import load_tokenizer, tokenize


class Clips(NamedTuple):
    """`vectors_BE` float32, the mean of the clip's unit frame vectors, not normalised again: the inner product
    with a text's unit vector is then the mean over frames of cosines. `patches_BND` are the tokens without cls.
    """

    vectors_BE: Tensor
    patches_BND: Tensor


class Texts(NamedTuple):
    """`vectors_BE` float32 unit vectors; `hidden_BLD` after the text layers; `mask_BL` 1 on words, 0 on padding."""

    vectors_BE: Tensor
    hidden_BLD: Tensor
    mask_BL: Tensor


@dataclass(frozen=True)
class Encoders:
    """Both towers of one checkpoint with the preprocessing that was stored beside them."""

    model: JointModel
    visual: VisualPreprocess
    text: TextPreprocess
    tokenizer: Tokenizer
    folder: Path
    meta: Meta
    device: torch.device
    precision: str = "fp32"

    @classmethod
    def load(cls, checkpoint: str | Path, device: str = "auto", precision: str = "fp32") -> "Encoders":
        """The encoders of a run or checkpoint folder of stage 2; UserError for anything else."""
        folder = resolve(checkpoint)
        place = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device)
        model, _, preprocess = load_model(folder, str(place))
        if not isinstance(model, JointModel) or preprocess.text is None:
            raise UserError(
                f"{folder} is a checkpoint of stage 1, which has no text encoder.",
                "Give the folder of a stage-2 run (`videomamba checkpoint inspect` says what a folder holds).",
            )
        tokenizer = load_tokenizer(tokenizer_of(folder))
        return cls(model, preprocess.visual, preprocess.text, tokenizer, folder, read_meta(folder), place, precision)

    def reading(self, max_tokens: int, clean: TextRule | None, first_seconds: float | None) -> "Encoders":
        """The same encoders with a test set's own token limit (and cleaning, and part of a clip, unless None).

        Raises UserError for more tokens than the text tower has positions.
        """
        joint = self.meta.model.joint
        most = joint.text.positions if joint else max_tokens
        if max_tokens > most:
            raise UserError(
                f"The test set reads texts of up to {max_tokens} tokens, the checkpoint's text tower {most}.",
                f"Give data.max_tokens={most}, and say so beside the number.",
            )
        text = self.text.model_copy(update={"max_tokens": max_tokens, "clean": clean or self.text.clean})
        visual = self.visual.model_copy(update={"first_seconds": first_seconds or self.visual.first_seconds})
        return replace(self, text=text, visual=visual)

    @property
    def digest(self) -> str:
        """16 hex digits of everything that decides a vector: weights, model, tokenizer and preprocessing."""
        kept = ("model.safetensors", "preprocess.json")
        files = {
            name: value for name, value in self.meta.files.items() if name in kept or name.startswith("tokenizer/")
        }
        return digest({"files": files, "model": self.meta.model.model_dump(mode="json")})

    @property
    def width(self) -> int:
        """Numbers in a vector of the joint space."""
        return int(self.model.config.embed)

    def clips(self, frames_BCTHW: Tensor) -> Clips:
        """Encode uint8 frames as the loader gives them."""
        model = self.model
        with torch.inference_mode(), self._autocast():
            seen = model.vision_encoder.forward_tokens(self.visual.normalise(frames_BCTHW.to(self.device)))
            pooled_BKD = model.vision_encoder.pooled(seen.tokens_BLD, seen.frames, per_frame=True)
            return Clips(model.embed_video(pooled_BKD).mean(1), seen.patches)

    def texts(self, captions: list[str]) -> Texts:
        """Encode captions, cleaned and cut as the checkpoint says."""
        cleaned = [self.text.clean_caption(caption) for caption in captions]
        ids_BL, mask_BL = tokenize(self.tokenizer, cleaned, self.text.max_tokens)
        return self.tokens(ids_BL, mask_BL)

    def tokens(self, ids_BL: Tensor, mask_BL: Tensor) -> Texts:
        """Encode token ids."""
        mask_BL = mask_BL.to(self.device)
        with torch.inference_mode(), self._autocast():
            hidden_BLD = self.model.text_encoder.encode(ids_BL.to(self.device), mask_BL)
            return Texts(self.model.embed_text(hidden_BLD), hidden_BLD, mask_BL)

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16")
