"""A throw-away Slurm cluster: a real controller and several real node daemons, all on loopback, none of them root's.

Nodes are called 0x7f00000b and so on: a name that resolves, without any hosts file, to an address of its own
(127.0.0.11) which is this machine. Their sizes are made up, so that profiles for large nodes can be tried.
"""

import contextlib
import os
import pwd
import random
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from tests.slurm.packages import Programs

GPUS, CPUS, MEMORY_MB = 8, 96, 1_000_000

CONFIGURATION = """\
ClusterName=throwaway
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser={user}
SlurmdUser={user}
StateSaveLocation={root}/state
SlurmdSpoolDir={root}/spool-%n
SlurmctldPidFile={root}/slurmctld.pid
SlurmdPidFile={root}/slurmd-%n.pid
SlurmctldLogFile={root}/slurmctld.log
SlurmdLogFile={root}/slurmd-%n.log
PlugStackConfig={root}/plugstack.conf
# nobody else can reach it: it trusts whoever asks
CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
AuthType=auth/none
CredType=cred/none
AuthInfo=cred_expire=5
# nothing that needs root, cgroups, PAM or a database
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SwitchType=switch/none
GresTypes=gpu
SlurmdParameters=config_overrides
ReturnToService=2
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=1,bf_resolution=1,sched_min_interval=0,batch_sched_delay=0,requeue_delay=0
EnforcePartLimits=ALL
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
# quick clocks
KillWait=10
SlurmdTimeout=10
SlurmctldTimeout=10
MessageTimeout=10
BatchStartTimeout=10
MinJobAge=600
{more}
{nodes}
PartitionName=gpu Nodes=ALL Default=YES MaxTime=2-0 State=UP PriorityTier=1 PreemptMode=REQUEUE GraceTime=60
PartitionName=urgent Nodes=ALL MaxTime=2-0 State=UP PriorityTier=10 PreemptMode=OFF
"""


