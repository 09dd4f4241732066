"""The CLIP teacher against the published one: features of every token and the cls attention."""

import pytest

from data_pipeline.torchvision_shim import ensure_torchvision
from pretrain.models.teacher import ClipTeacher

ensure_torchvision()
from open_clip.transformer import QuickGELU, VisionTransformer  # noqa: E402


@pytest.fixture
def tower(golden):
    file = golden("clip_teacher")
    c = file.config
    hidden = file["weight.visual.transformer.resblocks.0.mlp.c_fc.weight"].shape[0]
    visual = VisionTransformer(
        c["image_size"], c["patch_size"], c["width"], c["layers"], c["heads"], hidden / c["width"],
        output_dim=c["output_dim"], act_layer=QuickGELU,
    )  # fmt: skip
    visual.load_state_dict(file.under("weight.visual."))
    return visual


@pytest.mark.parametrize("chunk", [256, 3])
def test_clip_teacher(golden, errors, tower, chunk):
    file = golden("clip_teacher")
    output = ClipTeacher(tower, chunk=chunk).features(file["video"].transpose(1, 2))
    errors.check("features", output.features_JBLC, file["features"])
    errors.check("cls_attention", output.attention_BKN.flatten(0, 1), file["cls_attention"])
