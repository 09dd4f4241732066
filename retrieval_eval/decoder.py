"""The cross-modal decoder as a scorer of many texts against one clip, doing once what pairs share.

It computes `JointModel.match_logits` of class 1, to rounding. Three things make it quick, none changes the value:
the first fusion layer's self-attention has not seen the clip yet, so it is done once a text (`start`); a clip's
keys and values are made once and all its texts attend to them as one sequence (`look`, `score`); and the last
layer is computed for the first word alone, which is all that the head reads.

P texts of one clip, U texts, L words, N patch tokens, D widths, A attention heads, H width of a head.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from configs.errors import UserError
from pretrain.models.joint import JointModel

KeysValues = list[tuple[Tensor, Tensor]]


class PairScorer:
    """Match scores by the fusion layers and the matching head of `model`, which must be in eval mode."""

    def __init__(self, model: JointModel) -> None:
        text = model.text_encoder
        self.layers: list[Any] = list(text.bert.encoder.layer[text.config.layers :])
        if not self.layers:
            raise UserError(
                "This checkpoint has no fusion layers (text.fusion_layers is 0), so nothing can re-rank.",
                "Give rerank.top=0.",
            )
        self.heads = text.config.heads
        self.head: nn.Linear = model.itm_head

    def start(self, hidden_ULD: Tensor, mask_UL: Tensor) -> Tensor:
        """What pairs begin from, (U, L, D), or (U, 1, D) where there is one fusion layer: text only."""
        return self._read(0, hidden_ULD, mask_UL)

    def look(self, tokens_ND: Tensor) -> KeysValues:
        """The clip's keys and values (1, A, N, H) of every fusion layer."""
        return [
            (self._split(cross.key(tokens_ND)), self._split(cross.value(tokens_ND)))
            for cross in (layer.crossattention.self for layer in self.layers)
        ]

    def score(self, states_PLD: Tensor, mask_PL: Tensor, clip: KeysValues) -> Tensor:
        """The match logit of class 1, (P,) float32, of P started texts with the clip that `look` saw."""
        for number, layer in enumerate(self.layers):
            if number:
                states_PLD = self._read(number, states_PLD, mask_PL)
            states_PLD = layer.feed_forward_chunk(self._attend(layer, states_PLD, clip[number]))
        with torch.autocast(states_PLD.device.type, enabled=False):
            # Scores that rank 128 candidates must not tie, as they do in bf16.
            return F.linear(states_PLD[:, 0].float(), self.head.weight[1:].float(), self.head.bias[1:].float())[:, 0]

    def _read(self, number: int, states_PLD: Tensor, mask_PL: Tensor) -> Tensor:
        """Self-attention of a layer; in the last one for the first word alone."""
        attention = self.layers[number].attention
        wanted_PLD = states_PLD[:, :1] if number == len(self.layers) - 1 else states_PLD
        query, key, value = (
            part.unflatten(2, (self.heads, -1)).transpose(1, 2)
            for part in (
                attention.self.query(wanted_PLD),
                attention.self.key(states_PLD),
                attention.self.value(states_PLD),
            )
        )
        read = F.scaled_dot_product_attention(query, key, value, attn_mask=mask_PL[:, None, None, :].bool())
        out: Tensor = attention.output(read.transpose(1, 2).flatten(2), wanted_PLD)
        return out

    def _attend(self, layer: Any, states_PLD: Tensor, clip: tuple[Tensor, Tensor]) -> Tensor:
        """Cross-attention: no word is masked from the clip, so all words of all texts are one sequence."""
        cross = layer.crossattention
        query_1AWH = self._split(cross.self.query(states_PLD).flatten(0, 1))
        seen_1AWH = F.scaled_dot_product_attention(query_1AWH, *clip)
        out: Tensor = cross.output(seen_1AWH[0].transpose(0, 1).flatten(1).view(states_PLD.shape), states_PLD)
        return out

    def _split(self, rows_ND: Tensor) -> Tensor:
        split_1ANH: Tensor = rows_ND.unflatten(1, (self.heads, -1)).transpose(0, 1)[None]
        return split_1ANH
