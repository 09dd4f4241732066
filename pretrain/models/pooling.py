"""From the tokens of a clip to one vector, or to one a frame: the release's four poolings.

B batch, K token frames, N patches a frame, D width, F vectors a clip.

    cls          cls                                        F = 1
    avg          the mean of the patches                    F = 1, per frame K
    cls+avg      cls + that mean                            F = 1, per frame K
    cls_cat_avg  cls, then that mean, one after the other   F = 2, per frame 1 + K

The release codes the last one per frame as cls+avg, by mistake. Source: reference 1.6.
"""

import torch
from torch import Tensor

from pretrain.models.config import Pool


def pool_tokens(tokens_BLD: Tensor, pool: Pool, frames: int = 1, per_frame: bool = False) -> Tensor:
    """Vectors of a clip, (B, F, D), from tokens with cls at 0; `frames` matters for `per_frame` alone.

    With `per_frame` every frame must show equally many patches, as whole clips do, and tube, frame_row and
    attention masks.
    """
    cls_B1D, patches_BLD = tokens_BLD[:, :1], tokens_BLD[:, 1:]
    if pool == "cls":
        return cls_B1D
    mean_BKD: Tensor = patches_BLD.unflatten(1, (frames if per_frame else 1, -1)).mean(2)
    if pool == "avg":
        return mean_BKD
    return cls_B1D + mean_BKD if pool == "cls+avg" else torch.cat([cls_B1D, mean_BKD], dim=1)
