"""The visual towers that open_clip builds, each brought to the one form that the teacher reads.

What the student's tokens are aligned to, by how the tower sums a frame up:

- **its cls token** (CLIP's ViTs; timm's ViT and EVA with `global_pool` token): cls and patches are the tokens after a
  block, through the final norm if it is asked for, and the projection. The attention is the cls token's in the last
  block.
- **an attention pooling** (SigLIP, PE-Core, CoCa, CLIP's ResNets): cls is what the tower itself puts out for the frame.
  Patches are its tokens, with the final norm if it is asked for, through the projection; where the pooling changes the
  width (CoCa, ResNets), each passes the pooling's own value and output projections, as if it were alone. The attention
  is that of the pooling's query.
- **a mean** (ConvNeXt, FastViT, Swin, ViTamin, CLIPA): cls is what the tower itself puts out. Patches of a ViT are as
  above; a map's cells each pass the head as the pooled map does, norm included. There is no attention to draw masks by.

Cells of a map are tokens row by row. A map has one layer to align to, its last.
"""

from typing import Any

from configs.errors import UserError
from data_pipeline.torchvision_shim import ensure_torchvision
from pretrain.models.towers.clip_vit import open_clip_vit
from pretrain.models.towers.resnet import clip_resnet
from pretrain.models.towers.timm_map import timm_map
from pretrain.models.towers.timm_vit import is_timm_vit, timm_vit
from pretrain.models.towers.tower import SUPPORTED, Seen, Tower

__all__ = ["Seen", "Tower", "open_tower"]


def open_tower(visual: Any, image_size: int | None = None) -> Tower:
    """The tower of an open_clip model, in eval, for square frames of `image_size` pixels (None: its own).

    The module itself is changed where the size is another: its positions are resized bicubically. Raises UserError for
    a tower of another make, and for a size that its patches do not divide.
    """
    ensure_torchvision()
    from open_clip.modified_resnet import ModifiedResNet
    from open_clip.timm_model import TimmModel
    from open_clip.transformer import VisionTransformer

    visual.eval()
    if isinstance(visual, VisionTransformer):
        return open_clip_vit(visual, image_size)
    if isinstance(visual, ModifiedResNet):
        return clip_resnet(visual, image_size)
    if isinstance(visual, TimmModel) and "pool" not in dict(visual.head.named_children()):
        return timm_vit(visual, image_size) if is_timm_vit(visual.trunk) else timm_map(visual, image_size)
    kind = f"{type(visual.trunk).__name__} with a pooling of timm's own" if isinstance(visual, TimmModel) else ""
    raise UserError(
        f"The teacher's visual tower is a {kind or type(visual).__name__}, which open_clip has in none of its models.",
        f"Choose {SUPPORTED}.",
    )
