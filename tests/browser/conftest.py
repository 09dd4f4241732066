"""One browser for the tests of a file."""

from collections.abc import Iterator

import pytest

from tests.browser.driver import Browser


@pytest.fixture(scope="module")
def browser(chromium: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with Browser(chromium, tmp_path_factory.mktemp("profile")) as browser:
        yield browser
