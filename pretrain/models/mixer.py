"""The bidirectional Mamba mixer of VideoMamba: one projection in, two scans, one projection out.

B batch, L tokens, D width, E inner width (expand * D), N state, R rank of the time step.

    x, z = W_in n                                      shared by both directions
    forward  branch: u = silu(causal_conv(x));          delta, B, C = W_x u;  y_f = scan(u, ...)
    backward branch: the same on the reversed sequence, with its own conv, W_x, W_dt, A and D
    out = W_out ((y_f + y_b) * silu(z))

The operators walk the backward branch from the last position to the first, so nothing is flipped or copied. Source: the
release (reference 1.4): a plain sum of the directions, Euler's B, the bias of delta before the softplus.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pretrain.models.config import VisionConfig
from pretrain.ops import Direction, bidirectional_conv1d, bidirectional_scan

DT_MIN, DT_MAX, DT_FLOOR = 1e-3, 1e-1, 1e-4


class Mixer(nn.Module):
    """Mixes tokens in both directions, (B, L, D) -> (B, L, D); parameter names are the release's."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
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

    def forward(self, tokens_BLD: Tensor) -> Tensor:
        """The mixed tokens; matrix products follow autocast, the recurrence is in float32."""
        x_BLE, z_BLE = self.in_proj(tokens_BLD).chunk(2, dim=-1)
        conv, conv_b = self.conv1d, self.conv1d_b
        ahead_BLE, back_BLE = bidirectional_conv1d(
            x_BLE, conv.weight.squeeze(1), conv.bias, conv_b.weight.squeeze(1), conv_b.bias
        )
        y_BLE = bidirectional_scan(
            self._direction(ahead_BLE, self.x_proj, self.dt_proj, self.A_log, self.D),
            self._direction(back_BLE, self.x_proj_b, self.dt_proj_b, self.A_b_log, self.D_b),
            z_BLE,
        )
        mixed_BLD: Tensor = self.out_proj(y_BLE)
        return mixed_BLD

    def _direction(
        self, u_BLE: Tensor, x_proj: nn.Linear, dt_proj: nn.Linear, log_A_EN: Tensor, skip_E: Tensor
    ) -> Direction:
        """What one direction's scan reads, from its convolved input."""
        step_BLR, control_BLM = x_proj(u_BLE).split([self.rank, 2 * self.state], dim=-1)
        B_BLN, C_BLN = control_BLM.float().chunk(2, dim=-1)
        delta_BLE = F.linear(step_BLR, dt_proj.weight)
        return Direction(u_BLE, delta_BLE, -torch.exp(log_A_EN), B_BLN, C_BLN, skip_E, dt_proj.bias)
