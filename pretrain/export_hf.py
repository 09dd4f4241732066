"""The exported encoders as transformers models; importing this file makes AutoModel know them.

    import pretrain.export_hf
    from transformers import AutoModel
    video = AutoModel.from_pretrained("encoders/video")
    text = AutoModel.from_pretrained("encoders/text")

B clips or texts, C channels, T frames, H and W pixels, K token frames, L words, E joint width.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from data_pipeline.torchvision_shim import ensure_torchvision
from pretrain.models.config import TextConfig, VisionConfig
from pretrain.models.text import TextTower
from pretrain.models.videomamba import VideoMamba

ensure_torchvision()

from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel  # noqa: E402
from transformers.utils.generic import ModelOutput  # noqa: E402

VIDEO_TYPE, TEXT_TYPE = "videomamba_video", "videomamba_text"

__all__ = [
    "AutoModel",
    "TextEmbedding",
    "VideoEmbedding",
    "VideoMambaTextConfig",
    "VideoMambaTextModel",
    "VideoMambaVideoConfig",
    "VideoMambaVideoModel",
]


@dataclass
class VideoEmbedding(ModelOutput):
    """`embedding` (B, E), a unit vector: the direction of the mean of the frame vectors; `frame_embeddings` (B, K, E),
    unit vectors, one a token frame. The published dual score of a clip and a text is the mean over frames of
    cosines: `frame_embeddings.mean(1)` times the text's embedding.
    """

    embedding: Tensor | None = None
    frame_embeddings: Tensor | None = None


@dataclass
class TextEmbedding(ModelOutput):
    """`embedding` (B, E), a unit vector."""

    embedding: Tensor | None = None


class VideoMambaVideoConfig(PreTrainedConfig):
    """`vision` holds the fields of VisionConfig, `embed` the joint width."""

    model_type = VIDEO_TYPE

    def __init__(self, vision: dict[str, Any] | None = None, embed: int = 512, **others: Any) -> None:
        self.vision = vision if vision is not None else VisionConfig.model_validate({"name": "middle"}).model_dump()
        self.embed = embed
        super().__init__(**others)


class VideoMambaTextConfig(PreTrainedConfig):
    """`text` holds the fields of TextConfig, `embed` the joint width."""

    model_type = TEXT_TYPE

    def __init__(self, text: dict[str, Any] | None = None, embed: int = 512, **others: Any) -> None:
        self.text = text if text is not None else TextConfig(fusion_layers=0).model_dump()
        self.embed = embed
        super().__init__(**others)


class _Exported(PreTrainedModel):
    """What both share. Weights come from a checkpoint; the towers draw their own when built by hand."""

    def _init_weights(self, module: nn.Module) -> None:
        """Fill what no file holds: BERT's tables of positions and token types, which are not saved."""
        positions = getattr(module, "position_ids", None)
        if isinstance(positions, Tensor):
            with torch.no_grad():
                positions.copy_(torch.arange(positions.shape[-1]).expand_as(positions))
                module.token_type_ids.zero_()  # type: ignore[operator]


class VideoMambaVideoModel(_Exported):
    """VideoMamba and its projection to the joint space."""

    config_class = VideoMambaVideoConfig
    main_input_name = "pixel_values"

    def __init__(self, config: VideoMambaVideoConfig) -> None:
        super().__init__(config)
        vision = VisionConfig.model_validate(config.vision)
        self.vision_encoder = VideoMamba(vision)
        self.vision_proj = nn.Linear(vision.width, config.embed)
        self.post_init()  # type: ignore[no-untyped-call]

    def forward(self, pixel_values: Tensor, **_: Any) -> VideoEmbedding:
        """Normalised clips (B, C, T, H, W) float, or images with T = 1; see preprocessor_config.json."""
        seen = self.vision_encoder.forward_tokens(pixel_values)
        pooled_BKD = self.vision_encoder.pooled(seen.tokens_BLD, seen.frames, per_frame=True)
        frames_BKE = F.normalize(self.vision_proj(pooled_BKD).float(), dim=-1)
        return VideoEmbedding(embedding=F.normalize(frames_BKE.mean(1), dim=-1), frame_embeddings=frames_BKE)


class VideoMambaTextModel(_Exported):
    """The text layers of the tower and their projection to the joint space; no fusion layers, no word head."""

    config_class = VideoMambaTextConfig
    main_input_name = "input_ids"

    def __init__(self, config: VideoMambaTextConfig) -> None:
        super().__init__(config)
        text = TextConfig.model_validate(config.text)
        self.text_encoder = TextTower(text, vision_width=text.width)
        del self.text_encoder.cls
        self.text_proj = nn.Linear(text.width, config.embed)
        self.post_init()  # type: ignore[no-untyped-call]

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, **_: Any) -> TextEmbedding:
        """Token ids (B, L) and their mask (B, L), 1 on words; None for texts without padding."""
        mask_BL = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        hidden_BLD = self.text_encoder.encode(input_ids, mask_BL)
        return TextEmbedding(embedding=F.normalize(self.text_proj(hidden_BLD[:, 0]).float(), dim=-1))


for _type, _config, _model in (
    (VIDEO_TYPE, VideoMambaVideoConfig, VideoMambaVideoModel),
    (TEXT_TYPE, VideoMambaTextConfig, VideoMambaTextModel),
):
    AutoConfig.register(_type, _config, exist_ok=True)
    AutoModel.register(_config, _model, exist_ok=True)
