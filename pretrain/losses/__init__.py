"""The losses of both stages: pure functions of tensors, one idea a file."""

from pretrain.losses.alignment import alignment_loss, gather_visible
from pretrain.losses.contrastive import contrastive_loss, mean_vector, similarity
from pretrain.losses.matching import hard_negatives, matching_loss
from pretrain.losses.mlm import mask_words, mlm_loss

__all__ = [
    "alignment_loss",
    "contrastive_loss",
    "gather_visible",
    "hard_negatives",
    "mask_words",
    "matching_loss",
    "mean_vector",
    "mlm_loss",
    "similarity",
]
