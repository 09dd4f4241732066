"""What a site is, as a typed profile: everything that differs between clusters stands in one YAML file of it.

docs/slurm.md describes every field; `configs/clusters/` holds the shipped ones.
"""

import re
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from configs.errors import ConfigError
from configs.loader import PACKAGED, Frozen, find_config, load_config

WALL_TIME = re.compile(r"(?:(?P<days>\d+)-)?(?P<first>\d+)(?::(?P<second>\d+))?(?::(?P<third>\d+))?$")


def seconds(time: str) -> int:
    """A time limit in Slurm's forms (M, M:S, H:M:S, D-H, D-H:M, D-H:M:S) in seconds; ValueError for any other."""
    found = WALL_TIME.match(time)
    if not found:
        raise ValueError(f"'{time}' is no time limit. Write it as 4:00:00 or 1-00:00:00, in quotes.")
    days, first, second, third = (int(found[name] or 0) for name in ("days", "first", "second", "third"))
    if found["days"] is not None:
        return ((days * 24 + first) * 60 + second) * 60 + third
    if found["third"] is not None:
        return (first * 60 + second) * 60 + third
    return first * 60 + second


class Container(Frozen):
    """The image that ranks run in; the batch script itself stays outside it.

    `mounts` are folders, or FROM:TO; the run folder and the working directory are always there. `options` go to
    `srun` (pyxis) or to `apptainer exec` as they are.
    """

    kind: Literal["pyxis", "apptainer"]
    image: str
    mounts: tuple[str, ...] = ()
    options: tuple[str, ...] = ()


class ClusterProfile(Frozen):
    """One site. Sizes are those of a node; a job that takes a part of a node asks for that part of them.

    `cpu_partition` is for jobs without a GPU. `memory_gb` null leaves memory to the cluster. `setup` are lines of
    shell before the ranks start. `python` is the interpreter there (null: the one that submits). `requeue` says
    whether jobs may requeue themselves; without that right a chain of singletons is submitted. `signal_lead` is the
    time for saving before a limit, plus 60 s. `sbatch` and `srun` are further options of those commands.
    """

    partition: str | None = None
    cpu_partition: str | None = None
    account: str | None = None
    qos: str | None = None
    gpus_per_node: int = Field(ge=0)
    cpus_per_node: int = Field(ge=1)
    memory_gb: int | None = Field(None, ge=1)
    time: str
    setup: tuple[str, ...] = ()
    python: str | None = None
    container: Container | None = None
    environment: dict[str, str] = {}
    requeue: bool = True
    max_restarts: int = Field(100, ge=0)
    signal_lead: int = Field(240, ge=20)
    sbatch: tuple[str, ...] = ()
    srun: tuple[str, ...] = ()

    @field_validator("time", mode="before")
    @classmethod
    def _quoted(cls, value: Any) -> Any:
        if isinstance(value, int):  # YAML reads 24:00:00 as a number to the base 60
            raise ValueError(f"time was read as the number {value}. Put it in quotes: '24:00:00'.")
        return value

    @field_validator("time")
    @classmethod
    def _is_a_time(cls, value: str) -> str:
        seconds(value)
        return value

    @field_validator("sbatch", "srun")
    @classmethod
    def _are_options(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for option in value:
            if not option.startswith("-"):
                raise ValueError(f"'{option}' is no option. Write it as --name=value.")
        return value

    @model_validator(mode="after")
    def _python_of_a_container(self) -> Self:
        if self.container is not None and self.python is None:
            raise ValueError("python is missing, and this one is not in the container. Give python, such as python3.")
        return self


def load_cluster(name: str) -> ClusterProfile:
    """The profile of a site: a YAML file, or the name of a packaged one (`plain` is configs/clusters/plain.yaml).

    Raises ConfigError for a file that is not there or a key that is wrong.
    """
    path = Path(name)
    if not path.is_file() and (PACKAGED / "clusters" / f"{name}.yaml").is_file():
        path = PACKAGED / "clusters" / f"{name}.yaml"
    elif not path.is_file():
        shipped = ", ".join(sorted(file.stem for file in (PACKAGED / "clusters").glob("*.yaml")))
        raise ConfigError(f"There is no cluster '{name}'.", f"Give the YAML of your site, or one of: {shipped}.")
    return load_config(find_config(path), ClusterProfile)
