"""What is wrong with files, disks and processes: said clearly, and gone on from."""

import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from tokenizers import models, pre_tokenizers

from scripts.lib.indexed import IndexedReader

ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())
COMMAND = [sys.executable, "-m", "scripts.data.tokenize"]


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory):
    return tokenizer_of(tmp_path_factory.mktemp("tokenizer"), 257)


def tokenizer_of(folder, vocab_size):
    """A byte a token, and tokens `<|256|>` and so on, the first of them the EOD."""
    tok = tokenizers.Tokenizer(models.BPE({c: i for i, c in enumerate(ALPHABET)}, []))
    tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tok.add_special_tokens([f"<|{i}|>" for i in range(256, vocab_size)])
    tok.save(str(folder / "tokenizer.json"))
    config = {"eos_token": "<|256|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture
def tokenize(tmp_path, tokenizer_folder):
    """Run the stage as a user does; its exit code and what it said."""

    def tokenize(data, recipe="{}", folder=tokenizer_folder, out="out", **settings):
        (tmp_path / "r.yaml").write_text(recipe)
        words = words_of(tmp_path, data, folder, out)
        done = subprocess.run(
            words, stderr=subprocess.PIPE, text=True, timeout=120, **settings
        )
        assert "Traceback" not in done.stderr, done.stderr
        return done.returncode, done.stderr

    return tokenize


def words_of(tmp_path, data, folder, out="out"):
    words = [*COMMAND, "--tokenizer", str(folder), "--data", f"a={data}"]
    return [*words, "--recipe", str(tmp_path / "r.yaml"), "--out", str(tmp_path / out)]


def rows(path, *texts, **others):
    lines = (json.dumps({"text": text, **others}) + "\n" for text in texts)
    path.write_text("".join(lines))
    return path


def decoded(prefix):
    """Documents as text, the EOD's as |."""
    reader = IndexedReader(prefix)
    tok = tokenizers.Tokenizer.from_file(str(prefix.parent.parent / "t.json"))
    return [tok.decode(reader[i].tolist()) for i in range(len(reader))]


@pytest.mark.parametrize(
    ("line", "what"),
    [
        (b'{"text": "\\ud800"}', "a lone surrogate at character"),
        (b'{"text": "a\xffb"}', "not UTF-8: invalid start byte at byte 11"),
        (b'{"text": "a\xc3"}', "not UTF-8: invalid continuation byte"),
        (b"\0", "not JSON"),
        (b'{"text": "a"', "not JSON"),
        (b'["a"]', "is list, not an object"),
        (b'{"text": 5}', "column `text` is int, not a string"),
        (b'{"body": "a", "id": 7}', "column `text` is missing; found: body, id"),
    ],
)
def test_a_bad_line_is_named_with_what_is_wrong(tokenize, tmp_path, line, what):
    path = rows(tmp_path / "a.jsonl", "one")
    path.write_bytes(path.read_bytes() + line + b"\n")
    code, said = tokenize(path)
    assert code == 1
    assert f"a.jsonl:2: {what}" in said
    assert "max_bad_rows" in said
    assert not (tmp_path / "out/a.bin").exists()


def test_nul_bytes_empty_texts_and_other_columns_are_documents(
    tokenize, tmp_path, tokenizer_folder
):
    path = rows(tmp_path / "a.jsonl", "\0a\0", "", "\u2028\r\n", text2=[1], id=None)
    assert tokenize(path)[0] == 0
    reader = IndexedReader(tmp_path / "out/a")
    tok = tokenizers.Tokenizer.from_file(str(tokenizer_folder / "tokenizer.json"))
    assert reader.documents.tolist() == [0, 1, 1, 2]
    for i, text in enumerate(("\0a\0", "\u2028\r\n")):
        assert reader[i].tolist() == [*tok.encode(text).ids, 256]
    recipe = "sources: {a: {column: body}}"
    other = rows(tmp_path / "b.jsonl", "no", body="yes")
    assert tokenize(other, recipe, out="other")[0] == 0
    found = IndexedReader(tmp_path / "other/a")[0].tolist()
    assert found == [*tok.encode("yes").ids, 256]


@pytest.mark.parametrize("vocab_size", [65_499, 65_500, 65_535, 65_536, 65_537])
def test_ids_at_the_edge_of_uint16_are_stored_whole(tokenize, tmp_path, vocab_size):
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    tokenizer_of(folder, vocab_size)
    last = vocab_size - 1
    assert tokenize(rows(tmp_path / "a.jsonl", f"<|{last}|>"), folder=folder)[0] == 0
    reader = IndexedReader(tmp_path / "out/a")
    assert reader[0].tolist() == [last, 256]
    assert reader.dtype == (np.uint16 if vocab_size < 65_500 else np.int32)
    blend = json.loads((tmp_path / "out/blend.json").read_text())
    assert blend["tokenizer_vocab_size"] == vocab_size


def test_a_special_token_in_a_document_can_be_refused_by_row(tokenize, tmp_path):
    path = rows(tmp_path / "a.jsonl", "one", "", "a <|256|> b", "<|256|")
    code, said = tokenize(path, "special_tokens: refuse")
    assert code == 1
    assert "a.jsonl:3: <|256|>" in said and ":4" not in said
    assert "`special_tokens: escape`" in said
    assert tokenize(path, "{special_tokens: escape, append_eod: false}")[0] == 0
    assert 256 not in IndexedReader(tmp_path / "out/a").tokens


def test_a_line_of_100_mb_takes_a_bounded_part_of_memory(tokenize, tmp_path):
    text = "zwölf words 漢字 "
    data = rows(tmp_path / "a.jsonl", text, text * 5_500_000, "two")
    assert data.stat().st_size > 100_000_000
    gigabytes = 3 << 30
    code, said = tokenize(
        data,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_DATA, (gigabytes,) * 2),
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert code == 0, said
    assert len(IndexedReader(tmp_path / "out/a")) == 3


def several(tmp_path, num=4, num_rows=3_000):
    folder = tmp_path / "data"
    folder.mkdir()
    for name in range(num):
        rows(folder / f"{name}.jsonl", *(f"{name} {i} é" * 30 for i in range(num_rows)))
    return folder


def receipts(folder):
    return json.loads((folder / "receipts.json").read_text())["sources"]["a"]["files"]


def begun(folder):
    """Files that are done, of a run that is on or has stopped."""
    journal = folder / "a.receipts.jsonl"
    return journal.read_text().count("\n") - 1 if journal.exists() else 0


def whole(tokenize, tmp_path, data):
    assert tokenize(data, out="whole")[0] == 0
    return {path.name: path.read_bytes() for path in (tmp_path / "whole").iterdir()}


def test_a_file_that_cannot_grow_is_told_of_and_gone_on_with(tokenize, tmp_path):
    data = several(tmp_path)
    expected = whole(tokenize, tmp_path, data)
    limit = len(expected["a.bin"]) * 5 // 8
    code, said = tokenize(
        data,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit,) * 2),
    )
    assert code == 1
    assert "error: the disk is full" in said and "run again" in said
    assert begun(tmp_path / "out") == 2
    assert not (tmp_path / "out/a.bin").exists()
    assert tokenize(data)[0] == 0
    assert {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()} == expected


