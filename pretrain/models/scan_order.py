"""The orders in which a layer walks through a clip, as permutations of its tokens.

B batch, K token frames, N patches a frame, L = 1 + K N tokens of the whole clip, V visible ones, E channels,
R = B L (or B V) rows of the batch laid end to end.

    spatial_first    cls, then frame by frame, row by row: the order in which tokens travel everywhere else
    temporal_first   cls, then place by place, at each place through time
    st_half          the first half of the inner channels spatial-first, the second half temporal-first
    st_full          all channels in both orders, their outputs summed

cls stays first in every order, as in the release: the forward scan reads it before any patch, so every patch knows
it, and the backward scan reads it after all of them, so it knows every patch. The order of visible tokens is that of
the whole clip with the hidden ones left out. One token frame has one order. Source: arXiv 2403.06977, figures 4
and 7a; the published code has the first order alone.
"""

from collections.abc import Iterable
from typing import NamedTuple, Self

import torch
from torch import Tensor

from pretrain.models.config import ScanOrder


def temporal_first(frames: int, patches: int, device: torch.device | None = None) -> Tensor:
    """The tokens of a whole clip in temporal-first order, (L,): entry i is the index of the token that comes i-th."""
    index_KN = 1 + torch.arange(frames * patches, device=device).view(frames, patches)
    return torch.cat([index_KN.new_zeros(1), index_KN.T.reshape(-1)])


def visible_temporal_first(visible_BV: Tensor, frames: int, patches: int) -> Tensor:
    """The same among visible tokens, (B, V): positions within `visible_BV`, the indices of these, cls (0) first."""
    patch_BV = visible_BV - 1
    frame_BV, place_BV = patch_BV // patches, patch_BV % patches
    rank_BV = torch.where(visible_BV == 0, -1, place_BV * frames + frame_BV)
    return rank_BV.argsort(dim=1)


class Reordering(NamedTuple):
    """Takes the tokens of one batch from spatial-first to temporal-first order and back.

    Both ways are one copy of whole rows, which is the cheapest form on every device, in the gradient too.
    """

    ahead_R: Tensor
    back_R: Tensor

    @classmethod
    def of(cls, order_BL: Tensor) -> Self:
        """From each sample's order, (B, L) positions."""
        B, L = order_BL.shape
        first_B1 = L * torch.arange(B, device=order_BL.device)[:, None]
        return cls((first_B1 + order_BL).flatten(), (first_B1 + order_BL.argsort(dim=1)).flatten())

    @classmethod
    def needed(
        cls, orders: Iterable[ScanOrder], tokens_BLE: Tensor, visible_BV: Tensor | None, frames: int, patches: int
    ) -> Self | None:
        """What layers of these orders need for these tokens; None where spatial-first is all there is."""
        if frames == 1 or set(orders) == {"spatial_first"}:
            return None
        if visible_BV is not None:
            return cls.of(visible_temporal_first(visible_BV, frames, patches))
        return cls.of(temporal_first(frames, patches, tokens_BLE.device).expand(tokens_BLE.shape[0], -1))

    def temporal(self, tokens_BLE: Tensor) -> Tensor:
        """Tokens that stand in spatial-first order, in temporal-first order; any view, any width."""
        return _take_rows(tokens_BLE, self.ahead_R)

    def spatial(self, tokens_BLE: Tensor) -> Tensor:
        """The way back."""
        return _take_rows(tokens_BLE, self.back_R)


def _take_rows(tokens_BLE: Tensor, rows_R: Tensor) -> Tensor:
    return tokens_BLE.flatten(0, 1).index_select(0, rows_R).view(tokens_BLE.shape)
