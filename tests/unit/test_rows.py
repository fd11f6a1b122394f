"""Reading rows: every kind of file gives the same rows; every fault has its name."""

import gzip
import json
import tracemalloc

import pyarrow
import pytest
import zstandard
from pyarrow import parquet

from scripts.lib.errors import DataError, RecipeError
from scripts.lib.rows import BadRow, field, named_sources, read_rows
from scripts.lib.schema import Source

TEXTS = ["one", "zwölf 🙂", "", "a\nb"]


def text(row):
    return field(row, "text")


def read(*paths, take=text, **settings):
    return list(read_rows("corpus", Source(**settings), list(paths), take))


def values(*paths, **settings):
    return [value for value, _where in read(*paths, **settings)]


def as_lines(texts):
    return b"".join(json.dumps({"text": t}).encode() + b"\n" for t in texts)


def write(path, content):
    path.write_bytes(content)
    return path


@pytest.mark.parametrize(
    ("name", "pack"),
    [
        ("a.jsonl", bytes),
        ("a.json", bytes),
        ("a.jsonl.gz", gzip.compress),
        ("a.jsonl.zst", zstandard.compress),
    ],
)
def test_packed_lines_give_the_rows_of_plain_ones(tmp_path, name, pack):
    path = write(tmp_path / name, pack(as_lines(TEXTS)))
    assert read(path) == [(t, f"{path}:{n}") for n, t in enumerate(TEXTS, 1)]


def test_archives_joined_end_to_end_are_read_to_the_last(tmp_path):
    for suffix, pack in ((".gz", gzip.compress), (".zst", zstandard.compress)):
        content = pack(as_lines(TEXTS)) + pack(as_lines(TEXTS))
        assert values(write(tmp_path / f"a.jsonl{suffix}", content)) == TEXTS * 2


def test_parquet_rows_are_named_by_their_number(tmp_path):
    path = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.table({"text": TEXTS * 200}), path)
    rows = read(path)
    assert [value for value, _ in rows] == TEXTS * 200
    assert rows[-1][1] == f"{path}:800"


def test_a_text_file_is_one_document(tmp_path):
    story = "First line.\r\n\r\nSecond line.\n"
    plain = write(tmp_path / "a.txt", story.encode())
    packed = write(tmp_path / "b.txt.gz", gzip.compress(story.encode()))
    assert read(plain, packed) == [(story, str(plain)), (story, str(packed))]
    assert values(plain, column="body", take=lambda row: row["body"]) == [story]


def test_a_folder_is_its_data_files_sorted_by_name(tmp_path):
    write(tmp_path / "b.txt", b"second")
    write(tmp_path / "c.jsonl.gz", gzip.compress(as_lines(["third"])))
    write(tmp_path / "a.jsonl", as_lines(["first"]))
    write(tmp_path / "provenance.json", b'{"no": "row"}')
    assert values(tmp_path) == ["first", "second", "third"]


def test_windows_files_read_like_any_other(tmp_path):
    content = b"\xef\xbb\xbf" + as_lines(TEXTS).replace(b"\n", b"\r\n") + b"\r\n"
    assert values(write(tmp_path / "a.jsonl", content)) == TEXTS


@pytest.mark.parametrize(
    ("line", "why"),
    [
        (b'{"text": ', "not JSON: unexpected end of data"),
        (b'["text"]', "is list, not an object"),
        (b'{"body": "x", "id": 1}', "column `text` is missing; found: body, id"),
        (b'{"text": 7}', "column `text` is int, not a string"),
        (b'{"text": null}', "column `text` is null, not a string"),
        (b'{"text": "\xff"}', "not UTF-8: invalid start byte at byte 10"),
        (b'{"text": "\\ud800"}', "a lone surrogate"),
        (b'{"text": NaN}', "not JSON"),
    ],
)
def test_a_bad_row_is_named_by_file_and_line(tmp_path, line, why):
    content = as_lines(["good"]) + line + b"\n" + as_lines(["good"])
    path = write(tmp_path / "corpus.jsonl.gz", gzip.compress(content))
    with pytest.raises(DataError) as error:
        read(path)
    assert f"{path}:2: {why}" in str(error.value)
    assert "max_bad_rows" in error.value.hint


def test_bad_rows_up_to_the_limit_are_counted_reported_and_left_out(tmp_path, capsys):
    path = write(tmp_path / "a.jsonl", b"no\n" + as_lines(["x"]) + b"{}\n")
    rows = read_rows("corpus", Source(max_bad_rows=2), [path], text)
    assert [value for value, _ in rows] == ["x"]
    assert (rows.num_rows, rows.num_bad) == (1, 2)
    assert f"{path}:1: not JSON" in capsys.readouterr().err
    with pytest.raises(DataError, match="more than the 1 allowed"):
        read(path, max_bad_rows=1)


