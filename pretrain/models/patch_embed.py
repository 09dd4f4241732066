"""Pixels to tokens: one convolution over tubelets as released, or a convolutional stem before it.

B batch, C channels, T frames, H x W pixels; K = T / tubelet token frames, N patches a frame, L tokens, V visible
tokens with cls, D width; P values of a patch, S squares of it, Q values of a square, E channels of the stem.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pretrain.models.config import STEM_STRIDE, VisionConfig

WIDE = {torch.bfloat16: torch.int64, torch.float16: torch.int64}
"""A type as wide as the STEM_STRIDE pixels of a square's row, to move them as one (float32 gains nothing by it)."""


class PatchEmbed(nn.Module):
    """Tubelets of pixels to tokens, by one convolution or by a convolutional stem and a linear map.

    The stem (ours, not the release's) maps every 4x4 square of a frame to `stem_width` channels and a GELU
    before the squares of a tubelet are joined. All its windows lie inside one patch, so it is two matrix
    products over the pixels of a patch, and hidden patches are never computed.
    """

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.tubelet, self.patch = config.tubelet, config.patch_size
        self.stem: nn.Conv2d | None = None
        channels, side = config.channels, self.patch
        if config.stem == "conv":
            self.stem = nn.Conv2d(channels, config.stem_width, STEM_STRIDE, STEM_STRIDE)
            channels, side = config.stem_width, self.patch // STEM_STRIDE
        window = (self.tubelet, side, side)
        self.proj = nn.Conv3d(channels, config.width, window, window)

    def forward(self, video_BCTHW: Tensor, visible_BV: Tensor | None = None) -> Tensor:
        """Patch tokens (B, K N, D), or those of the visible indices alone, (B, V - 1, D)."""
        if self.stem is None:
            # The release's own convolution: a matrix product rounds otherwise, and the first norms magnify that.
            tokens_BLD = self.proj(video_BCTHW).flatten(2).transpose(1, 2)
            return _take(tokens_BLD, visible_BV)
        squares_BLSQ = _take(self._squares(video_BCTHW), visible_BV).unflatten(2, (-1, self.stem.weight[0].numel()))
        lit_BLSE = F.gelu(F.linear(squares_BLSQ, self.stem.weight.flatten(1), self.stem.bias))
        weight_DP = self.proj.weight.permute(0, 2, 3, 4, 1).flatten(1)
        return F.linear(lit_BLSE.flatten(2), weight_DP, self.proj.bias)

    def _squares(self, video_BCTHW: Tensor) -> Tensor:
        """The pixels of each patch, square by square, (B, K N, P)."""
        B, C, T, H, W = video_BCTHW.shape
        t, p, s = self.tubelet, self.patch, STEM_STRIDE
        wide = WIDE.get(video_BCTHW.dtype) if not video_BCTHW.requires_grad else None
        if wide is None:
            cut = video_BCTHW.reshape(B, C, T // t, t, H // p, p // s, s, W // p, p // s, s)
        else:  # a square's row of 4 pixels moves as one element, which is five times as fast
            rows_BCTHW = video_BCTHW.contiguous().view(wide)
            cut = rows_BCTHW.reshape(B, C, T // t, t, H // p, p // s, s, W // p, p // s, 1)
        squares = cut.permute(0, 2, 4, 7, 3, 5, 8, 1, 6, 9).reshape(B, (T // t) * (H // p) * (W // p), -1)
        return squares if wide is None else squares.view(video_BCTHW.dtype)


def _take(patches_BLP: Tensor, visible_BV: Tensor | None) -> Tensor:
    """The visible patches; index 0 of `visible_BV` is cls, which is no patch."""
    if visible_BV is None:
        return patches_BLP
    rows_BV1 = visible_BV[:, 1:, None] - 1
    return patches_BLP.gather(1, rows_BV1.expand(-1, -1, patches_BLP.shape[2]))
