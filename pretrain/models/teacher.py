"""The teacher: the visual tower of any CLIP that open_clip can build, frozen, seen by the student only as numbers.

B batch, T frames, K = T / tubelet token frames, N patches a frame, L = 1 + K N, J layers, W the tower's width,
C the teacher's output width, F frames at once.

It gives the features that the student's visible tokens are aligned to, and the attention of its cls token or pooling,
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
from pretrain.models.towers import open_tower

LOCAL = "local-dir:"


class TeacherOutput(NamedTuple):
    """Features (J, B, L, C), shallow layers first, cls at 0, not normalised.

    Attention (B, K, N), whose rows sum to 1 or less; None where the tower has none.
    """

    features_JBLC: Tensor
    attention_BKN: Tensor | None


class ClipTeacher:
    """A frozen visual tower of open_clip; what is read of each make of tower: pretrain/models/towers.

    `layers` counts the blocks whose tokens are given, the last one and each `interval` blocks before it; `ln_post`
    applies the tower's final norm before the projection (the release does not). `image_size` runs it at another
    resolution than its own, with resized positions. `tubelet` frames share one token of the student, so features
    and attention are averaged over them, or over every `stride`-th of them, which costs that much less. `chunk`
    frames, and always whole tubelets, go through the tower at once, which bounds memory.
    Raises UserError if its patches are not the student's `grid`, or it has too few blocks.
    """

    def __init__(
        self,
        visual: Any,
        *,
        mean: Triple = CLIP_MEAN,
        std: Triple = CLIP_STD,
        layers: int = 1,
        interval: float = 1.0,
        ln_post: bool = False,
        image_size: int | None = None,
        tubelet: int = 1,
        stride: int = 1,
        chunk: int = 256,
        grid: tuple[int, int] | None = None,
    ) -> None:
        self.tower = open_tower(visual, image_size)
        own = self.tower.grid
        if grid is not None and own != grid:
            raise UserError(
                f"The teacher sees {own[0]}x{own[1]} patches a frame and the student {grid[0]}x{grid[1]}.",
                "Choose a teacher, teacher.image_size, or vision.image_size and vision.patch_size "
                "so that both grids are the same.",
            )
        if tubelet % stride:
            raise UserError(
                f"teacher.frame_stride {stride} does not divide the tubelet of {tubelet} frames.",
                "Use a divisor of vision.tubelet; 1 looks at every frame.",
            )
        self.visual = visual.eval().requires_grad_(False)
        self.layers = last_layers(self.tower.depth, layers, interval)
        self.mean, self.std, self.tubelet, self.stride = mean, std, tubelet // stride, stride
        self.chunk, self.ln_post = chunk, ln_post
        self.width = self.tower.width

    @classmethod
    def from_open_clip(
        cls,
        source: str,
        weights: str | None = None,
        *,
        mean: Triple | None = None,
        std: Triple | None = None,
        **options: Any,
    ) -> Self:
        """The visual tower of a folder that open_clip wrote, or of a model name with weights (a file or a tag).

        Pixels are normalised as that CLIP says, unless `mean` and `std` do; `options` are those of the class.
        Raises UserError if it cannot be built, or has no weights.
        """
        model = _create_model(source, weights)
        settings = getattr(model.visual, "preprocess_cfg", {})
        mean, std = mean or tuple(settings.get("mean", CLIP_MEAN)), std or tuple(settings.get("std", CLIP_STD))
        return cls(model.visual, mean=mean, std=std, **options)

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
        return self._of_clips(frames_BCTHW.transpose(1, 2), self._pixels)

    def features(self, pixels_BTCHW: Tensor) -> TeacherOutput:
        """The same for frames that are already normalised and of the tower's resolution, (B, T, 3, H, W)."""
        return self._of_clips(pixels_BTCHW, lambda pixels_FCHW: pixels_FCHW)

    def _pixels(self, frames_FCHW: Tensor) -> Tensor:
        """Normalised pixels of the tower's size, of uint8 frames."""
        pixels_FCHW = normalise(frames_FCHW.transpose(0, 1)[None], self.mean, self.std)[0].transpose(0, 1)
        if self.tower.size != tuple(pixels_FCHW.shape[-2:]):
            pixels_FCHW = F.interpolate(pixels_FCHW, size=self.tower.size, mode="bicubic", align_corners=False)
        return pixels_FCHW

    @torch.no_grad()
    def _of_clips(self, frames_BTCHW: Tensor, prepare: Callable[[Tensor], Tensor]) -> TeacherOutput:
        """Features and attention of clips whose frames `prepare` makes ready, a chunk at a time."""
        B, T = frames_BTCHW.shape[:2]
        share = self.tubelet if T > 1 else 1
        if T % share:
            raise ValueError(f"{T} frames do not divide by the tubelet {share}")
        self.visual.eval()  # whatever a caller did to it
        at_once = max(1, self.chunk // share) * share
        parts = [self._frames(prepare(part_FCHW), share) for part_FCHW in frames_BTCHW.flatten(0, 1).split(at_once)]
        cls_JFW, patches_JKNC = (torch.cat([part[i] for part in parts], dim=1) for i in (0, 1))
        cls_JB1C = cls_JFW.unflatten(1, (B, T)).mean(2, keepdim=True)
        if not self.tower.pooled:
            with torch.autocast(frames_BTCHW.device.type, enabled=False):
                cls_JB1C = self.tower.project(cls_JB1C)
        patches_JBLC = patches_JKNC.unflatten(1, (B, -1)).flatten(2, 3)
        features_JBLC = torch.cat([cls_JB1C, patches_JBLC], dim=2)
        if not self.tower.attends:
            return TeacherOutput(features_JBLC, None)
        return TeacherOutput(features_JBLC, torch.cat([part[2] for part in parts]).unflatten(0, (B, -1)))

    def _frames(self, pixels_FCHW: Tensor, share: int) -> tuple[Tensor, Tensor, Tensor]:
        """Of whole tubelets of `share` frames: cls as the tower gives it (J, F, W or C); projected patches
        (J, F / share, N, C) and attention (F / share, N; empty if it has none), both means over a tubelet.
        """
        seen = self.tower.see(pixels_FCHW, self.layers)
        with torch.autocast(pixels_FCHW.device.type, enabled=False):
            cls_JFW = torch.stack([cls_FW.float() for cls_FW in seen.cls])
            patches_JFNW = torch.stack([patch_FNW.float() for patch_FNW in seen.patches])
            if self.ln_post:
                cls_JFW = cls_JFW if self.tower.pooled else self.tower.norm(cls_JFW)
                patches_JFNW = self.tower.norm(patches_JFNW)
            patches_JKNC = self.tower.project(patches_JFNW.unflatten(1, (-1, share)).mean(2))
        attention_FN = pixels_FCHW.new_empty(len(pixels_FCHW), 0) if seen.attention is None else seen.attention
        return cls_JFW.clone(), patches_JKNC, attention_FN.unflatten(0, (-1, share)).mean(1)


def last_layers(depth: int, layers: int, interval: float) -> tuple[int, ...]:
    """Which blocks of `depth` are looked at: depth - 1 - int(j interval) for j < `layers`, in ascending order.

    The rule is the release's, for the student as for the teacher. Raises UserError if there are not so many.
    """
    chosen = sorted({depth - 1 - int(j * interval) for j in range(layers)})
    if len(chosen) < layers or chosen[0] < 0:
        raise UserError(
            f"{layers} layers, each {interval:g} apart, do not fit a teacher of {depth} blocks.",
            "Lower teacher.layers or teacher.interval (of at least 1).",
        )
    return tuple(chosen)


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
