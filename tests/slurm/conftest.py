"""A real Slurm cluster for the slow tests, and jobs on it."""

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from slurm.cluster import ClusterProfile, load_cluster
from slurm.job import Job, Resources
from slurm.submit import prepare, submit
from tests.pretrain.conftest import Runs, corpora, stage1_tree, stage2_tree, teacher_folder
from tests.slurm.packages import find_slurm
from tests.slurm.throwaway import Cluster

__all__ = ["corpora", "stage1_tree", "stage2_tree", "teacher_folder"]  # a small world for training, as fixtures

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def started_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """The cluster of this session; `cluster` hands it out clean."""
    programs = find_slurm(tmp_path_factory.mktemp("slurm-packages"))
    cluster = Cluster(tmp_path_factory.mktemp("slurm-cluster"), programs)
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()


@pytest.fixture
def cluster(started_cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    """A quiet cluster of three nodes with 8 pretended GPUs each, which our commands find."""
    for name, value in started_cluster.environment.items():
        monkeypatch.setenv(name, value)
    for name in list(os.environ):
        if name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
            monkeypatch.delenv(name)
    try:
        yield started_cluster
    finally:
        started_cluster.clean()


@pytest.fixture
def site(tmp_path: Path) -> Callable[..., Path]:
    """`site(**options)`: the YAML of a site that is this cluster, with two GPUs a node and quick signals."""

    def write(name: str = "site", **options: Any) -> Path:
        tree = {
            "partition": "gpu",
            "gpus_per_node": 2,
            "cpus_per_node": 8,
            "memory_gb": 16,
            "time": "00:15:00",
            "signal_lead": 40,
            "max_restarts": 8,
            "environment": {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        }
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump(tree | options))
        return path

    return write


@pytest.fixture
def profile(site: Callable[..., Path]) -> Callable[..., ClusterProfile]:
    """`profile(**options)`: that site, loaded."""
    return lambda **options: load_cluster(str(site(**options)))


@pytest.fixture
def start(cluster: Cluster, tmp_path: Path) -> Callable[..., str]:
    """`start(profile, run, *command, **job options)` submits; the resources are two tasks on one node unless given."""

    def begin(profile: ClusterProfile, run: Path, *command: str, **options: Any) -> str:
        options = {"name": run.name, "resources": Resources(), "workdir": tmp_path, **options}
        job = Job(command=command, run=run, **options)
        prepare(run)
        return submit(job, profile)

    return begin


@pytest.fixture
def stand_in() -> tuple[str, ...]:
    """A command that keeps the contract of a training run, and costs nothing: see stand_in.py."""
    return (sys.executable, "-P", str(Path(__file__).with_name("stand_in.py")))


@pytest.fixture
def runs(tmp_path: Path) -> Runs:
    """Training runs in this test's own folder."""
    return Runs(tmp_path)


@pytest.fixture(scope="session")
def runs_in() -> type[Runs]:
    """`runs_in(folder)`: training runs in a folder that outlives a test."""
    return Runs
