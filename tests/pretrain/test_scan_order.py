"""Scan orders: the permutations against loops, and every order's encoder against a mixer written as loops."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from torch.nn import functional as F

from configs.errors import ConfigError
from configs.loader import validate
from pretrain.masking import visible_indices
from pretrain.models import mixer as mixer_module
from pretrain.models import scan_order
from pretrain.models.config import VisionConfig
from pretrain.models.mixer import Mixer
from pretrain.models.scan_order import Reordering, temporal_first, visible_temporal_first
from pretrain.models.videomamba import VideoMamba

ORDERS = ["spatial_first", "temporal_first", "st_half", "st_full"]
LISTS = [("spatial_first", "temporal_first"), ("temporal_first", "st_half", "st_full", "spatial_first")]


def small(order, **options) -> VisionConfig:
    sizes = {"depth": 4, "width": 12, "patch_size": 4, "frames": 3, "image_size": 8, "d_state": 3, "dt_rank": 2}
    return VisionConfig(**sizes | options, scan_order=order)


def build(order, **options) -> VideoMamba:
    """An encoder whose recurrence matters: at initialisation the scans would move the output by a thousandth."""
    torch.manual_seed(0)
    model = VideoMamba(small(order, **options))
    with torch.no_grad():
        for name, value in model.named_parameters():
            if "A_log" not in name and "norm" not in name:
                value.copy_(torch.randn_like(value) * 0.4)
    return model.eval()


@pytest.fixture
def clip():
    return torch.randn(2, 3, 3, 8, 8, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def visible():
    """Tokens of 3 frames of 2x2 patches; other ones in each sample, and not equally many of each frame."""
    return torch.tensor([[0, 1, 2, 4, 5, 9, 12], [0, 3, 6, 7, 8, 10, 11]])


# the permutations


def whole(frames: int, patches: int) -> list[int]:
    """Place by place, at each place through time."""
    return [0, *(1 + t * patches + n for n in range(patches) for t in range(frames))]


@given(frames=st.integers(1, 6), patches=st.integers(1, 9))
def test_temporal_first_is_place_by_place(frames, patches):
    order = temporal_first(frames, patches)
    assert order.tolist() == whole(frames, patches)


@given(frames=st.integers(1, 5), rows=st.integers(1, 4), columns=st.integers(1, 4), data=st.data())
def test_visible_tokens_keep_the_order_of_the_whole_clip(frames, rows, columns, data):
    patches = rows * columns
    count = data.draw(st.integers(1, frames * patches))
    hidden_from = data.draw(st.lists(st.permutations(range(1, 1 + frames * patches)), min_size=1, max_size=3))
    visible = torch.tensor([[0, *sorted(every[:count])] for every in hidden_from])
    order = visible_temporal_first(visible, frames, patches)
    for seen, positions in zip(visible.tolist(), order.tolist(), strict=True):
        assert [seen[i] for i in positions] == [token for token in whole(frames, patches) if token in seen]
        assert positions[0] == 0


@pytest.mark.parametrize("kind", ["random", "tube", "clip_row", "frame_row", "attention"])
def test_seeing_every_token_of_a_mask_is_the_order_of_the_clip(kind):
    grid, weight = (4, 3, 5), torch.rand(2, 4, 15)
    everything = visible_indices(kind, torch.tensor([3, 4]), grid, 0.0, weight)
    assert visible_temporal_first(everything, 4, 15).equal(temporal_first(4, 15).expand(2, -1))


@settings(max_examples=30)
@given(frames=st.integers(2, 4), patches=st.integers(1, 6), seed=st.integers(0, 999), share=st.floats(0.2, 1.0))
def test_there_and_back_again(frames, patches, seed, share):
    generator = torch.Generator().manual_seed(seed)
    length = 1 + frames * patches
    count = max(1, int(share * (length - 1)))
    drawn = torch.rand(3, length - 1, generator=generator).argsort(1)[:, :count].sort(1).values
    visible = torch.cat([torch.zeros(3, 1, dtype=torch.int64), 1 + drawn], 1)
    tokens = torch.randn(3, 1 + count, 5, generator=generator)
    reordering = Reordering.needed(["temporal_first"], tokens, visible, frames, patches)
    turned = reordering.temporal(tokens)
    order = visible_temporal_first(visible, frames, patches)
    expected = torch.stack([row[positions] for row, positions in zip(tokens, order, strict=True)])
    assert turned.equal(expected)
    assert turned[:, 0].equal(tokens[:, 0])
    assert reordering.spatial(turned).equal(tokens)
    assert reordering.temporal(reordering.spatial(tokens)).equal(tokens)


def test_views_are_reordered_and_gradients_go_the_way_back():
    wide = torch.randn(2, 7, 10, requires_grad=True)
    half = wide[..., 5:]
    reordering = Reordering.needed(["st_half"], half, None, 3, 2)
    turned = reordering.temporal(half)
    assert turned.equal(half[:, whole(3, 2)])
    upstream = torch.randn_like(turned)
    (gradient,) = torch.autograd.grad(turned, wide, upstream)
    assert gradient[..., 5:].equal(reordering.spatial(upstream))
    assert not gradient[..., :5].any()


def test_nothing_is_needed_for_one_frame_or_one_order():
    tokens = torch.zeros(2, 7, 4)
    assert Reordering.needed(["st_full"], tokens, None, 1, 6) is None
    assert Reordering.needed(["spatial_first"] * 3, tokens, None, 3, 2) is None
    assert Reordering.needed(["spatial_first", "st_half"], tokens, None, 3, 2) is not None


# the encoder


def slow_branch(mixer: Mixer, x_LE, lanes, back: bool):
    """One direction of one sample, token by token: (L, E), not gated. A lane is a slice of channels and its walk."""
    tail = "_b" if back else ""
    conv, x_proj, dt_proj = (getattr(mixer, name + tail) for name in ("conv1d", "x_proj", "dt_proj"))
    A_EN, skip_E = -torch.exp(mixer.A_b_log if back else mixer.A_log), mixer.D_b if back else mixer.D
    lanes = [(channels, walk[::-1] if back else walk) for channels, walk in lanes]
    parts = []
    for channels, walk in lanes:
        u = {}
        for step, token in enumerate(walk):
            past = [(tap, walk[step - 3 + tap]) for tap in range(4) if step - 3 + tap >= 0]
            u[token] = conv.bias[channels] + sum(conv.weight[channels, 0, tap] * x_LE[t, channels] for tap, t in past)
        parts.append(F.silu(torch.stack([u[token] for token in range(len(walk))])))
    u_LE = torch.cat(parts, dim=1)
    step_LR, B_LN, C_LN = x_proj(u_LE).split([mixer.rank, mixer.state, mixer.state], dim=1)
    delta_LE = F.softplus(dt_proj(step_LR))
    parts = []
    for channels, walk in lanes:
        y, state_EN = {}, torch.zeros_like(A_EN[channels])
        for token in walk:
            delta_E1, u_E = delta_LE[token, channels, None], u_LE[token, channels]
            state_EN = torch.exp(delta_E1 * A_EN[channels]) * state_EN + delta_E1 * u_E[:, None] * B_LN[token]
            y[token] = state_EN @ C_LN[token] + skip_E[channels] * u_E
        parts.append(torch.stack([y[token] for token in range(len(walk))]))
    return torch.cat(parts, dim=1)


def slow_mixer(mixer: Mixer, tokens_LD, order: str, walks):
    """The mixer of one sample, whose tokens stand spatial-first, whatever its order."""
    x_LE, z_LE = mixer.in_proj(tokens_LD).chunk(2, dim=1)
    half = x_LE.shape[1] // 2
    every, first, second = slice(None), slice(half), slice(half, None)
    spatial, temporal = walks
    passes = {
        "spatial_first": [[(every, spatial)]],
        "temporal_first": [[(every, temporal)]],
        "st_half": [[(first, spatial), (second, temporal)]],
        "st_full": [[(every, spatial)], [(every, temporal)]],
    }[order]
    scanned = [slow_branch(mixer, x_LE, lanes, back) for lanes in passes for back in (False, True)]
    return mixer.out_proj(sum(scanned) * F.silu(z_LE))


def slow_encoder(model: VideoMamba, clip, visible):
    """Every layer on its own, sample by sample."""
    tokens, (frames, rows, columns) = model._embed(clip, visible)
    out = []
    for b, residual in enumerate(tokens):
        order_of_all = whole(frames, rows * columns)
        seen = sorted(order_of_all) if visible is None else visible[b].tolist()
        spatial = list(range(len(seen)))
        temporal = [seen.index(token) for token in order_of_all if token in seen]
        for block, order in zip(model.layers, model.config.orders, strict=True):
            residual = residual + slow_mixer(block.mixer, block.norm(residual), order, (spatial, temporal))
        out.append(model.norm(residual))
    return torch.stack(out)


def error(ours, theirs):
    a, b = ours.detach().double(), theirs.detach().double()
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("order", [*ORDERS, *LISTS])
def test_every_order_against_loops(clip, visible, order, masked):
    depth = {"depth": 2} if isinstance(order, str) else {}
    model = build(order, **depth)
    seen = visible if masked else None
    ours, theirs = model(clip, seen).tokens_BLD, slow_encoder(model, clip, seen)
    assert error(ours, theirs) < 1e-5
    upstream = torch.randn(ours.shape, generator=torch.Generator().manual_seed(2))
    names, parameters = zip(*((n, p) for n, p in model.named_parameters()), strict=True)
    for name, mine, slow in zip(
        names,
        torch.autograd.grad(ours, parameters, upstream),
        torch.autograd.grad(theirs, parameters, upstream),
        strict=True,
    ):
        assert error(mine, slow) < 5e-5, name


def test_an_odd_number_of_channels_has_halves_too(clip, visible):
    model = build("st_half", width=7, expand=1, depth=1)
    assert error(model(clip, visible).tokens_BLD, slow_encoder(model, clip, visible)) < 1e-5


def test_orders_differ_and_share_their_weights(clip, visible):
    models = [build(order) for order in (*ORDERS, *LISTS)]
    states = [model.state_dict() for model in models]
    for seen in (None, visible):
        outputs = [model(clip, seen).tokens_BLD for model in models]
        for (a, one), (b, other) in itertools.combinations(enumerate(outputs), 2):
            assert error(one, other) > 1e-2, (a, b)
            assert {name: p.shape for name, p in states[a].items()} == {name: p.shape for name, p in states[b].items()}
    models[0].load_state_dict(states[1])


def test_an_image_has_one_order(clip):
    image, once = clip[:, :, :1], build("spatial_first")(clip[:, :, :1]).tokens_BLD
    assert build("temporal_first")(image).tokens_BLD.equal(once)
    assert build("st_half")(image).tokens_BLD.equal(once)
    twice = build("st_full")
    assert error(twice(image).tokens_BLD, slow_encoder(twice, image, None)) < 1e-5


def test_a_list_of_one_order_is_that_order_to_the_last_bit(clip):
    for order in ORDERS:
        assert build((order,) * 4)(clip).tokens_BLD.equal(build(order)(clip).tokens_BLD)
        assert build((order,))(clip).tokens_BLD.equal(build(order)(clip).tokens_BLD)


def test_tubelets_are_ordered_by_token_frame():
    clip = torch.randn(2, 3, 6, 8, 8)
    model = build("temporal_first", frames=6, tubelet=2, depth=2)
    assert error(model(clip).tokens_BLD, slow_encoder(model, clip, None)) < 1e-5


@pytest.mark.parametrize(("order", "scanned"), [("spatial_first", 1), ("st_half", 1), ("st_full", 2)])
def test_what_an_order_scans(clip, monkeypatch, order, scanned):
    values, scan = [], mixer_module.bidirectional_scan
    monkeypatch.setattr(
        mixer_module, "bidirectional_scan", lambda a, *rest: values.append(a[0].numel()) or scan(a, *rest)
    )
    build(order)(clip)
    assert sum(values) == scanned * 4 * 2 * 13 * 24  # layers, samples, tokens, channels


@pytest.mark.parametrize(("order", "moves"), [("spatial_first", 0), ("temporal_first", 2), (LISTS[0], 4)])
def test_layers_of_one_order_move_nothing_between_them(clip, monkeypatch, order, moves):
    taken, take = [], scan_order._take_rows
    monkeypatch.setattr(scan_order, "_take_rows", lambda *given: taken.append(1) or take(*given))
    build(order)(clip)
    assert len(taken) == moves


@pytest.mark.slow
@pytest.mark.parametrize("order", ["temporal_first", "st_half", "st_full"])
def test_orders_compile_to_one_graph_and_export(clip, visible, order):
    model = build(order, depth=1)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert error(compiled(clip, visible).tokens_BLD, model(clip, visible).tokens_BLD) < 1e-5
    compiled(clip, visible).tokens_BLD.sum().backward()
    batch = torch.export.Dim("batch")
    exported = torch.export.export(model, (clip, visible), dynamic_shapes=({0: batch}, {0: batch})).module()
    more = clip[[0, 1, 0]], visible[[1, 0, 1]]
    assert error(exported(*more).tokens_BLD, model(*more).tokens_BLD) < 1e-5


def test_recomputed_blocks_keep_their_order(clip, visible):
    gradients = []
    for again in (False, True):
        model = build(LISTS[1], checkpoint_blocks=again).train()
        model(clip, visible).tokens_BLD.square().sum().backward()
        gradients.append([p.grad for p in model.parameters()])
    for one, other in zip(*gradients, strict=True):
        assert one.equal(other)


@pytest.mark.parametrize("order", ORDERS)
def test_orders_under_autocast(clip, visible, order):
    model = build(order, depth=1)
    exact = model(clip, visible).tokens_BLD
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = model(clip, visible).tokens_BLD
    assert rounded.dtype == torch.float32
    assert 0 < error(rounded, exact) < 0.02
    rounded.square().sum().backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in model.layers.parameters())


def test_wrong_orders_say_so():
    with pytest.raises(
        ValidationError, match="there is no scan order 'temporal'; use one of spatial_first, temporal_f"
    ):
        small("temporal")
    with pytest.raises(ValidationError, match="3 orders for 4 layers; list 4, or a pattern whose length divides 4"):
        small(["st_half"] * 3)
    with pytest.raises(ConfigError, match="run: scan_order: there is no scan order 'st_both'"):
        validate({"name": "tiny", "scan_order": ["st_half", "st_both"]}, VisionConfig, "run")
    assert small(["st_half", "st_full"]).orders == ("st_half", "st_full") * 2
    assert VisionConfig.model_validate(small(LISTS[0]).model_dump(mode="json")) == small(LISTS[0])
