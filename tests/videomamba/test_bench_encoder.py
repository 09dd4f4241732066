"""The encoder's bench: its arithmetic on curves that are known, its baseline, and the whole of it on small clips."""

import json

import pytest
import torch

from videomamba.baselines import JointAttentionViT
from videomamba.bench_encoder import QUICK, crossings, exponent

FRAMES = (4, 8, 16, 32, 64)


def test_the_exponent_of_a_power_is_its_power():
    assert exponent(FRAMES, [3 * f for f in FRAMES]) == pytest.approx(1.0)
    assert exponent(FRAMES, [0.1 * f**2 for f in FRAMES]) == pytest.approx(2.0)
    assert exponent(FRAMES, [7.0] * 5) == pytest.approx(0.0)


def test_curves_cross_where_they_are_equal():
    line, parabola = [10 * f for f in FRAMES], [0.5 * f**2 for f in FRAMES]
    assert crossings(FRAMES, line, parabola) == pytest.approx(20.0)
    assert crossings(FRAMES, parabola, line) is None  # ours is overtaken: it is never the smaller from there on
    assert crossings(FRAMES, [f / 9 for f in FRAMES], parabola) is None  # ours is the smaller everywhere
    assert crossings(FRAMES, [3, 1, 1, 1, 3], [2, 2, 2, 2, 2]) is None  # overtaken again at the end
    assert crossings(FRAMES, [10, 80, 160, 320, 640], [20, 40, 80, 640, 1280]) == pytest.approx(16 * 2**0.5)


@torch.no_grad()
def test_the_baseline_attends_from_every_token_to_every_token():
    torch.manual_seed(0)
    model = JointAttentionViT(2, 32, width=24, depth=1, heads=3).eval()
    video = torch.randn(2, 3, 2, 32, 32)
    out = model(video)
    assert out.shape == (2, 1 + 2 * 4, 24)
    block = model.blocks[0]
    entering = []
    block.register_forward_pre_hook(lambda _, args: entering.append(args[0]))
    model(video)
    x = entering[0]
    query, key, value = block.qkv(block.norm1(x)).chunk(3, -1)
    mixed = torch.zeros_like(x)
    for head in (slice(0, 8), slice(8, 16), slice(16, 24)):
        score = query[..., head] @ key[..., head].transpose(1, 2) / 8**0.5
        mixed[..., head] = score.softmax(-1) @ value[..., head]
    x = x + block.proj(mixed)
    torch.testing.assert_close(out, model.norm(x + block.mlp(block.norm2(x))), rtol=1e-4, atol=1e-5)
    # the same patch at another time is another token
    still = video[:, :, :1].expand(-1, -1, 2, -1, -1)
    model.time_embed.copy_(torch.randn_like(model.time_embed))
    assert not torch.allclose(model(still)[:, 1:5], model(still)[:, 5:])
    assert sum(p.numel() for p in JointAttentionViT(8, 224).parameters()) == pytest.approx(5.5e6, rel=0.02)


@pytest.mark.slow
def test_the_bench_on_small_clips(videomamba, tmp_path):
    result, page = tmp_path / "encoder.json", tmp_path / "encoder.html"
    done = videomamba("bench", "encoder", "--quick", "--json", str(result), "--plot", str(page))
    assert done.returncode == 0, done.stderr
    rows = {row["name"]: row for row in json.loads(result.read_text())["rows"]}
    for what in ("time", "memory"):
        assert {f"{what}/{frames}" for frames in QUICK.frames} | {f"{what}/exponent"} <= rows.keys()
        assert rows[f"{what}/4"]["baseline_name"] == "ViT-Ti, joint attention"
    parts = [row for name, row in rows.items() if name.startswith("block/") and "all but" not in name]
    assert sum(row["ours"] for row in parts) == pytest.approx(parts[0]["baseline"], rel=0.01)
    assert rows["block/all but scan and products"]["ours"] < parts[0]["baseline"]
    assert {"block/scan", "block/matrix products", "block/causal convolution", "block/norm"} <= rows.keys()
    assert page.read_text().count("<svg") == 2
