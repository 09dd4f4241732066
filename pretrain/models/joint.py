"""The joint model of stage 2: a video encoder and a text tower that meet in one space, and a head that matches.

B batch, F vectors a clip (1, or one a frame), E joint width, L words, D widths of the towers, V vision tokens.

State-dict names are the release's, apart from `temp`, which is (1,) here and a scalar there (`released.py`).
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pretrain.models.config import JointConfig
from pretrain.models.text import TextTower
from pretrain.models.videomamba import VideoMamba

TEMPERATURE_INIT, TEMPERATURE_MIN, TEMPERATURE_MAX = 0.07, 0.001, 0.5


class JointModel(nn.Module):
    """Both towers, their projections to the joint space, the temperature and the matching head."""

    def __init__(self, config: JointConfig) -> None:
        super().__init__()
        vision = config.vision.model_copy(update={"pool_norm": True})
        self.config = config.model_copy(update={"vision": vision})
        self.vision_encoder = VideoMamba(vision)
        self.text_encoder = TextTower(config.text, vision.width)
        self.vision_proj = nn.Linear(vision.width, config.embed)
        self.text_proj = nn.Linear(config.text.width, config.embed)
        # DeepSpeed cannot broadcast a parameter without dimensions.
        self.temp = nn.Parameter(torch.full((1,), TEMPERATURE_INIT))
        self.itm_head = nn.Linear(config.text.width, 2)

    @torch.no_grad()
    def clamp_temperature(self) -> None:
        """Keep the temperature in [0.001, 0.5], as the release does before every step."""
        self.temp.clamp_(TEMPERATURE_MIN, TEMPERATURE_MAX)

    def embed_video(self, pooled_BFD: Tensor) -> Tensor:
        """Unit vectors (B, F, E), float32, of pooled clips (`vision_encoder.pooled`)."""
        return F.normalize(self.vision_proj(pooled_BFD).float(), dim=-1)

    def embed_text(self, hidden_BLD: Tensor) -> Tensor:
        """Unit vectors (B, E), float32, from the first word's hidden state after the text layers."""
        return F.normalize(self.text_proj(hidden_BLD[:, 0]).float(), dim=-1)

    def match_logits(self, hidden_BLD: Tensor, attention_mask_BL: Tensor, vision_BVD: Tensor) -> Tensor:
        """Scores (B, 2), float32, that text i does not (0) or does (1) describe clip i.

        `hidden_BLD` are hidden states after the text layers, `vision_BVD` patch tokens without cls.
        """
        fused_BLD = self.text_encoder.fuse(hidden_BLD, attention_mask_BL, vision_BVD)
        with torch.autocast(fused_BLD.device.type, enabled=False):
            # Scores that rank 128 candidates must not tie, as they do in bf16.
            return F.linear(fused_BLD[:, 0].float(), self.itm_head.weight.float(), self.itm_head.bias.float())

    def judges(self) -> list[nn.Parameter]:
        """The parameters that `match_logits` reads: those of the fusion layers and of the matching head."""
        return [*self.text_encoder.fusion_layers().parameters(), *self.itm_head.parameters()]

    def mlm_logits(self, input_ids_BL: Tensor, attention_mask_BL: Tensor, vision_BVD: Tensor, at_BL: Tensor) -> Tensor:
        """Scores (M, vocab) of the M words where `at_BL` is true, read from a text with masked words and the clip."""
        hidden_BLD = self.text_encoder.encode(input_ids_BL, attention_mask_BL)
        fused_BLD = self.text_encoder.fuse(hidden_BLD, attention_mask_BL, vision_BVD)
        return self.text_encoder.mlm_logits(fused_BLD[at_BL])
