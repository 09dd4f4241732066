"""The teacher: the visual tower of any CLIP that open_clip can build, frozen, seen by the student only as numbers.

B batch, T frames, K = T / tubelet token frames, N patches a frame, C the teacher's output width, F frames at once.

It gives the features that the student's visible tokens are aligned to, and the cls attention of its last block,
by which the attention mask is drawn. Pixels are normalised as its own CLIP wants them. It is no nn.Module, so
it appears in no state dict, no optimizer and no checkpoint of the student. Source: reference 2.2 and 2.7.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor
from torch.nn import functional as F

from configs.errors import UserError
from data_pipeline.preprocess import CLIP_MEAN, CLIP_STD, Triple, normalise
from data_pipeline.torchvision_shim import ensure_torchvision

LOCAL = "local-dir:"


class TeacherOutput(NamedTuple):
    """Features (B, 1 + K N, C), cls first, not normalised, and cls attention (B, K, N), rows summing below 1."""

    features_BLC: Tensor
    attention_BKN: Tensor


class ClipTeacher:
    """A frozen open_clip VisionTransformer.

    `tubelet` frames share one token of the student, so features and attention are averaged over them, or over
    every `stride`-th of them, which costs that much less. `chunk` frames go through the tower at once, which
    bounds memory. `ln_post` applies the tower's final norm before
    the projection (the release does not). Raises UserError if its patches are not the student's `grid`.
    """

    def __init__(
        self,
        visual: Any,
        *,
        mean: Triple = CLIP_MEAN,
        std: Triple = CLIP_STD,
        tubelet: int = 1,
        stride: int = 1,
        chunk: int = 256,
        ln_post: bool = False,
        grid: tuple[int, int] | None = None,
    ) -> None:
        check_tower(visual)
        own = (int(visual.grid_size[0]), int(visual.grid_size[1]))
        if grid is not None and own != grid:
            raise UserError(
                f"The teacher sees {own[0]}x{own[1]} patches a frame and the student {grid[0]}x{grid[1]}.",
                "Choose a teacher or vision.image_size and vision.patch_size so that both grids are the same.",
            )
        self.visual = visual.eval().requires_grad_(False)
        if tubelet % stride:
            raise UserError(
                f"teacher.frame_stride {stride} does not divide the tubelet of {tubelet} frames.",
                "Use a divisor of vision.tubelet; 1 looks at every frame.",
            )
        self.mean, self.std, self.tubelet, self.chunk, self.ln_post = mean, std, tubelet // stride, chunk, ln_post
        self.stride = stride
        self.grid = own
        self.size = (int(visual.image_size[0]), int(visual.image_size[1]))
        self.width = int(visual.proj.shape[1])

    @classmethod
    def from_open_clip(
        cls,
        source: str,
        weights: str | None = None,
        *,
        tubelet: int = 1,
        stride: int = 1,
        chunk: int = 256,
        ln_post: bool = False,
        grid: tuple[int, int] | None = None,
    ) -> Self:
        """The visual tower of a folder that open_clip wrote, or of a model name with weights (a file or a tag).

        Raises UserError if it cannot be built, or has no weights.
        """
        model = _create_model(source, weights)
        settings = getattr(model.visual, "preprocess_cfg", {})
        mean, std = (tuple(settings.get(key, default)) for key, default in (("mean", CLIP_MEAN), ("std", CLIP_STD)))
        return cls(
            model.visual, mean=mean, std=std, tubelet=tubelet, stride=stride, chunk=chunk, ln_post=ln_post, grid=grid
        )

    def to(self, device: torch.device | str) -> Self:
        """Move the tower; returns itself."""
        self.visual.to(device)
        return self

    def __call__(self, frames_BCTHW: Tensor) -> TeacherOutput:
        """What the teacher makes of uint8 frames; resized bicubically where its resolution differs.

        An image (T == 1) fills a token frame by itself.
        """
        if frames_BCTHW.shape[2] > 1:
            frames_BCTHW = frames_BCTHW[:, :, self.stride // 2 :: self.stride]
        B, _, T, H, W = frames_BCTHW.shape
        pixels_FCHW = normalise(frames_BCTHW, self.mean, self.std).transpose(1, 2).flatten(0, 1)
        if self.size != (H, W):
            pixels_FCHW = F.interpolate(pixels_FCHW, size=self.size, mode="bicubic", align_corners=False)
        return self.features(pixels_FCHW.unflatten(0, (B, T)))

    @torch.no_grad()
    def features(self, pixels_BTCHW: Tensor) -> TeacherOutput:
        """The same for frames that are already normalised and of the tower's resolution, (B, T, 3, H, W)."""
        B, T = pixels_BTCHW.shape[:2]
        K = T // self.tubelet if T > 1 else 1
        if K * self.tubelet != T and T > 1:
            raise ValueError(f"{T} frames do not divide by the tubelet {self.tubelet}")
        parts = [self._frames(chunk_FCHW) for chunk_FCHW in pixels_BTCHW.flatten(0, 1).split(self.chunk)]
        tokens_FMW, attention_FN = (torch.cat(columns) for columns in zip(*parts, strict=True))
        tokens_BTMW = tokens_FMW.unflatten(0, (B, T)).float()
        cls_B1W = tokens_BTMW[:, :, 0].mean(1, keepdim=True)
        patches_BKNW = tokens_BTMW[:, :, 1:].unflatten(1, (K, -1)).mean(2)
        with torch.autocast(pixels_BTCHW.device.type, enabled=False):
            features_BLC = torch.cat([cls_B1W, patches_BKNW.flatten(1, 2)], dim=1) @ self.visual.proj.float()
        attention_BKN = attention_FN.unflatten(0, (B, K, -1)).mean(2)
        return TeacherOutput(features_BLC, attention_BKN)

    def _frames(self, pixels_FCHW: Tensor) -> tuple[Tensor, Tensor]:
        """Last-block tokens (F, 1 + N, width), cls first, and the cls attention (F, N) of that block."""
        last = self.visual.transformer.resblocks[-1]
        seen: list[Tensor] = []
        hook = last.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
        try:
            out = self.visual.forward_intermediates(
                pixels_FCHW, indices=1, output_fmt="NLC", output_extra_tokens=True, intermediates_only=True,
                normalize_intermediates=self.ln_post,
            )  # fmt: skip
        finally:
            hook.remove()
        tokens_FMW = torch.cat([out["image_intermediates_prefix"][0], out["image_intermediates"][0]], dim=1)
        entering_FMW = seen[0] if self.visual.transformer.batch_first else seen[0].transpose(0, 1)
        return tokens_FMW, cls_attention(last, entering_FMW)


