"""The VideoMamba encoder: patches in space and time, one cls token, bidirectional mixers, a final norm.

B batch, C channels, T frames, H x W pixels; K = T / tubelet token frames, N patches a frame, L = 1 + K N
tokens (cls first, then frame by frame, row by row), V visible tokens, D width; P values of a patch, S squares
of it, Q values of a square, E channels of the stem.

State-dict names are the release's own (reference 1.7). Source: arXiv 2403.06977 and its code, as
reference/videomamba.md describes them.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from data_pipeline import draws
from pretrain.models.config import STEM_STRIDE, Pool, VisionConfig
from pretrain.models.mixer import Mixer
from pretrain.models.pos_embed import resize_spatial, resize_temporal, sincos_table

NORM_EPS = 1e-5

WIDE = {torch.bfloat16: torch.int64, torch.float16: torch.int64}
"""A type as wide as the STEM_STRIDE pixels of a square's row, to move them as one (float32 gains nothing by it)."""


class VisionOutput(NamedTuple):
    """What the encoder saw: final-normed tokens (cls at 0), the feature to align, and which tokens these are."""

    tokens_BLD: Tensor
    aligned_BLD: Tensor
    visible_BV: Tensor | None
    frames: int
    """Token frames K of the input."""
    length: int
    """Tokens of the whole input, 1 + K N, hidden ones included."""

    @property
    def patches(self) -> Tensor:
        """The tokens without cls: what the cross-modal layers attend to."""
        return self.tokens_BLD[:, 1:]


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


class Block(nn.Module):
    """One layer: norm, then mixer. The residual is added outside, in float32."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.mixer = Mixer(config)
        self.norm = nn.RMSNorm(config.width, eps=NORM_EPS)

    def forward(self, residual_BLD: Tensor) -> Tensor:
        """The mixer's output on the normed residual stream."""
        mixed_BLD: Tensor = self.mixer(self.norm(residual_BLD))
        return mixed_BLD


class AlignmentDecoder(nn.Module):
    """Student features to the teacher's width: Linear, then LayerNorm (`clip_decoder.0` of the release)."""

    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.head = nn.Linear(width, out)
        self.norm = nn.LayerNorm(out, eps=NORM_EPS)

    def forward(self, feature_BVD: Tensor) -> Tensor:
        """(B, V, D) -> (B, V, out)."""
        out: Tensor = self.norm(self.head(feature_BVD))
        return out


