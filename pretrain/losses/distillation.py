"""Self-distillation: a student's tokens towards those of a smaller, frozen VideoMamba, beside its classification.

    for b, t in samples, tokens (cls and every patch):
        s, t = (W rmsnorm(student[b, t]) + w) / |...|, teacher[b, t] / |teacher[b, t]|
        loss += 2 - 2 <s, t>
    loss /= number of (b, t)
    total = cross_entropy(logits, target) + WEIGHT * loss

Student and teacher tokens are those after the final norm; the head W is models/distill.py. The release trains M and
B on ImageNet-1K so, with S (width 384) as the teacher and both terms at weight 1; it has no recipe for Kinetics.
`target` may be soft, as mixup makes it. B batch, L tokens, C the teacher's width. Source: reference 5 (arXiv
2403.06977, 3.3).
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from pretrain.losses.alignment import alignment_loss
from pretrain.losses.precision import exact

WEIGHT = 1.0


def distillation_loss(student_BLC: Tensor, teacher_BLC: Tensor) -> Tensor:
    """The mean over samples and all tokens of 2 - 2 cos, a float32 scalar; the teacher's side gets no gradient.

    `student_BLC` has been through the head. Raises ValueError if the shapes differ.
    """
    return alignment_loss(student_BLC, teacher_BLC, "l2")


def distilled_classification_loss(
    logits_BK: Tensor, target: Tensor, student_BLC: Tensor, teacher_BLC: Tensor, weight: float = WEIGHT
) -> Tensor:
    """Cross-entropy plus `weight` times the distillation; `target` is (B,) classes or (B, K) shares of them."""
    with torch.autocast(logits_BK.device.type, enabled=False):
        classified = F.cross_entropy(exact(logits_BK), target if target.dim() == 1 else exact(target))
    return classified + weight * distillation_loss(student_BLC, teacher_BLC)
