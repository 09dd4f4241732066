"""Towers that sum a frame up by a mean or an attention pooling, against their own parts run one by one."""

import copy
import json
import re
from contextlib import nullcontext
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from configs.errors import UserError
from data_pipeline.loader import TrainLoader
from data_pipeline.torchvision_shim import ensure_torchvision
from pretrain.cost.measure import frame_flops
from pretrain.models.teacher import ClipTeacher
from pretrain.tasks import build_task
from tests.pretrain.tower_cases import BY_MEAN, POOLED, clip_folder, shake

ensure_torchvision()
import open_clip  # noqa: E402
import timm  # noqa: E402
from open_clip.modified_resnet import ModifiedResNet  # noqa: E402
from open_clip.transformer import VisionTransformer  # noqa: E402

FRAMES = 3


@pytest.fixture(params=POOLED)
def visual(request):
    torch.manual_seed(0)
    visual = POOLED[request.param]().eval()
    shake(visual)
    return visual


def pixels_for(visual):
    size = ClipTeacher(visual).tower.size
    return torch.randn(1, FRAMES, 3, *size, generator=torch.Generator().manual_seed(1))


def tokens_of(visual, pixels):
    """Every token after the last block, before any norm, (F, M, W), by the tower's own layers."""
    if isinstance(visual, VisionTransformer):
        x = visual._embeds(pixels)
        for block in visual.transformer.resblocks:
            x = block(x)
        return x
    trunk = copy.deepcopy(visual.trunk)
    trunk.norm = nn.Identity()
    return trunk.forward_features(pixels)


def alone_in_resnet(pool, feature_map):
    """The attention pooling with all but one cell hidden, cell by cell, and its weights with none hidden."""
    x = feature_map.flatten(2).permute(2, 0, 1)
    x = torch.cat([x.mean(0, keepdim=True), x]) + pool.positional_embedding[:, None]
    weights = (pool.q_proj.weight, pool.k_proj.weight, pool.v_proj.weight)
    biases = torch.cat([pool.q_proj.bias, pool.k_proj.bias, pool.v_proj.bias])

    def attend(hidden):
        return F.multi_head_attention_forward(
            x[:1], x, x, x.shape[-1], pool.num_heads, None, biases, None, None, False, 0.0, pool.c_proj.weight,
            pool.c_proj.bias, training=False, need_weights=True, attn_mask=hidden, use_separate_proj_weight=True,
            q_proj_weight=weights[0], k_proj_weight=weights[1], v_proj_weight=weights[2],
        )  # fmt: skip

    cells = []
    for cell in range(1, len(x)):
        hidden = torch.full((1, len(x)), float("-inf"))
        hidden[0, cell] = 0
        cells.append(attend(hidden)[0][0])
    return torch.stack(cells, dim=1), attend(None)[1][:, 0, 1:]


def patches_and_attention(visual, pixels):
    """Patches (F, N, C), and the pooling's attention (F, N) or None, with nothing of ours."""
    if isinstance(visual, ModifiedResNet):
        feature_map = visual.layer4(visual.layer3(visual.layer2(visual.layer1(visual.stem(pixels)))))
        return alone_in_resnet(visual.attnpool, feature_map)
    if isinstance(visual, VisionTransformer):
        x = tokens_of(visual, pixels)
        if visual.attn_pool is None:
            return x[:, 1:] @ visual.proj, None
        alone = [visual.ln_post(visual.attn_pool(x[:, n : n + 1])[:, 0]) @ visual.proj for n in range(1, x.shape[1])]
        pool = visual.attn_pool
        query, key = pool.ln_q(pool.query).expand(len(x), -1, -1), pool.ln_k(x)
        return torch.stack(alone, dim=1), pool.attn(query, key, key, need_weights=True)[1][:, 0, 1:]
    trunk = visual.trunk
    if not hasattr(trunk, "blocks"):
        return alone_in_map(visual, trunk.forward_features(pixels)), None
    x, patches = tokens_of(visual, pixels), slice(trunk.num_prefix_tokens, None)
    out = visual.head(trunk.head(x[:, patches]))
    pool = getattr(trunk, "attn_pool", None)
    if pool is None:
        return out, None
    normed = trunk.norm(x)
    key = pool.kv(normed).unflatten(-1, (2, pool.num_heads, -1))[:, :, 0]
    query = pool.q(pool.latent)[0, 0].unflatten(-1, (pool.num_heads, -1))
    weights = torch.einsum("he,fmhe->fhm", query * pool.scale, key).softmax(-1).mean(1)
    return out, weights[:, patches]


def alone_in_map(visual, feature_map):
    """What the head makes of maps that have one cell's values everywhere."""
    last = getattr(visual.trunk, "output_fmt", "NCHW").endswith("NHWC")
    cells = feature_map.flatten(1, 2) if last else feature_map.flatten(2).transpose(1, 2)
    out = []
    for values in cells.unbind(1):
        filled = values[:, None, None, :].expand(-1, 3, 3, -1)
        filled = filled if last else filled.permute(0, 3, 1, 2)
        out.append(visual.head(visual.trunk.forward_head(filled.contiguous())))
    return torch.stack(out, dim=1)


