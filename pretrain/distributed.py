"""Joining the other ranks, and the few collectives that training needs.

DeepSpeed looks for MPI unless RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT are all set, and
compiles a shared-memory operator at its first start (half a minute): both are seen to here, for one
process as for many.

Letters: W ranks, B rows on this rank, E features.
"""

import importlib
import logging
import os
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import FunctionCtx

from configs.errors import UserError
from pretrain.launch import World, find_world, meeting_point, rank_environment


def init(device: str, timeout_minutes: float = 30.0) -> World:
    """Join the run: set the five variables, quieten DeepSpeed, and start gloo (cpu) or nccl (cuda)."""
    world = find_world()
    os.environ.update(rank_environment(world, *meeting_point(world)))
    os.environ["DS_ACCELERATOR"] = device  # asked before DeepSpeed is imported, or it guesses, and warns
    if device == "cuda":
        torch.cuda.set_device(world.local_rank)
    backend = "nccl" if device == "cuda" else "gloo"
    quiet_deepspeed().init_distributed(backend, verbose=False, timeout=timedelta(minutes=timeout_minutes))
    return world


def quiet_deepspeed() -> Any:
    """The deepspeed module, with its chatter and its compiled start-up operator switched off."""
    import deepspeed

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    # By importlib: `deepspeed.comm.torch` as an attribute is torch itself.
    importlib.import_module("deepspeed.comm.torch").build_shm_op = lambda: None  # type: ignore[attr-defined]
    return deepspeed


def finish() -> None:
    """Leave the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def world_size() -> int:
    """Ranks in the running process group; 1 where there is none."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """This process's rank in the running process group; 0 where there is none."""
    return dist.get_rank() if dist.is_initialized() else 0


def barrier() -> None:
    """Wait for every rank."""
    if world_size() > 1:
        dist.barrier()


def all_reduce_sum(value: Tensor) -> Tensor:
    """The sum of `value` over ranks, without gradient; a new tensor of the same shape."""
    total = value.detach().clone()
    if world_size() > 1:
        dist.all_reduce(total)
    return total


def all_reduce_mean(value: Tensor) -> Tensor:
    """The mean of `value` over ranks, without gradient; a new tensor of the same shape."""
    return all_reduce_sum(value) / world_size()


def all_reduce_max(value: Tensor) -> Tensor:
    """The largest of `value` over ranks, without gradient; a new tensor of the same shape."""
    largest = value.detach().clone()
    if world_size() > 1:
        dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    return largest


def gather_rows(rows_BE: Tensor) -> Tensor:
    """Every rank's rows, (W*B, E) in rank order, without gradient; B must be the same on every rank."""
    if world_size() == 1:
        return rows_BE.detach()
    parts = [torch.empty_like(rows_BE, memory_format=torch.contiguous_format) for _ in range(world_size())]
    dist.all_gather(parts, rows_BE.detach().contiguous())
    return torch.cat(parts)


def own_rows(gathered: Tensor, rows: int) -> Tensor:
    """This rank's part of what was gathered from `rows` rows of every rank."""
    return gathered[rank() * rows : (rank() + 1) * rows]


def gather_objects(value: Any) -> list[Any]:
    """`value` of every rank, in rank order; for small things such as names and counters."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def on_first(work: Callable[[], None]) -> None:
    """Do `work` on rank 0 while the others wait; if it fails there, every rank raises the same UserError."""
    failure: UserError | None = None
    if rank() == 0:
        try:
            work()
        except UserError as error:
            failure = error
    failures = [error for error in gather_objects(failure) if error is not None]
    if failures:
        raise failures[0]


def gather_with_gradient(rows_BE: Tensor) -> Tensor:
    """Every rank's rows, (W*B, E) in rank order, with the true gradient.

    The gradient of a row is the sum of what all ranks' losses say about it; DeepSpeed then averages
    parameter gradients over ranks, which gives the gradient of the mean of the ranks' losses. (The
    released code keeps the local slice only, which divides the contrastive gradient by W.)
    """
    if world_size() == 1:
        return rows_BE
    gathered: Tensor = _Gather.apply(rows_BE)  # type: ignore[no-untyped-call]
    return gathered


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, rows_BE: Tensor) -> Tensor:
        ctx.rows = rows_BE.size(0)  # type: ignore[attr-defined]
        return gather_rows(rows_BE)

    @staticmethod
    def backward(ctx: FunctionCtx, *gradients: Tensor) -> Tensor:
        return own_rows(all_reduce_sum(gradients[0].contiguous()), ctx.rows)  # type: ignore[attr-defined]
