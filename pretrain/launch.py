"""Ranks as processes: who this process is, and how ranks are started on this machine. Nothing here imports torch."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from configs.errors import UserError
from configs.processes import die_with_parent
from pretrain.stopping import POLITE


@dataclass(frozen=True)
class World:
    """This process among the others of one run."""

    rank: int = 0
    local_rank: int = 0
    size: int = 1

    @property
    def first(self) -> bool:
        """Whether this is rank 0, which writes what is written once."""
        return self.rank == 0


def find_world(environment: Mapping[str, str] = os.environ) -> World:
    """Who this process is: torchrun's variables (RANK, ...), else Slurm's (SLURM_PROCID, ...), else alone.

    Slurm's are used only inside a step that `srun` started (SLURM_STEP_ID): a batch script's own shell has some of
    them too, and is no rank. Raises UserError where variables are missing or disagree: several processes that each
    take themselves for the only one would write over one another's run.
    """
    given = _world(("RANK", "LOCAL_RANK", "WORLD_SIZE"), environment)
    step = None
    if "SLURM_STEP_ID" in environment:
        step = _world(("SLURM_PROCID", "SLURM_LOCALID", "SLURM_STEP_NUM_TASKS"), environment)
    if given is not None and step is not None and given.size < step.size:
        raise UserError(
            f"RANK={given.rank} and WORLD_SIZE={given.size} are set, but srun started {step.size} tasks.",
            "Unset RANK, LOCAL_RANK and WORLD_SIZE before srun, or start one torchrun a node.",
        )
    return given or step or World()


def _world(names: tuple[str, str, str], environment: Mapping[str, str]) -> World | None:
    """The world that the variables `names` (rank, local rank, size) say, None where none is set."""
    missing = [name for name in names if name not in environment]
    if len(missing) == len(names):
        return None
    if missing:
        raise UserError(f"Of {', '.join(names)}, {missing[0]} is not set.", "Set all three, or none of them.")
    try:
        rank, local, size = (int(environment[name]) for name in names)
    except ValueError as error:
        said = ", ".join(f"{name}={environment[name]!r}" for name in names)
        raise UserError(f"{said}: these must be numbers.", "Mend the launcher's variables, or unset them.") from error
    if not 0 <= rank < size:
        raise UserError(f"{names[0]}={rank} is no rank of {size} ({names[2]}).", "Mend the launcher's variables.")
    return World(rank, local, size)


def free_port() -> int:
    """A TCP port of this machine that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def rank_environment(world: World, address: str, port: int) -> dict[str, str]:
    """The five variables that tell a process its rank."""
    return {
        "RANK": str(world.rank),
        "LOCAL_RANK": str(world.local_rank),
        "WORLD_SIZE": str(world.size),
        "MASTER_ADDR": address,
        "MASTER_PORT": str(port),
    }


def meeting_point(world: World) -> tuple[str, int]:
    """The address and port at which the ranks meet: what is set, or for one process alone a free port.

    Nothing is made up for several: under Slurm the batch script says both, since HOSTNAME is the first node's on all
    ranks, and since only the script knows a port that no other job and no earlier start has used.
    """
    if "MASTER_ADDR" in os.environ and "MASTER_PORT" in os.environ:
        return os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    if world.size == 1:
        return "127.0.0.1", free_port()
    raise UserError(
        f"This is rank {world.rank} of {world.size}, but MASTER_ADDR and MASTER_PORT are not set.",
        "Start the ranks with --ranks, torchrun or `videomamba submit`, or set both: the first node, and a free port.",
    )


def launch(ranks: int, arguments: Sequence[str]) -> int:
    """Start `ranks` local processes of `videomamba ARGUMENTS` and wait; returns the exit code of the run.

    The first rank that fails ends the others. Ctrl-C, TERM and USR2 are passed on, so that every rank can save: a
    rank starts with the last two held back, and must let them in (`stopping.listening`) when it is ready for them.
    """
    port = free_port()
    command = [sys.executable, "-P", "-m", "videomamba", *arguments]
    processes: list[subprocess.Popen[bytes]] = []

    def forward(number: int, _: Any) -> None:
        for process in processes:
            # Ctrl-C in a terminal reaches the children by itself, as members of our process group.
            if process.poll() is None and not (number == signal.SIGINT and sys.stdin.isatty()):
                process.send_signal(number)

    previous = {number: signal.signal(number, forward) for number in (signal.SIGINT, *POLITE)}
    signal.pthread_sigmask(signal.SIG_BLOCK, POLITE)  # what comes now is passed on when there are ranks to have it
    try:
        for rank in range(ranks):
            environment = {**os.environ, **rank_environment(World(rank, rank, ranks), "127.0.0.1", port)}
            processes.append(subprocess.Popen(command, env=environment, preexec_fn=die_with_parent))
        signal.pthread_sigmask(signal.SIG_UNBLOCK, POLITE)
        return _wait(processes)
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, POLITE)
        for process in processes:
            if process.poll() is None:
                process.kill()
            process.wait()
        for number, handler in previous.items():
            signal.signal(number, handler)


def _wait(processes: list["subprocess.Popen[bytes]"], grace: float = 5.0) -> int:
    """The first exit code that is not 0, after the rest had `grace` seconds to leave by themselves."""
    while True:
        codes = [process.poll() for process in processes]
        failed = [code for code in codes if code]
        if failed:
            deadline = time.monotonic() + grace
            while any(p.poll() is None for p in processes) and time.monotonic() < deadline:
                time.sleep(0.05)
            for process in processes:
                if process.poll() is None:
                    process.kill()
            return failed[0] if failed[0] > 0 else 128 - failed[0]
        if all(code == 0 for code in codes):
            return 0
        time.sleep(0.05)
