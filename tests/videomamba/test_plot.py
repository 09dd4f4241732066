"""`videomamba plot`: what was logged is what is drawn, restarts and gaps included; as a PNG and as a page."""

import json
import math
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from configs.errors import UserError
from videomamba.plot.cli import plot
from videomamba.plot.curves import read_panels, smoothed


def write_run(folder: Path, lines: list[dict[str, Any]], batch: int = 8) -> Path:
    folder.mkdir(parents=True)
    (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "config.yaml").write_text(f"data: {{batch: {batch}}}\n")
    return folder


def line(step: int, start: int = 0, **more: Any) -> dict[str, Any]:
    logged = {"step": step, "loss": 8 / step, "losses": {"mlm": 8 / step}, "lr": {"decay": 1e-3 * step}}
    return logged | {"grad_norm": 1.0, "eta_s": 3.0, "time": 1e9 + step, "start": start} | more


@pytest.fixture
def runs(tmp_path: Path) -> list[Path]:
    first = write_run(tmp_path / "a" / "stage2", [line(n, 0 if n <= 30 else 30) for n in range(10, 61, 10)])
    second = write_run(tmp_path / "b" / "stage2", [line(n, losses={"itm": 0.5}) for n in range(10, 31, 10)], batch=16)
    return [first, second]


def invoke(*arguments: Any) -> Any:
    import typer

    app = typer.Typer()
    app.command()(plot)
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_panels_hold_what_was_logged_by_run(runs: list[Path]) -> None:
    panels = {panel.name: panel for panel in read_panels(runs)}
    assert list(panels)[:3] == ["loss", "losses/mlm", "losses/itm"]
    assert not panels.keys() & {"eta_s", "time", "start", "step"}
    loss = panels["loss"].curves
    assert [curve.run for curve in loss] == ["a/stage2", "b/stage2"]
    assert loss[0].xs == (10, 20, 30, 40, 50, 60)
    assert loss[0].ys == tuple(8 / n for n in range(10, 61, 10))
    assert loss[0].restarts == (30,)
    assert loss[1].restarts == ()
    assert [curve.run for curve in panels["losses/itm"].curves] == ["b/stage2"]
    assert panels["losses/mlm"].title == "Loss: mlm"


def test_runs_of_other_batches_compare_by_samples(runs: list[Path]) -> None:
    loss = next(panel for panel in read_panels(runs, "samples") if panel.name == "loss")
    assert [curve.xs[-1] for curve in loss.curves] == [60 * 8, 30 * 16]
    assert loss.curves[0].restarts == (30 * 8,)


def test_many_learning_rates_become_the_highest_and_the_lowest(tmp_path: Path) -> None:
    rates = {f"layer{n}": 0.1 / (n + 1) for n in range(12)}
    panels = {panel.name: panel for panel in read_panels([write_run(tmp_path / "r", [line(1, lr=rates)])])}
    assert panels["lr/highest"].curves[0].ys == (0.1,)
    assert panels["lr/lowest"].curves[0].ys == (0.1 / 12,)
    assert sum(name.startswith("lr/") for name in panels) == 2


def test_smoothing_is_the_weighted_mean_of_the_past() -> None:
    ys, weight = [4.0, 1.0, math.nan, 7.0], 0.6
    out = smoothed(ys, weight)
    assert out[0] == 4  # no pull to zero
    assert out[1] == pytest.approx((4 * weight + 1) / (weight + 1))
    assert math.isnan(out[2])
    assert out[3] == pytest.approx((4 * weight**2 + weight + 7) / (weight**2 + weight + 1))
    assert smoothed([1.0, 5.0], 0) == [1, 5]


def test_the_command_draws_a_png_and_a_page(runs: list[Path], tmp_path: Path) -> None:
    done = invoke(*runs, "--out", tmp_path / "out")
    assert done.exit_code == 0, done.output
    pixels = np.asarray(Image.open(tmp_path / "out" / "curves.png").convert("RGB")).reshape(-1, 3).astype(int)
    for colour in ((0, 0x72, 0xB2), (0xD5, 0x5E, 0)):  # both runs are there
        assert (np.abs(pixels - colour).sum(1) < 12).sum() > 200
    page = (tmp_path / "out" / "curves.html").read_text()
    charts = [ET.fromstring("<svg" + part.split("</svg>")[0] + "</svg>") for part in page.split("<svg")[1:]]
    assert len(charts) == len(read_panels(runs))
    loss = charts[0]
    assert loss.attrib["aria-label"] == "Loss, all terms"
    assert [path.attrib["class"] for path in loss.findall("path")] == [
        "line faint s0", "line faint s1", "line s0", "line s1",
    ]  # fmt: skip
    assert [mark.attrib["class"] for mark in loss.findall("line") if "mark" in mark.attrib["class"]] == ["mark s0"]
    itm = next(chart for chart in charts if chart.attrib["aria-label"] == "Loss: itm")
    assert itm.findall("path")[-1].attrib["class"] == "line s1"  # a run keeps its colour where it is alone
    assert "http://" not in page
    assert "https://" not in page


def test_by_default_the_figures_stand_in_the_run_and_only_narrows(runs: list[Path]) -> None:
    done = invoke(runs[0], "--only", "losses/", "--smooth", "0")
    assert done.exit_code == 0, done.output
    page = (runs[0] / "curves.html").read_text()
    assert page.count("<svg") == 1
    assert "faint s0" not in page
    assert (runs[0] / "curves.png").is_file()


def test_wrong_requests_say_what_to_do(runs: list[Path], tmp_path: Path) -> None:
    for arguments, cause in (
        ([tmp_path / "nothing"], "no log.jsonl"),
        ([runs[0], runs[0]], "given twice"),
        ([runs[0], "--only", "accuracy"], "Nothing that was logged"),
        ([runs[0], "--smooth", "1"], "--smooth"),
    ):
        done = invoke(*arguments)
        assert isinstance(done.exception, UserError), done.output
        assert cause in str(done.exception.cause)
        assert done.exception.cure
