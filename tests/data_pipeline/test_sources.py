import csv
import io
import json
import os
import re
import sqlite3
import sys
import tarfile
from multiprocessing import get_context
from pathlib import Path

import pytest

from configs.errors import UserError
from data_pipeline import tables
from data_pipeline.columns import PRESETS, Clip, Columns, seconds
from data_pipeline.sources import FORMATS, Part, open_source
from data_pipeline.tables import SUFFIXES, open_table

ROWS = [
    {"file": "a.mp4", "caption": "red, “round”", "n": 1, "good": True},
    {"file": "b.mp4", "caption": "über\nzwei Zeilen", "n": 2, "good": False},
    {"file": "a.mp4", "caption": "another", "n": 3, "good": True},
    {"file": "c.jpg", "caption": " kept  as given ", "n": 4, "good": True},
]


def write_table(folder, kind, rows=ROWS, group=2):
    """The same rows in any of the formats."""
    path = folder / f"list.{next(suffix for suffix, its in SUFFIXES.items() if its == kind)[1:]}"
    if kind in ("csv", "tsv"):
        with path.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, rows[0].keys(), delimiter="\t" if kind == "tsv" else ",")
            writer.writeheader()
            writer.writerows(rows)
    elif kind == "json":
        path.write_text(json.dumps(rows, ensure_ascii=False, indent=1), encoding="utf-8")
    elif kind == "jsonl":
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    elif kind == "parquet":
        parquet = pytest.importorskip("pyarrow.parquet")
        import pyarrow

        parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=group)
    else:
        with sqlite3.connect(path) as database:
            database.execute(f"CREATE TABLE clips ({', '.join(rows[0])})")
            marks = ", ".join("?" for _ in rows[0])
            database.executemany(f"INSERT INTO clips VALUES ({marks})", [tuple(row.values()) for row in rows])
        database.close()
    return path


def clips_of(source, **options):
    return dict(open_source(source, **options).clips(Part()))


@pytest.mark.parametrize("kind", dict.fromkeys(SUFFIXES.values()))
def test_every_format_says_the_same(tmp_path, kind):
    path = write_table(tmp_path, kind)
    truth = (0, 1) if kind == "sqlite" else (False, True)  # SQLite has no truth values
    expected = {
        at: Clip(row["file"], (row["caption"],), {"n": row["n"], "good": truth[row["good"]]})
        for at, row in enumerate(ROWS)
    }
    assert clips_of(path) == expected
    assert clips_of(tmp_path) == expected  # found in its folder
    renamed = path.rename(tmp_path / "list.data")
    with pytest.raises(UserError, match=r"'.data' of .* tells no format.*--format csv\|tsv\|json"):
        open_source(renamed)
    assert clips_of(renamed, kind=kind) == expected


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet", "sqlite"])
def test_a_missing_column_names_the_nearest(tmp_path, kind):
    path = write_table(tmp_path, kind)
    with pytest.raises(
        UserError, match=r"no column 'captions'; it has file, caption, n, good. Did you mean 'caption'\?"
    ):
        open_source(path, columns=Columns.parse(["caption=captions"]))
    with pytest.raises(UserError, match=r"no column 'nn'"):
        open_source(path, columns=Columns.parse(["file={nn}.mp4"]))


def test_webvids_published_layout(tmp_path):
    path = tmp_path / "results_2M_train.csv"
    path.write_text(
        "videoid,contentUrl,duration,page_dir,name\n"
        '1066647457,https://example.org/p.mp4,PT00H00M20S,006001_006050,"Travel blogger, shoot a story"\n'
    )
    assert clips_of(path, columns=Columns.parse([], "webvid"))[0] == Clip(
        "006001_006050/1066647457.mp4",
        ("Travel blogger, shoot a story",),
        {
            "videoid": 1066647457,
            "contentUrl": "https://example.org/p.mp4",
            "duration": "PT00H00M20S",
            "page_dir": "006001_006050",
        },
    )


def test_kinetics_published_layout(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    rows = [{"label": "air drumming", "youtube_id": "--nQbRBEz2s", "time_start": 104, "time_end": 114, "split": "val"}]
    expected = Clip(
        "--nQbRBEz2s_000104_000114.mp4",
        ("air drumming",),
        {"youtube_id": "--nQbRBEz2s", "time_start": 104, "time_end": 114, "split": "val"},
    )
    path = write_table(tmp_path, "csv", rows)
    assert clips_of(path, columns=Columns.parse([], "kinetics")) == {0: expected}
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "val.parquet")
    assert clips_of(tmp_path / "val.parquet", columns=Columns.parse([], "kinetics")) == {0: expected}


