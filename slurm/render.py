"""A job and a cluster become one sbatch script, readable as it stands. Pure: nothing is read but job.sh beside this.

The rules behind each line are in docs/slurm.md; each has its test on a real cluster (tests/slurm/).
"""

import shlex
from pathlib import Path

from configs.errors import ConfigError
from configs.loader import digest
from slurm.cluster import ClusterProfile, seconds
from slurm.job import PART, Job

BODY = Path(__file__).with_name("job.sh")

TRAPS = """\
# Slurm's signal before the time limit comes to this shell alone: in the ranks it would kill data workers and launchers.
# It becomes a file that rank 0 looks for at every step.
was_asked=0
[[ -e $STOP ]] && was_asked=1
rm -f "$STOP" "$HUNG"
trap 'touch "$STOP"' USR2 TERM

say() { printf '%(%F %T)T %s\\n' -1 "$*"; }

# Ranks that do not leave of themselves are told by TERM, and then ended, while there is time to go on.
watch_the_stop() {
  until [[ -e $STOP ]]; do sleep 2; done
  say "asked to stop"
  sleep $((SIGNAL_LEAD / 2))
  scancel --signal=TERM "$SLURM_JOB_ID"
  sleep $((SIGNAL_LEAD / 4))
  touch "$HUNG"
  scancel --signal=KILL "$SLURM_JOB_ID"
}
"""

REQUEUE = """\
# Started again later: the job goes back into the queue under its own id. Exit codes do not requeue a job, this does.
continue_later() {
  # What is being ended already stays so: scancel would be undone, and a preempted job is requeued by Slurm itself.
  local state
  state=$(scontrol show job --oneliner "$SLURM_JOB_ID")
  if [[ $state != *JobState=RUNNING* && $state != *Reason=TimeLimit* ]]; then
    say "Slurm is ending this job; it is left to that"
    exit 130
  fi
  for pause in 1 5 15 30; do
    scontrol requeue "$SLURM_JOB_ID" && exit 0
    sleep "$pause"
  done
  give_up "scontrol requeue failed" 1 no_requeue
}
"""

CHAIN = """\
# Started again later: this job may not requeue itself, the next of the chain goes on. 75: not finished, try later.
continue_later() { exit 75; }
"""


def render(job: Job, cluster: ClusterProfile) -> str:
    """The sbatch script of `job` on `cluster`. Raises ConfigError where the time limit ends before its own signal."""
    limit = job.resources.time or cluster.time
    if seconds(limit) <= cluster.signal_lead:
        raise ConfigError(
            f"A time limit of {limit} leaves nothing: the signal to save comes {cluster.signal_lead} s before it.",
            "Ask for more time, or lower signal_lead in the cluster's YAML.",
        )
    parts = [
        "#!/usr/bin/env bash\n",
        f"# {job.name}, as `videomamba submit` wrote it; `sbatch` takes it as it stands.\n",
        *(f"#SBATCH {line}\n" for line in _directives(job, cluster)),
        "\n",
        _places(job, cluster),
        "\n",
        TRAPS,
        "\n",
        _environment(job, cluster),
        "\n",
        _ranks(job, cluster),
        "\n",
        REQUEUE if cluster.requeue else CHAIN,
        "\n",
        BODY.read_text(encoding="utf-8"),
    ]
    return "".join(parts)


def max_restarts(job: Job, cluster: ClusterProfile) -> int:
    """How often the job may be started again: its own limit, else the cluster's."""
    return cluster.max_restarts if job.max_restarts is None else job.max_restarts


def _shares(job: Job, cluster: ClusterProfile) -> int:
    """Into how many parts a node is cut: a task takes what goes with a GPU, or without GPUs its part of the node."""
    return max(cluster.gpus_per_node, job.resources.tasks_on(cluster))


