"""Names and shapes of the published checkpoints, in memory: the one place that knows where they differ from ours.

the image and the supervised video layout call the final norm `norm_f`; here it is `norm`
stage 2 holds a scalar `temp`; here it is (1,), since DeepSpeed cannot broadcast a scalar
stage 2 carries its teacher (`clip_teacher.*`) and BERT's `position_ids`; here neither is in the state dict
an image model's patch kernel is 2-D; here it has a frame axis
"""

from torch import Tensor

State = dict[str, Tensor]


def from_released(state: State) -> State:
    """A published state dict under our names and shapes; tensors are shared, not copied."""
    ours: State = {}
    for name, tensor in state.items():
        if name.startswith("clip_teacher.") or name.endswith(".position_ids"):
            continue
        if name == "temp":
            tensor = tensor.reshape(1)
        if name.endswith("patch_embed.proj.weight") and tensor.dim() == 4:
            tensor = tensor.unsqueeze(2)
        ours[_renamed(name, "norm_f.", "norm.")] = tensor
    return ours


def to_released(state: State, *, supervised: bool = False) -> State:
    """Our state dict under the release's names; `supervised` is the layout with a head, whose norm is `norm_f`."""
    theirs: State = {}
    for name, tensor in state.items():
        tensor = tensor.reshape(()) if name == "temp" else tensor
        theirs[_renamed(name, "norm.", "norm_f.") if supervised else name] = tensor
    return theirs


def _renamed(name: str, old: str, new: str) -> str:
    return new + name[len(old) :] if name.startswith(old) else name