class Cluster:
    """The daemons, and what a test does to them. Leaves no process and, below `root`, all that it wrote."""

    def __init__(self, root: Path, programs: Programs, nodes: int = 3) -> None:
        self.root, self.programs = root, programs
        self.nodes = [f"0x7f{11 + number:06x}" for number in range(nodes)]
        self.environment = {"SLURM_CONF": str(root / "slurm.conf"), **programs.environment()}
        self._ports = dict(zip(["", *self.nodes], _free_ports(nodes + 1), strict=True))
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}

    def start(self) -> None:
        for folder in ("state", "dev", "bin", *(f"spool-{node}" for node in self.nodes)):
            (self.root / folder).mkdir()
        (self.root / "plugstack.conf").touch()
        for number in range(GPUS):
            (self.root / "dev" / f"nvidia{number}").symlink_to("/dev/null")
        for name in ("slurmctld", "slurmd", "slurmstepd"):  # by other names they forget about GPUs
            (self.root / "bin" / name).symlink_to(self.programs.daemon(name))
        gpus = f"Name=gpu File={self.root}/dev/nvidia[0-{GPUS - 1}]"
        (self.root / "gres.conf").write_text("".join(f"NodeName={node} {gpus}\n" for node in self.nodes))
        self.configure()
        self._daemons[""] = self._spawn("slurmctld", "-D", "-c")
        for node in self.nodes:
            self.start_node(node)
        self.wait_for(lambda: set(self.states().values()) == {"idle"}, "all nodes idle")

    def configure(self, more: str = "") -> None:
        """Write slurm.conf, with lines of the test's own."""
        host = socket.gethostname().partition(".")[0]
        nodes = [
            f"NodeName={node} NodeHostname={host} NodeAddr=127.0.0.1 Port={self._ports[node]} CPUs={CPUS} "
            f"CoresPerSocket={CPUS} RealMemory={MEMORY_MB} Gres=gpu:{GPUS}"
            for node in self.nodes
        ]
        text = CONFIGURATION.format(
            host=host,
            port=self._ports[""],
            user=pwd.getpwuid(os.geteuid()).pw_name,
            root=self.root,
            more=self.programs.configuration() + more,
            nodes="\n".join(nodes),
        )
        (self.root / "slurm.conf").write_text(text)

    def reconfigure(self, more: str = "") -> None:
        """Have the running daemons read other lines."""
        self.configure(more)
        self("scontrol", "reconfigure")

    def _spawn(self, name: str, *arguments: str) -> "subprocess.Popen[bytes]":
        command = [str(self.root / "bin" / name), *arguments, "-f", self.environment["SLURM_CONF"]]
        with (self.root / f"{name}.out").open("ab") as out:
            return subprocess.Popen(
                command,
                env=os.environ | self.environment,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                start_new_session=True,
            )

    def start_node(self, node: str) -> None:
        self._daemons[node] = self._spawn("slurmd", "-D", "-d", str(self.root / "bin" / "slurmstepd"), "-N", node)

    def kill_node(self, node: str) -> None:
        """What a power cut does: the daemon, the steps and the ranks of a node are gone at once, and say nothing."""
        stepds = {_parent(pid) for pid in self.processes(f"SLURMD_NODENAME={node}")}
        victims = [pid for pid in stepds if _name(pid) == "slurmstepd"]
        victims += self.processes(f"SLURMD_NODENAME={node}")
        daemon = self._daemons.pop(node)
        daemon.kill()
        daemon.wait()
        for pid in victims:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def __call__(self, *command: str) -> str:
        """What one of Slurm's commands prints."""
        done = subprocess.run(command, env=os.environ | self.environment, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, f"{command}: {done.stderr}"
        return done.stdout.strip()

    def states(self) -> dict[str, str]:
        done = subprocess.run(
            ["sinfo", "--noheader", "-N", "-p", "gpu", "-o", "%N %T"],
            env=os.environ | self.environment, capture_output=True, text=True,
        )  # fmt: skip
        return dict(line.split() for line in done.stdout.splitlines())

    def jobs(self) -> dict[str, str]:
        """State by id of the jobs that wait or run."""
        return dict(line.split() for line in self("squeue", "--noheader", "--format=%i %T").splitlines())

    def wait_for(self, happened: Callable[[], object], what: str, timeout: float = 120) -> None:
        deadline = time.monotonic() + timeout
        while not happened():
            for name, daemon in self._daemons.items():
                assert daemon.poll() is None, f"{name or 'slurmctld'} died; see {self.root}"
            if time.monotonic() > deadline:
                raise AssertionError(f"waited {timeout:g} s for {what}; jobs {self.jobs()}, nodes {self.states()}")
            time.sleep(0.2)

    def wait_until_gone(self, *ids: str, timeout: float = 150) -> None:
        self.wait_for(lambda: not set(ids) & set(self.jobs()), f"the end of {ids}", timeout)

    def preempt(self) -> None:
        """A job that takes all nodes from those of the partition below."""
        wanted = ("--partition=urgent", f"--nodes={len(self.nodes)}", "--exclusive", "--output=/dev/null")
        self("sbatch", *wanted, "--wrap=sleep 1")

    def clean(self) -> None:
        """No job, all nodes idle: as the next test expects it."""
        for node in self.nodes:
            if node not in self._daemons:
                self.start_node(node)
        if ids := list(self.jobs()):
            self("scancel", *ids)
            subprocess.run(["scancel", "-s", "KILL", *ids], env=os.environ | self.environment, capture_output=True)

        def quiet() -> bool:
            states = self.states()
            for node, state in states.items():
                if state.startswith(("drain", "down")):  # refused while the node's last job is still being ended
                    resume = ["scontrol", "update", f"nodename={node}", "state=resume"]
                    subprocess.run(resume, env=os.environ | self.environment, capture_output=True)
            return set(states.values()) == {"idle"}

        self.wait_for(quiet, "a quiet cluster")

    def stop(self) -> None:
        for name in [*self.nodes, ""]:
            if daemon := self._daemons.pop(name, None):
                daemon.terminate()
                with contextlib.suppress(subprocess.TimeoutExpired):
                    daemon.wait(5)
                daemon.kill()
                daemon.wait()
        for pid in self.processes(f"SLURM_CONF={self.environment['SLURM_CONF']}"):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def processes(self, variable: str) -> list[int]:
        """The processes of this cluster whose environment says so; never this one, which has none of it."""
        wanted = {variable.encode(), f"SLURM_CONF={self.environment['SLURM_CONF']}".encode()}
        return [pid for pid, environment in _environments() if wanted <= environment]


def _environments() -> Iterator[tuple[int, set[bytes]]]:
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            with contextlib.suppress(OSError):
                yield int(folder.name), set((folder / "environ").read_bytes().split(b"\0"))


def _parent(pid: int) -> int:
    with contextlib.suppress(OSError):
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    return 0


def _name(pid: int) -> str:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/comm").read_text().strip()
    return ""


def _free_ports(count: int) -> list[int]:
    """Ports that nobody listens on, below those that Linux and the jobs' own script choose from."""
    found: list[int] = []
    for port in random.sample(range(4000, 10000), 1000):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            found.append(port)
        if len(found) == count:
            break
    return found
