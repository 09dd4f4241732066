"""What every test may use, and the rule that in CI nothing skips for want of what CI has to bring."""

import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

# Two processes that each start a thread for every core slow one another down: set before torch is imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["HF_HUB_OFFLINE"] = "1"
# A shell that starts tests in the background has them ignore Ctrl-C, and what they start inherits it: tests send it.
signal.signal(signal.SIGINT, signal.default_int_handler)

ROOT = Path(__file__).parents[1]
SHARED = ROOT.parent / "shared"
CI_BRINGS = re.compile(
    r"ffmpeg|browser|chromium|slurm|shared|golden|GOLDEN_DIR|MEDIA_DIR|ANNOTATIONS_DIR|triton is not installed",
    re.IGNORECASE,
)


def _folder(variable: str, default: Path) -> Path:
    folder = Path(os.environ.get(variable, default))
    if not folder.is_dir():
        pytest.skip(f"no folder {folder} of shared material; set {variable}")
    return folder


@pytest.fixture(scope="session")
def golden_dir() -> Path:
    """Tensors recorded from the published code: $GOLDEN_DIR, else ../shared/golden."""
    return _folder("GOLDEN_DIR", SHARED / "golden")


@pytest.fixture(scope="session")
def media_dir() -> Path:
    """Real clips and images: $MEDIA_DIR, else ../shared/media."""
    return _folder("MEDIA_DIR", SHARED / "media")


@pytest.fixture(scope="session")
def annotations_dir() -> Path:
    """Raw annotation files of the retrieval benchmarks: $ANNOTATIONS_DIR, else ../shared/annotations."""
    return _folder("ANNOTATIONS_DIR", SHARED / "annotations")


@pytest.fixture(scope="session")
def chromium() -> str:
    """The program of a Chromium or Chrome."""
    for name in ("chromium", "chromium-browser", "google-chrome"):
        if program := shutil.which(name):
            return program
    pytest.skip("no browser: install chromium")


@pytest.fixture(scope="session")
def python() -> Callable[..., subprocess.CompletedProcess[str]]:
    """`python(*arguments, cwd=None, **environment)` runs this interpreter, which sees our packages."""

    def run(
        *arguments: str, cwd: Path | None = None, timeout: float = 100, **environment: str
    ) -> subprocess.CompletedProcess[str]:
        environment = {"PYTHONPATH": str(ROOT), "COLUMNS": "120", **environment}
        return subprocess.run(
            [sys.executable, "-P", *arguments],
            cwd=cwd or ROOT,
            env={**os.environ, **environment},
            capture_output=True,
            text=True,
            timeout=timeout,
            stdin=subprocess.DEVNULL,
        )

    return run


@pytest.fixture(scope="session")
def videomamba(
    python: Callable[..., subprocess.CompletedProcess[str]],
) -> Callable[..., subprocess.CompletedProcess[str]]:
    """`videomamba(*arguments, ...)` runs the command in a process of its own."""
    return lambda *arguments, **options: python("-m", "videomamba", *arguments, **options)


def _fail_if_ci_should_bring_it(report: pytest.TestReport | pytest.CollectReport) -> None:
    if os.environ.get("CI") != "true" or report.outcome != "skipped" or hasattr(report, "wasxfail"):
        return
    reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
    if CI_BRINGS.search(reason):
        report.outcome = "failed"
        report.longrepr = f"in CI this must not skip: {reason}"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Iterator[None]:
    report = yield
    _fail_if_ci_should_bring_it(report)
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report() -> Iterator[None]:
    report = yield
    _fail_if_ci_should_bring_it(report)
    return report


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """The worst error of each comparison with the published code (tests/parity), or with -v that of every tensor."""
    compared = {
        report.nodeid: dict(report.user_properties)["parity"]
        for reports in terminalreporter.stats.values()
        for report in reports
        if "parity" in dict(getattr(report, "user_properties", ()))
    }
    if compared:
        terminalreporter.section("parity: |ours - published| / |published|")
    for nodeid, rows in sorted(compared.items()):
        terminalreporter.line(f"{nodeid.rpartition('::')[2]}: {len(rows)} tensors, the worst:")
        for name, error, limit in rows if terminalreporter.verbosity > 0 else rows[:1]:
            terminalreporter.line(f"    {error:9.2e} (limit {limit:.0e})  {name}")
