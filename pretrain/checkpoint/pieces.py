"""Where a rank keeps its part of every parameter's optimizer state, whatever ZeRO has cut.

ZeRO 0      every rank has the whole of every parameter, and of its state
ZeRO 1, 2   a group's parameters lie in one flat row, cut evenly among the ranks: most parameters whole on one rank,
            those at a cut on two or more
ZeRO 3      every parameter is cut evenly among the ranks, the last part filled up

This is the only file that reads DeepSpeed's own fields.
"""

from dataclasses import dataclass
from typing import Any

from torch import Size, Tensor, nn


@dataclass(frozen=True)
class Piece:
    """`count` numbers of a parameter from `offset` on, which are those of `flat` from `start` on.

    `flat` is what the optimizer takes for a parameter, and what its state is kept by.
    """

    flat: Tensor
    start: int
    offset: int
    count: int
    shape: tuple[int, ...]
    row: tuple[int, int] | None = None
    """For Muon at ZeRO 1 and 2, whose momentum a rank keeps of whole matrices, those at a cut too: where this one
    starts in the row of them, and how long the row is."""

    def of(self, value: Tensor) -> Tensor:
        """This piece of a tensor that is laid out as `flat` is; a view, one-dimensional."""
        return value.view(-1)[self.start : self.start + self.count]

    def under(self, key: str) -> tuple["Piece", tuple[int, ...]]:
        """Where the optimizer's `key` has its numbers of this parameter, and the shape of what it keeps there."""
        if key != "momentum_buffer" or self.row is None:
            return self, tuple(self.flat.shape)
        start, length = self.row
        return Piece(self.flat, start, 0, Size(self.shape).numel(), self.shape), (length,)


def plain_names(engine: Any) -> dict[str, nn.Parameter]:
    """The parameters that DeepSpeed trains, by the names that the task's model gives them."""
    named = engine.module.named_parameters()
    return {name.removeprefix("model."): parameter for name, parameter in named if parameter.requires_grad}


def pieces(engine: Any) -> dict[str, Piece]:
    """This rank's part of every parameter by plain name; what it has no number of is left out."""
    stage, zero = engine.zero_optimization_stage(), engine.optimizer
    parameters = plain_names(engine)
    if stage == 0:
        return {name: Piece(p, 0, 0, p.numel(), tuple(p.shape)) for name, p in parameters.items()}
    if stage == 3:
        return {name: piece for name, p in parameters.items() if (piece := _cut(zero, p)).count > 0}
    groups = {id(p): number for number, group in enumerate(zero.bit16_groups) for p in group}
    rows = _rows_of_whole_matrices(zero) if hasattr(engine.basic_optimizer, "aux_optimizer") else {}
    found = {}
    for name, parameter in parameters.items():
        mapping: Any = parameter._hp_mapping  # type: ignore[attr-defined]
        if mapping is not None:
            there, here = mapping.lp_fragment_address, mapping.hp_fragment_address
            flat = zero.single_partition_of_fp32_groups[groups[id(parameter)]]
            found[name] = Piece(
                flat, here.start, there.start, there.numel, tuple(parameter.shape), rows.get(id(parameter))
            )
    return found


def _rows_of_whole_matrices(zero: Any) -> dict[int, tuple[int, int]]:
    """Start in the row, and the row's length, of every parameter that lies in this rank's part, by id."""
    found = {}
    for members in zero.params_in_partition:
        start, length = 0, sum(parameter.numel() for parameter in members)
        for parameter in members:
            found[id(parameter)] = (start, length)
            start += parameter.numel()
    return found


def _cut(zero: Any, parameter: Any) -> Piece:
    group, start, count = zero.grad_position[zero.get_param_id(parameter)]
    offset = zero._get_param_partition_rank(parameter) * count
    count = max(0, min(count, parameter.ds_numel - offset))
    return Piece(zero.fp32_partitioned_groups_flat[group], start, offset, count, tuple(parameter.ds_shape))


def state_of(engine: Any, piece: Piece) -> dict[str, Any]:
    """What the optimizer keeps by `piece.flat`; changes to it are the optimizer's."""
    states: dict[Tensor, dict[str, Any]] = engine.basic_optimizer.state
    return states.setdefault(piece.flat, {})