def test_a_disk_that_is_full_is_told_of_and_gone_on_with(
    tokenize, tmp_path, tokenizer_folder
):
    """On a real file system of its own, which is made larger for the second run."""
    data = several(tmp_path)
    expected = whole(tokenize, tmp_path, data)
    megabytes = len(expected["a.bin"]) * 5 // 8 / 1e6
    disk, words = tmp_path / "disk", words_of(tmp_path, data, tokenizer_folder)
    disk.mkdir()
    words[-1] = str(disk / "out")
    script = f"""
        mount -t tmpfs -o size={int(megabytes * 1000)}k tmpfs {disk} || exit 99
        "$@" && exit 98
        wc -l < {disk}/out/a.receipts.jsonl
        mount -o remount,size=64m {disk}
        "$@" && cp -r {disk}/out {tmp_path}/copy
    """
    isolated = ["unshare", "--user", "--map-root-user", "--mount"]
    done = subprocess.run(
        [*isolated, "sh", "-c", script, "sh", *words],
        capture_output=True,
        text=True,
        timeout=120,
    )
    if done.returncode in (1, 99) and not done.stdout:
        pytest.skip(f"no file system of one's own here: {done.stderr}")
    assert done.returncode == 0, done.stderr
    assert "error: the disk is full: [Errno 28]" in done.stderr
    assert "Traceback" not in done.stderr
    assert 1 < int(done.stdout) <= 4
    assert {p.name: p.read_bytes() for p in (tmp_path / "copy").iterdir()} == expected


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV])
@pytest.mark.parametrize("which", [0, 1])
def test_a_killed_worker_ends_the_run_with_an_error_and_a_rerun_goes_on(
    tokenize, tmp_path, tokenizer_folder, number, which
):
    data = several(tmp_path, num=6, num_rows=9_000)
    expected = whole(tokenize, tmp_path, data)
    (tmp_path / "r.yaml").write_text("{}")
    process = subprocess.Popen(
        words_of(tmp_path, data, tokenizer_folder),
        env={**os.environ, "OMP_NUM_THREADS": "2"},
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 60
    while begun(tmp_path / "out") < 1 and time.monotonic() < deadline:
        time.sleep(0.005)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    os.kill(int(children.read_text().split()[which]), number)
    try:
        _, said = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 1
    assert "error: tokenize: a worker was killed" in said and "Traceback" not in said
    done = begun(tmp_path / "out")
    assert 1 <= done < 6
    before = (tmp_path / "out/a.receipts.jsonl").read_text().splitlines()[1 : done + 1]
    assert tokenize(data)[0] == 0
    assert receipts(tmp_path / "out")[:done] == [json.loads(line) for line in before]
    assert {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()} == expected
