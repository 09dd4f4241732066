"""The processes that share one evaluation: ranks that meet, started by --ranks, torchrun or srun.

They share nothing but the folder of embeddings, which all must see, and wait for one another twice. Parts of an array
(`--part 3/16`) do not even wait: a later command takes what they left.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import NamedTuple

from configs.errors import UserError
from data_pipeline.sources import Part
from pretrain.launch import World, find_world, meeting_point, rank_environment

PATIENCE = timedelta(days=7)
"""How long a rank waits for the others: as long as the longest share may take."""


class Crew(NamedTuple):
    """What is this process's to do, whether it is the first, and how it waits for the others."""

    part: Part
    first: bool = True
    wait: Callable[[], None] = lambda: None


@contextmanager
def crew(part: Part) -> Iterator[Crew]:
    """This process among its ranks, which share `part` among them; alone where no launcher says otherwise."""
    world = find_world()
    if world.size == 1:
        yield Crew(part)
        return
    import torch
    import torch.distributed as dist

    if torch.cuda.is_available():  # one GPU each, or the only one that the launcher shows to each
        torch.cuda.set_device(world.local_rank % torch.cuda.device_count())
    os.environ.update(rank_environment(world, *meeting_point(world)))
    dist.init_process_group("gloo", timeout=PATIENCE)

    def wait() -> None:
        try:
            dist.barrier()
        except RuntimeError as error:
            raise UserError("Another rank of this evaluation ended early.", "See what it said.", exit_code=1) from error

    try:
        yield Crew(share(part, world), world.first, wait)
    finally:
        dist.destroy_process_group()


def share(part: Part, world: World) -> Part:
    """What rank r of W takes of a part, as a part of the whole."""
    return Part((part.index - 1) * world.size + world.rank + 1, part.count * world.size)
