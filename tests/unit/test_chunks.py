"""A large file is cut: the bytes of one piece, whoever makes which chunk, and when."""

import gzip
import itertools
import json
import os
import subprocess
import sys
import time
from contextlib import closing

import pyarrow
import pytest
from pyarrow import parquet

from scripts.data import chunks, fast, tokenize
from scripts.data.chunks import Task
from scripts.data.documents import DocumentEncoder
from scripts.data.shard import Shard
from scripts.data.workers import Worker, Workers
from scripts.lib import rows
from scripts.lib.errors import DataError
from scripts.lib.schema import Source, TokenizeRecipe
from tests.unit.conftest import run

SMALL = 400


def line(text, end=b"\n"):
    return json.dumps({"text": text}, ensure_ascii=False).encode() + end


WORDS = ["one two", "zwölf 🙂 漢字", "", "x" * 90, "三四 é", "\u2028\x85 a\0b", "four"]
MANY = [f"{WORDS[i % len(WORDS)]} {i}" for i in range(99)]
LONG = "three é " * 200
FILES = {
    "plain": b"".join(map(line, MANY)),
    "no newline at the end": b"".join(map(line, MANY)) + line("end", b""),
    "carriage returns": b"".join(line(text, b"\r\n") for text in MANY),
    "a byte order mark": b"\xef\xbb\xbf" + b"".join(map(line, MANY)),
    "blank lines": b"\n \r\n".join(map(line, MANY)) + b"\n" * 3 * SMALL,
    "lines longer than chunks": b"".join(map(line, [*MANY, LONG, "a", LONG, LONG])),
    "a long line first and last": b"".join(map(line, [LONG, *MANY, LONG])),
}
EDGES = [
    b"\n",
    b"a",
    b"a\n",
    b"\n\na",
    "é\r\n🙂\n\n漢".encode(),
    b"a\n" + b"b" * 9 + b"\nc",
]


@pytest.mark.parametrize("content", EDGES)
def test_each_byte_is_in_one_chunk_and_each_chunk_ends_with_a_line(tmp_path, content):
    path = tmp_path / "a.jsonl"
    path.write_bytes(content)
    for size in range(1, len(content) + 2):
        starts = range(0, len(content), size)
        found = [rows.lines_from(path, i, i + size) for i in starts]
        parts = [content[lines.start : lines.stop] for lines in found]
        assert b"".join(parts) == content
        for start, lines, part in zip(starts, found, parts, strict=True):
            assert not part or part.endswith(b"\n") or lines.stop == len(content)
            assert not part or start <= lines.start < start + size
            before = content[: lines.start].count(b"\n")
            assert rows.num_lines(path, 0, lines.start) == before


def test_lines_of_no_file_are_none(tmp_path):
    (tmp_path / "empty.jsonl").touch()
    assert not rows.lines_from(tmp_path / "empty.jsonl", 0, 9)
    with pytest.raises(DataError, match="gone"):
        rows.lines_from(tmp_path / "gone.jsonl", 0, 9)


@pytest.fixture
def make(tmp_path, tokenizer_folder, encoded, monkeypatch):
    """Tokenize files, chunks of them or whole ones; the texts that were encoded."""
    monkeypatch.setattr(chunks, "BATCH_DOCUMENTS", 3)

    def make(paths, out, recipe="{}", size=SMALL, cores=1, earlier=(), share=""):
        monkeypatch.setattr(chunks, "CHUNK_BYTES", size)
        monkeypatch.setattr(tokenize, "BYTES_OF_A_WORKER", 1)
        monkeypatch.setenv("OMP_NUM_THREADS", str(cores))
        paths = paths if isinstance(paths, list) else [paths]
        flags = [f"--data=a={path}" for path in paths]
        flags += [f"--earlier={tmp_path / folder}" for folder in earlier]
        flags += [f"--tokenizer={tokenizer_folder}"]
        flags += [f"--share={share}"] if share else []
        encoded.clear()
        run(tokenize, tmp_path / out, recipe, *flags)
        return set(encoded)

    return make


@pytest.fixture
def many(tmp_path):
    path = tmp_path / "many.jsonl"
    path.write_bytes(FILES["plain"])
    return path


@pytest.fixture(params=["lines", "row groups"])
def large(request, many):
    """A file that is cut at either."""
    if request.param == "lines":
        return many
    return write_parquet(many.with_suffix(".parquet"), MANY, 5)


