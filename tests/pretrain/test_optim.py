import copy
import itertools
import math

import pytest
import torch
from torch import nn

from pretrain.groups import parameter_groups
from pretrain.models.config import JointConfig, TextConfig, VisionConfig
from pretrain.optim import Optimizer, orthogonalise, set_learning_rates
from pretrain.optim_config import OptimConfig
from pretrain.schedule import warmup_cosine


@pytest.fixture(scope="module")
def joint() -> nn.Module:
    from pretrain.models.joint import JointModel

    torch.manual_seed(0)
    vision = VisionConfig(depth=2, width=16, patch_size=8, frames=2, image_size=16, stem="conv", align_width=8)
    text = TextConfig(
        width=16, heads=2, layers=1, fusion_layers=1, intermediate=32, vocab_size=40, positions=16, max_tokens=8
    )
    return JointModel(JointConfig(vision=vision, text=text, embed=8))


def names_by_group(model: nn.Module, config: OptimConfig) -> dict[str, set[str]]:
    names = {id(p): name for name, p in model.named_parameters()}
    return {g["name"]: {names[id(p)] for p in g["params"]} for g in parameter_groups(model.named_parameters(), config)}


def test_every_parameter_is_in_exactly_one_group(joint):
    for method in ("adamw", "muon"):
        groups = parameter_groups(joint.named_parameters(), OptimConfig(method=method))
        seen = [id(p) for group in groups for p in group["params"]]
        assert len(seen) == len(set(seen)) == len(list(joint.parameters()))


def test_what_is_never_decayed(joint):
    groups = names_by_group(joint, OptimConfig())
    encoder = "vision_encoder."
    for name in (
        encoder + "layers.0.mixer.A_log", encoder + "layers.0.mixer.A_b_log", encoder + "layers.1.mixer.D",
        encoder + "layers.1.mixer.D_b", encoder + "layers.0.mixer.dt_proj.bias", encoder + "layers.0.norm.weight",
        encoder + "cls_token", encoder + "pos_embed", encoder + "temporal_pos_embedding", encoder + "norm.weight",
        "text_encoder.bert.embeddings.position_embeddings.weight", "vision_proj.bias",
        "text_encoder.bert.embeddings.LayerNorm.weight",
    ):  # fmt: skip
        assert name in groups["plain"], name
    for name in (encoder + "layers.0.mixer.in_proj.weight", "vision_proj.weight", encoder + "patch_embed.proj.weight"):
        assert name in groups["decay"], name
    config = OptimConfig(weight_decay=0.3)
    decays = {g["name"]: g["weight_decay"] for g in parameter_groups(joint.named_parameters(), config)}
    assert decays == {"decay": 0.3, "plain": 0.0, "bounded": 0.0}
    assert groups["bounded"] == {"temp"}


def test_the_released_rule_decays_what_the_release_does(joint):
    """Reference 2.5 and 3.3: A_log always; positions and cls in stage 2, where its list of names finds nothing."""
    released = OptimConfig(decay="released")
    positions = {"cls_token", "pos_embed", "temporal_pos_embedding"}
    scans = {f"layers.{i}.mixer.{name}" for i in range(2) for name in ("A_log", "A_b_log")}
    tables = {f"text_encoder.bert.embeddings.{name}_embeddings.weight" for name in ("position", "token_type")}

    alone = names_by_group(joint.vision_encoder, released)
    assert alone["plain"] == names_by_group(joint.vision_encoder, OptimConfig())["plain"] - scans
    assert positions <= alone["plain"]

    moved = names_by_group(joint, released)["decay"] - names_by_group(joint, OptimConfig())["decay"]
    assert moved == {f"vision_encoder.{name}" for name in positions | scans} | tables


def test_muon_takes_the_block_matrices_and_nothing_else(joint):
    muon = names_by_group(joint, OptimConfig(method="muon"))["muon"]
    mixer = ("in_proj", "out_proj", "x_proj", "x_proj_b", "dt_proj", "dt_proj_b")
    expected = {f"vision_encoder.layers.{i}.mixer.{part}.weight" for i in range(2) for part in mixer}
    text = {name for name in muon if name.startswith("text_encoder.")}
    assert muon - text == expected
    assert text == {
        name
        for name, p in joint.named_parameters()
        if ".encoder.layer." in name and p.ndim == 2 and name.startswith("text_encoder.bert.")
    }
    assert len(text) >= 6 + 10  # one text layer, one fusion layer with cross-attention


