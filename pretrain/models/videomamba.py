"""The VideoMamba encoder: patches in space and time, one cls token, bidirectional mixers, a final norm.

B batch, C channels, T frames, H x W pixels; K = T / tubelet token frames, N patches a frame, L = 1 + K N
tokens (cls first, then frame by frame, row by row), V visible tokens, D width, I layers, J aligned ones,
F vectors of a clip.

State-dict names are the release's own (reference 1.7). Source: arXiv 2403.06977 and its code, as
reference/videomamba.md describes them.
"""

import math
from collections.abc import Collection, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from pretrain.models.config import Pool, ScanOrder, VisionConfig
from pretrain.models.drop import keep_factors
from pretrain.models.mixer import Mixer
from pretrain.models.patch_embed import PatchEmbed
from pretrain.models.pooling import pool_tokens
from pretrain.models.pos_embed import resize_spatial, resize_temporal, sincos_table
from pretrain.models.scan_order import Reordering

NORM_EPS = 1e-5

Grid = tuple[int, int, int]
"""Tokens of a clip: frames, rows, columns."""


class VisionOutput(NamedTuple):
    """What the encoder saw: final-normed tokens (cls at 0), the features to align, and which tokens these are."""

    tokens_BLD: Tensor
    aligned: tuple[Tensor, ...]
    """One feature (B, L or V, D) for each layer to align, first to last; empty without an alignment decoder."""
    visible_BV: Tensor | None
    frames: int
    """Token frames K of the input."""
    length: int
    """Tokens of the whole input, 1 + K N, hidden ones included."""

    @property
    def patches(self) -> Tensor:
        """The tokens without cls: what the cross-modal layers attend to."""
        return self.tokens_BLD[:, 1:]


