"""What we measure ourselves against: each the plainest form that is well written and needs nothing of ours.

Letters: B batch, L length, D channels, N state.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def eager_scan(
    u_BLD: Tensor,
    delta_BLD: Tensor,
    A_DN: Tensor,
    B_BLN: Tensor,
    C_BLN: Tensor,
    D_D: Tensor,
    z_BLD: Tensor,
    delta_bias_D: Tensor,
) -> Tensor:
    """The selective scan as Mamba's own `selective_scan_ref` does it: all coefficients first, then a loop over L.

    With softplus of delta, skip and gate; float32; y (B, L, D). Against the source, time comes first in memory,
    so that each step of the loop reads and writes contiguous blocks. Source: state-spaces/mamba,
    selective_scan_interface.py.
    """
    delta_LBD = F.softplus(delta_BLD + delta_bias_D).transpose(0, 1).contiguous()
    decay_LBDN = torch.exp(delta_LBD.unsqueeze(-1) * A_DN)
    input_LBDN = (delta_LBD * u_BLD.transpose(0, 1)).unsqueeze(-1) * B_BLN.transpose(0, 1).unsqueeze(2)
    state_BDN = torch.zeros_like(decay_LBDN[0])
    states = []
    for decay_BDN, input_BDN in zip(decay_LBDN.unbind(0), input_LBDN.unbind(0), strict=True):
        state_BDN = torch.addcmul(input_BDN, decay_BDN, state_BDN)
        states.append(state_BDN)
    y_LBD = torch.einsum("lbdn,bln->lbd", torch.stack(states), C_BLN)
    return (y_LBD.transpose(0, 1) + D_D * u_BLD) * F.silu(z_BLD)
