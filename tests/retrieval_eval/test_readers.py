"""The readers on the authors' own files, and on small ones that hold each trap."""

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from configs.errors import ConfigError, UserError
from configs.loader import load_config, validate
from retrieval_eval.benchmarks import Benchmark, load, stem
from retrieval_eval.config import PUBLISHED, BenchmarkData, RetrievalConfig
from retrieval_eval.readers import read_lsmdc, read_msvd


def data(kind: str, annotations: Path, **changes: object) -> BenchmarkData:
    tree = {"type": kind, "annotations": str(annotations), "media": "nowhere"} | changes
    return validate({"checkpoint": "c", "out": "o", "data": tree}, RetrievalConfig, "test").data  # type: ignore[return-value]


def captions(benchmark: Benchmark) -> dict[str, tuple[str, ...]]:
    return {entry.name: entry.captions for entry in benchmark.entries}


@pytest.fixture
def written(tmp_path: Path) -> Callable[[str, object], Path]:
    """`written(name, tree or text)` is that file."""

    def write(name: str, content: object) -> Path:
        path = tmp_path / name
        path.write_bytes((content if isinstance(content, str) else json.dumps(content)).encode())
        return path

    return write


def test_didemo_has_1037_videos_by_name_and_1004_by_stem(annotations_dir: Path) -> None:
    path = annotations_dir / "didemo/test_data.json"
    by_name, by_stem = load(data("didemo", path)), load(data("didemo", path, key="stem"))
    assert (by_name.sentences, len(by_name.entries), len(by_stem.entries)) == (4021, 1037, 1004)
    assert all(len(entry.captions) == 1 for entry in by_name.entries)
    names = {entry["video"] for entry in json.loads(path.read_text())}
    assert sum(count > 1 for count in Counter(stem(name) for name in names).values()) == 33
    # what the authors wrote is not touched: seven descriptions hold newlines, and they are still there
    unjoined = load(data("didemo", path, paragraph="none"))
    texts = [caption for entry in unjoined.entries for caption in entry.captions]
    assert sum("\n" in text for text in texts) == 7
    assert sum(text != text.strip() for text in texts) == 12


def test_each_order_of_didemos_descriptions_gives_other_paragraphs(annotations_dir: Path) -> None:
    path = annotations_dir / "didemo/test_data.json"
    orders = {p: captions(load(data("didemo", path, paragraph=p))) for p in ("file", "number", "start")}
    words = [{name: sorted(text[0].split()) for name, text in found.items()} for found in orders.values()]
    assert words[0] == words[1] == words[2]
    for one, other in (("file", "number"), ("file", "start"), ("number", "start")):
        differ = sum(orders[one][name] != orders[other][name] for name in orders[one])
        assert differ > len(orders[one]) / 2, (one, other, differ)


def test_activitynet_has_4917_videos_and_17505_sentences(annotations_dir: Path) -> None:
    path = annotations_dir / "activitynet/val_1.json"
    benchmark = load(data("activitynet", path))
    assert (benchmark.sentences, len(benchmark.entries)) == (17505, 4917)
    assert max(len(entry.captions[0].split()) for entry in benchmark.entries) == 332
    assert all(entry.name.startswith("v_") for entry in benchmark.entries)
    by_start = captions(load(data("activitynet", path, paragraph="start")))
    assert sum(by_start[entry.name] != entry.captions for entry in benchmark.entries) == 131
    sentences = [c for e in load(data("activitynet", path, paragraph="none")).entries for c in e.captions]
    assert sum(not text.isascii() for text in sentences) == 24
    assert 0.6 < sum(text != text.lstrip() for text in sentences) / len(sentences) < 0.7


def test_msrvtt_reads_video_ids_and_sentences_as_they_stand(annotations_dir: Path) -> None:
    benchmark = load(data("msrvtt", annotations_dir / "msrvtt/MSRVTT_JSFUSION_test.sample.csv"))
    assert len(benchmark.entries) == benchmark.sentences == 20
    assert benchmark.entries[0].name == "video9770"
    assert benchmark.entries[0].captions == ("a person is connecting something to system",)


def test_msrvtts_surplus_duplicates_stay_separate_videos(written: Callable[[str, object], Path]) -> None:
    rows = 'key,vid_key,video_id,sentence\nret0,m1,video1,a man\nret1,m2,video2,a man\nret2,m3,video3,"a, b"\n'
    assert captions(load(data("msrvtt", written("t.csv", rows)))) == {
        "video1": ("a man",), "video2": ("a man",), "video3": ("a, b",)
    }  # fmt: skip


def test_msvd_reads_the_listed_videos_with_all_their_captions(annotations_dir: Path) -> None:
    folder = annotations_dir / "msvd"
    benchmark = load(data("msvd", folder / "captions.sample.json", videos=str(folder / "test_list.sample.txt")))
    raw = json.loads((folder / "captions.sample.json").read_text())
    assert len(benchmark.entries) == 6
    assert all(list(entry.captions) == raw[entry.name] for entry in benchmark.entries)
    assert all(21 <= len(entry.captions) <= 81 for entry in benchmark.entries)


