"""`videomamba bench serve` at its small size, and its clients."""

import json
from pathlib import Path

import pytest

from videomamba.bench_clients import ask, sentence


def test_the_quick_bench_has_a_row_for_every_level(videomamba, tmp_path: Path) -> None:
    result = tmp_path / "serve.json"
    done = videomamba("bench", "serve", "--quick", "--json", str(result))
    assert done.returncode == 0, done.stderr
    rows = {row["name"]: row for row in json.loads(result.read_text())["rows"]}
    assert list(rows) == ["requests-1", "p99-1", "requests-8", "p99-8", "requests-32", "p99-32", "memory"]
    assert rows["requests-8"]["ratio"] == pytest.approx(
        rows["requests-8"]["ours"] / rows["requests-8"]["baseline"], rel=0.05
    )
    assert rows["p99-8"]["ratio"] == pytest.approx(rows["p99-8"]["baseline"] / rows["p99-8"]["ours"], rel=0.05)


def test_sentences_differ_and_clients_stay_on_this_machine() -> None:
    assert len({sentence(salt, number) for salt in range(6) for number in range(-80, 320)}) == 6 * 400
    with pytest.raises(RuntimeError, match="this machine alone"):
        ask("http://192.0.2.1:80/", 1, 1, 0)
