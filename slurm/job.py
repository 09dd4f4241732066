"""What is to run, as a value: a command line, what it asks for, and the run folder that remembers it."""

import os
import sys
from pathlib import Path
from typing import Self

from pydantic import Field, field_validator, model_validator

from configs.loader import Frozen
from slurm.cluster import ClusterProfile, seconds

PART = "%a"
"""In a command: the number of this element of an array, as Slurm writes it in file names."""


class Resources(Frozen):
    """What a job asks for; None takes the cluster's own.

    One task is one process: one a GPU, or with `gpus` false one a node. With `min_nodes` below `nodes` Slurm may start,
    or restart, the job on fewer.
    """

    nodes: int = Field(1, ge=1)
    min_nodes: int | None = Field(None, ge=1)
    tasks_per_node: int | None = Field(None, ge=1)
    gpus: bool = True
    cpus_per_task: int | None = Field(None, ge=1)
    memory_gb: int | None = Field(None, ge=1)
    time: str | None = None

    @field_validator("time")
    @classmethod
    def _is_a_time(cls, value: str | None) -> str | None:
        if value is not None:
            seconds(value)
        return value

    @model_validator(mode="after")
    def _range_of_nodes(self) -> Self:
        if self.min_nodes is not None and self.min_nodes > self.nodes:
            raise ValueError(f"min_nodes {self.min_nodes} is above nodes {self.nodes}. Lower it, or leave it out.")
        return self

    def tasks_on(self, cluster: ClusterProfile) -> int:
        """Tasks on every node: as asked, else one for each of the cluster's GPUs, else one."""
        return self.tasks_per_node or (cluster.gpus_per_node if self.gpus else 0) or 1


class Job(Frozen):
    """A command, started as many times at once as there are tasks, and started again until its work is done.

    `command` is an argument list (`videomamba_command` makes one); `run` its run folder and `workdir` the folder it
    starts in, both absolute; `code` the folder of our packages (a snapshot), put on PYTHONPATH. `mounts` are folders
    that a container has to see beside the run folder and the working directory. `after` are job
    ids that must have succeeded. `array` starts that many elements, numbered from 0, `at_once` of them at a time;
    `%a` in the command stands for the number. `done` is a file whose being there says that the work is done
    (None: done.json in the run folder). `max_restarts` 0 never starts it again (None: the cluster's limit).
    """

    name: str = Field(pattern=r"^[A-Za-z0-9._-]+$")
    command: tuple[str, ...] = Field(min_length=1)
    run: Path
    workdir: Path
    code: Path | None = None
    mounts: tuple[Path, ...] = ()
    resources: Resources = Resources()
    after: tuple[str, ...] = ()
    array: int | None = Field(None, ge=1)
    at_once: int | None = Field(None, ge=1)
    done: Path | None = None
    max_restarts: int | None = Field(None, ge=0)

    @field_validator("run", "workdir", "code", "done")
    @classmethod
    def _absolute(cls, value: Path | None) -> Path | None:
        if value is not None and not value.is_absolute():
            raise ValueError(f"{value} is not absolute, and a job starts elsewhere. Give the whole path.")
        return value

    @property
    def work(self) -> Path:
        """The folder of the script, its logs and its records."""
        return self.run / "slurm"


def videomamba_command(cluster: ClusterProfile, *arguments: str) -> tuple[str, ...]:
    """`videomamba ARGUMENTS` as the ranks start it: by the site's Python, blind to the working directory."""
    return (cluster.python or sys.executable, "-P", "-m", "videomamba", *arguments)


def absolute(path: str | os.PathLike[str]) -> Path:
    """`path` from the root, links left as they are: what a link says on all nodes may lead elsewhere here."""
    return Path(os.path.abspath(path))  # noqa: PTH100 - resolve() would follow links
