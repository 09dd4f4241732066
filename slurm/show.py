"""The scripts in slurm/examples/, one for each shipped profile, to be read; `python -P -m slurm.show` renews them."""

from pathlib import Path

from configs.loader import PACKAGED
from slurm.cluster import load_cluster
from slurm.job import Job, Resources, videomamba_command
from slurm.render import render

EXAMPLES = Path(__file__).with_name("examples")
PROFILES = tuple(sorted(path.stem for path in (PACKAGED / "clusters").glob("*.yaml")))
RUN = Path("/shared/runs/stage1")


def example(profile: str) -> str:
    """The script of a stage-1 run on two nodes of a shipped profile."""
    cluster = load_cluster(profile)
    if cluster.python is None:  # otherwise it would be the one of whoever renews the examples
        cluster = cluster.model_copy(update={"python": "/shared/videomamba/.venv/bin/python"})
    job = Job(
        name="stage1",
        command=videomamba_command(cluster, "pretrain", str(RUN / "slurm" / "config.yaml")),
        run=RUN,
        workdir=Path("/shared/videomamba"),
        code=RUN / "slurm" / "code",
        resources=Resources(nodes=2),
    )
    return render(job, cluster)


if __name__ == "__main__":
    for name in PROFILES:
        (EXAMPLES / f"{name}.sbatch").write_text(example(name), encoding="utf-8")