class Block(nn.Module):
    """One layer: norm, then mixer. The residual is added outside, in float32."""

    def __init__(self, config: VisionConfig, order: ScanOrder = "spatial_first") -> None:
        super().__init__()
        self.temporal = order == "temporal_first"
        """Whether it takes its tokens, and gives them, in temporal-first order."""
        self.mixer = Mixer(config, order)
        self.norm = nn.RMSNorm(config.width, eps=NORM_EPS)

    def forward(self, residual_BLD: Tensor, reordering: Reordering | None = None) -> Tensor:
        """The mixer's output on the normed residual stream."""
        mixed_BLD: Tensor = self.mixer(self.norm(residual_BLD), reordering)
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
    """The encoder of videos and images; heads, pooling norm and alignment decoders as the config says."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.config = config
        K, rows, columns = config.grid
        D = config.width
        self.cls_token = nn.Parameter(torch.zeros(1, 1, D))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + rows * columns, D))
        # an image model, of one frame, has no times to tell apart; the release's has no such parameter either
        self.temporal_pos_embedding = nn.Parameter(torch.zeros(1, K, D)) if config.frames > 1 else None
        self.patch_embed = PatchEmbed(config)
        self.layers = nn.ModuleList(Block(config, order) for order in config.orders)
        self.norm = nn.RMSNorm(D, eps=NORM_EPS)
        if config.align_width:
            decoders = [AlignmentDecoder(D, config.align_width) for _ in config.aligned]
            self.clip_decoder = nn.ModuleList(decoders)
            table = sincos_table(1 + K * rows * columns, D)
            self.register_buffer("position_table", table, persistent=False)
        if config.pool_norm:
            self.pool_norm = nn.LayerNorm(D, eps=NORM_EPS)
        if config.classes:
            self.head = nn.Linear(D, config.classes)
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
        Position tables are resized to the input's grid. Raises ValueError for another number of channels, for
        pixels or frames that do not divide, and for a clip given to an image model.
        """
        tokens_BLD, grid = self._embed(video_BCTHW, visible_BV)
        last = self.config.depth - 1
        sources = self._align_sources()
        stream = self._layers(tokens_BLD, visible_BV, grid, {last, *(index for index, _ in sources)}, seeds_B)
        out_BLD = self.norm(stream[last])
        aligned: list[Tensor] = []
        for index, bare in sources:
            if bare:
                aligned.append(stream[index])
            else:
                aligned.append(out_BLD if index == last else self.norm(stream[index]))
        return VisionOutput(out_BLD, tuple(aligned), visible_BV, grid[0], 1 + math.prod(grid))

    def _align_sources(self) -> list[tuple[int, bool]]:
        """The stream that each aligned layer gives: after which layer, and whether without the final norm."""
        if not self.config.align_width:
            return []
        sources = [(index, False) for index in self.config.aligned]
        if self.config.align_source == "released":  # without the last mixer and the norm (reference 7, A)
            sources[-1] = (self.config.depth - 2, True)
        return sources

    def forward_tokens(
        self, video_BCTHW: Tensor, visible_BV: Tensor | None = None, seeds_B: Tensor | None = None
    ) -> VisionOutput:
        """The same as calling the model, for callers that hold it inside another module."""
        output: VisionOutput = self(video_BCTHW, visible_BV, seeds_B)
        return output

    def forward_features(
        self,
        video_BCTHW: Tensor,
        visible_BV: Tensor | None = None,
        layers: Sequence[int] | Literal["all"] = (-1,),
        *,
        norm: bool = True,
        maps: bool = False,
    ) -> list[Tensor]:
        """The residual stream after each of `layers`, in the order asked for; what comes after the last is not run.

        Layers count from 0, or from the end with -1; "all" is every one. Each feature holds tokens (B, L or V, D),
        cls first, then frame by frame whatever the scan order; with `maps` the patches alone as (B, D, K, rows,
        columns), for whole clips only. `norm` applies the final norm, so that the last layer's feature is what the
        model itself gives. Raises ValueError for a layer that is not there and for maps of a masked clip.
        """
        depth = self.config.depth
        asked = list(range(depth)) if layers == "all" else [int(layer) for layer in layers]
        if wrong := [layer for layer in asked if not -depth <= layer < depth]:
            raise ValueError(f"there are no layers {wrong}; this encoder has 0 to {depth - 1}, or -{depth} to -1")
        if maps and visible_BV is not None:
            raise ValueError("a masked clip has no whole maps; ask for tokens, or show every patch")
        asked = [layer % depth for layer in asked]
        tokens_BLD, grid = self._embed(video_BCTHW, visible_BV)
        stream = self._layers(tokens_BLD, visible_BV, grid, set(asked))
        features = [self.norm(stream[layer]) if norm else stream[layer] for layer in asked]
        if not maps:
            return features
        return [feature_BLD[:, 1:].transpose(1, 2).unflatten(2, grid) for feature_BLD in features]

    def _layers(
        self,
        residual_BLD: Tensor,
        visible_BV: Tensor | None,
        grid: Grid,
        wanted: Collection[int],
        seeds_B: Tensor | None = None,
    ) -> dict[int, Tensor]:
        """The residual stream after each wanted layer (-1: before the first), in spatial-first order.

        Between layers of one order nothing is moved.
        """
        frames, rows, columns = grid
        reordering = Reordering.needed(self.config.orders, residual_BLD, visible_BV, frames, rows * columns)
        dropped_BI: Tensor | None = None
        if self.training and self.config.drop_path:
            dropped_BI = keep_factors(self.config.drop_rates, residual_BLD, "drop_path", seeds_B)
        stream = {-1: residual_BLD}
        temporal, deepest = False, max(wanted, default=-1)
        for index, block in enumerate(self.layers):
            if index > deepest:
                break
            assert isinstance(block, Block)
            if reordering is not None and block.temporal != temporal:
                residual_BLD = (reordering.temporal if block.temporal else reordering.spatial)(residual_BLD)
                temporal = block.temporal
            if self.config.checkpoint_blocks and self.training:
                mixed_BLD = checkpoint(block, residual_BLD, reordering, use_reentrant=False)
            else:
                mixed_BLD = block(residual_BLD, reordering)
            if dropped_BI is not None and self.config.drop_rates[index] > 0:
                mixed_BLD = mixed_BLD * dropped_BI[:, index, None, None]
            residual_BLD = residual_BLD + mixed_BLD
            if index in wanted:
                stream[index] = reordering.spatial(residual_BLD) if reordering and temporal else residual_BLD
        return stream

    def _embed(self, video_BCTHW: Tensor, visible_BV: Tensor | None) -> tuple[Tensor, Grid]:
        """Tokens with their positions, (B, L or V, D) float32, and the whole clip's grid of them."""
        grid = self._grid(video_BCTHW)
        image = video_BCTHW.shape[2] == 1
        if image and self.config.tubelet > 1:
            video_BCTHW = video_BCTHW.expand(-1, -1, self.config.tubelet, -1, -1)
        patches_BLD = self.patch_embed(video_BCTHW, visible_BV)
        tokens_BLD = torch.cat([self.cls_token.expand(patches_BLD.shape[0], -1, -1), patches_BLD], dim=1)
        # One after the other, as released: where pixels and positions nearly cancel, the order is seen in float32.
        for table_LD in self._positions(grid, image):
            tokens_BLD = tokens_BLD + (table_LD if visible_BV is None else F.embedding(visible_BV, table_LD))
        return tokens_BLD, grid

    def _grid(self, video_BCTHW: Tensor) -> Grid:
        """Token frames, rows and columns of a clip or image; ValueError if this model cannot cut it so."""
        shape, patch, tubelet = tuple(video_BCTHW.shape), self.config.patch_size, self.config.tubelet
        if len(shape) != 5 or shape[1] != self.config.channels:
            raise ValueError(
                f"expected clips as (batch, {self.config.channels}, frames, height, width), an image being a clip of "
                f"one frame; got {shape}"
            )
        T, H, W = shape[2:]
        if H % patch or W % patch or (T > 1 and T % tubelet):
            raise ValueError(f"a clip of {T} frames of {H}x{W} does not divide by tubelet {tubelet} and patch {patch}")
        if T > 1 and self.temporal_pos_embedding is None:
            raise ValueError(f"an image model (frames: 1) has no temporal embedding for a clip of {T} frames")
        return max(1, T // tubelet), H // patch, W // patch

    def _positions(self, grid: Grid, image: bool) -> list[Tensor]:
        """What is added to every token, each (L, D): its place in the frame, and in a clip its time (0 for cls)."""
        frames, rows, columns = grid
        spatial_MD = resize_spatial(self.pos_embed, (rows, columns))[0]
        if image or self.temporal_pos_embedding is None:
            return [spatial_MD]
        temporal_KD = resize_temporal(self.temporal_pos_embedding, frames)[0]
        place_LD = torch.cat([spatial_MD[:1], spatial_MD[1:].repeat(frames, 1)])
        time_LD = torch.cat([torch.zeros_like(temporal_KD[:1]), temporal_KD.repeat_interleave(rows * columns, dim=0)])
        return [place_LD, time_LD]

    def align(self, output: VisionOutput) -> Tensor:
        """Student features in the teacher's space, (J, B, V, align_width) for J aligned layers, not normalised.

        A fixed sin-cos table tells each layer's decoder where a visible token is. Needs `align_width` in the config.
        """
        table_LD = self.get_buffer("position_table")
        if output.length > table_LD.shape[0]:
            table_LD = sincos_table(output.length, self.config.width).to(table_LD.device)
        place_BVD = table_LD[: output.length] if output.visible_BV is None else table_LD[output.visible_BV]
        pairs = zip(self.clip_decoder, output.aligned, strict=True)
        return torch.stack([decoder(feature_BVD + place_BVD) for decoder, feature_BVD in pairs])

    def pooled(self, tokens_BLD: Tensor, frames: int = 1, pool: Pool | None = None, per_frame: bool = False) -> Tensor:
        """Vectors for a clip, (B, F, D), by `pool_tokens`; through `pool_norm` where there is one."""
        out_BFD = pool_tokens(tokens_BLD, pool or self.config.pool, frames, per_frame)
        return self.pool_norm(out_BFD) if self.config.pool_norm else out_BFD

    def classify(self, tokens_BLD: Tensor, seeds_B: Tensor | None = None) -> Tensor:
        """Logits (B, classes) from final-normed tokens, by `head_pool`; in training after `head_dropout`.

        `seeds_B` (int64) draws the dropout for each sample from its own seed, else from torch's generator.
        """
        feature_BD = pool_tokens(tokens_BLD, self.config.head_pool)[:, 0]
        if self.training and self.config.head_dropout:
            rates = [self.config.head_dropout] * self.config.width
            feature_BD = feature_BD * keep_factors(rates, feature_BD, "head_dropout", seeds_B)
        logits: Tensor = self.head(feature_BD)
        return logits
