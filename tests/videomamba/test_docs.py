"""The Python sessions in docs/ do what they show."""

import doctest
import re
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[2] / "docs"
PAGES = sorted(path.name for path in DOCS.glob("*.md") if ">>> " in path.read_text(encoding="utf-8"))


def test_there_are_sessions():
    assert "models.md" in PAGES


@pytest.mark.parametrize("page", PAGES)
def test_sessions_show_what_happens(page):
    text = re.sub(r"^```.*$", "", (DOCS / page).read_text(encoding="utf-8"), flags=re.MULTILINE)
    session = doctest.DocTestParser().get_doctest(text, {}, page, page, 0)
    heard: list[str] = []
    result = doctest.DocTestRunner().run(session, out=heard.append)
    assert result.attempted > 0
    assert result.failed == 0, "".join(heard)