def cpus_per_task(job: Job, cluster: ClusterProfile) -> int:
    """CPUs of a task: as asked, else its share of a node's."""
    return job.resources.cpus_per_task or max(1, cluster.cpus_per_node // _shares(job, cluster))


def job_name(job: Job, cluster: ClusterProfile) -> str:
    """The job's name in the queue; in a chain, where equal names wait for one another, it is this run's alone."""
    return job.name if cluster.requeue else f"{job.name}-{digest({'run': str(job.run)})[:6]}"


def after(job: Job) -> list[str]:
    """What must have succeeded before the job starts, as a condition of --dependency; none for none."""
    return [f"afterok:{':'.join(job.after)}"] if job.after else []


def _directives(job: Job, cluster: ClusterProfile) -> list[str]:
    """The lines that sbatch reads."""
    asked, tasks = job.resources, job.resources.tasks_on(cluster)
    # A number of tasks would tie a range to its upper end: Slurm counts them for the most nodes, and keeps the count.
    ranged = asked.min_nodes not in (None, asked.nodes)
    nodes = f"{asked.min_nodes}-{asked.nodes}" if ranged else str(asked.nodes)
    memory = asked.memory_gb or (cluster.memory_gb and max(1, cluster.memory_gb * tasks // _shares(job, cluster)))
    restarts = cluster.requeue and max_restarts(job, cluster) > 0
    conditions = after(job) + ([] if cluster.requeue or job.array else ["singleton"])
    options: list[tuple[str, object]] = [
        ("job-name", job_name(job, cluster)),
        ("partition", cluster.partition if asked.gpus else cluster.cpu_partition or cluster.partition),
        ("account", cluster.account),
        ("qos", cluster.qos),
        ("nodes", nodes),
        ("ntasks-per-node", None if ranged else tasks),
        ("mincpus", tasks * cpus_per_task(job, cluster) if ranged else None),
        # Never --gpus-per-task: it hides a rank's neighbours from NCCL.
        ("gpus-per-node", tasks if asked.gpus and cluster.gpus_per_node else None),
        ("cpus-per-task", None if ranged else cpus_per_task(job, cluster)),
        ("mem", memory and f"{memory}G"),
        ("time", asked.time or cluster.time),
        ("array", _array(job)),
        ("dependency", ",".join(conditions) or None),
        ("chdir", job.workdir),
        ("output", _pattern(job.work / "logs") + ("/%A_%a.out" if job.array else "/%j.out")),
        ("signal", f"B:USR2@{cluster.signal_lead}"),
    ]
    lines = [f"--{name}={_quoted(str(value))}" for name, value in options if value is not None]
    lines.append("--open-mode=append")
    lines.append("--requeue" if restarts else "--no-requeue")
    lines.append("--kill-on-invalid-dep=yes")  # or a job whose parent failed would wait for ever
    return [*lines, *cluster.sbatch]


def _array(job: Job) -> str | None:
    if job.array is None:
        return None
    return f"0-{job.array - 1}" + (f"%{job.at_once}" if job.at_once else "")


def _pattern(path: Path) -> str:
    """A path in one of Slurm's file names, where % begins a pattern."""
    return str(path).replace("%", "%%")


def _quoted(value: str) -> str:
    """A value in a line that sbatch, not a shell, reads."""
    return f'"{value}"' if any(letter.isspace() for letter in value) else value


def _places(job: Job, cluster: ClusterProfile) -> str:
    """The script's variables: where things are, and how patient it is."""
    part = "" if job.array is None else "$SLURM_ARRAY_TASK_ID-"
    done = job.run / "done.json" if job.done is None else job.done
    return (
        f"RUN={shlex.quote(str(job.run))} # what is remembered is remembered here, under no job's id\n"
        f"WORK=$RUN/slurm\n"
        f'PART="{part}"\n'
        f"DONE={shlex.quote(str(done))}\n"
        "FINISHED=$WORK/${PART}finished ATTEMPTS=$WORK/${PART}attempts.tsv CANCELLED=$WORK/cancelled\n"
        "STOP=$WORK/${PART}stop HUNG=$WORK/${PART}hung UNFINISHED=$WORK/${PART}unfinished\n"
        f"MAX_RESTARTS={max_restarts(job, cluster)} SIGNAL_LEAD={cluster.signal_lead}\n"
    )


def _environment(job: Job, cluster: ClusterProfile) -> str:
    """The site's own lines, and what the ranks find in their environment."""
    lines = ["# The site's own preparation.", *cluster.setup] if cluster.setup else []
    lines.append(f"export OMP_NUM_THREADS={cpus_per_task(job, cluster)}")
    lines += [f"export {name}={shlex.quote(value)}" for name, value in cluster.environment.items()]
    if job.code is not None:
        lines.append(f"export PYTHONPATH={shlex.quote(str(job.code))} # as submitted: later edits do not change a run")
    lines.append("export PYTHONUNBUFFERED=1")
    lines.append('export VIDEOMAMBA_STOP_FILE="$STOP" VIDEOMAMBA_UNFINISHED_FILE="$UNFINISHED"')
    return "\n".join(lines) + "\n"


def _ranks(job: Job, cluster: ClusterProfile) -> str:
    """The function that starts one process a task on all nodes, and ends all when one fails."""
    tasks = job.resources.tasks_on(cluster)
    words = [
        "srun",
        '--nodes="$SLURM_JOB_NUM_NODES"',
        f"--ntasks=$((SLURM_JOB_NUM_NODES * {tasks}))",
        f"--ntasks-per-node={tasks}",
        f"--cpus-per-task={cpus_per_task(job, cluster)}",
        "--kill-on-bad-exit=1",
        "--export=ALL",
        '--output="${LOGS//%/%%}/rank%t.log"',
        *(shlex.quote(option) for option in cluster.srun),
        *_container(job, cluster),
    ]
    command = " ".join(_word(argument) for argument in job.command)
    return (
        "# One process a task: srun says which rank each is, and ends all when one fails. It hands on no CPUs untold.\n"
        "start_ranks() {\n  " + " \\\n    ".join([*words, command, '2>"$LOGS/srun.log"']) + "\n}\n"
    )


def _container(job: Job, cluster: ClusterProfile) -> list[str]:
    """The words between srun and the command that put the command into an image."""
    container = cluster.container
    if container is None:
        return []
    mounts = list(dict.fromkeys([str(job.run), str(job.workdir), *map(str, job.mounts), *container.mounts]))
    options = [shlex.quote(option) for option in container.options]
    image, workdir = shlex.quote(container.image), shlex.quote(str(job.workdir))
    if container.kind == "pyxis":
        pairs = ",".join(mount if ":" in mount else f"{mount}:{mount}" for mount in mounts)
        inside = [f"--container-image={image}", f"--container-mounts={shlex.quote(pairs)}"]
        return [*inside, f"--container-workdir={workdir}", *options]
    binds = ",".join(mounts)
    return [f"apptainer exec --bind {shlex.quote(binds)} --pwd {workdir}", *options, image]


def _word(argument: str) -> str:
    """An argument for the shell, the array's number in the place of %a."""
    pieces = [shlex.quote(piece) if piece else "" for piece in argument.split(PART)]
    return '"$SLURM_ARRAY_TASK_ID"'.join(pieces) or "''"
