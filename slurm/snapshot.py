"""The code of a submission: a copy of our packages, so that later edits do not change what waits in the queue."""

import shutil
import subprocess
from pathlib import Path

import configs
from configs.loader import Frozen

ROOT = Path(configs.__file__).parents[1]
PACKAGES = ("configs", "data_pipeline", "pretrain", "retrieval_eval", "slurm", "videomamba")


class CodeVersion(Frozen):
    """Which code was copied: git's commit, and whether files differed from it; None where there is no git."""

    commit: str | None = None
    changed: bool | None = None


def snapshot_code(target: Path) -> CodeVersion:
    """Copy the packages into the new folder `target`: what git tracks or would, elsewhere all but caches."""
    listed = _git("ls-files", "-z", "--cached", "--others", "--exclude-standard", "--", *PACKAGES)
    files = [ROOT / name for name in (listed or "").split("\0") if name]
    inside_git = bool(files)
    if not inside_git:  # installed, not checked out
        files = [path for package in PACKAGES for path in (ROOT / package).rglob("*") if path.is_file()]
    target.mkdir(parents=True)
    for file in files:
        if file.is_file() and "__pycache__" not in file.parts:  # git also lists what was removed by hand
            copy = target / file.relative_to(ROOT)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(file, copy)
    if not inside_git:
        return CodeVersion()
    commit = (_git("rev-parse", "HEAD") or "").strip() or None
    return CodeVersion(commit=commit, changed=bool(_git("status", "--porcelain", "--", *PACKAGES)))


def _git(*arguments: str) -> str | None:
    """What git says about the checkout that we run from; None where there is no git, or no checkout."""
    try:
        done = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True)
    except FileNotFoundError:
        return None
    return done.stdout if done.returncode == 0 else None
