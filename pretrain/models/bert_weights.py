"""Fill a text tower from somebody's BERT: a folder with config.json and weights, or a hub name.

A BERT comes in many forms: saved alone (`encoder.layer.0...`) or inside a model with heads (`bert.encoder...`), with
or without a word head and a pooler, with LayerNorms called gamma and beta. All of them are read, and strictly: a
tensor is used, dropped by name, or an error. No BERT has cross-attention to a video: that stays as initialised.
"""

import json
import logging
import re
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from configs.errors import UserError
from pretrain.models.config import TextConfig
from pretrain.weight_faults import require_fit
from pretrain.weight_files import State, read

log = logging.getLogger(__name__)

WEIGHTS = ("model.safetensors", "pytorch_model.bin")
DROPPED = re.compile(r"bert\.pooler\.|cls\.seq_relationship\.|.*\.position_ids$|.*\.token_type_ids$")
"""Of a BERT, what a text tower has no use for: the pooler, next-sentence prediction, tables of 0, 1, 2, ..."""

HEAD = "cls.predictions."
TIED = {
    f"{HEAD}decoder.weight": "bert.embeddings.word_embeddings.weight",
    f"{HEAD}decoder.bias": f"{HEAD}bias",
}
ACTIVATION, NORM_EPS = "gelu", 1e-12


def load_bert(tower: nn.Module, config: TextConfig) -> None:
    """Fill `tower`, built as `config` says, from the BERT that `config.init` names.

    Raises UserError where there is no such BERT, its sizes are not the config's (all that differ are named), or its
    weights are not exactly a BERT's.
    """
    source = str(config.init)
    settings, weights = _find(source)
    _check_sizes(source, settings, config)
    given = _named(read(weights).tensors)
    wanted = {name: tensor for name, tensor in tower.state_dict().items() if ".crossattention." not in name}
    if not any(name.startswith(HEAD) for name in given):
        log.warning("text tower: %s has no word head; ours starts at random", source)
        wanted = {name: tensor for name, tensor in wanted.items() if not name.startswith(HEAD)}
    require_fit(
        {name: tuple(tensor.shape) for name, tensor in given.items()},
        {name: tuple(tensor.shape) for name, tensor in wanted.items()},
        f"The BERT in {source}",
    )
    tower.load_state_dict(given, strict=False)
    log.info("text tower: %d tensors from %s; cross-attention is new", len(given), source)


def _named(tensors: State) -> State:
    """A BERT's tensors by the names that ours have."""
    named: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        name = re.sub(r"LayerNorm\.(gamma|beta)$", lambda old: f"LayerNorm.{_NORM[old[1]]}", name)
        if not name.startswith(("bert.", "cls.")):
            name = f"bert.{name}"
        if not DROPPED.match(name):
            named[name] = tensor
    if f"{HEAD}bias" in named:
        named |= {name: named[same] for name, same in TIED.items() if name not in named and same in named}
    return named


_NORM = {"gamma": "weight", "beta": "bias"}


def _check_sizes(source: str, settings: dict[str, Any], config: TextConfig) -> None:
    """Every size of config.json against ours: shapes would not show a wrong number of heads."""
    if settings.get("model_type", "bert") != "bert":
        raise UserError(
            f"text.init {source} holds a {settings['model_type']} model, not a BERT.", "Give a BERT, or null."
        )
    layers = config.layers + config.fusion_layers
    ours = {
        "hidden_size": ("text.width", config.width),
        "num_attention_heads": ("text.heads", config.heads),
        "num_hidden_layers": ("text.layers + text.fusion_layers", layers),
        "intermediate_size": ("text.intermediate", config.intermediate),
        "vocab_size": ("text.vocab_size", config.vocab_size),
        "max_position_embeddings": ("text.positions", config.positions),
    }
    differ = [
        f"{name} is {here}, there {settings.get(key)}"
        for key, (name, here) in ours.items()
        if settings.get(key) != here
    ]
    fixed = {"hidden_act": ACTIVATION, "layer_norm_eps": NORM_EPS, "position_embedding_type": "absolute"}
    differ += [
        f"{key} is {settings[key]}, here always {only}"
        for key, only in fixed.items()
        if settings.get(key, only) != only
    ]
    if differ:
        raise UserError(f"The BERT in {source} is not the one configured: {'; '.join(differ)}.", "Make them equal.")


def _find(source: str) -> tuple[dict[str, Any], Path]:
    """config.json, read, and the file of weights, in a folder or fetched from the hub."""
    if Path(source).is_dir():
        found = {name: Path(source) / name for name in ("config.json", *WEIGHTS) if (Path(source) / name).is_file()}
    elif source.startswith((".", "/", "~")):
        raise UserError(f"There is no folder {source} (text.init).", "Mend the path, or give null for random weights.")
    else:
        found = _fetch(source)
    weights = next((found[name] for name in WEIGHTS if name in found), None)
    if weights is None or "config.json" not in found:
        raise UserError(
            f"text.init {source} holds no BERT: config.json and {' or '.join(WEIGHTS)} are looked for.",
            "Give the folder of a BERT, or null for random weights.",
        )
    try:
        settings = json.loads(found["config.json"].read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{found['config.json']} is not readable as JSON.", "Fetch it again.", exit_code=1) from error
    return settings, weights


def _fetch(name: str) -> dict[str, Path]:
    """The files of a hub's model, as far as it has them."""
    from transformers.utils.hub import cached_file

    found: dict[str, Path] = {}
    try:
        for file in ("config.json", *WEIGHTS):
            optional = {} if file == "config.json" else {"_raise_exceptions_for_missing_entries": False}
            path = None if len(found) == 2 else cached_file(name, file, **optional)
            found |= {} if path is None else {file: Path(path)}
    except OSError as error:
        said = str(error).splitlines()[0].rstrip(".")
        raise UserError(
            f"text.init {name} is no folder here, and the hub does not give it: {said}.",
            "Give a local folder, or fetch it once where there is a network (`hf download`) and give that folder.",
        ) from error
    return found