def test_the_lists_of_umt_and_videomamba_mix_images_and_videos(tmp_path):
    path = tmp_path / "anno.json"
    path.write_text(
        '[{"video": "v/1.mp4", "caption": ["one", "two"]}, {"image": "i/2.jpg", "caption": "three"},\n'
        ' {"video": "v/3.mp4", "caption": "", "extra": {"k": [1]}, "none": null}]'
    )
    expected = {
        0: Clip("v/1.mp4", ("one", "two")),
        1: Clip("i/2.jpg", ("three",)),
        2: Clip("v/3.mp4", (), {"extra": '{"k": [1]}'}),
    }
    assert clips_of(path, columns=Columns.parse([], "umt")) == expected
    assert clips_of(path) == expected  # those are the defaults too


def test_columns_are_given_over_a_preset_and_may_hold_commas():
    columns = Columns.parse(
        ["file={page_dir}/{videoid}, {n:03d}.webm,caption=title", "caption=more,start=from"], "webvid"
    )
    assert columns.roles == {
        "file": ("{page_dir}/{videoid}, {n:03d}.webm",),
        "caption": ("title", "more"),
        "start": ("from",),
    }
    for texts, preset, words in [
        (["captoin=x"], None, "maps no column to a role.*Did you mean 'caption'"),
        (["file"], None, "'file' maps no column"),
        ([], "webvd", "no preset 'webvd'.*Did you mean 'webvid'.*kinetics"),
    ]:
        with pytest.raises(UserError, match=words):
            Columns.parse(texts, preset)
    assert set(PRESETS) == {"webvid", "kinetics", "umt"}


@pytest.mark.parametrize(
    ("given", "expected"),
    [(3, 3.0), ("12.5", 12.5), ("1:02.5", 62.5), ("01:02:03", 3723.0), ("0:0:1,25", 1.25), ("00:00:05.000", 5.0)],
)
def test_times_are_seconds_or_a_clock(given, expected):
    assert seconds(given) == expected


@pytest.mark.parametrize("given", ["soon", "1:2:3:4", -1, "-3", float("nan"), True, ""])
def test_what_is_no_time(given):
    with pytest.raises(ValueError, match="is no time"):
        seconds(given)


def test_spans_make_several_clips_of_one_file(tmp_path):
    rows = [
        {"file": "a.mp4", "caption": "x", "from": "0", "to": "1.5"},
        {"file": "a.mp4", "caption": "y", "from": "00:00:02", "to": ""},
        {"file": "a.mp4", "caption": "z", "from": "3", "to": "2"},
        {"file": "a.mp4", "caption": "w", "from": "never", "to": "2"},
    ]
    path = write_table(tmp_path, "csv", rows)
    found = clips_of(path, columns=Columns.parse(["start=from,end=to"]))
    assert [(clip.start, clip.end) for clip in found.values()] == [(0, 1.5), (2, None), (3, 2), (None, None)]
    assert [clip.fault for clip in found.values()][:2] == [None, None]
    assert found[2].fault == "it ends at 2 s and begins at 3 s"
    assert found[3].fault == "'never' is no time: expected seconds or hh:mm:ss"


def test_columns_become_attributes_of_their_type(tmp_path):
    path = tmp_path / "list.csv"
    path.write_text(
        "n,x,id,flag,word,caption,file\n1,0.5,007,True,a,red,a.mp4\n2,1e3,12,false,,blue,b.mp4\n,,,,z,007,a.mp4\n"
    )
    assert clips_of(path) == {
        0: Clip("a.mp4", ("red",), {"n": 1, "x": 0.5, "id": "007", "flag": True, "word": "a"}),
        1: Clip("b.mp4", ("blue",), {"n": 2, "x": 1000.0, "id": "12", "flag": False}),
        2: Clip("a.mp4", ("007",), {"word": "z"}),
    }


