"""The script as text: what a profile and a job ask for is there, and what would be a known bug is not."""

import re
import subprocess
from pathlib import Path

import pytest

from configs.errors import ConfigError
from configs.loader import load_config
from slurm.cluster import ClusterProfile, load_cluster, seconds
from slurm.job import Job, Resources, videomamba_command
from slurm.render import render
from slurm.show import EXAMPLES, PROFILES, example

PLAIN = {"gpus_per_node": 8, "cpus_per_node": 96, "memory_gb": 960, "time": "4:00:00"}


def cluster(**options):
    return ClusterProfile(**PLAIN | options)


def job(**options):
    settings = {"name": "t", "command": ("train", "a b"), "run": Path("/runs/t"), "workdir": Path("/work")}
    return Job(**settings | options)


def directives(script):
    lines = [line.removeprefix("#SBATCH --") for line in script.splitlines() if line.startswith("#SBATCH")]
    return {line.partition("=")[0]: line.partition("=")[2] for line in lines}


@pytest.mark.parametrize("profile", PROFILES)
def test_the_examples_are_what_the_renderer_gives(profile):
    kept = EXAMPLES / f"{profile}.sbatch"
    assert kept.read_text(encoding="utf-8") == example(profile), "renew them: python -P -m slurm.show"


def test_every_shipped_profile_has_its_example():
    assert {"plain", "pyxis", "apptainer", "norequeue"} <= set(PROFILES)
    assert {path.stem for path in EXAMPLES.glob("*.sbatch")} == set(PROFILES)