@torch.no_grad()
def test_a_tower(visual, request):
    pixels = pixels_for(visual)
    teacher = ClipTeacher(visual)
    out = teacher.features(pixels)
    rows, columns = teacher.tower.grid
    assert out.features_JBLC.shape == (1, 1, 1 + FRAMES * rows * columns, teacher.width)
    own = visual(pixels[0])
    own = own[0] if isinstance(own, tuple) else own
    torch.testing.assert_close(out.features_JBLC[0, :, 0], own.mean(0, keepdim=True), rtol=1e-4, atol=1e-5)
    patches, attention = patches_and_attention(visual, pixels[0])
    got = out.features_JBLC[0, 0, 1:].unflatten(0, (FRAMES, -1))
    torch.testing.assert_close(got, patches, rtol=1e-4, atol=1e-4)
    assert got.std(1).min() > 0  # the cells differ
    assert (attention is None) == (request.node.callspec.params["visual"] in BY_MEAN)
    if attention is None:
        assert out.attention_BKN is None
        return
    torch.testing.assert_close(out.attention_BKN[0], attention, rtol=1e-4, atol=1e-7)
    assert attention.std() > 2e-5  # not one that any query would give


def test_cells_are_in_the_order_of_rows(visual):
    """Paint one corner of a frame: the cell of that corner changes most."""
    teacher = ClipTeacher(visual)
    rows, columns = teacher.tower.grid
    high, wide = teacher.tower.size
    grey, painted = (torch.zeros(1, 1, 3, high, wide) for _ in range(2))
    painted[..., : high // rows, -(wide // columns) :] = 3.0
    changed = (teacher.features(painted).features_JBLC - teacher.features(grey).features_JBLC)[0, 0, 1:].norm(dim=-1)
    if isinstance(visual, (VisionTransformer, ModifiedResNet)) or hasattr(visual.trunk, "blocks"):
        expected = {columns - 1}  # one patch, or a cell in whose middle the paint is
    else:
        expected = {columns - 1, columns - 2, 2 * columns - 1}  # several strided convolutions reach beyond their cell
    assert int(changed.argmax()) in expected


@pytest.mark.parametrize("tubelet", [1, 2])
def test_chunks_change_nothing(visual, tubelet):
    size = ClipTeacher(visual).tower.size
    pixels = torch.randn(2, 4, 3, *size)
    whole = ClipTeacher(visual, tubelet=tubelet).features(pixels)
    parts = ClipTeacher(visual, tubelet=tubelet, chunk=3).features(pixels)
    torch.testing.assert_close(whole.features_JBLC, parts.features_JBLC, rtol=1e-4, atol=1e-5)
    if whole.attention_BKN is not None:
        torch.testing.assert_close(whole.attention_BKN, parts.attention_BKN, rtol=1e-4, atol=1e-6)


def test_the_final_norm(visual):
    """It reaches the patches of a ViT alone: cls is always the tower's own, and a map's cells have passed the head."""
    pixels = pixels_for(visual)
    plain, normed = (ClipTeacher(visual, ln_post=on).features(pixels).features_JBLC for on in (False, True))
    torch.testing.assert_close(plain[:, :, 0], normed[:, :, 0])
    of_tokens = hasattr(getattr(visual, "trunk", None), "blocks") or getattr(visual, "attn_pool", visual) is None
    assert torch.equal(plain, normed) != of_tokens


def test_several_layers(visual):
    depth = ClipTeacher(visual).tower.depth
    if depth == 1:
        with pytest.raises(UserError, match="2 layers, each 1 apart, do not fit a teacher of 1 blocks"):
            ClipTeacher(visual, layers=2)
        return
    pixels = pixels_for(visual)
    two, one = (ClipTeacher(visual, layers=n).features(pixels) for n in (2, 1))
    torch.testing.assert_close(two.features_JBLC[1], one.features_JBLC[0])
    assert not torch.allclose(two.features_JBLC[0], one.features_JBLC[0])
    if one.attention_BKN is not None:
        torch.testing.assert_close(two.attention_BKN, one.attention_BKN)


def test_another_resolution(visual):
    """Half as large again, where the tower can."""
    own = ClipTeacher(visual).tower
    side = own.size[0] * 3 // 2
    if type(getattr(visual, "trunk", None)).__name__ == "SwinTransformer":
        side = own.size[0] * 2  # whole windows
    teacher = ClipTeacher(visual, image_size=side)
    grid = tuple(cells * side // own.size[0] for cells in own.grid)
    assert teacher.tower.grid == grid
    out = teacher(torch.randint(0, 256, (1, 3, 2, 40, 40), dtype=torch.uint8))
    assert out.features_JBLC.shape[2] == 1 + 2 * grid[0] * grid[1]
    with pytest.raises(UserError, match="does not divide by the teacher's patches"):
        ClipTeacher(visual, image_size=side + 1)


def test_a_plan_counts_its_operations(visual):
    one, four = (frame_flops(ClipTeacher(visual, tubelet=tubelet)) for tubelet in (1, 4))
    assert 0 < four <= one  # a frame of four that share their projection


def test_a_stage_1_step_trains(visual, request, runs, stage1_tree, monkeypatch):
    """No config of open_clip's builds timm models this small, so the tower itself is handed over in a model's place."""
    monkeypatch.setattr("pretrain.models.teacher._create_model", lambda *_: SimpleNamespace(visual=visual))
    by_mean = request.node.callspec.params["visual"] in BY_MEAN
    patch = 32 // ClipTeacher(visual).tower.grid[0]
    tree = stage1_tree | {"vision": stage1_tree["vision"] | {"patch_size": patch}}
    if by_mean:
        with pytest.raises(UserError, match=r"mask\.kind is attention, and the teacher .* by a mean"):
            build_task(runs.config(tree, "refused"), torch.device("cpu"))
        tree["mask"] = {"kind": "tube", "ratio": 0.5}
    config = runs.config(tree, "run")
    task = build_task(config, torch.device("cpu"))
    batch = next(iter(TrainLoader(config.data, config.seed, 0, 1, 0, 50)))
    optimizer = torch.optim.AdamW(task.model.parameters(), lr=3e-3)
    losses = []
    for _ in range(6):
        with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
            loss = task.losses(batch)["alignment"]
        losses.append(float(loss.detach()))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < losses[0]
    wrong = runs.config(tree | {"vision": tree["vision"] | {"patch_size": 16 if patch != 16 else 8}}, "wrong")
    with pytest.raises(UserError, match=r"The teacher sees \d+x\d+ patches a frame and the student"):
        build_task(wrong, torch.device("cpu"))


CONVNEXT = {"image_size": 128, "timm_model_name": "convnext_atto", "timm_pool": "", "timm_proj": "linear"}
RESNET = {"image_size": 128, "layers": [1, 1, 1, 1], "width": 4, "head_width": 32}


def test_a_mask_that_the_teacher_cannot_draw_is_refused_before_anything_starts(tmp_path, runs, stage1_tree):
    config = runs.write(stage1_tree | {"teacher": {"source": clip_folder(tmp_path, CONVNEXT)}}, "attention")
    refused = runs.run(config)
    assert refused.returncode == 2
    assert "it sums a frame up by a mean" in refused.stderr
    assert "Use mask.kind=tube" in refused.stderr
    assert not list(runs.folder.glob("attention/checkpoints/*"))


@pytest.mark.slow
@pytest.mark.parametrize(("vision", "mask"), [(RESNET, "attention"), (CONVNEXT, "tube")], ids=["ResNet", "ConvNeXt"])
def test_a_folder_of_open_clip(tmp_path, vision, mask, runs, stage1_tree):
    """As a user has it: a folder and a config."""
    tree = stage1_tree | {"teacher": {"source": clip_folder(tmp_path, vision)}, "mask": {"kind": mask, "ratio": 0.5}}
    done = runs.run(runs.write(tree, "run"), "steps=3")
    assert done.returncode == 0, done.stderr
    assert (runs.folder / "run" / "done.json").is_file()


LISTED_BY_MEAN = re.compile("convnext|CLIPA|ViTamin|gap_256|swin_|MobileCLIP2?-S")


def shallow(vision):
    """The same tower with one or two blocks, for timm and for open_clip: all that follows the last one stays."""
    name = vision.get("timm_model_name")
    if name is None:
        layers = [1, 1, 1, 1] if isinstance(vision["layers"], list) else 2
        return {}, vision | {"layers": layers}
    deep = {"vit": {"depth": 2}, "eva": {"depth": 2}, "convnext": {"depths": (1, 1, 1, 1)}}
    kind = next((kind for kind in deep if name.startswith(kind) and not name.startswith("vitamin")), None)
    return deep.get(kind, {}), vision | {"timm_model_pretrained": False}


@pytest.mark.slow
@pytest.mark.timeout(500)
@torch.no_grad()
def test_every_model_that_open_clip_lists(monkeypatch):
    """Built without memory (torch's meta device), looked at, and read by the rule that its pooling calls for."""
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())  # there is none for that device
    create, known = timm.create_model, {}
    for name in open_clip.list_models():
        config = open_clip.get_model_config(name)
        small, vision = shallow(config["vision_cfg"])
        key = json.dumps(vision, sort_keys=True)
        if key not in known:
            monkeypatch.setattr("open_clip.timm_model.timm.create_model", partial(create, **small))
            with torch.device("meta"):
                teacher = ClipTeacher(open_clip.model._build_vision_tower(config["embed_dim"], vision))
                (high, wide), (rows, columns) = teacher.tower.size, teacher.tower.grid
                out = teacher.features(torch.zeros(1, 1, 3, high, wide))
            assert out.features_JBLC.shape == (1, 1, 1 + rows * columns, teacher.width), name
            assert rows * columns >= 16, name
            known[key] = None if out.attention_BKN is None else out.attention_BKN.shape == (1, 1, rows * columns)
        assert known[key] is not False, name
        assert (known[key] is None) == bool(LISTED_BY_MEAN.search(name)), name
    assert len(known) > 50
