"""Alignment: the student's visible tokens towards the frozen teacher's, in the teacher's space.

    for b, v in samples, visible tokens (cls among them):
        s, t = student[b, v] / |student[b, v]|, teacher[b, v] / |teacher[b, v]|
        l2: loss += 2 - 2 <s, t>      mse: mean((s - t)^2)      smooth_l1: mean(huber(s - t))
    loss /= number of (b, v)

J aligned layers, B batch, L tokens, V visible ones, C the teacher's width. Source: reference 2.3, unmasked teacher
(arXiv 2303.16058).
"""

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from pretrain.losses.precision import exact

AlignmentKind = Literal["l2", "mse", "smooth_l1"]


def alignment_loss(student_BVC: Tensor, teacher_BVC: Tensor, kind: AlignmentKind = "l2") -> Tensor:
    """The mean over samples and tokens, a float32 scalar; both sides are normalised here, (K, B, V, C) works too.

    The teacher's side gets no gradient.
    """
    if student_BVC.shape != teacher_BVC.shape:
        raise ValueError(f"student {tuple(student_BVC.shape)} and teacher {tuple(teacher_BVC.shape)} differ in shape")
    with torch.autocast(student_BVC.device.type, enabled=False):
        student = F.normalize(exact(student_BVC), dim=-1)
        teacher = F.normalize(exact(teacher_BVC.detach()), dim=-1)
        if kind == "l2":
            return (2 - 2 * (student * teacher).sum(-1)).mean()
        if kind == "mse":
            return F.mse_loss(student, teacher)
        if kind == "smooth_l1":
            return F.smooth_l1_loss(student, teacher)
    raise ValueError(f"there is no alignment loss '{kind}'; use l2, mse or smooth_l1")


def gather_visible(teacher_JBLC: Tensor, visible_BV: Tensor) -> Tensor:
    """The teacher's features of the tokens that the student saw, (J, B, V, C); (B, L, C) gives (B, V, C)."""
    index = visible_BV[..., None].expand(*teacher_JBLC.shape[:-2], -1, teacher_JBLC.shape[-1])
    return teacher_JBLC.gather(-2, index)
