"""Contrastive loss between clips and texts, with soft targets where several share one medium.

    score[i, j] = mean over f of <video[i, f], text[j]> / temperature
    target[i, j] = 1 / (how many j share i's identity) where identity[i] == identity[j], else 0
    loss = mean over i of (cross-entropy of row i, clips to texts, + the same of texts to clips) / 2

B this rank's samples, G the global batch, F vectors a clip (1, or one a frame), E joint width.
Source: reference 3.2 (VTC); CLIP (arXiv 2103.00020) with ALBEF's identity targets.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from pretrain.losses.precision import exact


def similarity(video_BFE: Tensor, text_GE: Tensor) -> Tensor:
    """Mean over a clip's vectors of the cosine to each text, (B, G) float32; inputs are unit vectors.

    The mean of inner products is the inner product with the mean vector, which is also what the index stores.
    """
    with torch.autocast(video_BFE.device.type, enabled=False):
        return mean_vector(video_BFE) @ exact(text_GE).T


def mean_vector(video_BFE: Tensor) -> Tensor:
    """One vector a clip, (B, E) float32, of its unit vectors; (B, E) passes through. Not normalised again."""
    return exact(video_BFE).mean(1) if video_BFE.dim() == 3 else exact(video_BFE)


def soft_targets(identity_B: Tensor, all_identity_G: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Row-normalised equality of identities, (B, G)."""
    same_BG = (identity_B[:, None] == all_identity_G[None, :]).to(dtype)
    return same_BG / same_BG.sum(1, keepdim=True)


def contrastive_loss(
    video_BFE: Tensor,
    text_BE: Tensor,
    all_video_GFE: Tensor,
    all_text_GE: Tensor,
    temp: Tensor,
    identity_B: Tensor,
    all_identity_G: Tensor,
) -> Tensor:
    """The mean over this rank's B samples in both directions, a float32 scalar.

    Inputs are unit vectors; `temp` is (1,) or a scalar. The features of the whole batch carry gradients where
    the gather does. Alone, a rank passes its own features twice. The mean of equal ranks' losses is the loss
    of the global batch.
    """
    scale = 1 / exact(temp).reshape(())
    to_text_BG = similarity(video_BFE, all_text_GE) * scale
    target_BG = soft_targets(identity_B, all_identity_G, to_text_BG.dtype)
    with torch.autocast(video_BFE.device.type, enabled=False):
        to_video_BG = exact(text_BE) @ mean_vector(all_video_GFE).T * scale
        return (F.cross_entropy(to_text_BG, target_BG) + F.cross_entropy(to_video_BG, target_BG)) / 2