class VideoMamba(nn.Module):
    """The encoder of videos and images; heads, pooling norm and alignment decoder as the config says."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.config = config
        K, rows, columns = config.grid
        D = config.width
        self.cls_token = nn.Parameter(torch.zeros(1, 1, D))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + rows * columns, D))
        self.temporal_pos_embedding = nn.Parameter(torch.zeros(1, K, D))
        self.patch_embed = PatchEmbed(config)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.norm = nn.RMSNorm(D, eps=NORM_EPS)
        if config.align_width:
            self.clip_decoder = nn.ModuleList([AlignmentDecoder(D, config.align_width)])
            table = sincos_table(1 + K * rows * columns, D)
            self.register_buffer("position_table", table, persistent=False)
        if config.pool_norm:
            self.pool_norm = nn.LayerNorm(D, eps=NORM_EPS)
        if config.classes:
            self.head = nn.Linear(D, config.classes)
        self.drop_rates = [config.drop_path * i / max(1, config.depth - 1) for i in range(config.depth)]
        self._initialise()

    def _initialise(self) -> None:
        """The release's initialisation, apart from the time step where `dt_init` is "mamba"."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        for block in self.layers:
            assert isinstance(block, Block)
            out = block.mixer.out_proj.weight
            nn.init.kaiming_uniform_(out, a=math.sqrt(5))
            with torch.no_grad():
                out /= math.sqrt(self.config.depth)
            if self.config.dt_init == "mamba":
                block.mixer.reset_time_step()

    def forward(
        self, video_BCTHW: Tensor, visible_BV: Tensor | None = None, seeds_B: Tensor | None = None
    ) -> VisionOutput:
        """Encode a clip, or with T == 1 an image (no temporal embedding; repeated to fill a tubelet).

        `visible_BV` holds the sorted indices of the tokens to see, 0 (cls) first; None sees everything.
        `seeds_B` (int64) draws drop path for each sample from its own seed, else from torch's generator.
        Position tables are resized to the input's grid. Raises ValueError where pixels or frames do not divide.
        """
        residual_BLD, frames, length = self._embed(video_BCTHW, visible_BV)
        dropped_BI = self._draw_drop_path(residual_BLD, seeds_B)
        before_last_BLD = residual_BLD
        for index, block in enumerate(self.layers):
            before_last_BLD = residual_BLD
            if self.config.checkpoint_blocks and self.training:
                mixed_BLD = checkpoint(block, residual_BLD, use_reentrant=False)
            else:
                mixed_BLD = block(residual_BLD)
            if dropped_BI is not None and self.drop_rates[index] > 0:
                mixed_BLD = mixed_BLD * dropped_BI[:, index, None, None]
            residual_BLD = residual_BLD + mixed_BLD
        tokens_BLD = self.norm(residual_BLD)
        aligned_BLD = before_last_BLD if self.config.align_source == "released" else tokens_BLD
        return VisionOutput(tokens_BLD, aligned_BLD, visible_BV, frames, length)

    def forward_tokens(
        self, video_BCTHW: Tensor, visible_BV: Tensor | None = None, seeds_B: Tensor | None = None
    ) -> VisionOutput:
        """The same as calling the model, for callers that hold it inside another module."""
        output: VisionOutput = self(video_BCTHW, visible_BV, seeds_B)
        return output

    def _embed(self, video_BCTHW: Tensor, visible_BV: Tensor | None) -> tuple[Tensor, int, int]:
        """Tokens with their positions, (B, L or V, D) float32, the token frames K and the whole length L."""
        image = video_BCTHW.shape[2] == 1
        if image and self.config.tubelet > 1:
            video_BCTHW = video_BCTHW.expand(-1, -1, self.config.tubelet, -1, -1)
        B, _, T, H, W = video_BCTHW.shape
        patch, tubelet = self.config.patch_size, self.config.tubelet
        if T % tubelet or H % patch or W % patch:
            raise ValueError(f"a clip of {T} frames of {H}x{W} does not divide by tubelet {tubelet} and patch {patch}")
        frames = T // tubelet
        patches_BLD = self.patch_embed(video_BCTHW, visible_BV)
        tokens_BLD = torch.cat([self.cls_token.expand(B, -1, -1), patches_BLD], dim=1)
        # One after the other, as released: where pixels and positions nearly cancel, the order is seen in float32.
        for table_LD in self._positions(frames, H // patch, W // patch, image):
            tokens_BLD = tokens_BLD + (table_LD if visible_BV is None else F.embedding(visible_BV, table_LD))
        return tokens_BLD, frames, 1 + frames * (H // patch) * (W // patch)

    def _positions(self, frames: int, rows: int, columns: int, image: bool) -> list[Tensor]:
        """What is added to every token, each (L, D): its place in the frame, and in a clip its time (0 for cls)."""
        spatial_MD = resize_spatial(self.pos_embed, (rows, columns))[0]
        if image:
            return [spatial_MD]
        temporal_KD = resize_temporal(self.temporal_pos_embedding, frames)[0]
        place_LD = torch.cat([spatial_MD[:1], spatial_MD[1:].repeat(frames, 1)])
        time_LD = torch.cat([torch.zeros_like(temporal_KD[:1]), temporal_KD.repeat_interleave(rows * columns, dim=0)])
        return [place_LD, time_LD]

    def _draw_drop_path(self, like: Tensor, seeds_B: Tensor | None) -> Tensor | None:
        """Factors (B, depth): 0 where a layer's output is dropped, 1 / keep probability elsewhere."""
        if not self.training or self.config.drop_path == 0:
            return None
        B, depth = like.shape[0], self.config.depth
        if seeds_B is None:
            uniform_BI = torch.rand(B, depth, device=like.device)
        else:
            uniform_BI = draws.uniform(seeds_B, "drop_path", depth).to(like.device)
        rate_I = torch.tensor(self.drop_rates, device=like.device)
        return (uniform_BI >= rate_I).float() / (1 - rate_I)

    def align(self, output: VisionOutput) -> Tensor:
        """Student features in the teacher's space, (B, V, align_width), not normalised.

        A fixed sin-cos table tells the decoder where each visible token is. Needs `align_width` in the config.
        """
        table_LD = self.get_buffer("position_table")
        if output.length > table_LD.shape[0]:
            table_LD = sincos_table(output.length, self.config.width).to(table_LD.device)
        place_BVD = table_LD[: output.length] if output.visible_BV is None else table_LD[output.visible_BV]
        decoded: Tensor = self.clip_decoder[0](output.aligned_BLD + place_BVD)
        return decoded

    def pooled(self, tokens_BLD: Tensor, frames: int = 1, pool: Pool | None = None, per_frame: bool = False) -> Tensor:
        """Vectors for a clip, (B, K', D), from tokens with cls at 0; through `pool_norm` where there is one.

        K' is 1, or with `per_frame` the number of frames (every frame must show equally many patches).
        "cls_cat_avg" puts cls before the means, (B, 1 + K', D).
        """
        pool = pool or self.config.pool
        cls_B1D, patches_BLD = tokens_BLD[:, :1], tokens_BLD[:, 1:]
        if pool == "cls":
            out = cls_B1D
        else:
            mean_BKD = patches_BLD.unflatten(1, (frames if per_frame else 1, -1)).mean(2)
            joined = {"avg": mean_BKD, "cls+avg": cls_B1D + mean_BKD}
            out = joined[pool] if pool in joined else torch.cat([cls_B1D, mean_BKD], dim=1)
        return self.pool_norm(out) if self.config.pool_norm else out

    def classify(self, tokens_BLD: Tensor) -> Tensor:
        """Logits (B, classes) from the cls token."""
        logits: Tensor = self.head(tokens_BLD[:, 0])
        return logits
