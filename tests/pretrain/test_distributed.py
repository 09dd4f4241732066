import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from configs.errors import UserError
from pretrain import launch
from pretrain.launch import World, find_world

ROOT = Path(__file__).parents[2]


def test_who_this_process_is():
    assert find_world({}) == World(0, 0, 1)
    torchrun = {"RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "4"}
    slurm = {"SLURM_PROCID": "5", "SLURM_LOCALID": "1", "SLURM_STEP_NUM_TASKS": "8"}
    one_a_node = {"SLURM_PROCID": "1", "SLURM_LOCALID": "0", "SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_ID": "0"}
    assert find_world(torchrun) == World(3, 1, 4)
    assert find_world(slurm) == World()  # the batch script itself, not a step of srun
    assert find_world(slurm | {"SLURM_STEP_ID": "0"}) == World(5, 1, 8)
    assert find_world(torchrun | one_a_node) == World(3, 1, 4)  # torchrun on each node
    assert World(0, 0, 2).first
    assert not World(1, 1, 2).first
    with pytest.raises(UserError, match="RANK=4 is no rank of 4"):
        find_world(torchrun | {"RANK": "4"})


SRUN = {"SLURM_STEP_ID": "0", "SLURM_PROCID": "5", "SLURM_LOCALID": "1", "SLURM_STEP_NUM_TASKS": "8"}


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        ({"RANK": "1", "LOCAL_RANK": "1"}, "WORLD_SIZE is not set"),
        ({"WORLD_SIZE": "4"}, "RANK is not set"),
        ({"RANK": "1", "WORLD_SIZE": "4"}, "LOCAL_RANK is not set"),
        ({"RANK": "", "LOCAL_RANK": "", "WORLD_SIZE": ""}, "must be numbers"),
        (SRUN | {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}, "srun started 8 tasks"),
        ({name: value for name, value in SRUN.items() if name != "SLURM_PROCID"}, "SLURM_PROCID is not set"),
    ],
)
def test_no_process_takes_itself_for_the_only_one(environment, said):
    with pytest.raises(UserError, match=said):
        find_world(environment)


def test_where_ranks_meet(monkeypatch):
    for name in list(os.environ):
        if name.startswith(("SLURM_", "MASTER_")):
            monkeypatch.delenv(name)
    address, port = launch.meeting_point(World())
    assert address == "127.0.0.1"
    assert port > 1023
    with pytest.raises(UserError, match="MASTER_ADDR and MASTER_PORT are not set"):
        launch.meeting_point(World(1, 1, 2))
    monkeypatch.setenv("HOSTNAME", "the-first-node")
    with pytest.raises(UserError, match="MASTER_ADDR and MASTER_PORT are not set"):
        launch.meeting_point(World(1, 0, 2))
    monkeypatch.setenv("MASTER_ADDR", "host")
    monkeypatch.setenv("MASTER_PORT", "5")
    assert launch.meeting_point(World(1, 1, 2)) == ("host", 5)


CONTRASTIVE = """
import os, sys, torch
import torch.distributed as dist
from torch.nn import functional as F
from pretrain import distributed as d
from pretrain.launch import World, free_port, rank_environment
from pretrain.losses import Cached, cached_gradients, contrastive_loss, replay

torch.manual_seed(0)
ROWS, IDENTITY = torch.randn(8, 4, dtype=torch.float64), torch.tensor([1, 2, 3, 1, 5, 6, 6, 6])
WEIGHT = torch.randn(4, 4, dtype=torch.float64)


def encode(rows, weight):
    return F.normalize(rows @ weight, dim=-1), F.normalize(rows.flip(1) @ weight, dim=-1)


def naive_loop(video, text, temp):
    # Every row against every column, both ways, by hand.
    total = 0
    for i in range(8):
        same = [j for j in range(8) if IDENTITY[j] == IDENTITY[i]]
        for ours, theirs in ((video, text), (text, video)):
            score = torch.stack([ours[i] @ theirs[j] / temp[0] for j in range(8)])
            total = total - sum(score[j] - score.logsumexp(0) for j in same) / len(same) / 2
    return total / 8


def whole_batch():
    weight, temp = WEIGHT.clone().requires_grad_(), torch.tensor([0.1], dtype=torch.float64, requires_grad=True)
    loss = naive_loop(*encode(ROWS, weight), temp)
    return [loss.detach(), *torch.autograd.grad(loss, [weight, temp])]


def in_parts(rank, ranks, parts):
    # A rank's loss and gradients, as the trainer takes them: a survey, and one graph a micro-batch.
    weight, temp = WEIGHT.clone().requires_grad_(), torch.tensor([0.1], dtype=torch.float64, requires_grad=True)
    mine = torch.arange(8).chunk(ranks)[rank]

    def loss_of(video, text, temp):
        everyone = d.gather_with_gradient(video), d.gather_with_gradient(text), temp
        return contrastive_loss(video, text, *everyone, IDENTITY[mine], d.gather_rows(IDENTITY[mine]))

    if parts == 1:
        value = loss_of(*encode(ROWS[mine], weight), temp)
        value.backward()
    else:
        with torch.no_grad():
            cached = cached_gradients(loss_of, *encode(ROWS[mine], weight), temp)
        value = cached.value
        for cut in torch.arange(len(mine)).chunk(parts):
            about = Cached(value, (cached.gradients[0][cut], cached.gradients[1][cut], cached.gradients[2] / parts))
            replay(about, [*encode(ROWS[mine][cut], weight), temp]).backward()
    return [value.detach(), weight.grad, temp.grad]


def one_rank(rank, ranks, parts):
    dist.init_process_group("gloo")
    got = [d.all_reduce_mean(value) for value in in_parts(rank, ranks, parts)]  # as DeepSpeed does to gradients
    for ours, theirs in zip(got, whole_batch(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)
    assert d.gather_objects(rank) == list(range(ranks))
    assert d.all_reduce_max(torch.tensor(rank)).item() == ranks - 1
    assert d.all_reduce_sum(torch.tensor(1)).item() == d.world_size() == ranks
    d.barrier()
    d.finish()


for ranks, parts in ((1, 4), (2, 2), (4, 1)):
    port, children = free_port(), []
    for rank in range(ranks):
        child = os.fork()
        if child == 0:
            os.environ.update(rank_environment(World(rank, rank, ranks), "127.0.0.1", port))
            try:
                one_rank(rank, ranks, parts)
            except BaseException:
                sys.excepthook(*sys.exc_info())
                os._exit(1)
            os._exit(0)
        children.append(child)
    assert not any([os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]), (ranks, parts)
"""


