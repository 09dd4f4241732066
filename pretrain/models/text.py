"""The text tower: transformers' BERT, split into layers that read text and layers that also attend to the video.

B batch, L tokens, D width, V vision tokens, W vision width.

    embeddings, text layers   -> `encode`: what the contrastive loss and the cross-modal layers start from
    fusion layers             -> `fuse`: self-attention, cross-attention to vision tokens, feed-forward
    masked-word head          -> `mlm_logits`: tied to the word embedding

In a fusion layer the keys and values of cross-attention come from tokens of another width. BERT's own modules are used
as they are (transformers 5); ours is only how they are put together. State-dict names are the release's: `bert.*` and
`cls.predictions.*`. Source: reference 3.1.
"""

import inspect
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from configs.errors import UserError
from data_pipeline.torchvision_shim import ensure_torchvision
from pretrain.models.bert_weights import load_bert
from pretrain.models.config import TextConfig

KNOWN_MAJOR = 5
INIT_STD = 0.02
LAYER_TAKES = ["self", "hidden_states", "attention_mask", "encoder_hidden_states"]
"""What a layer of the BERT that is known here takes, in this order."""


def _bert_module() -> Any:
    """transformers' file of BERT modules; UserError on a version whose modules are not the ones used here."""
    import transformers

    if int(transformers.__version__.split(".")[0]) != KNOWN_MAJOR:
        raise _unknown(transformers.__version__)
    ensure_torchvision()
    from transformers.models.bert import modeling_bert

    if list(inspect.signature(modeling_bert.BertLayer.forward).parameters)[:4] != LAYER_TAKES:
        raise _unknown(transformers.__version__)
    return modeling_bert


def _unknown(version: str) -> UserError:
    return UserError(
        f"transformers {version} is installed; the text tower is built from the BERT of version {KNOWN_MAJOR}, whose "
        f"layers take {', '.join(LAYER_TAKES[1:])}.",
        f"Run: pip install 'transformers>={KNOWN_MAJOR},<{KNOWN_MAJOR + 1}'",
    )


def bert_config(config: TextConfig, fusion: bool) -> Any:
    """transformers' BertConfig for one kind of layer."""
    _bert_module()
    from transformers import BertConfig

    bert = BertConfig(
        vocab_size=config.vocab_size, hidden_size=config.width, num_hidden_layers=config.layers + config.fusion_layers,
        num_attention_heads=config.heads, intermediate_size=config.intermediate, pad_token_id=0,
        hidden_dropout_prob=config.dropout, attention_probs_dropout_prob=config.dropout,
        max_position_embeddings=config.positions, is_decoder=fusion, add_cross_attention=fusion,
    )  # fmt: skip
    bert._attn_implementation = config.attention
    return bert


class _Encoder(nn.Module):
    """Only a name in the state dict: `bert.encoder.layer.*`."""

    def __init__(self, layers: list[nn.Module]) -> None:
        super().__init__()
        self.layer = nn.ModuleList(layers)


class _Bert(nn.Module):
    """Only a name in the state dict: `bert.embeddings.*` and `bert.encoder.*`."""

    def __init__(self, embeddings: Any, layers: list[nn.Module]) -> None:
        super().__init__()
        self.embeddings = embeddings
        self.encoder = _Encoder(layers)


class TextTower(nn.Module):
    """BERT in two modes. `vision_width` is the width of the tokens that the fusion layers attend to."""

    def __init__(self, config: TextConfig, vision_width: int) -> None:
        super().__init__()
        self.config = config
        parts, text = _bert_module(), bert_config(config, fusion=False)
        layers: list[nn.Module] = [parts.BertLayer(text, layer_idx=i) for i in range(config.layers)]
        fusion = bert_config(config, fusion=True)
        for index in range(config.fusion_layers):
            layer = parts.BertLayer(fusion, layer_idx=config.layers + index)
            # Only decoders may have cross-attention in transformers; this one reads the text in both directions.
            layer.attention.self.is_causal = False
            cross = layer.crossattention.self
            cross.key, cross.value = (nn.Linear(vision_width, config.width) for _ in range(2))
            layers.append(layer)
        self.bert = _Bert(parts.BertEmbeddings(text), layers)
        self.cls = parts.BertOnlyMLMHead(text)
        self.apply(_initialise)
        self._tie()
        if config.init is not None:
            load_bert(self, config)

    def _tie(self) -> None:
        """The decoder of the masked-word head is the word embedding; its two biases are one."""
        predictions = self.cls.predictions
        predictions.decoder.weight = self.bert.embeddings.word_embeddings.weight
        predictions.decoder.bias = predictions.bias

    def _mask(self, attention_mask_BL: Tensor, like: Tensor) -> Tensor:
        """What attention adds or selects by, (B, 1, 1, L): padding is not attended to."""
        keep = attention_mask_BL[:, None, None, :].bool()
        if self.config.attention == "sdpa":
            return keep
        return torch.zeros_like(keep, dtype=like.dtype).masked_fill(~keep, torch.finfo(like.dtype).min)

    def encode(self, input_ids_BL: Tensor, attention_mask_BL: Tensor) -> Tensor:
        """Text alone: hidden states (B, L, D) after the text layers. The mask is 1 for words, 0 for padding."""
        hidden_BLD: Tensor = self.bert.embeddings(input_ids=input_ids_BL)
        mask = self._mask(attention_mask_BL, hidden_BLD)
        return self._through(self.bert.encoder.layer[: self.config.layers], hidden_BLD, mask)

    def fuse(self, hidden_BLD: Tensor, attention_mask_BL: Tensor, vision_BVW: Tensor) -> Tensor:
        """Text that has seen the video: hidden states (B, L, D) after the fusion layers, all of V attended to."""
        mask = self._mask(attention_mask_BL, hidden_BLD)
        return self._through(self.fusion_layers(), hidden_BLD, mask, vision_BVW)

    def _through(self, layers: Iterable[nn.Module], hidden_BLD: Tensor, *seen: Tensor) -> Tensor:
        """Hidden states after `layers`, each recomputed in the backward pass where the config says so."""
        for layer in layers:
            if self.config.checkpoint_layers and self.training:
                hidden_BLD = checkpoint(layer, hidden_BLD, *seen, use_reentrant=False)
            else:
                hidden_BLD = layer(hidden_BLD, *seen)
        return hidden_BLD

    def fusion_layers(self) -> nn.ModuleList:
        """The layers that attend to the video as well."""
        layers: nn.ModuleList = self.bert.encoder.layer[self.config.layers :]
        return layers

    def mlm_logits(self, hidden: Tensor) -> Tensor:
        """Scores of every word of the vocabulary, (..., vocab), from hidden states (..., D)."""
        logits: Tensor = self.cls(hidden)
        return logits

    def forward(self, input_ids_BL: Tensor, attention_mask_BL: Tensor) -> Tensor:
        """The same as `encode`."""
        return self.encode(input_ids_BL, attention_mask_BL)


def _initialise(module: nn.Module) -> None:
    """BERT's initialisation: normal(0.02), biases zero, the padding word zero."""
    if isinstance(module, (nn.Linear, nn.Embedding)):
        nn.init.normal_(module.weight, std=INIT_STD)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)
        if isinstance(module, nn.Embedding) and module.padding_idx is not None:
            with torch.no_grad():
                module.weight[module.padding_idx].zero_()