def test_an_sqlite_table_of_ids_and_filenames(tmp_path):
    path = write_table(tmp_path, "sqlite", [{"id": 7, "filename": "x/y.mp4", "caption": "c"}])
    assert clips_of(path) == {0: Clip("x/y.mp4", ("c",), {"id": 7})}
    with sqlite3.connect(path) as database:
        database.execute('CREATE TABLE "more ""clips" (filename, caption)')
        database.execute('INSERT INTO "more ""clips" VALUES (?, ?)', ("z.mp4", "d"))
    database.close()
    with pytest.raises(UserError, match=r"holds the tables clips, more \"clips\. Choose one of them: --table NAME"):
        open_source(path)
    with pytest.raises(UserError, match="not 'clip'"):
        open_source(path, table="clip")
    assert clips_of(path, table='more "clips') == {0: Clip("z.mp4", ("d",))}


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("a.json", '{"file": "x"', "Record 1 of .* cannot be read"),
        ("a.json", '[{"file": "x", "caption": "y"}, 3]', "Record 2 of .* is a int, not a mapping"),
        ("a.json", '[{"file": "x", "caption": "y"}', "cannot be read.*the list breaks off"),
        ("a.json", '[{"file": "x", "caption": "y"}] more', "something follows the list"),
        ("a.json", '[{"file": "x", "caption": "y"} {"file"', "stands between two elements"),
        ("a.json", '"text"', "the file is no list"),
        ("a.jsonl", '{"file": "x", "caption": "y"}\n{"file": \n', "Record 2 of .* cannot be read"),
        ("a.jsonl", "[1]\n", "Record 1 of .* is a list, not a mapping.*a mapping a line"),
        ("a.jsonl", "", "no column 'file'; it has nothing in it"),
        ("a.parquet", "PAR1 this is none PAR1", "cannot be read as Parquet"),
        ("a.db", "this is no database " * 100, "cannot be read as an SQLite database"),
    ],
)
def test_a_table_that_is_damaged(tmp_path, name, text, words):
    if name.endswith("parquet"):
        pytest.importorskip("pyarrow")
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=words):
        clips_of(tmp_path / name)


@pytest.mark.parametrize("block", [1, 2, 3, 7, 64, 1 << 16])
def test_a_json_list_is_read_alike_in_blocks_of_any_size(tmp_path, monkeypatch, block):
    values = [{"file": "f", "caption": "] , [ {", "n": 12345678, "deep": [[], {"a": [1.5, None]}]}, {"file": "é"}] * 3
    path = tmp_path / "list.json"
    path.write_text("\n " + json.dumps(values, indent=2, ensure_ascii=False) + " \n", encoding="utf-8")
    monkeypatch.setattr(tables, "_BLOCK", block)
    assert [row for _, row in open_table(path, "json").rows()] == json.loads(path.read_text(encoding="utf-8"))


def test_json_lines_under_the_name_of_json(tmp_path):
    (tmp_path / "list.json").write_text('{"file": "a", "caption": "b"}\n\n{"file": "c", "caption": "d"}\n')
    assert [clip.file for clip in clips_of(tmp_path).values()] == ["a", "c"]


def test_without_pyarrow_the_cure_is_said(tmp_path, monkeypatch):
    (tmp_path / "a.parquet").touch()
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(
        UserError, match=r"pyarrow, which reads it, is not installed.*pip install 'videomamba\[parquet\]'"
    ):
        open_source(tmp_path / "a.parquet")


# Folders with side-cars


def test_side_cars(tmp_path):
    (tmp_path / "deep").mkdir()
    for name in ("a.mp4", "b.jpg", "c.webm", "deep/d.MP4", "e.mp4", "notes.pdf"):
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / "a.txt").write_text("one caption\n\nanother\n")
    (tmp_path / "b.json").write_text('{"caption": "a picture", "place": 3, "tags": ["x"], "empty": null}')
    (tmp_path / "c.json").write_text('["first", "second\\nline"]')
    (tmp_path / "deep" / "d.json").write_text('"only a text"')
    expected = {
        0: Clip("a.mp4", ("one caption", "another")),
        1: Clip("b.jpg", ("a picture",), {"place": 3, "tags": '["x"]'}),
        2: Clip("c.webm", ("first", "second\nline")),
        3: Clip("e.mp4", ()),
        4: Clip("deep/d.MP4", ("only a text",)),
    }
    assert clips_of(tmp_path) == expected  # the .json files are no manifests
    before = open_source(tmp_path).identity()
    assert open_source(tmp_path).identity() == before
    (tmp_path / "e.txt").write_text("late")
    assert open_source(tmp_path).identity() != before
    (tmp_path / "a.txt").write_bytes(b"\xff\xfe\xff")
    with pytest.raises(UserError, match=r"side-car .*a\.txt cannot be read"):
        clips_of(tmp_path)


def test_a_name_that_is_no_text(tmp_path):
    (tmp_path / "ok.mp4").touch()
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.mp4")).touch()
    with pytest.raises(UserError, match=r"caf.\.mp4 is not UTF-8\. Rename it"):
        clips_of(tmp_path)


# Tars


def write_tar(path, members, tar_format=tarfile.GNU_FORMAT):
    with tarfile.open(path, "w", format=tar_format) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


TAR = [
    ("00.json", b'{"caption": "from json", "url": "u", "status": "success"}'),
    ("00.mp4", b"video 0"),
    ("00.txt", b"from txt"),
    ("01.mp4", b"video 1"),
    ("01.txt", "über\ntwo lines\n".encode()),
    ("02.jpg", b"picture"),
    ("02.json", b'{"captions": ["a", "", "b"], "attributes": {"place": 4}, "sha256": "0", "probe": {}}'),
    ("03.txt", b"no medium"),
    ("04.mp4", b"video 4"),
    ("04.json", b"{broken"),
    ("05.mp4", b"video 5"),
    ("05.json", b'{"url": "x"}'),
    ("05.txt", b"the json has none"),
]