def test_one_failure_names_several_bad_rows(tmp_path):
    path = write(tmp_path / "a.jsonl", b"{}\n" * 20)
    with pytest.raises(DataError) as error:
        read(path)
    assert [f"a.jsonl:{n}: " in str(error.value) for n in range(1, 7)] == (
        [True] * 5 + [False]
    )


def test_what_a_stage_refuses_is_a_bad_row_too(tmp_path):
    def take(row):
        raise BadRow("no assistant turn")

    with pytest.raises(DataError, match=r"a\.jsonl:1: no assistant turn"):
        read(write(tmp_path / "a.jsonl", as_lines(["x"])), take=take)


def test_invalid_utf8_in_parquet_is_a_bad_row_not_a_crash(tmp_path):
    path = tmp_path / "a.parquet"
    column = pyarrow.array([b"good", b"\xff", b"fine"]).view(pyarrow.string())
    parquet.write_table(pyarrow.table({"text": column}), path)
    assert values(path, max_bad_rows=1) == ["good", "fine"]
    with pytest.raises(DataError, match=r"a\.parquet:2: not UTF-8"):
        read(path)


@pytest.mark.parametrize("pack", [gzip.compress, zstandard.compress])
@pytest.mark.parametrize("keep", [0.01, 0.5, 0.999])
def test_a_truncated_archive_is_fatal_whatever_is_allowed(tmp_path, pack, keep):
    packed = pack(as_lines(f"{n * 7919}" for n in range(5000)))
    suffix = ".gz" if pack is gzip.compress else ".zst"
    path = write(tmp_path / f"a.jsonl{suffix}", packed[: int(len(packed) * keep)])
    with pytest.raises(DataError, match="cannot be read to its end") as error:
        read(path, max_bad_rows=10**9)
    assert error.value.where == str(path)


@pytest.mark.parametrize(
    ("name", "content", "what"),
    [
        ("a.jsonl", b"", "the file is empty"),
        ("a.txt", b"", "the file is empty"),
        ("a.jsonl", b"\n \n", "holds no rows"),
        ("a.jsonl.gz", gzip.compress(b""), "holds no rows"),
        ("a.jsonl", '{"text": "x"}'.encode("utf-16"), "UTF-16"),
        ("a.txt", b"caf\xe9", "not UTF-8: invalid continuation byte|unexpected end"),
        ("a.json", b'[\n{"text": "x"}\n]', "one JSON array"),
        ("a.jsonl.gz", b"not an archive", "cannot be read to its end"),
        ("a.parquet", b"not parquet at all", "cannot be read as parquet"),
        ("a.csv", b"text\nx\n", "not a kind of file"),
        ("a.parquet.gz", b"x", "not a kind of file"),
    ],
)
def test_a_file_that_cannot_be_used_is_named(tmp_path, name, content, what):
    path = write(tmp_path / name, content)
    with pytest.raises(DataError, match=what) as error:
        read(path, max_bad_rows=10**9)
    assert error.value.where == str(path)


def test_a_missing_file_and_an_empty_folder_are_named(tmp_path):
    with pytest.raises(DataError, match=r"gone\.jsonl: no such file"):
        read(tmp_path / "gone.jsonl")
    with pytest.raises(DataError, match="holds no data files"):
        read(tmp_path)


def test_memory_does_not_grow_with_the_file(tmp_path):
    peaks = []
    for count in (1_000, 10_000):
        line = as_lines(["x" * 1000])
        path = write(tmp_path / f"{count}.jsonl.zst", zstandard.compress(line * count))
        rows = read_rows("corpus", Source(), [path], text)
        tracemalloc.start()
        assert sum(1 for _ in rows) == count
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert rows.bytes_read == rows.bytes_total == path.stat().st_size
    assert peaks[1] < peaks[0] + 500_000


def test_a_local_hugging_face_folder_is_read_offline_by_split(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    folder = tmp_path / "data"
    folder.mkdir()
    for split, texts in (("train", TEXTS), ("test", ["held"])):
        table = pyarrow.table({"text": texts})
        parquet.write_table(table, folder / f"{split}.parquet")
    rows = read(folder, hf=str(folder))
    assert rows[1] == ("zwölf 🙂", f"{folder}[train]:2")
    assert values(folder, hf=str(folder)) == TEXTS
    assert values(hf=str(folder), split="test") == ["held"]
    with pytest.raises(DataError, match=r"data\[nowhere\]: cannot be read"):
        read(folder, hf=str(folder), split="nowhere")


def test_a_hub_dataset_without_its_revision_is_refused():
    with pytest.raises(RecipeError, match="revision"):
        read(hf="org/name")


def test_data_that_the_recipe_does_not_list_is_refused(tmp_path):
    sources = {"b": Source(weight=2.0), "a": Source()}
    found = named_sources(sources, {"a": [tmp_path], "b": [tmp_path]})
    assert [name for name, _, _ in found] == ["b", "a"]
    with pytest.raises(RecipeError, match="--data c"):
        named_sources(sources, {"c": [tmp_path]})
    with pytest.raises(RecipeError, match="no dataset"):
        named_sources({}, {})
