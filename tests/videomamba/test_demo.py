"""The whole demo, small: two ranks, interrupted once, run again, and what it leaves."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow


def start(out: Path, *more: str) -> "subprocess.Popen[str]":
    command = [sys.executable, "-P", "-m", "videomamba", "demo", "--minutes", "2", "--out", str(out), *more]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    environment.pop("OMP_NUM_THREADS", None)
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )


def test_two_ranks_interrupted_and_run_again(tmp_path: Path) -> None:
    out = tmp_path / "demo"
    first = start(out, "--ranks", "2")
    log = out / "stage2" / "log.jsonl"
    deadline = time.monotonic() + 500
    while not (log.is_file() and log.read_text()):
        assert first.poll() is None, first.stdout.read() if first.stdout else ""
        assert time.monotonic() < deadline, "stage 2 did not begin"
        time.sleep(0.2)
    os.killpg(first.pid, signal.SIGINT)  # as a terminal does on Ctrl-C: to every process of the demo
    said, _ = first.communicate(timeout=120)
    assert first.returncode == 130, said
    assert "Traceback" not in said
    assert not list(out.rglob("*.mp4.tmp"))

    again = start(out, "--ranks", "2")
    said, _ = again.communicate(timeout=600)
    assert again.returncode == 0, said
    assert said.count("finished before") == 4  # world, shards, teacher, stage 1

    summary = json.loads((out / "summary.json").read_text())
    assert summary["ranks"] == 2
    assert 0 < summary["peak_memory_bytes"] < 8 * 2**30
    assert set(summary["retrieval"]) == {"dual", "reranked", "controls"}
    assert set(summary["retrieval"]["controls"]) == {"shuffled", "single"}
    queries = summary["retrieval"]["dual"]["t2v"]["n"]
    assert queries == 100
    page = (out / "report.html").read_text()
    assert "rendered world" in page
    assert "re-ranked, top 128" in page
    for name in ("video", "text"):
        assert (out / "encoders" / name / "model.safetensors").stat().st_size > 10_000

    third = start(out, "--ranks", "2")
    said, _ = third.communicate(timeout=120)
    assert third.returncode == 0, said
    assert said.count("finished before") == 8
