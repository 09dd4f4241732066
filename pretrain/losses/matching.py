"""Matching: does this text describe this clip? Each true pair is set against one hard clip and one hard text.

    for each row i: draw j with probability softmax(score[i])[j] among identity[j] != identity[i]
    loss = cross-entropy of the true pairs (1), of (hard clip, text) and of (clip, hard text) (0)

B this rank's rows, G the candidates (this rank's own batch as released, or the global one). A row whose
candidates all share its identity (a batch of one) has no negative and contributes none.
Source: reference 3.2 (VTM); ALBEF (arXiv 2107.07651).
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from data_pipeline import draws
from pretrain.losses.precision import exact


def has_negative(identity_B: Tensor, all_identity_G: Tensor) -> Tensor:
    """Whether a row has a candidate of another medium, (B,) bool."""
    return (identity_B[:, None] != all_identity_G[None, :]).any(1)


def hard_negatives(
    score_BG: Tensor, identity_B: Tensor, all_identity_G: Tensor, seeds_B: Tensor, stream: str
) -> tuple[Tensor, Tensor]:
    """One negative a row, (B,) int64 into G, and whether there is one, (B,) bool.

    `score_BG` is the similarity over the temperature. The draw (Gumbel's maximum) belongs to each row's seed
    and to `stream`: use another for texts than for clips. A row without a negative points at candidate 0.
    """
    other_BG = identity_B[:, None] != all_identity_G[None, :]
    uniform_BG = draws.uniform(seeds_B, stream, score_BG.shape[1]).clamp(min=2**-25)
    gumbel_BG = -torch.log(-torch.log(uniform_BG))
    drawn_BG = (score_BG.detach().float() + gumbel_BG).masked_fill(~other_BG, float("-inf"))
    return drawn_BG.argmax(1), other_BG.any(1)


def matching_loss(
    positive_B2: Tensor,
    hard_video_B2: Tensor,
    hard_text_B2: Tensor,
    has_video_B: Tensor | None = None,
    has_text_B: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The sum of cross-entropies over pairs and the number of pairs, both float32 scalars: divide by the global count.

    Logits are (no match, match): of (clip, text), of (hard clip, text) and of (clip, hard text). Rows where
    `has_video_B` or `has_text_B` is false have no such negative; None means that all have.
    """
    logits = exact(torch.cat([positive_B2, hard_video_B2, hard_text_B2]))
    everywhere = torch.ones(len(positive_B2), dtype=torch.bool, device=logits.device)
    label = torch.cat([everywhere, ~everywhere, ~everywhere]).long()
    counted = torch.cat([everywhere, *(everywhere if has is None else has for has in (has_video_B, has_text_B))])
    total = (F.cross_entropy(logits, label, reduction="none") * counted).sum()
    return total, counted.sum().float()
