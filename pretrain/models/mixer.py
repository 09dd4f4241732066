"""The bidirectional Mamba mixer of VideoMamba: one projection in, two scans, one projection out.

B batch, L tokens, D width, E inner width (expand * D), N state, R rank of the time step.

    x, z = W_in n                                      shared by both directions
    forward  branch: u = silu(causal_conv(x));          delta, B, C = W_x u;  y_f = scan(u, ...)
    backward branch: the same on the reversed sequence, with its own conv, W_x, W_dt, A and D
    out = W_out ((y_f + y_b) * silu(z))

The operators walk the backward branch from the last position to the first, so nothing is flipped or copied. Source: the
release (reference 1.4): a plain sum of the directions, Euler's B, the bias of delta before the softplus.

Convolution and scan run in the layer's order (scan_order.py); the projections, the gate and the sum of the directions
know no order. So a layer of one order gets its tokens in that order and moves nothing, `st_full` moves only what
enters and leaves its second scan, and `st_half` half of that and the narrow rows of W_x u, which its halves share.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pretrain.models.config import ScanOrder, VisionConfig
from pretrain.models.scan_order import Reordering
from pretrain.ops import Direction, bidirectional_conv1d, bidirectional_scan

Pair = tuple[Tensor, Tensor]
"""The same of the forward and of the backward branch."""

ALL = slice(None)
DT_MIN, DT_MAX, DT_FLOOR = 1e-3, 1e-1, 1e-4


class Mixer(nn.Module):
    """Mixes tokens in both directions, (B, L, D) -> (B, L, D); parameter names are the release's.

    A mixer of a pure order takes its tokens in that order; one of two orders takes them spatial-first.
    """

    def __init__(self, config: VisionConfig, order: ScanOrder = "spatial_first") -> None:
        super().__init__()
        self.order = order
        inner, state, rank = config.expand * config.width, config.d_state, config.rank
        self.rank, self.state = rank, state
        log_state = torch.log(torch.arange(1, state + 1, dtype=torch.float32)).expand(inner, state)
        self.in_proj = nn.Linear(config.width, 2 * inner, bias=False)
        self.A_log, self.A_b_log = nn.Parameter(log_state.clone()), nn.Parameter(log_state.clone())
        self.D, self.D_b = nn.Parameter(torch.ones(inner)), nn.Parameter(torch.ones(inner))
        # Conv1d only holds the weights, under the release's names; the operator does the work.
        self.conv1d = nn.Conv1d(inner, inner, config.d_conv, groups=inner)
        self.conv1d_b = nn.Conv1d(inner, inner, config.d_conv, groups=inner)
        self.x_proj = nn.Linear(inner, rank + 2 * state, bias=False)
        self.x_proj_b = nn.Linear(inner, rank + 2 * state, bias=False)
        self.dt_proj, self.dt_proj_b = nn.Linear(rank, inner), nn.Linear(rank, inner)
        self.out_proj = nn.Linear(inner, config.width, bias=False)

    def reset_time_step(self) -> None:
        """Mamba's own initialisation: softplus(bias) log-uniform in [1e-3, 1e-1], weights within rank^-0.5."""
        for projection in (self.dt_proj, self.dt_proj_b):
            nn.init.uniform_(projection.weight, -(self.rank**-0.5), self.rank**-0.5)
            draw = torch.rand_like(projection.bias) * (math.log(DT_MAX) - math.log(DT_MIN)) + math.log(DT_MIN)
            step = draw.exp().clamp(min=DT_FLOOR)
            with torch.no_grad():
                projection.bias.copy_(step + torch.log(-torch.expm1(-step)))

    def forward(self, tokens_BLD: Tensor, reordering: Reordering | None = None) -> Tensor:
        """The mixed tokens; matrix products follow autocast, the recurrence is in float32.

        `reordering` is what `st_half` and `st_full` turn the tokens by; None means that there is one order only.
        """
        gated_BLF = self.in_proj(tokens_BLD)
        if self.order == "st_full":
            y_BLE = self._both_orders(gated_BLF, reordering)
        elif self.order == "st_half" and reordering is not None:
            y_BLE = self._half_and_half(gated_BLF, reordering)
        else:
            y_BLE = self._one_order(gated_BLF)
        mixed_BLD: Tensor = self.out_proj(y_BLE)
        return mixed_BLD

    def _one_order(self, gated_BLF: Tensor) -> Tensor:
        """All channels in the order in which the tokens stand; F holds x and z, both E wide."""
        x_BLE, z_BLE = gated_BLF.chunk(2, dim=-1)
        ahead_BLE, back_BLE = self._convolve(x_BLE, ALL)
        control = self.x_proj(ahead_BLE), self.x_proj_b(back_BLE)
        return self._scan((ahead_BLE, back_BLE), control, z_BLE, ALL)

    def _both_orders(self, gated_BLF: Tensor, reordering: Reordering | None) -> Tensor:
        """All channels in each order, summed; where there is one order only it counts twice."""
        spatial_BLE = self._one_order(gated_BLF)
        if reordering is None:
            return 2 * spatial_BLE
        return spatial_BLE + reordering.spatial(self._one_order(reordering.temporal(gated_BLF)))

    def _half_and_half(self, gated_BLF: Tensor, reordering: Reordering) -> Tensor:
        """The first half of the channels spatial-first, the second temporal-first; W_x reads both halves of a token."""
        x_BLE, z_BLE = gated_BLF.chunk(2, dim=-1)
        half = x_BLE.shape[2] // 2
        first, second = slice(None, half), slice(half, None)
        u = self._convolve(x_BLE[..., first], first)
        turned_u = self._convolve(reordering.temporal(x_BLE[..., second]), second)
        control = (
            _shared_product(self.x_proj, u[0], turned_u[0], reordering),
            _shared_product(self.x_proj_b, u[1], turned_u[1], reordering),
        )
        turned_control = reordering.temporal(control[0]), reordering.temporal(control[1])
        y = self._scan(u, control, z_BLE[..., first], first)
        turned_y = self._scan(turned_u, turned_control, reordering.temporal(z_BLE[..., second]), second)
        return torch.cat([y, reordering.spatial(turned_y)], dim=-1)

    def _convolve(self, x_BLE: Tensor, channels: slice) -> Pair:
        """Both convolutions of some channels, with SiLU."""
        conv, conv_b = self.conv1d, self.conv1d_b
        assert conv.bias is not None
        assert conv_b.bias is not None
        return bidirectional_conv1d(
            x_BLE,
            conv.weight.squeeze(1)[channels],
            conv.bias[channels],
            conv_b.weight.squeeze(1)[channels],
            conv_b.bias[channels],
        )

    def _scan(self, u: Pair, control: Pair, z_BLE: Tensor, channels: slice) -> Tensor:
        """Both scans of some channels, gated, (B, L, E); `control` is W_x u, (B, L, R + 2 N)."""
        return bidirectional_scan(
            self._direction(u[0], control[0], self.dt_proj, self.A_log, self.D, channels),
            self._direction(u[1], control[1], self.dt_proj_b, self.A_b_log, self.D_b, channels),
            z_BLE,
        )

    def _direction(
        self, u_BLE: Tensor, control_BLM: Tensor, dt_proj: nn.Linear, log_A_EN: Tensor, skip_E: Tensor, channels: slice
    ) -> Direction:
        """What one direction's scan of some channels reads."""
        step_BLR, states_BLM = control_BLM.split([self.rank, 2 * self.state], dim=-1)
        B_BLN, C_BLN = states_BLM.float().chunk(2, dim=-1)
        delta_BLE = F.linear(step_BLR, dt_proj.weight[channels])
        A_EN = -torch.exp(log_A_EN[channels])
        return Direction(u_BLE, delta_BLE, A_EN, B_BLN, C_BLN, skip_E[channels], dt_proj.bias[channels])


def _shared_product(x_proj: nn.Linear, u_BLE: Tensor, turned_BLE: Tensor, reordering: Reordering) -> Tensor:
    """W_x times the whole u of each token, spatial-first, where the second half of u stands temporal-first."""
    half = u_BLE.shape[2]
    turned_BLM = F.linear(turned_BLE, x_proj.weight[:, half:])
    return F.linear(u_BLE, x_proj.weight[:, :half]) + reordering.spatial(turned_BLM)
