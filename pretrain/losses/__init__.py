"""The losses of both stages: pure functions of tensors, one idea a file."""

from pretrain.losses.alignment import alignment_loss, gather_visible
from pretrain.losses.cached import Cached, cached_gradients, replay
from pretrain.losses.contrastive import contrastive_loss, mean_vector, similarity
from pretrain.losses.distillation import distillation_loss, distilled_classification_loss
from pretrain.losses.matching import hard_negatives, has_negative, matching_loss
from pretrain.losses.mlm import mask_words, mlm_loss

__all__ = [
    "Cached",
    "alignment_loss",
    "cached_gradients",
    "contrastive_loss",
    "distillation_loss",
    "distilled_classification_loss",
    "gather_visible",
    "hard_negatives",
    "has_negative",
    "mask_words",
    "matching_loss",
    "mean_vector",
    "mlm_loss",
    "replay",
    "similarity",
]
