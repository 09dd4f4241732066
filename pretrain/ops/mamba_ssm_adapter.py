"""mamba-ssm's own scan, for machines that have it, behind the arguments of ours.

Letters: B batch, L length, D channels, N state. mamba-ssm has channels before positions, (B, D, L) and (B, N, L), and
knows one direction.

Source of the signature: state-spaces/mamba, `selective_scan_fn` of mamba_ssm/ops/selective_scan_interface.py.
"""

from collections.abc import Callable

from torch import Tensor


def selective_scan_fn() -> Callable[..., tuple[Tensor, Tensor]]:
    """mamba-ssm's function; importing it takes seconds."""
    from mamba_ssm.ops.selective_scan_interface import selective_scan_fn as found

    function: Callable[..., tuple[Tensor, Tensor]] = found
    return function


def scan(
    function: Callable[..., tuple[Tensor, Tensor]],
    u_BLD: Tensor,
    delta_BLD: Tensor,
    A_DN: Tensor,
    B_BLN: Tensor,
    C_BLN: Tensor,
    D_D: Tensor | None,
    z_BLD: Tensor | None,
    delta_bias_D: Tensor | None,
    delta_softplus: bool,
    reverse: bool,
) -> tuple[Tensor, Tensor]:
    """y (B, L, D) and the last state (B, D, N) by `function`, which has mamba-ssm's signature.

    u, delta, z, B and C go in as u's type, as its kernel asks for; the last state has no gradient, as there.
    """

    def turned(x: Tensor) -> Tensor:
        ahead = x.to(u_BLD.dtype)
        return (ahead.flip(1) if reverse else ahead).transpose(1, 2).contiguous()

    y_BDL, state_BDN = function(
        turned(u_BLD),
        turned(delta_BLD),
        A_DN,
        turned(B_BLN),
        turned(C_BLN),
        D_D,
        z=None if z_BLD is None else turned(z_BLD),
        delta_bias=delta_bias_D,
        delta_softplus=delta_softplus,
        return_last_state=True,
    )
    y_BLD = y_BDL.transpose(1, 2)
    return (y_BLD.flip(1) if reverse else y_BLD), state_BDN.detach()
