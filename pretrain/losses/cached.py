"""A loss over more samples than fit into one graph: its gradient by the features first, the graphs one by one after.

    feature = [encode(part), without a graph, for each part of the batch]
    gradient = d loss(all features) / d feature                           # the loss sees the whole batch, once
    for each part:  (encode(part) * gradient[part]).sum().backward()      # the chain rule's other half

Loss, gradient and memory are those of one graph over everything, but for the graphs of the encoder, of which there
is one at a time; the price is a second forward pass. Source: GradCache (arXiv 2101.06983), 3.2.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Cached(NamedTuple):
    """A loss's value, and its gradient by each of some tensors."""

    value: Tensor
    gradients: tuple[Tensor, ...]


def cached_gradients(loss_of: Callable[..., Tensor], *features: Tensor) -> Cached:
    """`loss_of(*features)`, a scalar, and its gradient by each of `features` (zeros where it does not depend on one).

    No other tensor's `.grad` is touched, whatever `loss_of` reads.
    """
    leaves = [feature.detach().requires_grad_() for feature in features]
    with torch.enable_grad():
        loss = loss_of(*leaves)
        gradients = torch.autograd.grad(loss, leaves, materialize_grads=True)
    return Cached(loss.detach(), gradients)


def replay(cached: Cached, tensors: Sequence[Tensor]) -> Tensor:
    """A scalar of the cached value whose gradient by each of `tensors` is the cached one.

    `tensors` are the features again, now with the graph that made them; raises ValueError if shapes differ.
    """
    total = cached.value
    for gradient, tensor in zip(cached.gradients, tensors, strict=True):
        if gradient.shape != tensor.shape:
            raise ValueError(f"a gradient of {tuple(gradient.shape)} for a tensor of {tuple(tensor.shape)}")
        product = (tensor.to(gradient.dtype) * gradient).sum()
        total = total + (product - product.detach())
    return total
