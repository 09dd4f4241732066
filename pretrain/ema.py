"""An average of the weights over the steps, each counting less the longer ago it was.

    average = decay * average + (1 - decay) * weights        # after every update

It starts from the first weights. Kept in float32 by each rank: all of it, and with ZeRO 3 the rank's share.
"""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from pretrain import distributed
from pretrain.zero import own_share, share_of, whole


class Ema:
    """The average of some named parameters, which DeepSpeed may have cut up by now."""

    def __init__(self, named: Iterable[tuple[str, nn.Parameter]], decay: float) -> None:
        self.decay = decay
        self._parameters = dict(named)
        self._average = {name: own_share(p).detach().float().clone() for name, p in self._parameters.items()}

    @torch.no_grad()
    def update(self) -> None:
        """Take the weights of now into the average."""
        weights = [own_share(parameter).float() for parameter in self._parameters.values()]
        torch._foreach_lerp_(list(self._average.values()), weights, 1 - self.decay)

    def state_dict(self) -> dict[str, Tensor]:
        """The average by the parameters' plain names, whole and on the CPU; every rank calls this."""
        return {name: whole(self._average[name], p).detach().cpu() for name, p in self._parameters.items()}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on from a saved average, of any ranks and stage; every rank calls this. KeyError for a missing name."""
        for name, parameter in self._parameters.items():
            self._average[name].copy_(share_of(state[name].float(), parameter, distributed.rank()))
