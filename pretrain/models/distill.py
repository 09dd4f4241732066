"""The head that brings a student's tokens to a smaller teacher's width (`distill_head` of the release)."""

from torch import nn

NORM_EPS = 1e-5


class DistillHead(nn.Sequential):
    """RMSNorm, then Linear: (B, L, width) -> (B, L, out). Its names are the release's, 0.weight, 1.weight and 1.bias.

    It is thrown away after training, as published weights are loaded without it.
    """

    def __init__(self, width: int, out: int) -> None:
        linear = nn.Linear(width, out)
        nn.init.trunc_normal_(linear.weight, std=0.02)
        nn.init.zeros_(linear.bias)
        super().__init__(nn.RMSNorm(width, eps=NORM_EPS), linear)