@pytest.mark.parametrize("profile", PROFILES)
def test_the_examples_are_bash(profile):
    done = subprocess.run(["bash", "-n", EXAMPLES / f"{profile}.sbatch"], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_whole_node_and_a_part_of_one():
    whole = directives(render(job(resources=Resources(nodes=3)), cluster()))
    assert (whole["nodes"], whole["ntasks-per-node"], whole["gpus-per-node"]) == ("3", "8", "8")
    assert (whole["cpus-per-task"], whole["mem"], whole["time"]) == ("12", "960G", "4:00:00")
    part = directives(render(job(resources=Resources(tasks_per_node=2, time="30:00")), cluster()))
    assert (part["gpus-per-node"], part["cpus-per-task"], part["mem"], part["time"]) == ("2", "12", "240G", "30:00")


def test_a_job_without_gpus_takes_what_goes_with_one_and_its_own_partition():
    said = directives(render(job(resources=Resources(gpus=False)), cluster(partition="g", cpu_partition="c")))
    assert "gpus-per-node" not in said
    assert (said["partition"], said["ntasks-per-node"], said["cpus-per-task"], said["mem"]) == ("c", "1", "12", "120G")
    without = directives(render(job(resources=Resources(gpus=False)), cluster(partition="g", gpus_per_node=0)))
    assert (without["partition"], without["cpus-per-task"], without["mem"]) == ("g", "96", "960G")


def test_what_a_profile_leaves_out_is_not_asked_for():
    said = directives(render(job(), cluster(memory_gb=None)))
    assert not {"partition", "account", "qos", "mem", "array", "dependency"} & said.keys()


def test_what_the_site_says_is_there():
    script = render(
        job(),
        cluster(
            partition="p",
            account="a",
            qos="q",
            setup=("module load cuda/12",),
            environment={"NCCL_DEBUG": "a b"},
            sbatch=("--exclusive", "--constraint=h100"),
            srun=("--mpi=none",),
        ),
    )
    said = directives(script)
    assert (said["partition"], said["account"], said["qos"], said["constraint"]) == ("p", "a", "q", "h100")
    assert "exclusive" in said
    assert "\nmodule load cuda/12\n" in script
    assert "\nexport NCCL_DEBUG='a b'\n" in script
    assert " --mpi=none " in script


@pytest.mark.parametrize(
    "rule",
    [
        "#SBATCH --signal=B:USR2@240",  # to the batch shell alone
        "#SBATCH --kill-on-invalid-dep=yes",
        "#SBATCH --gpus-per-node=8",
        "#SBATCH --requeue",
        "--kill-on-bad-exit=1",
        "--cpus-per-task=12 ",  # srun does not inherit it
        "--ntasks=$((SLURM_JOB_NUM_NODES * 8))",
        "${SLURM_RESTART_COUNT:-0}",  # unset on the first attempt
        'scontrol requeue "$SLURM_JOB_ID"',
        "export MASTER_ADDR=",
        "export MASTER_PORT=",
        "unset RANK LOCAL_RANK WORLD_SIZE",
    ],
)
def test_a_rule_is_followed(rule):
    assert rule in render(job(), cluster())


@pytest.mark.parametrize("bug", ["--gpus-per-task", "torchrun", "HOSTNAME"])
def test_a_known_bug_is_not_there(bug):
    assert bug not in render(job(), cluster())


def test_ports_differ_between_jobs_and_restarts_and_stay_below_the_ephemeral_ones():
    line = re.search(r"MASTER_PORT=(\$\(\(.*\)\))", render(job(), cluster()))[1]
    asked = [(number, restart) for number in (1, 2, 3, 77, 1234567, 67043328) for restart in ("", "1", "2", "50")]
    lines = "\n".join(f"SLURM_JOB_ID={n} SLURM_RESTART_COUNT={r}; echo {line}" for n, r in asked)
    ports = [int(port) for port in subprocess.run(["bash", "-c", lines], capture_output=True, text=True).stdout.split()]
    assert len(set(ports)) == len(asked)
    assert all(1024 < port < 32768 for port in ports)


def test_no_requeue_is_a_chain_of_singletons_named_after_the_run():
    first = directives(render(job(after=("5", "6")), cluster(requeue=False)))
    other = directives(render(job(run=Path("/runs/u")), cluster(requeue=False)))
    assert first["dependency"] == "afterok:5:6,singleton"
    assert other["dependency"] == "singleton"
    assert first["job-name"] != other["job-name"]
    assert "no-requeue" in first
    assert "scontrol requeue" not in render(job(), cluster(requeue=False)).replace("no_requeue", "")


def test_a_job_that_must_not_start_twice_is_not_requeued_by_slurm():
    assert "no-requeue" in directives(render(job(max_restarts=0), cluster()))


def test_an_array_puts_its_number_into_the_command_and_keeps_its_records_apart():
    script = render(job(array=4, at_once=2, command=("build", "--part=%a/4", "%a")), cluster())
    said = directives(script)
    assert said["array"] == "0-3%2"
    assert said["output"].endswith("/%A_%a.out")
    assert 'build --part="$SLURM_ARRAY_TASK_ID"/4 "$SLURM_ARRAY_TASK_ID"' in script
    assert 'PART="$SLURM_ARRAY_TASK_ID-"' in script


def test_containers_wrap_the_ranks_and_not_the_script():
    image = {"image": "/i/x.sqsh", "mounts": ["/data", "/a:/b"]}
    pyxis = render(job(), cluster(python="python3", container={"kind": "pyxis", **image}))
    assert "--container-image=/i/x.sqsh" in pyxis
    assert "--container-mounts=/runs/t:/runs/t,/work:/work,/data:/data,/a:/b" in pyxis
    apptainer = render(job(), cluster(python="python3", container={"kind": "apptainer", "options": ["--nv"], **image}))
    assert re.search(r"apptainer exec --bind /runs/t,/work,/data,/a:/b --pwd /work \\\s+--nv \\\s+/i/x.sqsh", apptainer)


def test_a_limit_that_ends_before_its_own_signal_is_refused():
    with pytest.raises(ConfigError, match="time limit of 00:04:00"):
        render(job(resources=Resources(time="00:04:00")), cluster())


def test_odd_paths_survive_the_shell_and_sbatch():
    script = render(job(run=Path("/runs/50% off/it's"), workdir=Path("/a b")), cluster())
    said = directives(script)
    assert said["output"] == '"/runs/50%% off/it\'s/slurm/logs/%j.out"'
    assert said["chdir"] == '"/a b"'
    assigned = script[script.index("\nRUN=") : script.index("\nWORK=")]
    done = subprocess.run(["bash", "-c", f'{assigned}\necho "$RUN"'], capture_output=True, text=True)
    assert done.stdout == "/runs/50% off/it's\n"


def test_videomamba_is_started_blind_to_the_working_directory():
    assert videomamba_command(cluster(python="py"), "pretrain", "x") == (
        "py",
        "-P",
        "-m",
        "videomamba",
        "pretrain",
        "x",
    )


def test_the_time_forms_of_slurm():
    forms = {"90": 5400, "1:30": 90, "4:00:00": 14400, "2-0": 172800, "1-2:30": 95400, "1-00:00:30": 86430}
    assert {form: seconds(form) for form in forms} == forms
    with pytest.raises(ValueError, match="no time limit"):
        seconds("4h")


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("time: 24:00:00", "Put it in quotes"),
        ("time: soon", "no time limit"),
        ("partitions: gpu", "Did you mean 'partition'"),
        ("sbatch: [exclusive]", "no option"),
        ("container: {kind: pyxis, image: x}\npython: null", "python is missing"),
        ("container: {kind: docker, image: x}", "'pyxis' or 'apptainer'"),
    ],
)
def test_a_wrong_profile_is_refused_in_words(tmp_path, line, said):
    path = tmp_path / "site.yaml"
    path.write_text(f"base: clusters/plain\n{line}\n")
    with pytest.raises(ConfigError, match=re.escape(said)):
        load_config(path, ClusterProfile)


def test_a_site_builds_on_a_shipped_profile(tmp_path):
    (tmp_path / "site.yaml").write_text("base: clusters/plain\npartition: mine\n")
    assert load_cluster(str(tmp_path / "site.yaml")).partition == "mine"
    with pytest.raises(ConfigError, match=r"no cluster 'plane'.*plain"):
        load_cluster("plane")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--nodes", "2"], "No cluster is named"),
        (["--cluster", "plane"], "There is no cluster 'plane'"),
        (["--cluster", "plain", "--nodes", "4-2"], "--nodes is '4-2'"),
        (["--cluster", "plain", "--time", "4h"], "'4h' is no time limit"),
    ],
)
def test_a_wrong_submission_is_refused_in_words(videomamba, arguments, said):
    done = videomamba("submit", "demo/stage1", *arguments, VIDEOMAMBA_CLUSTER="")
    assert done.returncode == 2
    assert said in done.stderr
    assert "Traceback" not in done.stderr


def test_a_run_that_was_never_submitted_has_no_status(videomamba, tmp_path):
    for command in ("status", "cancel"):
        done = videomamba(command, str(tmp_path))
        assert (done.returncode, "was not submitted" in done.stderr) == (2, True)
