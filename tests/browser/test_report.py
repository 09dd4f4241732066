"""The report in a real Chromium: nothing overflows a telephone, nothing is fetched, nothing fails."""

import html
import json
import re
import subprocess
from pathlib import Path

import pytest

from retrieval_eval.report import write_report
from retrieval_eval.report_data import ReportData
from tests.browser.report_sample import MARKUP, result, sample

FLAGS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
    "--enable-logging=stderr",
    "--virtual-time-budget=3000",
    "--dump-dom",
)

# A window narrower than 500 is widened by the browser, so the page is measured inside a frame of the wanted width.
MEASURE = """<!doctype html><body style="margin:0"><iframe style="border:0;width:{width}px;height:800px"
srcdoc="{page}"></iframe><pre id="seen"></pre><script>
onload = () => {{
  const page = document.querySelector("iframe").contentDocument, root = page.documentElement;
  const inside = node => node.closest(".scroll") && !node.matches(".scroll");
  const wide = [...page.body.querySelectorAll("*")].filter(node => !inside(node))
    .filter(node => node.getBoundingClientRect().right > root.clientWidth + 0.5)
    .map(node => node.tagName + "." + (node.getAttribute("class") || ""));
  const small = [...page.querySelectorAll("svg text")]
    .map(node => node.getBoundingClientRect().height).filter(height => height < 9).length;
  document.getElementById("seen").textContent = JSON.stringify({{
    width: root.clientWidth, scroll: root.scrollWidth, wide, small,
    boxes: page.querySelectorAll(".scroll").length,
    images: [...page.images].map(image => image.naturalWidth),
    scripts: page.scripts.length,
    dark: getComputedStyle(page.body).backgroundColor,
  }});
}};
</script>"""


def visit(chromium: str, page: Path, profile: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    command = [chromium, *FLAGS, *flags, f"--user-data-dir={profile}", page.as_uri()]
    return subprocess.run(command, capture_output=True, text=True, timeout=90)


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_report(sample(), tmp_path_factory.mktemp("report") / "report.html")


@pytest.mark.parametrize("width", [390, 1440])
def test_nothing_overflows(chromium: str, page: Path, tmp_path: Path, width: int) -> None:
    framed = tmp_path / "framed.html"
    framed.write_text(MEASURE.format(width=width, page=html.escape(page.read_text(), quote=True)))
    done = visit(chromium, framed, tmp_path / "profile", "--window-size=1500,900")
    found = re.search(r'<pre id="seen">(.*?)</pre>', done.stdout, re.DOTALL)
    assert found, done.stderr
    seen = json.loads(html.unescape(found.group(1)))
    assert seen["width"] == width
    assert seen["scroll"] <= width
    assert seen["wide"] == []
    assert seen["small"] == 0  # letters of the charts
    assert seen["boxes"] == 5
    assert len(seen["images"]) == 8
    assert min(seen["images"]) > 400
    assert seen["scripts"] == 0


def test_no_errors_and_no_requests(chromium: str, page: Path, tmp_path: Path) -> None:
    done = visit(chromium, page, tmp_path / "profile")
    assert "CONSOLE" not in done.stderr, done.stderr
    assert "<h1>VideoMamba demo" in done.stdout
    addresses = re.findall(r'(?:src|href|url)\s*[=(]\s*["\']?([a-z]+:[^"\' )]{0,20})', page.read_text())
    assert addresses
    assert all(address.startswith("data:") for address in addresses)
    assert "http" not in re.sub(r"base64,[A-Za-z0-9+/=]+", "", page.read_text())


def test_texts_stay_texts(chromium: str, page: Path, tmp_path: Path) -> None:
    text = page.read_text()
    assert "<script" not in text
    assert text.count(html.escape(MARKUP, quote=True)) >= 2
    shown = visit(chromium, page, tmp_path / "profile").stdout
    assert "&lt;script&gt;alert(1)&lt;/script&gt; &amp;" in shown


def test_every_number_says_how_it_was_made(page: Path) -> None:
    text = page.read_text()
    for measure in ("R@1", "R@5", "R@10", "MedR"):
        for column in result()["columns"].values():
            assert f"{measure}<small>({column})</small>" in text
    assert "This is a rendered world" in text
    assert "Frames shuffled" in text
    assert "One frame repeated" in text
    assert "Model that only ever saw one frame" in text
    assert "docs/log.md" in text
    assert ">Chance<" in text
    assert "56.5–66.0" in text


def test_a_report_survives_json_and_little_data(chromium: str, tmp_path: Path) -> None:
    assert ReportData.model_validate_json(sample().model_dump_json()) == sample()
    bare = write_report(ReportData(title="Nothing yet", result={}), tmp_path / "bare.html")
    done = visit(chromium, bare, tmp_path / "profile")
    assert "Nothing yet" in done.stdout
    assert "CONSOLE" not in done.stderr
