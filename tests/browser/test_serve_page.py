"""The page of `videomamba serve` in a real Chromium, against the real server: type, see, play, upload, go wrong."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from retrieval_eval.collection import Collection
from tests.browser.corpus import COUNT, MARKUP, build, clip
from tests.browser.driver import CONTRASTS, OVERFLOWING, Browser
from tests.retrieval_eval.conftest import clips, make_checkpoint, tokenizer_folder  # noqa: F401 - fixtures
from tests.retrieval_eval.serving import application

STATUS = "document.getElementById('status').textContent"
WRONG = "document.getElementById('status').className === 'error'"
HITS = "document.querySelectorAll('#hits .hit').length"
CAPTIONS = "[...document.querySelectorAll('.hit .caption')].map(node => node.textContent)"
SETTLED = f"!document.querySelector('#status.busy') && {STATUS}"


@pytest.fixture(scope="module")
def address(make_checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:  # noqa: F811
    folder = tmp_path_factory.mktemp("played")
    index = build(folder, make_checkpoint(folder / "run"))
    with application(Collection.open(index, device="cpu")) as (client, _):
        yield client.address


@pytest.fixture(autouse=True)
def _as_a_desk(browser: Browser) -> None:
    browser.screen(1200)
    browser.faults.clear()


def search(browser: Browser, sentence: str) -> None:
    """Type a sentence into the page that is open, and press Enter."""
    browser.run("document.getElementById('query').focus(), document.getElementById('query').select()")
    browser.type(sentence)
    browser.press("Enter")
    browser.wait(f"new URLSearchParams(location.search).get('q') === {sentence!r} && {SETTLED}")


def test_type_see_and_play(browser: Browser, address: str) -> None:
    browser.open(f"{address}/")
    browser.wait("document.getElementById('about').textContent.includes('30 clips in 2 shards')")
    search(browser, "a red square")
    assert browser.run(HITS) == 12
    assert browser.run(STATUS) == f"Clips 1–12 of {COUNT}, best first."
    assert browser.run("document.querySelector('.hit b').textContent") == "1."
    scores = browser.run("[...document.querySelectorAll('.line .quiet')].map(node => +node.textContent.slice(6))")
    assert scores == sorted(scores, reverse=True)
    browser.click(".hit .start")
    browser.wait("document.querySelector('.hit video').currentTime > 0.1")
    assert browser.run("document.querySelector('.hit video').videoWidth") == 64
    assert browser.run("document.querySelector('.hit video').controls")
    assert browser.faults == []


@pytest.mark.parametrize("number, kind", [(0, "H.264"), (1, "VP9")])
def test_what_a_browser_knows_is_played_by_keyboard_alone(
    browser: Browser, address: str, number: int, kind: str
) -> None:
    browser.open(f"{address}/?name={number:09d}")
    browser.wait("document.querySelector('#asked video')")
    browser.run("document.querySelector('.start').focus()")
    browser.press("Enter")
    browser.wait("document.querySelector('#asked video').currentTime > 0.1")
    assert browser.run("document.activeElement.tagName") == "VIDEO", kind


def test_what_it_does_not_know_is_offered_to_be_downloaded(browser: Browser, address: str) -> None:
    browser.open(f"{address}/?name=000000002")
    browser.wait("document.querySelector('#asked .broken')")
    assert "cannot play" in browser.run("document.querySelector('#asked .broken').innerText")


def test_pages_links_and_the_way_back(browser: Browser, address: str) -> None:
    browser.open(f"{address}/?q=blue")
    browser.wait(HITS)
    seen = browser.run(CAPTIONS)
    for page, count in ((2, 12), (3, 6)):
        browser.click("#next")
        browser.wait(f"document.getElementById('place').textContent === 'Page {page} of 3'")
        assert browser.run(HITS) == count
        seen += browser.run(CAPTIONS)
    assert len(set(seen)) == COUNT, "each clip once"
    assert browser.run("document.getElementById('next').disabled")
    browser.run("history.back()")
    browser.wait("document.getElementById('place').textContent === 'Page 2 of 3'")
    browser.click(".links a")  # the key
    browser.wait("document.querySelector('#asked dl')")
    assert "played-00000" in browser.run("document.querySelector('#asked dl').innerText")
    browser.click("#asked dd a")  # its shard
    browser.wait(f"{HITS} && location.search.startsWith('?shard=played-00000')")
    browser.click(".links a:nth-of-type(3)")  # clips like it
    browser.wait(f"{HITS} === 12 && location.search.startsWith('?like=')")
    assert browser.faults == []


def test_an_empty_query_and_one_that_is_too_long(browser: Browser, address: str) -> None:
    browser.open(f"{address}/")
    browser.run("document.getElementById('query').focus()")
    browser.press("Enter")
    browser.wait(WRONG)
    assert browser.run(STATUS) == "Type a sentence first."
    assert browser.run(HITS) == 0
    search(browser, "red " * 40)
    assert "tokens; this checkpoint reads 12" in browser.run(STATUS)


def test_markup_is_text_wherever_it_comes_from(browser: Browser, address: str) -> None:
    browser.open(f"{address}/")
    search(browser, MARKUP)
    browser.open(f"{address}/?q=%3Cb%3Ered%3C/b%3E")
    browser.wait(HITS)
    assert browser.run("document.getElementById('query').value") == "<b>red</b>"
    assert browser.run("document.title") == "<b>red</b> – Find clips"
    browser.open(f"{address}/?name=000000003")
    browser.wait("document.querySelector('#asked dl')")
    assert MARKUP in browser.run("document.querySelector('#asked dl').innerText")
    browser.open(f"{address}/?like={MARKUP}")
    browser.wait(WRONG)
    assert "No clip of this index is called" in browser.run(STATUS)
    assert browser.run("document.querySelectorAll('b:not(.line b), img, script:not([src])').length") == 0
    assert [fault for fault in browser.faults if "Failed to load resource" not in fault] == []  # two were refused


def test_a_clip_is_dropped_or_chosen(browser: Browser, address: str, tmp_path: Path) -> None:
    (tmp_path / "mine.mp4").write_bytes(clip(5))
    browser.open(f"{address}/")
    browser.choose_file("#file", tmp_path / "mine.mp4")
    browser.wait(HITS)
    assert browser.run(CAPTIONS)[0].endswith("take 5"), "the very clip is the nearest"
    assert "Clips like mine.mp4" in browser.run("document.getElementById('asked').innerText")
    browser.click("#next")
    browser.wait("document.getElementById('place').textContent === 'Page 2 of 3'")
    browser.run(
        "(async () => { const data = new DataTransfer();"
        "const bytes = await (await fetch('/api/media/000000007')).arrayBuffer();"
        "data.items.add(new File([bytes], 'dropped.mp4', {type: 'video/mp4'}));"
        "document.body.dispatchEvent(new DragEvent('drop', {dataTransfer: data, bubbles: true})); })()"
    )
    browser.wait("document.getElementById('asked').innerText.includes('dropped.mp4')")
    assert browser.run(CAPTIONS)[0].endswith("take 7")
    assert browser.faults == []


def test_an_upload_that_is_no_video(browser: Browser, address: str, tmp_path: Path) -> None:
    (tmp_path / "notes.mp4").write_text("this is no video\n" * 100)
    browser.open(f"{address}/?q=red")
    browser.wait(HITS)
    browser.choose_file("#file", tmp_path / "notes.mp4")
    browser.wait(WRONG)
    assert "The upload is no video or image" in browser.run(STATUS)
    assert browser.run(HITS) == 0
    search(browser, "red")
    assert browser.run(HITS) == 12, "and the page goes on"


def test_a_telephone_and_the_dark(browser: Browser, address: str) -> None:
    for path in ("/", "/?q=red", "/?name=000000000", "/?shard=played-000000.tar", "/login"):
        for width, dark, colour in ((360, True, "rgb(19, 20, 22)"), (390, False, "rgb(246, 246, 243)")):
            browser.screen(width, 800, dark=dark, telephone=True)
            browser.open(address + path)
            if "?" in path:
                browser.wait("document.querySelector('#hits .hit, #asked dl')")
            assert browser.run("document.documentElement.scrollWidth") <= width, path
            assert browser.run(OVERFLOWING) == [], path
            assert browser.run("getComputedStyle(document.body).backgroundColor") == colour
            assert browser.run(CONTRASTS) == [], path


def test_while_it_looks_it_says_so_and_a_server_that_has_gone_is_told(browser: Browser, address: str) -> None:
    browser.open(f"{address}/")
    browser.run("window.fetch = () => new Promise(done => window.answer = done)")
    browser.run("document.getElementById('query').focus()")
    browser.type("red")
    browser.press("Enter")
    browser.wait("document.querySelector('#status.busy')")
    assert browser.run(STATUS) == "Searching…"
    assert browser.run("document.getElementById('hits').getAttribute('aria-busy')") == "true"
    browser.run("window.fetch = () => Promise.reject(new TypeError('gone'))")
    browser.press("Enter")
    browser.wait(WRONG)
    assert browser.run(STATUS) == "The server does not answer."
