"""Golden files and the one measure of error: |a - b| / |b| in float64, against the tolerances of their README."""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from pretrain.models.config import VisionConfig
from pretrain.models.joint import JointModel
from pretrain.released.config import ImportConfig
from pretrain.released.fit import Fitted, fit

OUTPUT, GRADIENT = 1e-5, 2e-5


@dataclass(frozen=True)
class Golden:
    """One golden file: its config and its tensors by name."""

    config: dict[str, Any]
    tensors: dict[str, Tensor]

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name]

    def under(self, prefix: str) -> dict[str, Tensor]:
        """The tensors whose names begin with `prefix`, without it."""
        return {name[len(prefix) :]: value for name, value in self.tensors.items() if name.startswith(prefix)}

    def vision(self, **options: Any) -> VisionConfig:
        """The encoder that the file's own config and shapes describe (for files without a whole model)."""
        c = self.config
        sizes = {
            "width": c["embed_dim"], "depth": c.get("depth", 1), "frames": c.get("num_frames", 1),
            "image_size": c.get("img_size", 16), "patch_size": c.get("patch_size", 16), "tubelet": c.get("tubelet", 1),
            "d_state": next(v for k, v in self.tensors.items() if k.endswith("A_log")).shape[1],
            "expand": c.get("expand", 2), "d_conv": c.get("d_conv", 4),
        }  # fmt: skip
        return VisionConfig(**sizes, **options)

    def loaded(self, target: str, **options: Any) -> Fitted:
        """The model of the file, its weights read as any published file's are; the file's config must agree."""
        c, bert = self.config, self.config.get("bert", {})
        heads = bert["num_attention_heads"] if target == "stage2" else None
        made = fit(self.under("weight."), ImportConfig(target=target, heads=heads, **options))
        vision = made.meta.vision
        sizes = (vision.width, vision.depth, vision.frames, vision.image_size, vision.patch_size, vision.tubelet)
        assert sizes == tuple(
            c[key] for key in ("embed_dim", "depth", "num_frames", "img_size", "patch_size", "tubelet")
        )
        if isinstance(made.model, JointModel):
            text = made.model.config.text
            assert (text.layers, text.layers + text.fusion_layers) == (bert["fusion_layer"], bert["num_hidden_layers"])
            for module in made.model.modules():  # the file was made without dropout, which no shape tells
                if isinstance(module, torch.nn.Dropout):
                    module.p = bert["hidden_dropout_prob"]
        return made


@pytest.fixture
def golden(golden_dir: Path) -> Callable[[str], Golden]:
    """`golden(name)` reads one golden file."""

    def read(name: str) -> Golden:
        path = golden_dir / f"{name}.safetensors"
        if not path.is_file():
            pytest.skip(f"no golden file {path}")
        with safe_open(path, "pt") as file:
            config = json.loads((file.metadata() or {}).get("config", "{}"))
            return Golden(config, {name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118

    return read


class Errors:
    """Collects the error of every tensor, for the summary; the test fails at its end if one is too large."""

    def __init__(self) -> None:
        self.rows: list[tuple[str, float, float]] = []

    def check(self, name: str, ours: Tensor | None, theirs: Tensor, tolerance: float = OUTPUT) -> None:
        assert ours is not None, f"{name}: nothing computed"
        assert ours.numel() == theirs.numel(), f"{name}: {tuple(ours.shape)} against {tuple(theirs.shape)}"
        a, b = ours.detach().double().reshape(theirs.shape), theirs.double()
        off = float((a - b).norm())
        # A gradient that is exactly zero must be so here too.
        self.rows.append((name, off / float(b.norm()) if b.any() or b.isnan().any() else off, tolerance))

    def gradients(self, module: torch.nn.Module, theirs: dict[str, Tensor]) -> None:
        """Every gradient of the file, and none elsewhere."""
        given = dict(module.named_parameters())
        for name, value in theirs.items():
            self.check(f"grad.{name}", given[name].grad, value, GRADIENT)
        for name, parameter in given.items():
            assert name in theirs or parameter.grad is None or not parameter.grad.any(), f"{name}: an extra gradient"


@pytest.fixture
def errors(request: pytest.FixtureRequest) -> Iterator[Errors]:
    collected = Errors()
    yield collected
    assert collected.rows, "nothing was compared"
    rows = sorted(collected.rows, key=lambda row: row[1] / row[2], reverse=True)
    request.node.user_properties.append(("parity", rows))  # for the summary at the end: tests/conftest.py
    # Not "error > limit": that is false for NaN.
    wrong = [f"{name}: {error:.2e} (limit {limit:.0e})" for name, error, limit in rows if not error <= limit]
    assert not wrong, "; ".join(wrong)


def visible_of(mask_BL: Tensor) -> Tensor:
    """The visible indices of a golden mask, where 1 is hidden."""
    return torch.stack([row.logical_not().nonzero()[:, 0] for row in mask_BL])


@pytest.fixture
def visible() -> Callable[[Tensor], Tensor]:
    return visible_of
