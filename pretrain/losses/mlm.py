"""Masked words: hide some words of a text, and score what the model puts in their place, the clip beside it.

    for each word that is not special or padding, with probability p:
        label = word;  80 %: [MASK];  10 %: a random word of the vocabulary;  10 %: left as it is
    loss = cross-entropy at the labelled words

B batch, L words. Source: BERT (arXiv 1810.04805), 3.1; reference 3.2 (p = 0.5, [SEP] may be hidden).
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from data_pipeline import draws
from pretrain.losses.precision import exact

IGNORED = -100
MASK_SHARE, RANDOM_SHARE = 0.8, 0.1


def mask_words(
    input_ids_BL: Tensor,
    attention_mask_BL: Tensor,
    seeds_B: Tensor,
    *,
    mask_id: int,
    keep_ids: Sequence[int],
    vocab_size: int,
    probability: float = 0.5,
) -> tuple[Tensor, Tensor]:
    """The text with hidden words and the labels, both (B, L) int64; -100 where nothing is asked.

    `keep_ids` are never hidden ([PAD] and [CLS] as released; a task may add [SEP]), nor is padding. The draws
    belong to each sample's seed, and to a word's place whatever the length the batch is padded to.
    """
    length = input_ids_BL.shape[1]
    chosen_BL = draws.uniform(seeds_B, "mlm.which", length) < probability
    chosen_BL &= attention_mask_BL.bool()
    chosen_BL &= ~torch.isin(input_ids_BL, torch.tensor(list(keep_ids), device=input_ids_BL.device))
    kind_BL = draws.uniform(seeds_B, "mlm.how", length)
    other_BL = draws.randint(seeds_B, "mlm.word", 0, vocab_size, length)
    masked_BL = torch.where(chosen_BL & (kind_BL < MASK_SHARE), mask_id, input_ids_BL)
    random_BL = chosen_BL & (kind_BL >= MASK_SHARE) & (kind_BL < MASK_SHARE + RANDOM_SHARE)
    masked_BL = torch.where(random_BL, other_BL, masked_BL)
    return masked_BL, torch.where(chosen_BL, input_ids_BL, IGNORED)


def mlm_loss(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The sum of cross-entropies over the asked words and their number, both float32 scalars.

    Logits are (..., vocab) for labels (...): all words with -100 where nothing is asked, or the asked ones
    alone. Divide by the count of the global batch, and by at least 1: a text may have no hidden word.
    """
    flat, wanted = exact(logits).flatten(0, -2), labels.flatten()
    total = F.cross_entropy(flat, wanted, ignore_index=IGNORED, reduction="sum")
    return total, (wanted != IGNORED).sum().float()