def test_the_contrastive_loss_is_that_of_the_whole_batch_however_it_is_cut():
    """Ranks x micro-batches of 1x4, 2x2 and 4x1: value, weights' and temperature's gradient, against the loop."""
    subprocess.run([sys.executable, "-c", CONTRASTIVE], check=True, cwd=ROOT, timeout=100)


LAUNCHER = """
import sys
from pretrain import launch
sys.executable, argv = sys.argv[1], sys.argv[2:]
sys.exit(launch.launch(2, argv))
"""


@pytest.fixture
def fake_rank(tmp_path: Path):
    """A program that stands for python: it runs the body with its rank, whatever its arguments."""

    def make(body: str) -> list[str]:
        program = tmp_path / "rank"
        body = textwrap.indent(textwrap.dedent(body), "")
        program.write_text(f"#!{sys.executable}\nimport os, pathlib, signal, sys, time\nrank = os.environ['RANK']\n"
                           f"here = pathlib.Path({str(tmp_path)!r})\n{body}")  # fmt: skip
        program.chmod(0o755)
        return [sys.executable, "-c", LAUNCHER, str(program)]

    return make


def test_a_rank_that_dies_ends_the_others(fake_rank, tmp_path):
    command = fake_rank("""
        (here / rank).write_text(str(os.getpid()))
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        if rank == '1':
            sys.exit(7)
        time.sleep(100)
    """)
    began = time.monotonic()
    assert subprocess.run(command, cwd=ROOT, timeout=60).returncode == 7
    assert time.monotonic() - began < 40
    assert not _alive(int((tmp_path / "0").read_text()))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR2])
def test_ranks_have_what_they_need_and_get_the_signal(fake_rank, tmp_path, number):
    """It is sent before a rank is ready for it; it waits for that, and kills nobody."""
    command = fake_rank(f"""
        names = ('RANK', 'LOCAL_RANK', 'WORLD_SIZE', 'MASTER_ADDR', 'MASTER_PORT')
        (here / f'{{rank}}.part').write_text(' '.join([*sys.argv[1:], *(os.environ[name] for name in names)]))
        (here / f'{{rank}}.part').rename(here / rank)
        while {int(number)} not in signal.sigpending():
            time.sleep(0.01)
        signal.signal({int(number)}, lambda *_: sys.exit(9))
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [{int(number)}])
        time.sleep(100)
    """)
    process = subprocess.Popen([*command, "pretrain", "x"], cwd=ROOT)
    deadline = time.monotonic() + 60
    while not all((tmp_path / rank).exists() for rank in "01") and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(number)
    assert process.wait(timeout=60) == 9
    said = [(tmp_path / rank).read_text().split() for rank in "01"]
    assert [words[:8] for words in said] == [
        ["-P", "-m", "videomamba", "pretrain", "x", rank, rank, "2"] for rank in "01"
    ]
    assert said[0][8:] == said[1][8:]


def test_no_rank_outlives_a_killed_launcher(fake_rank, tmp_path):
    command = fake_rank("""
        (here / f'{rank}.part').write_text(str(os.getpid()))
        (here / f'{rank}.part').rename(here / rank)
        time.sleep(100)
    """)
    process = subprocess.Popen(command, cwd=ROOT)
    deadline = time.monotonic() + 60
    while not all((tmp_path / rank).exists() for rank in "01") and time.monotonic() < deadline:
        time.sleep(0.05)
    process.kill()
    process.wait()
    for rank in "01":
        number = int((tmp_path / rank).read_text())
        while _alive(number) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not _alive(number)


def _alive(number: int) -> bool:
    """Whether a process runs; one that waits to be collected by init does not."""
    try:
        return Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
