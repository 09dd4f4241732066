"""Slurm's programs for the tests: those that are here, else Debian's, installed as root or only unpacked without it."""

import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

import pytest

PACKAGES = ("slurmctld", "slurmd", "slurm-client")
BESIDES = ("slurm-wlm-basic-plugins",)
"""What PACKAGES bring along; named for machines where apt will not say what is missing."""

QUIET = {"DEBIAN_FRONTEND": "noninteractive"}


class Programs(NamedTuple):
    """Where Slurm is: `prefix` is the folder that packages were unpacked into, empty where they are installed."""

    prefix: str = ""

    def daemon(self, name: str) -> str:
        """The path of slurmctld, slurmd or slurmstepd; unpacked ones keep the name that Debian's alternatives hide."""
        if self.prefix:
            return f"{self.prefix}/usr/sbin/{name}-wlm"
        return shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin:/usr/local/sbin") or name

    def environment(self) -> dict[str, str]:
        """What finds the commands and their libraries."""
        if not self.prefix:
            return {"PATH": f"{os.environ['PATH']}:/usr/sbin"}
        libraries = [str(folder) for folder in Path(self.prefix, "usr/lib").glob("*-linux-gnu*")]
        libraries += [f"{folder}/slurm-wlm" for folder in libraries]
        return {"PATH": f"{self.prefix}/usr/bin:{os.environ['PATH']}", "LD_LIBRARY_PATH": ":".join(libraries)}

    def configuration(self) -> str:
        """The line of slurm.conf that an unpacked Slurm needs to find its plugins."""
        plugins = [str(path) for path in Path(self.prefix, "usr/lib").glob("*/slurm-wlm")] if self.prefix else []
        return f"PluginDir={plugins[0]}\n" if plugins else ""


def find_slurm(folder: Path) -> Programs:
    """Slurm's programs, installed or unpacked into `folder` if need be; skips the test where that cannot be done."""
    unpack = os.environ.get("VIDEOMAMBA_TEST_SLURM") == "unpack"
    if _installed() and not unpack:
        return Programs()
    if not shutil.which("apt-get"):
        pytest.skip(f"no slurm here, and no apt to bring it: install {', '.join(PACKAGES)}")
    if os.geteuid() == 0 and not unpack:
        _apt("update")
        _apt("install", "-y", "--no-install-recommends", *PACKAGES)
        if _installed():
            return Programs()
    elif _unpack(folder):
        return Programs(str(folder))
    pytest.skip(f"slurm could not be brought: install {', '.join(PACKAGES)}")


def _installed() -> bool:
    path = f"{os.environ['PATH']}:/usr/sbin:/usr/local/sbin"
    return all(shutil.which(name, path=path) for name in ("slurmctld", "slurmd", "srun"))


def _apt(*arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["apt-get", "-qq", *arguments], env=os.environ | QUIET, cwd=cwd, capture_output=True, text=True
    )


def _unpack(folder: Path) -> bool:
    """Fetch the packages and what they need that is missing, and unpack them; whether that worked."""
    said = _apt("--simulate", "install", "--no-install-recommends", *PACKAGES).stdout
    names = {*re.findall(r"^Inst (\S+)", said, re.MULTILINE), *PACKAGES, *BESIDES}
    if _apt("download", *sorted(names), cwd=folder).returncode:
        return False
    for package in folder.glob("*.deb"):
        subprocess.run(["dpkg", "-x", package, folder], check=True)
    return True