def test_msvds_odd_ids_and_empty_lines(written: Callable[[str, object], Path]) -> None:
    tree = {"-4wsuPCjDBc_5_15": ["a", "a"], "_0nX-El-ySo_83_93": ["b"], "a_b_c_1_2": ["c"], "other_1_2": ["d"]}
    listed = written("list.txt", "-4wsuPCjDBc_5_15\r\n_0nX-El-ySo_83_93\r\na_b_c_1_2\r\n\r\n")
    lines = read_msvd(written("c.json", tree), listed)
    assert [(line.video, line.text) for line in lines] == [
        ("-4wsuPCjDBc_5_15", "a"), ("-4wsuPCjDBc_5_15", "a"), ("_0nX-El-ySo_83_93", "b"), ("a_b_c_1_2", "c")
    ]  # fmt: skip
    with pytest.raises(UserError, match=r"1 of the 1 ids .* such as gone_1_2"):
        read_msvd(written("c.json", tree), written("l2.txt", "gone_1_2\n"))


def test_lsmdc_is_tab_separated_with_quotes_and_dots_in_ids(written: Callable[[str, object], Path]) -> None:
    name = "1004_Juno_00.00.32.072-00.00.40.196"
    row = f'{name}\t00.00.32.072\t00.00.40.196\t00.00.32.100\t00.00.40.200\tSOMEONE says "no, and leaves.\n'
    path = written("l.csv", row + row.replace("leaves", "stays"))
    lines = read_lsmdc(path)
    assert [line.text for line in lines] == ['SOMEONE says "no, and leaves.', 'SOMEONE says "no, and stays.']
    assert lines[0].start == pytest.approx(32.1)
    benchmark = load(data("lsmdc", path))  # an id that comes twice is one video with two captions
    assert [(entry.name, len(entry.captions)) for entry in benchmark.entries] == [(name, 2)]


def test_the_processed_list_takes_a_text_a_list_and_an_answer(written: Callable[[str, object], Path]) -> None:
    tree = [{"video": "a.mp4", "caption": "one"}, {"video": "b.mp4", "caption": ["two", " three"]}]
    path = written("p.json", tree)
    assert captions(load(data("processed", path))) == {"a.mp4": ("one",), "b.mp4": ("two", " three")}
    joined = load(data("processed", path, paragraph="file"))
    assert captions(joined)["b.mp4"] == ("two  three",)
    choice = load(data("processed", written("mc.json", [{"video": "a", "caption": ["x", "y"], "answer": 1}])))
    assert choice.multiple_choice
    assert choice.entries[0].answer == 1
    mixed = [{"video": "a", "caption": ["x", "y"], "answer": 1}, {"video": "b", "caption": "z"}]
    with pytest.raises(UserError, match="for some videos and none for others"):
        load(data("processed", written("mixed.json", mixed)))


@pytest.mark.parametrize(
    "kind,content,said",
    [
        ("msrvtt", "video,text\n1,2\n", "its header is video, text, without video_id and sentence"),
        ("msrvtt", "", "its header is empty"),
        ("msrvtt", "key,vid_key,video_id,sentence\n", "annotates no video"),
        ("didemo", {"a": 1}, "it is no list"),
        ("didemo", [{"video": "a"}], "entry 0 has no `description`"),
        ("didemo", "[{", "it is no JSON"),
        ("activitynet", [], "it is no object"),
        ("activitynet", {"v_a": {"sentences": ["a"], "timestamps": []}}, "'v_a' has no `sentences` and `timestamps`"),
        ("lsmdc", "one column\n", "line 1 has no tab"),
        ("processed", [{"clip": "a"}], "entry 0 has no `video`"),
    ],
)
def test_another_file_is_refused(kind: str, content: object, said: str, written: Callable[[str, object], Path]) -> None:
    with pytest.raises(UserError, match=said):
        load(data(kind, written("file", content)))


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"There is no annotation file .*gone\.csv"):
        load(data("msrvtt", tmp_path / "gone.csv"))


@pytest.mark.parametrize(
    "name,bare",
    [("a.b.mp4", "a.b"), ("x.MOV", "x"), ("9046089068_429505c4de.", "9046089068_429505c4de"),
     ("1010_TITANIC_00.41.32.072-00.41.40.196", "1010_TITANIC_00.41.32.072-00.41.40.196"), ("-4ws_5_15", "-4ws_5_15")],
)  # fmt: skip
def test_stems_drop_media_extensions_alone(name: str, bare: str) -> None:
    assert stem(name) == bare


@pytest.mark.parametrize("name", sorted(PUBLISHED.keys() - {"processed"}))
def test_the_packaged_configs_hold_the_published_protocol(name: str) -> None:
    config = load_config(f"retrieval/{name}", RetrievalConfig)
    assert isinstance(config.data, BenchmarkData)
    assert config.data.type == name
    assert config.rerank.top == 128
    assert {field: getattr(config.data, field) for field in PUBLISHED[name]} == PUBLISHED[name]


def test_a_set_that_is_not_known_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"there is no data.type 'msrvt'\. Did you mean 'msrvtt'\?"):
        load_config("retrieval/msrvtt", RetrievalConfig, ["data.type=msrvt"])


def test_a_choice_overrides_the_published_one() -> None:
    config = load_config("retrieval/didemo", RetrievalConfig, ["data.key=stem", "data.first_seconds=null"])
    assert isinstance(config.data, BenchmarkData)
    assert (config.data.key, config.data.first_seconds, config.data.max_tokens) == ("stem", None, 64)
