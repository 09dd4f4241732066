"""The selective scan and the causal convolution of the mixer, on whatever machine is at hand."""

from pretrain.ops.dispatch import causal_conv1d, selective_scan

__all__ = ["causal_conv1d", "selective_scan"]
