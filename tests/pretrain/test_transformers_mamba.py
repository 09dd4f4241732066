"""One direction of ours against transformers' MambaModel with copied weights: an oracle that shares no code with us."""

import pytest
import torch
from torch.nn import functional as F

from data_pipeline.torchvision_shim import ensure_torchvision
from pretrain.ops import causal_conv1d, selective_scan


@pytest.fixture
def model():
    ensure_torchvision()
    from transformers import MambaConfig, MambaModel

    torch.manual_seed(0)
    config = MambaConfig(
        hidden_size=24, state_size=5, num_hidden_layers=2, expand=2, conv_kernel=4, time_step_rank=3, vocab_size=7,
        use_cache=False,
    )  # fmt: skip
    model = MambaModel(config).double()
    with torch.no_grad():
        for name, value in model.named_parameters():  # the initialisation leaves biases at zero and D at one
            value += 0.3 * torch.randn_like(value) * ("A_log" not in name)
    return model


def ours(model, x_BLD, backend):
    """The same layers, of our operators: pre-norm mixers on a residual stream, one direction, then a norm."""
    for layer in model.layers:
        mixer = layer.mixer
        rank, states = mixer.time_step_rank, mixer.ssm_state_size
        normed = F.rms_norm(x_BLD, x_BLD.shape[-1:], layer.norm.weight, layer.norm.variance_epsilon)
        u, z = mixer.in_proj(normed).chunk(2, -1)
        u = causal_conv1d(u, mixer.conv1d.weight.squeeze(1), mixer.conv1d.bias, backend=backend)
        step, B, C = mixer.x_proj(u).split([rank, states, states], -1)
        delta, A = F.linear(step, mixer.dt_proj.weight), -torch.exp(mixer.A_log)
        bias = mixer.dt_proj.bias
        x_BLD = x_BLD + mixer.out_proj(selective_scan(u, delta, A, B, C, mixer.D, z, bias, True, backend=backend))
    return F.rms_norm(x_BLD, x_BLD.shape[-1:], model.norm_f.weight, model.norm_f.variance_epsilon)


@pytest.mark.parametrize(
    "backend, dtype, tolerance", [("reference", torch.float64, 2e-6), ("auto", torch.float32, 1e-5)]
)
def test_one_direction_is_mambas(model, backend, dtype, tolerance):
    """In float64, but for the norms, which transformers computes in float32."""
    x = torch.randn(2, 19, 24, dtype=torch.float64)
    weights = torch.randn(2, 19, 24, dtype=torch.float64)

    def outputs_and_gradients(call, kind):
        model.to(kind).zero_grad()
        given = x.to(kind).detach().clone().requires_grad_()
        y = call(given)
        (y * weights.to(kind)).sum().backward()
        found = {"y": y.detach(), "x": given.grad, **{name: p.grad for name, p in model.named_parameters()}}
        return {name: value.double() for name, value in found.items() if value is not None}

    theirs = outputs_and_gradients(lambda x: model(inputs_embeds=x).last_hidden_state, torch.float64)
    mine = outputs_and_gradients(lambda x: ours(model, x, backend), dtype)
    assert mine.keys() == theirs.keys()
    assert len(theirs) == 2 + 2 * 10 + 1, "every parameter but the table of words has a gradient"
    for name, value in theirs.items():
        assert (mine[name] - value).norm() <= tolerance * value.norm(), name