def trained(make, model: nn.Module, steps: int = 5) -> list[torch.Tensor]:
    model = copy.deepcopy(model)
    optimizer = make(model)
    torch.manual_seed(1)
    for _ in range(steps):
        for parameter in model.parameters():
            parameter.grad = torch.randn_like(parameter)
        optimizer.step()
    return [p.detach() for p in model.parameters()]


def one_group(method: str, lr: float, weight_decay: float):
    return lambda model: Optimizer(
        [
            {
                "name": method, "method": method, "params": list(model.parameters()), "lr": lr, "base_lr": lr,
                "weight_decay": weight_decay,
            }
        ],
        betas=(0.9, 0.95),
    )  # fmt: skip


def test_adamw_is_torchs():
    model = nn.Sequential(nn.Linear(6, 5), nn.LayerNorm(5), nn.Linear(5, 3))
    ours = trained(one_group("adamw", 3e-3, 0.1), model)
    theirs = trained(lambda m: torch.optim.AdamW(m.parameters(), lr=3e-3, weight_decay=0.1, betas=(0.9, 0.95)), model)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


def test_muon_is_torchs():
    # two of one shape, so that stacking is tried; tall, wide and square
    model = nn.ModuleList(nn.Linear(a, b, bias=False) for a, b in ((24, 8), (24, 8), (8, 24), (12, 12)))
    ours = trained(one_group("muon", 0.02, 0.1), model)
    theirs = trained(lambda m: torch.optim.Muon(m.parameters(), lr=0.02, weight_decay=0.1), model)
    start = [p.detach() for p in model.parameters()]
    for a, b, before in zip(ours, theirs, start, strict=True):
        moved = (b - before).norm()
        assert (a - b).norm() < 0.02 * moved, float((a - b).norm() / moved)  # bfloat16 products in another order


def test_orthogonalise_gives_singular_values_near_one():
    torch.manual_seed(0)
    for shape in ((3, 16, 40), (2, 40, 16)):
        values = torch.linalg.svdvals(orthogonalise(torch.randn(shape)).float())
        assert values.min() > 0.3
        assert values.max() < 1.4


def test_parameters_without_gradient_stay():
    model = nn.Linear(4, 4)
    optimizer = one_group("adamw", 0.1, 0.1)(model)
    before = model.bias.detach().clone()
    model.weight.grad = torch.ones_like(model.weight)
    optimizer.step()
    assert torch.equal(model.bias, before)
    assert not torch.equal(model.weight, torch.zeros_like(model.weight))
    assert len(optimizer.state) == 1


def test_a_reloaded_optimizer_goes_on_exactly():
    torch.manual_seed(0)
    model = nn.ModuleList([nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False)])
    groups = lambda m: [  # noqa: E731
        {"name": n, "method": n, "params": [layer.weight], "lr": 0.01, "base_lr": 0.01, "weight_decay": 0.1}
        for n, layer in zip(("muon", "adamw"), m, strict=True)
    ]
    gradients = [[torch.randn(8, 8), torch.randn(8, 8)] for _ in range(4)]

    def take(optimizer, model, steps):
        for pair in steps:
            for parameter, gradient in zip(model.parameters(), pair, strict=True):
                parameter.grad = gradient.clone()
            optimizer.step()

    straight = copy.deepcopy(model)
    first = Optimizer(groups(straight))
    take(first, straight, gradients[:2])
    resumed = copy.deepcopy(straight)
    second = Optimizer(groups(resumed))
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    take(first, straight, gradients[2:])
    take(second, resumed, gradients[2:])
    for a, b in zip(straight.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b)


def test_learning_rates_follow_the_base_of_each_group(joint):
    config = OptimConfig(method="muon", lr=1e-3, muon_lr=0.02)
    optimizer = Optimizer(parameter_groups(joint.named_parameters(), config))
    assert set_learning_rates(optimizer, 0.5) == {"muon": 0.01, "decay": 5e-4, "plain": 5e-4, "bounded": 5e-4}
    assert set_learning_rates(optimizer, 0.25)["muon"] == 0.005  # of the base, not of the rate before


def test_schedule():
    factors = [warmup_cosine(step, steps=20, warmup=4, floor=0.1) for step in range(20)]
    assert factors[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert all(a > b for a, b in itertools.pairwise(factors[4:]))
    assert factors[12] == pytest.approx(0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * 8 / 16)))
    assert 0.1 < factors[-1] < 0.12
    assert warmup_cosine(20, 20, 4, 0.1) == pytest.approx(0.1)
    assert warmup_cosine(0, 1, 0, 0.0) == 1.0
