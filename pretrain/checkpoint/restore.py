"""A run's state put back into any number of ranks at any ZeRO stage, bit for bit, one tensor at a time."""

from collections.abc import Iterator, Mapping
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from configs.errors import UserError
from pretrain.checkpoint.folder import read_meta
from pretrain.checkpoint.meta import FORMAT, Meta
from pretrain.checkpoint.pieces import Piece, pieces, state_of
from pretrain.checkpoint.snapshot import EMA, MODEL


class StoredTensors(Mapping[str, Tensor]):
    """The tensors of one or several safetensors files by name; each is read when it is asked for."""

    def __init__(self, *paths: Path) -> None:
        self._files = [safe_open(path, framework="pt") for path in paths]
        self._where = {name: file for file in self._files for name in file.keys()}  # noqa: SIM118

    def __iter__(self) -> Iterator[str]:
        return iter(self._where)

    def __len__(self) -> int:
        return len(self._where)

    def __getitem__(self, name: str) -> Tensor:
        tensor: Tensor = self._where[name].get_tensor(name)
        return tensor

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Every tensor's shape by name."""
        return {name: tuple(file.get_slice(name).get_shape()) for name, file in self._where.items()}

    def keys_by_parameter(self) -> dict[str, list[str]]:
        """Of names `KEY/NAME`: the keys that there are of each NAME."""
        found: dict[str, list[str]] = {}
        for full in self._where:
            key, _, name = full.partition("/")
            found.setdefault(name, []).append(key)
        return found


def restore(engine: Any, model: nn.Module, folder: Path) -> Meta:
    """Load weights and optimizer from a verified checkpoint; its meta. (`stored_ema` gives the average of the weights.)

    Every rank calls this, before the first step. Raises UserError where the checkpoint is of a format whose state
    cannot be put back, or does not fit the model.
    """
    meta = read_meta(folder)
    if meta.format != FORMAT:
        raise UserError(
            f"{folder} has format {meta.format}, whose optimizer state only the version that wrote it can read.",
            f"Finish the run with that version, or start another run from its weights with init={folder}.",
        )
    _put_weights(engine, model, StoredTensors(folder / MODEL), folder)
    _put_optimizer(engine, StoredTensors(*optimizer_files(folder, meta)), folder)
    return meta


def optimizer_files(folder: Path, meta: Meta) -> list[Path]:
    """The files of the optimizer's state, of which each rank that wrote the checkpoint wrote one."""
    return [folder / name for name in sorted(meta.files) if fnmatch(name, "optimizer-*.safetensors")]


def stored_ema(folder: Path) -> StoredTensors:
    """The average of the weights in a checkpoint, by name. Raises UserError where the run kept none."""
    if not (folder / EMA).is_file():
        raise UserError(f"{folder} has no average of the weights.", "Train with optim.ema_decay to have one.")
    return StoredTensors(folder / EMA)


def _put_weights(engine: Any, model: nn.Module, stored: StoredTensors, folder: Path) -> None:
    stage = engine.zero_optimization_stage()
    parameters = dict(model.named_parameters(remove_duplicate=False))
    wanted = model.state_dict()
    if wanted.keys() != stored.keys():
        odd = min(wanted.keys() ^ stored.keys())
        raise UserError(
            f"{folder} is a checkpoint of another model: {odd} is in one of them alone.", "Give another out=."
        )
    with torch.no_grad():
        for name, tensor in wanted.items():
            if stage == 3 and name in parameters:
                _put_cut(parameters[name], stored[name])
            else:
                tensor.copy_(stored[name])
        if stage == 0:
            return
        for name, piece in pieces(engine).items():
            piece.of(piece.flat.data).copy_(stored[name].view(-1)[piece.offset : piece.offset + piece.count])


def _put_cut(parameter: nn.Parameter, value: Tensor) -> None:
    from deepspeed.runtime.zero import GatheredParameters

    with GatheredParameters([parameter], modifier_rank=0):
        parameter.copy_(value)


def _put_optimizer(engine: Any, stored: StoredTensors, folder: Path) -> None:
    """What the optimizer keeps, as if it had kept it all along; what no file has begins as zero, as at a first step."""
    keys = stored.keys_by_parameter()
    for name, piece in pieces(engine).items():
        state = state_of(engine, piece)
        for key in keys.get(name, ()):
            value = stored[f"{key}/{name}"]
            if value.shape == piece.shape:
                there, kept = piece.under(key)
                if key not in state:
                    state[key] = torch.zeros(kept, dtype=value.dtype, device=piece.flat.device)
                there.of(state[key]).copy_(value.view(-1)[there.offset : there.offset + there.count])
            else:
                _put_number(state, key, value, piece, folder)


def _put_number(state: dict[str, Any], key: str, value: Tensor, piece: Piece, folder: Path) -> None:
    """A count of steps, say, which all parameters in one flat row share."""
    if key in state and float(state[key]) != float(value):
        raise UserError(
            f"{folder} has parameters with {key} {float(value):g} and {float(state[key]):g} that ZeRO keeps together.",
            "Use deepspeed=zero0.",
        )
    state[key] = value.to(piece.flat.device) if value.is_floating_point() else int(value)
