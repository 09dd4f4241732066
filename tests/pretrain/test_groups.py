"""Which parameter is decayed and at what rate it learns: on the models of the published recipes, in whole."""

import pytest
import torch

from configs.errors import UserError
from configs.loader import load_config
from pretrain.config import PretrainConfig
from pretrain.groups import parameter_groups
from pretrain.models.config import JointConfig
from pretrain.models.joint import JointModel
from pretrain.models.videomamba import VideoMamba
from pretrain.optim_config import OptimConfig


@pytest.fixture(scope="module")
def models():
    """The models of stage 1 and stage 2 at their published size, without memory for the weights."""
    one, two = load_config("stage1/k400", PretrainConfig), load_config("stage2/5m", PretrainConfig)
    with torch.device("meta"):
        encoder = VideoMamba(one.vision.model_copy(update={"align_width": 512}))
        vision = two.vision.model_copy(update={"align_width": 512})
        text = two.text.model_copy(update={"init": None})
        joint = JointModel(JointConfig(vision=vision, text=text, embed=two.embed))
    return {"stage1": encoder, "stage2": joint}


def by_parameter(model, **optim):
    """Each parameter's group, by name."""
    named = dict(model.named_parameters())
    names = {id(p): name for name, p in named.items()}
    groups = parameter_groups(named.items(), OptimConfig(**optim))
    found = {names[id(p)]: group for group in groups for p in group["params"]}
    assert found.keys() == named.keys()
    assert sum(len(group["params"]) for group in groups) == len(named)
    return found


@pytest.mark.parametrize("stage", ["stage1", "stage2"])
def test_only_matrices_and_kernels_are_decayed(models, stage):
    found = by_parameter(models[stage], weight_decay=0.05)
    shapes = {name: p.ndim for name, p in models[stage].named_parameters()}
    decayed = {name for name, group in found.items() if group["weight_decay"]}
    for name in shapes.keys() - decayed:
        last = name.rpartition(".")[2]
        assert (
            shapes[name] < 2  # norms and biases
            or last in ("A_log", "A_b_log", "cls_token", "pos_embed", "temporal_pos_embedding")
            or "position_embeddings" in name
            or "token_type_embeddings" in name
        ), name
    for name in decayed:
        assert shapes[name] >= 2
        assert not any(part in name for part in ("A_log", "A_b_log", ".D", "norm", "bias", "pos", "cls_token", "temp"))
    layers = 32
    assert sum(name.endswith(("A_log", "A_b_log")) for name in found.keys() - decayed) == 2 * layers
    assert sum(name.endswith((".D", ".D_b")) for name in found.keys() - decayed) == 2 * layers
    assert {"muon"} == {g["name"] for n, g in by_parameter(models[stage], method="muon").items() if "in_proj" in n}


def test_layers_learn_the_slower_the_lower_they_lie(models):
    found = by_parameter(models["stage2"], lr=1.0, layer_decay=0.5)
    rates = {
        "vision_encoder.layers.31.mixer.in_proj.weight": 1,
        "vision_encoder.layers.31.norm.weight": 1,
        "vision_encoder.layers.0.mixer.A_log": 32,
        "vision_encoder.patch_embed.proj.weight": 33,
        "vision_encoder.cls_token": 33,
        "vision_encoder.pos_embed": 33,
        "vision_encoder.temporal_pos_embedding": 33,
        "text_encoder.bert.encoder.layer.11.output.dense.weight": 1,
        "text_encoder.bert.encoder.layer.0.output.dense.weight": 12,
        "text_encoder.bert.embeddings.word_embeddings.weight": 13,
        "vision_encoder.norm.weight": 0,
        "vision_encoder.pool_norm.weight": 0,
        "vision_encoder.clip_decoder.0.head.weight": 0,
        "text_encoder.cls.predictions.transform.dense.weight": 0,
        "vision_proj.weight": 0,
        "itm_head.weight": 0,
        "temp": 0,
    }
    for name, above in rates.items():
        assert found[name]["lr"] == found[name]["base_lr"] == 0.5**above, name
    alone = by_parameter(models["stage1"], lr=1.0, layer_decay=0.5)
    assert alone["layers.30.mixer.in_proj.weight"]["lr"] == 0.25
    assert alone["layers.30.mixer.in_proj.weight"]["name"] == "decay/below02"


def test_modules_have_rates_of_their_own_and_the_longest_name_wins(models):
    modules = {
        "text_encoder": {"lr": 1e-5},
        "text_encoder.bert.encoder.layer.1": {"weight_decay": 0.3},
        "vision_proj": {"lr": 2e-3, "weight_decay": 0.0},
    }
    found = by_parameter(models["stage2"], lr=1e-3, weight_decay=0.1, modules=modules)

    def of(name):
        return found[name]["lr"], found[name]["weight_decay"]

    layer = "text_encoder.bert.encoder.layer."
    assert of(layer + "0.output.dense.weight") == (1e-5, 0.1)
    assert of(layer + "1.output.dense.weight") == (1e-3, 0.3)
    assert of(layer + "1.output.dense.bias") == (1e-3, 0.0)
    assert of(layer + "10.output.dense.weight") == (1e-5, 0.1)  # not the layer 1
    assert of("vision_proj.weight") == (2e-3, 0.0)
    assert of("text_proj.weight") == (1e-3, 0.1)
    assert found["vision_proj.weight"]["name"] == "decay/vision_proj"
    with pytest.raises(UserError, match=r"names text_encodr, and nothing trained is in it\. Did you mean text_encoder"):
        by_parameter(models["stage2"], modules={"text_encodr": {"lr": 1}})


def test_rates_are_those_of_the_batch_that_is_named():
    optim = OptimConfig(lr=1.5e-4, muon_lr=0.01, lr_base_batch=256, method="muon", modules={"head": {"lr": 1e-3}})
    assert (optim.scale(2048), optim.scale(64)) == (8.0, 0.25)
    assert OptimConfig(lr=1.0).scale(2048) == 1.0
    named = [
        ("layers.0.mixer.in_proj.weight", torch.nn.Parameter(torch.zeros(2, 2))),
        ("patch_embed.proj.weight", torch.nn.Parameter(torch.zeros(2, 2))),
        ("head.weight", torch.nn.Parameter(torch.zeros(2, 2))),
    ]
    rates = {group["name"]: group["base_lr"] for group in parameter_groups(named, optim, optim.scale(512))}
    assert rates == pytest.approx({"muon": 0.02, "decay": 3e-4, "decay/head": 2e-3})
