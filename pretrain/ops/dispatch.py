"""Which backend computes the scan and the convolution: one dispatcher for all of them."""

from typing import Literal, overload

from torch import Tensor

from pretrain.ops import reference


@overload
def selective_scan(
    u_BLD: Tensor,
    delta_BLD: Tensor,
    A_DN: Tensor,
    B_BLN: Tensor,
    C_BLN: Tensor,
    D_D: Tensor | None = None,
    z_BLD: Tensor | None = None,
    delta_bias_D: Tensor | None = None,
    delta_softplus: bool = False,
    reverse: bool = False,
    return_last_state: Literal[False] = False,
    backend: str = "auto",
) -> Tensor: ...


@overload
def selective_scan(
    u_BLD: Tensor,
    delta_BLD: Tensor,
    A_DN: Tensor,
    B_BLN: Tensor,
    C_BLN: Tensor,
    D_D: Tensor | None = None,
    z_BLD: Tensor | None = None,
    delta_bias_D: Tensor | None = None,
    delta_softplus: bool = False,
    reverse: bool = False,
    *,
    return_last_state: Literal[True],
    backend: str = "auto",
) -> tuple[Tensor, Tensor]: ...


def selective_scan(
    u_BLD: Tensor,
    delta_BLD: Tensor,
    A_DN: Tensor,
    B_BLN: Tensor,
    C_BLN: Tensor,
    D_D: Tensor | None = None,
    z_BLD: Tensor | None = None,
    delta_bias_D: Tensor | None = None,
    delta_softplus: bool = False,
    reverse: bool = False,
    return_last_state: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """The selective scan, see `reference.sequential_scan`; y (B, L, D) in u's type, on request with the last state."""
    y_BLD, state_BDN = reference.sequential_scan(
        u_BLD, delta_BLD, A_DN, B_BLN, C_BLN, D_D, z_BLD, delta_bias_D, delta_softplus, reverse
    )
    return (y_BLD, state_BDN) if return_last_state else y_BLD


def causal_conv1d(
    x_BLD: Tensor,
    weight_DK: Tensor,
    bias_D: Tensor | None = None,
    reverse: bool = False,
    silu: bool = True,
    backend: str = "auto",
) -> Tensor:
    """The causal depthwise convolution, see `reference.causal_conv1d`; y (B, L, D) in x's type."""
    return reference.causal_conv1d(x_BLD, weight_DK, bias_D, reverse, silu)
