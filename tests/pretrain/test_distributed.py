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
    slurm = {"SLURM_PROCID": "5", "SLURM_LOCALID": "1", "SLURM_NTASKS": "8"}
    assert find_world(torchrun) == World(3, 1, 4)
    assert find_world(slurm) == World()  # the batch script itself, not a step of srun
    assert find_world(slurm | {"SLURM_STEP_ID": "0"}) == World(5, 1, 8)
    assert find_world(torchrun | slurm | {"SLURM_STEP_ID": "0"}) == World(3, 1, 4)
    assert World(0, 0, 2).first
    assert not World(1, 1, 2).first
    with pytest.raises(UserError, match="RANK=4 is no rank of 4"):
        find_world(torchrun | {"RANK": "4"})


def test_where_ranks_meet(monkeypatch):
    for name in list(os.environ):
        if name.startswith(("SLURM_", "MASTER_")):
            monkeypatch.delenv(name)
    address, port = launch.meeting_point(World())
    assert address == "127.0.0.1"
    assert port > 1023
    with pytest.raises(UserError, match="MASTER_ADDR and MASTER_PORT are not set"):
        launch.meeting_point(World(1, 1, 2))
    monkeypatch.setenv("SLURM_JOB_ID", "123456")
    for nodes, first in (
        ("gpu[003-005,9],big1", "gpu003"),
        ("big1,gpu[1-2]", "big1"),
        ("solo", "solo"),
        ("n[7,9]", "n7"),
    ):
        monkeypatch.setenv("SLURM_STEP_NODELIST", nodes)
        assert launch.meeting_point(World(1, 0, 2)) == (first, 20000 + 123456 % 20000)
    monkeypatch.setenv("MASTER_ADDR", "host")
    monkeypatch.setenv("MASTER_PORT", "5")
    assert launch.meeting_point(World(1, 1, 2)) == ("host", 5)


CONTRASTIVE = """
import os, sys, torch
from pretrain.launch import World, free_port, rank_environment

port = free_port()
child = os.fork()
rank = 0 if child else 1
os.environ.update(rank_environment(World(rank, rank, 2), "127.0.0.1", port))
import torch.distributed as dist
dist.init_process_group("gloo")
from pretrain import distributed as d
from pretrain.losses import contrastive_loss
from torch.nn import functional as F

def loss_of(video, text, identity, gather):
    video, text = F.normalize(video, dim=-1), F.normalize(text, dim=-1)
    everyone = (gather(video), gather(text))
    ids = d.gather_rows(identity) if gather is d.gather_with_gradient else identity
    return contrastive_loss(video, text, *everyone, torch.tensor([0.1]), identity, ids)

torch.manual_seed(0)
rows, identity = torch.randn(6, 4), torch.tensor([1, 2, 3, 1, 5, 6])
weight = torch.randn(4, 4, requires_grad=True)
whole = loss_of(rows @ weight, rows.flip(1) @ weight, identity, lambda x: x)
expected, = torch.autograd.grad(whole, weight)

mine = slice(3 * rank, 3 * rank + 3)
part = loss_of(rows[mine] @ weight, rows[mine].flip(1) @ weight, identity[mine], d.gather_with_gradient)
got, = torch.autograd.grad(part, weight)
torch.testing.assert_close(d.all_reduce_mean(part), whole.detach())
torch.testing.assert_close(d.all_reduce_mean(got), expected)  # what DeepSpeed does to gradients
assert d.gather_objects(rank) == [0, 1]
assert d.all_reduce_max(torch.tensor(rank)).item() == 1
assert d.all_reduce_sum(torch.tensor(1)).item() == d.world_size() == 2
dist.barrier(); dist.destroy_process_group()
if child:
    sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


def test_the_gathered_contrastive_loss_has_the_whole_batchs_gradient():
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


def test_ranks_have_what_they_need_and_get_the_signal(fake_rank, tmp_path):
    command = fake_rank("""
        def stop(*_):
            sys.exit(143)
        signal.signal(signal.SIGTERM, stop)
        names = ('RANK', 'LOCAL_RANK', 'WORLD_SIZE', 'MASTER_ADDR', 'MASTER_PORT')
        (here / f'{rank}.part').write_text(' '.join([*sys.argv[1:], *(os.environ[name] for name in names)]))
        (here / f'{rank}.part').rename(here / rank)
        time.sleep(100)
    """)
    process = subprocess.Popen([*command, "pretrain", "x"], cwd=ROOT)
    deadline = time.monotonic() + 60
    while not all((tmp_path / rank).exists() for rank in "01") and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == 143
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