def cls_attention(block: Any, entering_FMW: Tensor) -> Tensor:
    """Attention of the cls token to the patches in `block`, mean over heads, (F, N) float32.

    Softmaxed over all 1 + N tokens and the cls column dropped. Only the cls row is computed.
    """
    attention = block.attn
    normed_FMW = block.ln_1(entering_FMW).float()
    heads = attention.num_heads
    with torch.autocast(normed_FMW.device.type, enabled=False):
        query_weight, key_weight, _ = attention.in_proj_weight.float().chunk(3)
        query_bias, key_bias, _ = attention.in_proj_bias.float().chunk(3)
        query_FHE = F.linear(normed_FMW[:, 0], query_weight, query_bias).unflatten(-1, (heads, -1))
        key_FMHE = F.linear(normed_FMW, key_weight, key_bias).unflatten(-1, (heads, -1))
        scores_FHM = torch.einsum("fhe,fmhe->fhm", query_FHE, key_FMHE) * query_FHE.shape[-1] ** -0.5
        attention_FM: Tensor = scores_FHM.softmax(-1).mean(1)
    return attention_FM[:, 1:]


def check_tower(visual: Any) -> None:
    """UserError unless `visual` is an open_clip VisionTransformer with plain attention and a projection."""
    ensure_torchvision()
    from open_clip.transformer import ResidualAttentionBlock, VisionTransformer

    plain = isinstance(visual, VisionTransformer) and isinstance(
        visual.transformer.resblocks[-1], ResidualAttentionBlock
    )
    if not plain or visual.attn_pool is not None or visual.proj is None:
        raise UserError(
            f"The teacher's visual tower is a {type(visual).__name__} without the cls token, plain attention and "
            "projection of a CLIP ViT.",
            "Choose a ViT of open_clip, for example ViT-B-16-quickgelu.",
        )


def _create_model(source: str, weights: str | None) -> Any:
    """open_clip's model; UserError where it cannot be built, or would be random."""
    ensure_torchvision()
    import open_clip

    folder = Path(source.removeprefix(LOCAL))
    if folder.is_dir():
        source = f"{LOCAL}{folder}"
        has_weights = any(path.suffix in (".safetensors", ".bin", ".pth") for path in folder.iterdir())
    else:
        has_weights = weights is not None or ":" in source
    if not has_weights:
        raise UserError(
            f"The teacher '{source}' comes without weights, and a random teacher teaches nothing.",
            "Give a folder that open_clip wrote, or teacher.weights: a file, or a tag of open_clip.",
        )
    build: Callable[..., Any] = open_clip.create_model
    try:
        return build(source, pretrained=weights)
    except (OSError, RuntimeError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"open_clip cannot build the teacher '{source}': {str(error).splitlines()[0]}",
            "Give a folder that open_clip wrote, or a model name with teacher.weights.",
        ) from error
