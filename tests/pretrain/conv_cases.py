"""torch's own grouped convolution, and one way to run every form of the causal one."""

import torch
import torch.nn.functional as F


def grouped_convolution(x, weight, bias, reverse, silu):
    x = x.flip(1) if reverse else x
    taps = weight.shape[1]
    y = F.conv1d(F.pad(x.transpose(1, 2), (taps - 1, 0)), weight[:, None], bias, groups=weight.shape[0])
    y = F.silu(y) if silu else y
    y = y.transpose(1, 2)
    return y.flip(1) if reverse else y


def run(conv, tensors, dtype, reverse, silu, backend=None):
    x, weight, bias = tensors
    wide = torch.cat([x, x * 2], -1).to(dtype).requires_grad_()  # x is one half of it, a view with strided rows
    small = [t.clone().to(max(dtype, torch.float32, key=lambda d: d.itemsize)).requires_grad_() for t in (weight, bias)]
    more = {} if backend is None else {"backend": backend}
    y = conv(wide[..., : x.shape[-1]], *small, reverse, silu, **more)
    y.backward(torch.sin(torch.arange(y.numel(), dtype=torch.float64)).view_as(y).to(y.dtype))
    return [y.detach(), wide.grad, small[0].grad, small[1].grad]
