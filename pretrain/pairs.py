"""What stage 2 moves between micro-batches and ranks: texts, pairs of clips and texts, and what a part has to know.

B samples of a micro-batch, S of a rank, L words, V visible tokens, F vectors a clip, E joint width, D widths.
"""

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from pretrain.distributed import gather_rows, gather_with_gradient, world_size
from pretrain.losses import Cached
from pretrain.sight import Shown


class Text(NamedTuple):
    """Captions as (B, L): tokens and which of them are words; the same with hidden words, and what these were."""

    ids_BL: Tensor
    words_BL: Tensor
    masked_BL: Tensor
    label_BL: Tensor

    def part(self, rows: slice) -> "Text":
        """Some of the captions, as views."""
        return Text(*(column[rows] for column in self))


class Pairs(NamedTuple):
    """What the contrastive and the matching loss need of some clips and their texts, row by row."""

    video_BFE: Tensor
    text_BE: Tensor
    hidden_BLD: Tensor
    words_BL: Tensor
    patches_BVD: Tensor
    identity_B: Tensor
    seeds_B: Tensor

    def part(self, rows: slice) -> "Pairs":
        """Some of the pairs, as views."""
        return Pairs(*(column[rows] for column in self))

    def of_all_ranks(self) -> "Pairs":
        """The same of every rank, in rank order; what a negative is made of carries its gradient home."""
        return Pairs(
            gather_rows(self.video_BFE),
            gather_rows(self.text_BE),
            gather_with_gradient(self.hidden_BLD),
            gather_rows(self.words_BL),
            gather_with_gradient(self.patches_BVD),
            gather_rows(self.identity_B),
            gather_rows(self.seeds_B),
        )

    def leaves(self) -> "Pairs":
        """The same without a graph, with a gradient of its own for what negatives are made of."""
        free = Pairs(*(column.detach() for column in self))
        return free._replace(hidden_BLD=free.hidden_BLD.requires_grad_(), patches_BVD=free.patches_BVD.requires_grad_())


@dataclass(frozen=True)
class Known:
    """What a micro-batch knows of the rest: how many parts a rank has, counts over all of them, cached gradients."""

    text: Text
    shown: Shown
    pairs: Tensor
    """Pairs that matching judges, over all parts and ranks."""
    asked: Tensor
    """Hidden words that are asked for, over all parts and ranks."""
    first: int = 0
    """The number of this part's first sample in the global batch."""
    parts: int = 1
    dropout: int | None = None
    """Seed of torch's generator, so that the features come out as they did in the survey."""
    contrastive: Cached | None = None
    """By this part's video and text vectors, and the temperature."""
    matching: Cached | None = None
    """By this part's hidden states and patches, and the parameters that judge them."""


def over_ranks(total: Tensor, count: Tensor, parts: int = 1) -> Tensor:
    """This part's `total` such that the mean over parts and ranks is the sum of all totals over `count`, or over 1."""
    return total * (world_size() * parts) / count.clamp(min=1)