def write_parquet(path, texts, row_group_size=9, **how):
    table = pyarrow.table({"number": [*range(len(texts))], "text": texts})
    parquet.write_table(table, path, row_group_size=row_group_size, **how)
    return path


def content(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def tokens(folder):
    return [(folder / name).read_bytes() for name in ("a.bin", "a.idx", "blend.json")]


def receipts(folder):
    found = json.loads((folder / "receipts.json").read_text())
    return found["sources"]["a"]["files"]


@pytest.mark.parametrize("kind", FILES)
def test_a_file_that_is_cut_gives_the_bytes_of_one_that_is_not(make, tmp_path, kind):
    path = tmp_path / "a.jsonl"
    path.write_bytes(FILES[kind])
    make(path, "whole", size=10**9)
    assert "chunk" not in receipts(tmp_path / "whole")[0]
    for size in (61, SMALL, 3000):
        make(path, f"cut{size}", size=size)
        assert tokens(tmp_path / f"cut{size}") == tokens(tmp_path / "whole")
        found = receipts(tmp_path / f"cut{size}")
        num = -(-len(FILES[kind]) // size)
        assert [receipt["chunk"] for receipt in found] == [*range(num)]


def test_a_parquet_file_that_is_cut_gives_the_bytes_of_one_that_is_not(make, tmp_path):
    path = write_parquet(tmp_path / "a.parquet", MANY)
    make(path, "whole", size=10**9)
    assert "chunk" not in receipts(tmp_path / "whole")[0]
    for size, nums in ((1, [11]), (900, range(3, 10))):
        make(path, f"cut{size}", size=size)
        assert tokens(tmp_path / f"cut{size}") == tokens(tmp_path / "whole")
        found = receipts(tmp_path / f"cut{size}")
        assert [receipt["chunk"] for receipt in found] == [*range(len(found))]
        assert len(found) in nums
    make(write_parquet(path, MANY, 10**6), "one", size=1)
    assert tokens(tmp_path / "one") == tokens(tmp_path / "whole")


def test_row_groups_have_a_digest_of_what_is_in_them_and_how(tmp_path):
    def digests(texts, **how):
        path = write_parquet(tmp_path / "a.parquet", texts, **how)
        groups = rows.RowGroups(path)
        assert groups.num_rows(range(11)) == len(texts)
        return [chunks.digest(path, range(i, i + 1)) for i in range(11)]

    before = digests(MANY)
    assert len(set(before)) == 11 and digests(MANY) == before
    after = digests([*MANY[:-1], f"{MANY[-1][:-1]}x"])
    assert before[:-1] == after[:-1] and before[-1] != after[-1]
    assert not {*before} & {*digests(MANY, compression="none")}


@pytest.mark.parametrize("cores", [1, 2])
def test_bad_rows_of_row_groups_are_named_by_their_number(make, tmp_path, cores):
    texts = [None if i == 59 else text for i, text in enumerate(MANY)]
    path = write_parquet(tmp_path / "a.parquet", texts)
    with pytest.raises(DataError, match=r"a\.parquet:60: column `text` is null"):
        make(path, "out", size=1, cores=cores)


@pytest.mark.parametrize("cores", [1, 2])
@pytest.mark.parametrize("where", [0, 300, -20])
def test_a_damaged_parquet_file_is_named(make, tmp_path, cores, where):
    path = write_parquet(tmp_path / "a.parquet", MANY)
    damaged = bytearray(path.read_bytes())
    at = where % len(damaged)
    damaged[at : at + 20] = b"\xff" * 20
    path.write_bytes(damaged)
    with pytest.raises(DataError, match=r"a\.parquet: cannot be read as parquet"):
        make(path, "out", size=1, cores=cores)


def test_one_process_two_and_three_write_the_same_receipts_too(make, tmp_path, large):
    second = tmp_path / "second.jsonl"
    second.write_bytes(FILES["lines longer than chunks"])
    packed = tmp_path / "third.jsonl.gz"
    packed.write_bytes(gzip.compress(FILES["plain"]))
    prose = tmp_path / "fourth.txt"
    prose.write_text("one é\n" * SMALL)
    paths = [large, second, packed, prose]
    make(paths, "1")
    assert [r["file"] for r in receipts(tmp_path / "1") if "chunk" not in r] == [
        packed.name,
        prose.name,
    ]
    for cores in (2, 3):
        make(paths, str(cores), cores=cores)
        assert content(tmp_path / str(cores)) == content(tmp_path / "1")


def test_jobs_share_one_file_and_their_tokens_are_taken_over(make, tmp_path, large):
    make(large, "fresh")
    encoded = [make(large, str(i), share=f"{i}/3") for i in (1, 2, 3)]
    assert all(encoded) and sum(map(len, encoded)) == len(MANY)
    assert set().union(*encoded) == set(MANY)
    assert make(large, "after", earlier="123") == set()
    assert content(tmp_path / "after") == content(tmp_path / "fresh")
    assert make(large, "most", earlier=["1", "nowhere", "3"]) == encoded[1]
    assert content(tmp_path / "most") == content(tmp_path / "fresh")
    for i in (1, 2, 3):
        assert make(large, f"again{i}", earlier=["after"], share=f"{i}/3") == set()


@pytest.mark.parametrize("how", ["grown", "changed"])
def test_only_what_changed_of_a_file_is_encoded_anew(make, tmp_path, many, how):
    make(many, "before")
    before = many.read_bytes()
    if how == "grown":
        many.write_bytes(before + line("new"))
    else:
        many.write_bytes(before.replace(b"four 55", b"five 55"))
    encoded = make(many, "after", earlier=["before"])
    assert encoded & {"new", "five 55"} and len(encoded) < len(MANY) / 5
    make(many, "fresh")
    assert content(tmp_path / "after") == content(tmp_path / "fresh")


def test_a_run_goes_on_at_the_chunk_it_was_at(make, tmp_path, large, monkeypatch):
    make(large, "whole")
    encode = DocumentEncoder.encode

    def stopped(encoder, texts, check):
        if any("60" in text for text in texts):
            raise KeyboardInterrupt
        return encode(encoder, texts, check)

    with monkeypatch.context() as patch:
        patch.setattr(DocumentEncoder, "encode", stopped)
        with pytest.raises(KeyboardInterrupt):
            make(large, "out")
    done = (tmp_path / "out/a.receipts.jsonl").read_text().count("\n") - 1
    assert done > 3
    encoded = make(large, "out")
    left = sum(r["documents"] for r in receipts(tmp_path / "out")[done:])
    assert len(encoded) == left < len(MANY)
    assert content(tmp_path / "out") == content(tmp_path / "whole")


def test_a_run_that_stopped_before_its_index_writes_it(
    make, tmp_path, many, monkeypatch
):
    make(many, "whole")
    with monkeypatch.context() as patch:
        patch.setattr(Shard, "finish", lambda shard: (_ for _ in ()).throw(OSError))
        with pytest.raises(OSError):
            make(many, "out")
    assert make(many, "out") == set()
    assert content(tmp_path / "out") == content(tmp_path / "whole")


PROGRAM = """
import sys
from scripts.data import chunks, tokenize
from scripts.lib import cli
chunks.CHUNK_BYTES = 100_000
tokenize.BYTES_OF_A_WORKER = 1
cli.run(tokenize.main)
"""


@pytest.mark.parametrize("cores", ["1", "3"])
def test_a_killed_run_goes_on_and_the_bytes_are_those_of_another(
    tmp_path, tokenizer_folder, cores
):
    data = tmp_path / "a.jsonl"
    data.write_bytes(b"".join(line(f"{i} é" * 40) for i in range(20_000)))
    (tmp_path / "r.yaml").write_text("{}")

    def command(out):
        words = [sys.executable, "-c", PROGRAM, f"--out={tmp_path / out}"]
        words += [f"--tokenizer={tokenizer_folder}", f"--data=a={data}"]
        return [*words, f"--recipe={tmp_path / 'r.yaml'}"]

    def environment(cores):
        return {**os.environ, "OMP_NUM_THREADS": cores}

    process = subprocess.Popen(command("out"), env=environment(cores))
    journal = tmp_path / "out/a.receipts.jsonl"
    deadline = time.monotonic() + 60
    while not journal.exists() or journal.read_text().count("\n") < 4:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.002)
    process.kill()
    process.wait()
    kept = [json.loads(x) for x in journal.read_text().splitlines()[1:4]]
    assert not (tmp_path / "out/a.bin").exists()
    subprocess.run(command("out"), env=environment(cores), check=True)
    subprocess.run(command("other"), env=environment("2"), check=True)
    assert receipts(tmp_path / "out")[:3] == kept
    assert content(tmp_path / "out") == content(tmp_path / "other")


def test_nothing_is_written_once_no_more_chunks_are_wanted(
    tmp_path, tokenizer_folder, large, monkeypatch
):
    monkeypatch.setattr(chunks, "CHUNK_BYTES", SMALL)
    tasks = [Task("a", Source(), c) for c in chunks.chunks_of(Source(), [], [large])]
    recipe = TokenizeRecipe()
    encoder = DocumentEncoder(tokenizer_folder, recipe)
    with closing(Workers(encoder, tokenizer_folder, recipe, 2)) as workers:
        with closing(workers.make(tasks, tmp_path / "apart")) as made:
            first = next(made)
            processes = [worker.process for worker in workers.workers]
            assert all(process.is_alive() for process in processes)
        assert not any(process.is_alive() for process in processes)
        again = [m.receipt for m in workers.make(tasks, tmp_path / "apart")]
    assert again[0] == first.receipt and len(again) == len(tasks)


WRONG = """
from scripts.data import fast
ids = fast.Encoder.fastokens
fast.Encoder.fastokens = lambda self, texts: ids(self, [t.replace("99", "6") for t in texts])
"""


@pytest.mark.parametrize("cores", ["1", "3"])
def test_a_fault_in_one_process_is_answered_for_all_of_a_file(
    tmp_path, tokenizer_folder, cores
):
    """Whatever of this file and others was made by then, or waits."""
    texts = [f"{i % 7} é" * 40 for i in range(2_000)]
    for name in "abc":
        end = line("§ 99") if name == "b" else b""
        content = b"".join(map(line, texts)) + end
        (tmp_path / f"{name}.jsonl").write_bytes(content)
    (tmp_path / "r.yaml").write_text("{}")
    for out, program in (("right", PROGRAM), ("out", WRONG + PROGRAM)):
        words = [sys.executable, "-c", program, f"--out={tmp_path / out}"]
        words += [f"--data=a={tmp_path}/{name}.jsonl" for name in "abc"]
        words += [f"--tokenizer={tokenizer_folder}", f"--recipe={tmp_path / 'r.yaml'}"]
        done = subprocess.run(
            words,
            env={**os.environ, "OMP_NUM_THREADS": cores},
            stderr=subprocess.PIPE,
            text=True,
        )
        assert done.returncode == 0, done.stderr
    assert done.stderr.count("encodes the whole file") == 1
    assert tokens(tmp_path / "out") == tokens(tmp_path / "right")
    by = {(r["file"], r["encoder"]) for r in receipts(tmp_path / "out")}
    assert by == {
        ("a.jsonl", "fastokens"),
        ("b.jsonl", "tokenizers"),
        ("c.jsonl", "fastokens"),
    }


def of_line(number):
    """A file with what is not JSON at some lines."""
    lines = FILES["plain"].splitlines(keepends=True)
    for at in number:
        lines[at - 1] = b"no\n"
    return b"".join(lines)


@pytest.mark.parametrize("cores", [1, 2])
def test_bad_rows_are_named_by_their_line_and_counted_over_chunks(
    make, tmp_path, many, capfd, cores
):
    many.write_bytes(of_line([3, 40, 90]))
    for allowed, named in ((0, 3), (1, 40), (2, 90)):
        with pytest.raises(DataError, match=rf"many\.jsonl:{named}: not JSON"):
            make(many, f"out{allowed}", f"sources: {{a: {{max_bad_rows: {allowed}}}}}", cores=cores)  # fmt: skip
    capfd.readouterr()
    make(many, "out", "sources: {a: {max_bad_rows: 3}}", cores=cores)
    said = capfd.readouterr().err
    assert [f"many.jsonl:{at}: not JSON" in said for at in (3, 40, 90)] == [True] * 3
    assert sum(r["bad_rows"] for r in receipts(tmp_path / "out")) == 3


@pytest.mark.parametrize("cores", [1, 2])
def test_a_refused_token_is_named_by_its_line(make, many, cores):
    lines = FILES["plain"].splitlines(keepends=True)
    lines[69] = line("a <eos>")
    many.write_bytes(b"".join(lines))
    with pytest.raises(DataError, match=r"many\.jsonl:70: <eos>"):
        make(many, "out", "special_tokens: refuse", cores=cores)


@pytest.mark.parametrize("cores", [1, 2])
@pytest.mark.parametrize(
    ("start", "what"),
    [
        (b"[\n", "one JSON array"),
        ("\ufeff".encode("utf-16-le"), "UTF-16"),
        (b"\n" * 9 * SMALL, "holds no"),
    ],
)
def test_what_is_wrong_with_a_whole_file_is_told_of_one_that_is_cut(
    make, tmp_path, many, cores, start, what
):
    other = tmp_path / "other.jsonl"
    other.write_bytes(start if what == "holds no" else start + FILES["plain"])
    with pytest.raises(DataError, match=what):
        make([many, other], "out", cores=cores)
    with pytest.raises(DataError, match=what):
        make(other, "alone", cores=cores)


def test_one_wrong_document_leaves_a_whole_file_that_is_cut_to_hugging_face(
    make, tmp_path, many, monkeypatch
):
    """Also where it was found by one of several jobs, or by a run that was killed."""
    small = tmp_path / "small.jsonl"
    small.write_bytes(line("one"))
    paths = [small, many, small]
    make(paths, "right")
    ids = fast.Encoder.fastokens

    def wrong(encoder, texts):
        return ids(encoder, [text.replace("99", "6") for text in texts])

    many.write_bytes(FILES["plain"] + line("§ 99") + line("end"))
    make(paths, "right")
    monkeypatch.setattr(fast.Encoder, "fastokens", wrong)
    make(paths, "out")
    assert tokens(tmp_path / "out") == tokens(tmp_path / "right")
    found = receipts(tmp_path / "out")
    by = [list(group) for _, group in itertools.groupby(r["encoder"] for r in found)]
    assert [(each[0], len(each)) for each in by] == [
        ("fastokens", 1),
        ("tokenizers", len(found) - 2),
        ("fastokens", 1),
    ]
    assert len({r["because"] for r in found[1:-1]}) == 1

    for i in (1, 2):
        make(paths, str(i), share=f"{i}/2")
    of_shares = [{r["encoder"] for r in receipts(tmp_path / i)} for i in "12"]
    assert {"tokenizers"} in of_shares or {"fastokens", "tokenizers"} in of_shares
    assert make(paths, "after", earlier="12") >= {"§ 99", *MANY}
    assert content(tmp_path / "after") == content(tmp_path / "out")
    assert make(paths, "again", earlier=["out"]) == set()
    assert content(tmp_path / "again") == content(tmp_path / "out")

    encode = DocumentEncoder.encode

    def stopped(encoder, texts, check):
        if check is None and any("60" in text for text in texts):
            raise KeyboardInterrupt
        return encode(encoder, texts, check)

    with monkeypatch.context() as patch:
        patch.setattr(DocumentEncoder, "encode", stopped)
        with pytest.raises(KeyboardInterrupt):
            make(paths, "killed")
    assert MANY[0] not in make(paths, "killed"), "that is done"
    assert content(tmp_path / "killed") == content(tmp_path / "out")


def test_a_damaged_chunk_alone_is_encoded_again(make, tmp_path, large):
    make(large, "before")
    fresh = content(tmp_path / "before")
    path = tmp_path / "before/a.bin"
    damaged = bytearray(path.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    path.write_bytes(damaged)
    encoded = make(large, "after", earlier=["before"])
    assert 0 < len(encoded) < 20
    assert content(tmp_path / "after") == fresh


@pytest.mark.parametrize("cores", [1, 2])
def test_what_waited_in_a_killed_run_is_removed(make, tmp_path, many, cores):
    make(many, "other")
    left = tmp_path / "out/a.chunks.tmp"
    left.mkdir(parents=True)
    for number in range(9):
        (left / f"{number}.ids").write_bytes(b"left")
    make(many, "out", cores=cores)
    assert content(tmp_path / "out") == content(tmp_path / "other")


def test_a_later_chunk_begins_with_what_the_first_one_settles():
    first = fast.Checks()
    first.choose(["ab", "é"])
    for _ in range(2):
        assert first.later().choose(["ab", "é", "ü"]) == [
            (0, fast.WHOLE),
            (2, fast.WHOLE),
        ]


def test_a_process_goes_on_with_its_file_then_begins_one_then_helps(tmp_path):
    """So that few find out what the first chunk of a file settles."""
    whole, cut, other = (tmp_path / f"{name}.jsonl" for name in ("a", "b", "c"))
    tasks = [
        Task("x", Source(), chunks.Chunk(path.name, [path], 1, number))
        for path, number in ((other, 1), (cut, 0), (whole, None), (cut, 1), (cut, 2))
    ]
    worker = Worker(None, None, file=[cut])
    preferred = sorted(range(5), key=lambda i: (worker.prefers(tasks[i]), i))
    assert preferred == [1, 3, 4, 2, 0]