@pytest.mark.parametrize("tar_format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT, tarfile.USTAR_FORMAT])
def test_existing_shards(tmp_path, tar_format):
    path = write_tar(tmp_path / "x.tar", TAR, tar_format)
    found = clips_of(tmp_path)
    with tarfile.open(path) as tar:
        place = {member.name: ("x.tar", member.offset_data, member.size) for member in tar}
    assert found == {
        0: Clip("x.tar:00.mp4", ("from json",), {"url": "u", "status": "success"}, inside=place["00.mp4"]),
        1: Clip("x.tar:01.mp4", ("über\ntwo lines",), inside=place["01.mp4"]),
        2: Clip("x.tar:02.jpg", ("a", "b"), {"place": 4}, inside=place["02.jpg"]),
        3: Clip("x.tar:03.txt", ("no medium",), inside=place["03.txt"], fault="no medium among its members (txt)"),
        4: found[4],
        5: Clip("x.tar:05.mp4", ("the json has none",), {"url": "x"}, inside=place["05.mp4"]),
    }
    assert "cannot be read" in found[4].fault
    assert clips_of(path) == found


def test_tars_that_break_off_say_so(tmp_path):
    path = write_tar(tmp_path / "a.tar", TAR)
    data = path.read_bytes()
    (tmp_path / "b.tar").write_bytes(data[:1540])  # in the middle of a video
    (tmp_path / "c.tar").write_bytes(data[:3072] + b"\xee" * 512 + data[3584:])  # a header overwritten
    (tmp_path / "d.tar").write_bytes(bytes(10240))
    found = clips_of(tmp_path)
    assert {clip.fault for at, clip in found.items() if 1_000_000 <= at < 2_000_000} >= {
        "a tar reader gives up: unexpected end of data"
    }
    assert found[2_000_001].fault.startswith("a tar reader gives up: no header stands at 3072")
    assert found[3_000_000].fault == "there is no sample in it"


# Parts, and memory


@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_parts_are_disjoint_and_make_up_the_whole(tmp_path, count):
    rows = [{"file": f"{n // 2:03d}.mp4", "caption": f"caption {n}"} for n in range(200)]
    source = open_source(write_table(tmp_path, "jsonl", rows))
    parts = [dict(source.clips(Part(index, count))) for index in range(1, count + 1)]
    assert sum(map(len, parts)) == 200
    assert {at: clip for part in parts for at, clip in part.items()} == dict(source.clips(Part()))
    files = [{clip.file for clip in part.values()} for part in parts]
    assert sum(map(len, files)) == 100  # the captions of a clip stay together
    assert min(map(len, files)) > 100 / count / 3


@pytest.mark.parametrize("text", ["0/4", "5/4", "3", "a/b", "1/0", "-1/2"])
def test_what_is_no_part(text):
    with pytest.raises(UserError, match="is no part"):
        Part.parse(text)


def peak_of_listing(kind, path, ledger):
    """In a process of its own: the peak memory, in KiB, of listing a manifest."""
    from data_pipeline.ledger import Ledger

    if kind == "parquet":
        import pyarrow.parquet  # noqa: F401
    with Ledger(ledger) as opened, opened.transaction():
        opened.list_clips(open_source(path, kind=kind).clips(Part()))
        count = opened.one("SELECT count(*) FROM clips")
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]), count  # ru_maxrss can be the parent's


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "parquet"])
def test_a_long_manifest_is_not_held_in_memory(tmp_path, kind):
    """Ten times the rows, which as objects take 30 MB more: within 12 MB of the peak of a tenth of them."""
    peaks = []
    for count in (4_000, 40_000):
        folder = tmp_path / str(count)
        folder.mkdir()
        rows = [{"file": f"folder/{n:09d}.mp4", "caption": f"a caption of clip {n} " * 8} for n in range(count)]
        path = write_table(folder, kind, rows, group=2_000)
        with get_context("spawn").Pool(1) as pool:
            peak, listed = pool.apply(peak_of_listing, (kind, path, folder / "ledger.sqlite"))
        assert listed == count
        peaks.append(peak)
    assert peaks[1] - peaks[0] < 12_000, peaks


def test_formats_are_named(tmp_path):
    assert FORMATS == ("csv", "tsv", "json", "jsonl", "parquet", "sqlite", "folder", "shards")
    with pytest.raises(UserError, match="no format 'xls'"):
        open_source(tmp_path, kind="xls")
