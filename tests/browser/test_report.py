"""The report in a real Chromium: nothing overflows a telephone, nothing is fetched, nothing fails."""

import html
import re
from itertools import pairwise
from pathlib import Path

import pytest

from retrieval_eval.report.data import ReportData
from retrieval_eval.report.page import write_report
from tests.browser.driver import CONTRASTS, OVERFLOWING, Browser
from tests.browser.report_sample import MARKUP, result, sample

LIGHT, DARK = "rgb(246, 246, 243)", "rgb(19, 20, 22)"
BACKGROUND = "getComputedStyle(document.body).backgroundColor"
LETTERS = "[...document.querySelectorAll('svg text')].map(node => node.getBoundingClientRect().height)"


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_report(sample(), tmp_path_factory.mktemp("report") / "report.html")


@pytest.mark.parametrize("width, telephone", [(360, True), (390, True), (1440, False)])
def test_nothing_overflows(browser: Browser, page: Path, width: int, telephone: bool) -> None:
    browser.screen(width, telephone=telephone)
    browser.open(page.as_uri())
    assert browser.run("document.documentElement.scrollWidth") <= width
    assert browser.run(OVERFLOWING) == []
    assert min(browser.run(LETTERS)) >= 9
    assert browser.run("document.querySelectorAll('.scroll').length") == 8
    widths = browser.run("[...document.images].map(image => image.naturalWidth)")
    assert len(widths) == 9
    assert min(widths) >= 40


def test_nothing_is_asked_of_the_network_and_nothing_fails(browser: Browser, page: Path) -> None:
    browser.faults.clear()
    browser.requests.clear()
    browser.open(page.as_uri())
    assert browser.faults == []
    assert [address for address in browser.requests if not address.startswith("data:")] == [page.as_uri()]
    assert "http" not in re.sub(r"base64,[A-Za-z0-9+/=]+", "", page.read_text().replace("http-equiv", ""))


def test_light_dark_and_the_button_between_them(browser: Browser, page: Path) -> None:
    for dark, colour in ((False, LIGHT), (True, DARK)):
        browser.screen(1200, dark=dark)
        browser.open(page.as_uri())
        assert browser.run(BACKGROUND) == colour
        assert browser.run(CONTRASTS) == [], "every text has a contrast of 4.5 with what lies behind it"
    seen = {}
    for _ in range(3):
        browser.run("document.querySelector('.theme').focus()")
        browser.press("Enter")
        seen[browser.run("document.querySelector('.theme').textContent")] = browser.run(BACKGROUND)
    assert seen == {"Theme: light": LIGHT, "Theme: dark": DARK, "Theme: auto": DARK}


def test_it_can_be_read_by_ear_and_by_keyboard(browser: Browser, page: Path) -> None:
    browser.open(page.as_uri())
    assert browser.run("document.documentElement.lang") == "en"
    levels = browser.run("[...document.querySelectorAll('h1, h2, h3, h4')].map(node => +node.tagName[1])")
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(later <= earlier + 1 for earlier, later in pairwise(levels)), levels
    for fault in ("img:not([alt])", "img[alt='']", "svg:not([aria-label])", "th:not([scope])",
                  ".scroll:not([tabindex='0'])", ".scroll:not([aria-label])"):  # fmt: skip
        assert browser.run(f'document.querySelectorAll("{fault}").length') == 0, fault
    targets = "[...document.querySelectorAll('nav a')].every(node => document.querySelector(node.getAttribute('href')))"
    assert browser.run(targets)


def test_texts_stay_texts(browser: Browser, page: Path) -> None:
    text = page.read_text()
    assert text.count("<script") == 1, "the page's own"
    assert text.count(html.escape(MARKUP, quote=True)) >= 4
    browser.open(page.as_uri())
    assert "<script>alert(1)</script>" in browser.run("document.body.innerText")
    assert browser.run("document.scripts.length") == 1


def test_every_number_says_how_it_was_made(page: Path) -> None:
    text = page.read_text()
    for measure in ("R@1", "R@5", "R@10", "MedR"):
        for column in result()["columns"].values():
            assert f"{measure}<small>({column})</small>" in text
    for said in ("This is a rendered world", "This result is partial: 1 clips could not be read", "Frames shuffled",
                 "One frame repeated", "Model that only ever saw one frame", "docs/log.md", ">Chance<", "56.5–66.0",
                 "<dt>visual, frames</dt><dd>8</dd>", "<dt>bootstrap, samples</dt><dd>1000</dd>",
                 "<dt>torch</dt><dd>2.13.0</dd>", "The worst", "The best"):  # fmt: skip
        assert said in text, said


def test_multiple_choice_has_a_table_of_its_own(browser: Browser, tmp_path: Path) -> None:
    scored = {"choice": {"accuracy": 51.25, "n": 80, "interval_95": {"accuracy": [40.0, 62.5]}}}
    made = {"columns": {"dual": "dual encoder"}, "results": {"dual": scored, "controls": {"single": {"dual": scored}}}}
    browser.open(write_report(ReportData(title="MC", result=made), tmp_path / "mc.html").as_uri())
    shown = browser.run("document.querySelector('table').innerText")
    assert "51.2" in shown
    assert "40.0–62.5" in shown
    assert "One frame repeated" in shown


def test_a_report_survives_json_and_little_data(browser: Browser, tmp_path: Path) -> None:
    assert ReportData.model_validate_json(sample().model_dump_json()) == sample()
    bare = write_report(ReportData(title="Nothing yet", result={}), tmp_path / "bare.html")
    browser.faults.clear()
    browser.open(bare.as_uri())
    assert "Nothing yet" in browser.run("document.body.innerText")
    assert browser.faults == []
