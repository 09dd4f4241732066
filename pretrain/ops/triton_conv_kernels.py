"""The causal depthwise convolution with SiLU as Triton kernels: a program works on a tile of positions and channels.

Letters: B samples, L positions, D channels, K taps; of a program's own tiles, T is SPAN positions and D is BLOCK
channels.

Tap k of position t reads position t - (K - 1) + k, with REVERSE t + (K - 1) - k; outside there are zeros. As for the
scan, everything is float32 once loaded, and sums over positions are written for each program.
"""

import triton
import triton.language as tl

from pretrain.ops.triton_scan_kernels import load_vector, sigmoid


@triton.jit
def tile_of(length, channels, SPAN: tl.constexpr, BLOCK: tl.constexpr):
    """Sample, span of positions and walk (length, channels d, which exist, positions t) of this program."""
    blocks = tl.cdiv(channels, BLOCK)
    spans = tl.cdiv(length, SPAN)
    d = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    span = tl.program_id(0) // blocks
    return (span // spans).to(tl.int64), span, (length, d, d < channels, span % spans * SPAN + tl.arange(0, SPAN))


@triton.jit
def load_tile(rows, t, walk):
    """Positions t of rows (pointer to a sample, stride) as (T, D) float32; zeros outside."""
    exists = ((t >= 0) & (t < walk[0]))[:, None] & walk[2][None, :]
    return tl.load(rows[0] + t.to(tl.int64)[:, None] * rows[1] + walk[1][None, :], mask=exists, other=0.0).to(
        tl.float32
    )


@triton.jit
def before_silu(rows_x, weight, bias_D, t, walk, TAPS: tl.constexpr, REVERSE: tl.constexpr):
    """The convolution at positions t, (T, D)."""
    y_TD = tl.zeros([t.shape[0], bias_D.shape[0]], tl.float32) + bias_D[None, :]
    for k in tl.static_range(TAPS):
        x_TD = load_tile(rows_x, (t + (TAPS - 1 - k)) if REVERSE else (t - (TAPS - 1 - k)), walk)
        y_TD += x_TD * tl.load(weight + walk[1] * TAPS + k, mask=walk[2], other=0.0)[None, :]
    return y_TD


@triton.jit
def through_silu(
    rows_grad, rows_x, weight, bias_D, t, walk, TAPS: tl.constexpr, REVERSE: tl.constexpr, SILU: tl.constexpr
):
    """The gradient of the convolution at positions t, from that of its SiLU, (T, D)."""
    grad_TD = load_tile(rows_grad, t, walk)
    if SILU:
        y_TD = before_silu(rows_x, weight, bias_D, t, walk, TAPS, REVERSE)
        open_TD = sigmoid(y_TD)
        grad_TD *= open_TD * (1.0 + y_TD * (1.0 - open_TD))
    return grad_TD


@triton.jit(do_not_specialize=["length"])
def conv_forward_kernel(
    x, weight, bias, y, length, channels, x_sample, x_row,
    TAPS: tl.constexpr, SPAN: tl.constexpr, BLOCK: tl.constexpr, REVERSE: tl.constexpr, SILU: tl.constexpr,
):  # fmt: skip
    """y (B, L, D), dense, of x with adjacent channels; weight (D, K) and bias (D) or None are float32."""
    sample, _, walk = tile_of(length, channels, SPAN, BLOCK)
    t = walk[3]
    y_TD = before_silu((x + sample * x_sample, x_row), weight, load_vector(bias, walk), t, walk, TAPS, REVERSE)
    if SILU:
        y_TD *= sigmoid(y_TD)
    at_TD = (sample * length + t)[:, None] * channels + walk[1][None, :]
    tl.store(y + at_TD, y_TD, mask=(t < length)[:, None] & walk[2][None, :])


@triton.jit(do_not_specialize=["length"])
def conv_backward_kernel(
    grad_y, x, weight, bias, grad_x, grad_weight, grad_bias, length, channels, grad_sample, grad_row, x_sample, x_row,
    TAPS: tl.constexpr, SPAN: tl.constexpr, BLOCK: tl.constexpr, REVERSE: tl.constexpr, SILU: tl.constexpr,
):  # fmt: skip
    """grad_x (B, L, D), dense; grad_weight (B * spans, K, D) and grad_bias (B * spans, D) or None, float32."""
    sample, span, walk = tile_of(length, channels, SPAN, BLOCK)
    t = walk[3]
    bias_D = load_vector(bias, walk)
    rows_x, rows_grad = (x + sample * x_sample, x_row), (grad_y + sample * grad_sample, grad_row)
    own_TD = through_silu(rows_grad, rows_x, weight, bias_D, t, walk, TAPS, REVERSE, SILU)
    grad_x_TD = tl.zeros_like(own_TD)
    for k in tl.static_range(TAPS):
        shift = -(TAPS - 1 - k) if REVERSE else TAPS - 1 - k
        x_TD = load_tile(rows_x, t - shift, walk)
        at_D = grad_weight + (span.to(tl.int64) * TAPS + k) * channels + walk[1]
        tl.store(at_D, tl.sum(own_TD * x_TD, 0), mask=walk[2])
        grad_TD = through_silu(rows_grad, rows_x, weight, bias_D, t + shift, walk, TAPS, REVERSE, SILU)
        grad_x_TD += grad_TD * tl.load(weight + walk[1] * TAPS + k, mask=walk[2], other=0.0)[None, :]
    if grad_bias is not None:
        tl.store(grad_bias + span.to(tl.int64) * channels + walk[1], tl.sum(own_TD, 0), mask=walk[2])
    at_TD = (sample * length + t)[:, None] * channels + walk[1][None, :]
    tl.store(grad_x + at_TD, grad_x_TD, mask=(t < length)[:, None] & walk[2][None, :])
