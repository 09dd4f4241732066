"""The state of a run as whole tensors by name, gathered from however many ranks and whatever ZeRO has cut.

model.safetensors           the model's state dict: float32 weights, which are the masters too, and buffers
optimizer-0003.safetensors  `exp_avg/NAME`, `exp_avg_sq/NAME`, `step/NAME`, `momentum_buffer/NAME`: what the optimizer
                            keeps of the parameter NAME; every rank writes some parameters into a file of its own
ema.safetensors             the average of the weights, where there is one

A tensor that lies whole on some rank is written by that rank; where it is cut, the rank with the largest part gathers
it. Tensors pass one at a time: a rank holds what it writes (in the background) or a single tensor (otherwise).
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from pretrain import distributed
from pretrain.checkpoint.pieces import Piece, pieces, plain_names, state_of
from pretrain.checkpoint.tensors import Entry, entries_of

MODEL, EMA, OPTIMIZER = "model.safetensors", "ema.safetensors", "optimizer-{:04d}.safetensors"


@dataclass(frozen=True)
class File:
    """What this rank writes into one file. Every rank has to run through `tensors`, for some have to be gathered."""

    name: str
    entries: list[Entry]
    tensors: Iterable[Tensor]


class Row(NamedTuple):
    """A rank's part of one parameter's state, as told to the others: by key the type, the offset and the count.

    A count of 0 is a number, such as that of the steps, which has no parts.
    """

    shape: tuple[int, ...]
    state: dict[str, tuple[torch.dtype, int, int]]


class Item(NamedTuple):
    """One tensor of the optimizer's state: who writes it, and from whose parts (rank, offset, count) it is joined."""

    entry: Entry
    key: str
    parameter: str
    writer: int
    parts: list[tuple[int, int, int]]


def files(engine: Any, model: nn.Module, ema: dict[str, Tensor] | None = None) -> list[File]:
    """What this rank has to write of a run's state; every rank calls this, and runs through the files in order."""
    rank, stage = distributed.rank(), engine.zero_optimization_stage()
    weights = model.state_dict(keep_vars=True)  # ZeRO 3 tells a parameter's real shape
    entries = [Entry(name, t.dtype, tuple(getattr(t, "ds_shape", t.shape))) for name, t in weights.items()]
    made = [File(MODEL, entries if rank == 0 else [], _weights(model, weights, stage))]
    if ema and rank == 0:
        made.append(File(EMA, entries_of(ema), ema.values()))
    found = pieces(engine)
    items = _plan([*plain_names(engine)], _rows(engine, found, stage), first_load=sum(e.bytes for e in entries))
    mine = [item.entry for item in items if item.writer == rank]
    return [*made, File(OPTIMIZER.format(rank), mine, _optimizer(engine, found, items, rank))]


def _weights(model: nn.Module, weights: dict[str, Tensor], stage: int) -> Iterator[Tensor]:
    """Every tensor of the state dict, on rank 0; ZeRO 3 brings a parameter together for as long as it is needed."""
    if stage < 3:
        yield from weights.values() if distributed.rank() == 0 else ()
        return
    from deepspeed.runtime.zero import GatheredParameters

    parameters = dict(model.named_parameters(remove_duplicate=False))
    for name, tensor in weights.items():
        if name not in parameters:
            whole = tensor
        else:
            with GatheredParameters([parameters[name]]):
                whole = parameters[name].detach().clone()
        if distributed.rank() == 0:
            yield whole


def _rows(engine: Any, found: dict[str, Piece], stage: int) -> list[dict[str, Row]]:
    """Every rank's table of its parts; without ZeRO all are alike, and nobody has to ask."""
    table = {}
    for name, piece in found.items():
        keys = {}
        for key, value in state_of(engine, piece).items():
            tensor, (there, _) = torch.as_tensor(value), piece.under(key)
            keys[key] = (tensor.dtype, there.offset, there.count) if tensor.ndim else (tensor.dtype, 0, 0)
        table[name] = Row(piece.shape, keys)
    return [table] * distributed.world_size() if stage == 0 else distributed.gather_objects(table)


def _plan(names: list[str], rows: list[dict[str, Row]], first_load: int) -> list[Item]:
    """All tensors of the optimizer's state with their writers, the same list on every rank.

    What several ranks have whole goes to the one with the least to write; rank 0 begins with `first_load` bytes.
    """
    load = [first_load, *[0] * (len(rows) - 1)]
    items = []
    for name in names:
        tables = {rank: table[name] for rank, table in enumerate(rows) if name in table}
        for key in sorted({key for row in tables.values() for key in row.state}):
            holders = {rank: row.state[key] for rank, row in tables.items() if key in row.state}
            most = max(count for _, _, count in holders.values())
            fullest = [rank for rank, (_, _, count) in holders.items() if count == most]
            writer = min(fullest, key=lambda rank: (load[rank], rank))
            shape = tables[writer].shape if most else ()
            entry = Entry(f"{key}/{name}", holders[writer][0], shape)
            whole = most in (0, torch.Size(shape).numel())
            parts = [] if whole else [(rank, offset, count) for rank, (_, offset, count) in holders.items()]
            items.append(Item(entry, key, name, writer, parts))
            load[writer] += entry.bytes
    return items


def _optimizer(engine: Any, found: dict[str, Piece], items: list[Item], rank: int) -> Iterator[Tensor]:
    """This rank's tensors in the order of `items`; the others' parts are sent or received on the way."""
    for item in items:
        if item.writer != rank and not item.parts:
            continue
        piece = found.get(item.parameter)
        value = None if piece is None else torch.as_tensor(state_of(engine, piece)[item.key])
        if piece is not None and value is not None and value.ndim:
            value = piece.under(item.key)[0].of(value)
        if item.parts:
            value = _join(item, value, engine.device)
        if item.writer == rank:
            assert value is not None
            yield value.reshape(item.entry.shape)


def _join(item: Item, own: Tensor | None, device: torch.device) -> Tensor | None:
    """Bring the parts of one tensor together on its writer; every rank calls this."""
    row = torch.zeros(max(count for _, _, count in item.parts), dtype=item.entry.dtype, device=device)
    if own is not None:
        row[: own.numel()] = own
    writes = item.writer == distributed.rank()
    received = [torch.empty_like(row) for _ in range(distributed.world_size())] if writes else None
    dist.gather(row, received, dst=item.writer)
    if received is None:
        return None
    whole = torch.empty(torch.Size(item.entry.shape).numel(), dtype=row.dtype, device=device)
    for rank, offset, count in item.parts:
        whole[offset : offset + count] = received[rank][:count]
    return whole


def in_memory(made: list[File]) -> list[File]:
    """The same files with copies of their tensors in this process's memory, which training can no longer change."""

    def copy(tensor: Tensor) -> Tensor:
        return tensor.detach().cpu() if tensor.device.type != "cpu" else tensor.detach().clone()

    return [File(file.name, file.entries, [copy(tensor) for tensor in file.tensors]) for file in made]
