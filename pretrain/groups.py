"""Which parameter takes which method, rate and weight decay: the groups that an optimizer is given."""

import difflib
import re
from collections.abc import Iterable, Mapping
from typing import Any, Literal, NotRequired, TypedDict

from torch import nn

from configs.errors import UserError
from pretrain.models.joint import TEMPERATURE_MAX, TEMPERATURE_MIN
from pretrain.optim_config import ModuleConfig, OptimConfig

BLOCK_MATRIX = re.compile(
    r"(^|\.)layers\.\d+\.mixer\.(in_proj|out_proj|x_proj|x_proj_b|dt_proj|dt_proj_b)\.weight$"
    r"|(^|\.)encoder\.layer\.\d+\..*\.weight$"
)
"""Matrices inside a Mamba block or a BERT layer: what Muon is for."""

NO_DECAY = re.compile(
    r"(^|\.)(A_log|A_b_log|D|D_b|temp|cls_token|pos_embed|temporal_pos_embedding)$"
    r"|(^|\.)(position_embeddings|token_type_embeddings)\.weight$|\.bias$"
)
"""Names that are never decayed; everything with fewer than two dimensions (norms, biases) is exempt too."""

NO_DECAY_RELEASED = re.compile(r"^(cls_token|pos_embed|temporal_pos_embedding)$|\.bias$")
"""What the release spares by name: its list is asked of the whole model, so inside a joint one it matches nothing."""

LAYER = re.compile(
    r"^(?P<vision>(vision_encoder\.)?)(layers\.(?P<block>\d+)\.|(patch_embed\.|(cls_token|(temporal_)?pos_embed(ding)?)$))"
    r"|^(?P<text>text_encoder\.)bert\.(encoder\.layer\.(?P<layer>\d+)\.|embeddings\.)"
)
"""A name inside one of the towers: which, and which of its layers (neither number: its embeddings)."""

BOUNDS = re.compile(r"(^|\.)temp$"), (TEMPERATURE_MIN, TEMPERATURE_MAX)
"""The parameter that an update may not take out of a range, and that range."""

Kind = Literal["muon", "decay", "plain", "bounded"]


class Group(TypedDict):
    """Parameters that share a method, a base learning rate and a weight decay.

    An update leaves them within `bounds`, where there are any. `use_muon` says the same as `method` to DeepSpeed.
    """

    name: str
    params: list[nn.Parameter]
    method: Literal["adamw", "muon"]
    lr: float
    base_lr: float
    weight_decay: float
    bounds: NotRequired[tuple[float, float]]
    use_muon: NotRequired[bool]


def parameter_groups(named: Iterable[tuple[str, nn.Parameter]], config: OptimConfig, scale: float = 1.0) -> list[Group]:
    """Every trainable parameter in exactly one group, by the rules above; `scale` multiplies every rate.

    A group is named `muon`, `decay`, `plain` or `bounded`, then by the module that has its own rates, then by how many
    layers lie above it where rates decay from layer to layer: `decay/text_encoder/below03`. Raises UserError for a
    module that is not there.
    """
    trained = {name: parameter for name, parameter in named if parameter.requires_grad}
    _check_modules(trained, config.modules)
    heights = _heights(trained) if config.layer_decay is not None else {}
    groups: dict[tuple[str, str, int], Group] = {}
    for name, parameter in trained.items():
        kind, module = _kind(name, parameter, config), _module_of(name, config.modules)
        above = heights.get(name, 0)
        key = (kind, module, above)
        if key not in groups:
            groups[key] = _group(kind, module, above, config, scale)
        groups[key]["params"].append(parameter)
    order = {"muon": 0, "decay": 1, "plain": 2, "bounded": 3}
    return [groups[key] for key in sorted(groups, key=lambda key: (order[key[0]], key[1], key[2]))]


def _kind(name: str, parameter: nn.Parameter, config: OptimConfig) -> Kind:
    if BOUNDS[0].search(name):
        return "bounded"
    if config.method == "muon" and len(shape_of(parameter)) == 2 and BLOCK_MATRIX.search(name):
        return "muon"
    spared = NO_DECAY if config.decay == "weights" else NO_DECAY_RELEASED
    return "plain" if len(shape_of(parameter)) < 2 or spared.search(name) else "decay"


def shape_of(parameter: nn.Parameter) -> tuple[int, ...]:
    """A parameter's whole shape, also where ZeRO 3 has left this rank an empty one."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def _group(kind: Kind, module: str, above: int, config: OptimConfig, scale: float) -> Group:
    own = config.modules.get(module, ModuleConfig())
    base = (own.muon_lr or config.muon_lr) if kind == "muon" else (own.lr or config.lr)
    decay = config.weight_decay if own.weight_decay is None else own.weight_decay
    rate = base * scale * (config.layer_decay or 1.0) ** above
    parts = [kind, module, f"below{above:02d}" if above else ""]
    group = Group(
        name="/".join(part for part in parts if part),
        params=[],
        method="muon" if kind == "muon" else "adamw",
        lr=rate,
        base_lr=rate,
        weight_decay=decay if kind in ("muon", "decay") else 0.0,
    )
    if kind == "bounded":
        group["bounds"] = BOUNDS[1]
    return group


def _module_of(name: str, modules: Mapping[str, Any]) -> str:
    """The longest of `modules` that a parameter is in, else nothing."""
    fitting = [module for module in modules if name == module or name.startswith(f"{module}.")]
    return max(fitting, key=len, default="")


def _check_modules(trained: Mapping[str, nn.Parameter], modules: Mapping[str, Any]) -> None:
    used = {_module_of(name, {module: None}) for name in trained for module in modules}
    for module in modules:
        if module not in used:
            there = {".".join(parts[:n]) for parts in (name.split(".") for name in trained) for n in (1, 2, 3)}
            near = difflib.get_close_matches(module, sorted(there), n=1, cutoff=0.0)
            raise UserError(f"optim.modules names {module}, and nothing trained is in it.", f"Did you mean {near[0]}?")


def _heights(trained: Mapping[str, nn.Parameter]) -> dict[str, int]:
    """How many layers of its tower lie above a parameter: 1 for the last one, depth + 1 for embeddings; heads: none."""
    places: dict[str, tuple[str, int]] = {}
    depths: dict[str, int] = {}
    for name in trained:
        if found := LAYER.match(name):
            tower = "text" if found["text"] else "vision"
            index = int(found["block"] or found["layer"] or -1)
            places[name] = tower, index
            depths[tower] = max(depths.get(tower, 0), index + 1)
    return {name: depths[tower] - index for name, (tower, index) in places.items()}
