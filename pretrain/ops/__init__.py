"""The selective scan and the causal convolution of the mixer, on whatever machine is at hand."""

from pretrain.ops.bidirectional import Direction, bidirectional_conv1d, bidirectional_scan
from pretrain.ops.dispatch import causal_conv1d, selective_scan, speed_check
from pretrain.ops.selection import BackendStatus, backends, scan_device

__all__ = [
    "BackendStatus",
    "Direction",
    "backends",
    "bidirectional_conv1d",
    "bidirectional_scan",
    "causal_conv1d",
    "scan_device",
    "selective_scan",
    "speed_check",
]
