"""The selective scan and the causal convolution of the mixer, on whatever machine is at hand."""

from pretrain.ops.dispatch import BackendStatus, backends, causal_conv1d, selective_scan, speed_check

__all__ = ["BackendStatus", "backends", "causal_conv1d", "selective_scan", "speed_check"]
