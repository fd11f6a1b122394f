"""The tokenize stage: the ids preprocess_data.py writes, kept only while they hold."""

import itertools
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tokenizers
from tokenizers import processors

from scripts.data import chunks, fast, tokenize
from scripts.data.documents import DocumentEncoder
from scripts.lib.errors import DataError, RecipeError
from scripts.lib.indexed import IndexedReader
from tests.unit.conftest import run

EOS = 1
TEXTS = ["one two", "", "three <eos> four", "zwölf 🙂 漢字", "one two"]


def lines(path, texts):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


@pytest.fixture
def make(tmp_path, tokenizer_folder):
    def make(recipe="{}", folder=tokenizer_folder, **data):
        flags = [f"--data={name}={path}" for name, path in data.items()]
        run(tokenize, tmp_path / "out", recipe, f"--tokenizer={folder}", *flags)
        return tmp_path / "out"

    return make


def documents(prefix):
    """Each document's ids, from its entry in the index."""
    reader = IndexedReader(prefix)
    starts = reader.documents.tolist()
    return [
        [token for i in range(a, b) for token in reader[i].tolist()]
        for a, b in itertools.pairwise(starts)
    ]


def expected(folder, texts):
    tok = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    return [[*ids, EOS] if (ids := tok.encode(text).ids) else [] for text in texts]


def test_ids_are_those_of_one_document_at_a_time(
    make, tmp_path, tokenizer_folder, monkeypatch
):
    path = lines(tmp_path / "a.jsonl", TEXTS)
    found = documents(make(a=path) / "a")
    assert found == expected(tokenizer_folder, TEXTS)
    content = (tmp_path / "out" / "a.bin").read_bytes()
    shutil.rmtree(tmp_path / "out")
    monkeypatch.setattr(chunks, "BATCH_DOCUMENTS", 2)
    assert (make(a=path) / "a.bin").read_bytes() == content


def test_ids_are_those_of_transformers(make, tmp_path, tokenizer_folder):
    from transformers import AutoTokenizer

    tok = AutoTokenizer.from_pretrained(tokenizer_folder)
    found = documents(
        make("append_eod: false", a=lines(tmp_path / "a.jsonl", TEXTS)) / "a"
    )
    assert found == [tok(text)["input_ids"] for text in TEXTS]


def test_an_empty_document_is_an_entry_without_a_sequence(make, tmp_path):
    out = make(a=lines(tmp_path / "a.jsonl", ["", "one", ""]))
    reader = IndexedReader(out / "a")
    assert (len(reader), reader.documents.tolist()) == (1, [0, 0, 1, 1])
    assert json.loads((out / "blend.json").read_text())["sources"][0]["documents"] == 3


def test_special_token_text_becomes_the_special_token(make, tmp_path):
    found = documents(make(a=lines(tmp_path / "a.jsonl", ["x<eos>"])) / "a")
    assert found[0][-2:] == [EOS, EOS]


def test_a_bos_that_the_tokenizer_adds_is_kept(make, tmp_path, tokenizer_folder):
    folder = tmp_path / "bos"
    folder.mkdir()
    for path in tokenizer_folder.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    tok = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    tok.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", 2)]
    )
    tok.enable_truncation(3)
    tok.save(str(folder / "tokenizer.json"))
    path = lines(tmp_path / "a.jsonl", ["one two three four one two"])
    (ids,) = documents(make(folder=folder, a=path) / "a")
    assert ids[0] == 2
    assert len(ids) > 4, "the tokenizer's own truncation must not cut documents"


def test_the_blend_lists_sources_in_the_recipes_order_with_weights(make, tmp_path):
    a, b = lines(tmp_path / "a.jsonl", TEXTS), lines(tmp_path / "b.jsonl", ["one"])
    recipe = "sources: {b: {weight: 0.25, column: text}, a: {weight: 3.0}}"
    out = make(recipe, a=a, b=b)
    blend = json.loads((out / "blend.json").read_text())
    assert [(s["name"], s["prefix"], s["weight"]) for s in blend["sources"]] == [
        ("b", "b", 0.25),
        ("a", "a", 3.0),
    ]
    for source in blend["sources"]:
        reader = IndexedReader(out / source["prefix"])
        assert source["tokens"] == len(reader.tokens)
        assert source["documents"] == len(reader.documents) - 1
        assert reader.tokens.max() < blend["tokenizer_vocab_size"]
    assert blend["eod_id"] == EOS


def test_a_whole_source_is_kept_and_a_changed_or_damaged_one_made_again(make, tmp_path):
    a, b = lines(tmp_path / "a.jsonl", ["one"]), lines(tmp_path / "b.jsonl", ["two"])
    out = make(a=a, b=b)
    first = {path.name: path.stat() for path in out.iterdir()}
    content = {path.name: path.read_bytes() for path in out.iterdir()}

    lines(b, ["six"])  # as many bytes
    make(a=a, b=b)
    assert (out / "a.bin").stat().st_ino == first["a.bin"].st_ino
    assert (out / "b.bin").stat().st_ino != first["b.bin"].st_ino
    assert (out / "b.bin").read_bytes() != content["b.bin"]

    lines(b, ["two"])
    (out / "a.bin").write_bytes(b"")
    make(a=a, b=b)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == content

    make("append_eod: false", a=a, b=b)
    assert (out / "a.bin").read_bytes() != content["a.bin"]


def test_no_tokens_at_all_is_an_error(make, tmp_path):
    with pytest.raises(DataError, match="no tokens"):
        make(a=lines(tmp_path / "a.jsonl", ["", ""]))


def test_a_failed_source_leaves_no_shard_and_no_blend(make, tmp_path):
    path = lines(tmp_path / "a.jsonl", ["one"])
    path.write_text(path.read_text() + "not json\n")
    with pytest.raises(DataError, match=r"a\.jsonl:2: not JSON"):
        make(a=path)
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert not names & {"a.bin", "a.idx", "blend.json"}


def test_a_folder_without_a_tokenizer_is_named(make, tmp_path):
    with pytest.raises(DataError, match="not a tokenizer's folder"):
        make(folder=tmp_path, a=lines(tmp_path / "a.jsonl", ["one"]))


def test_data_not_in_the_recipe_is_refused(make, tmp_path):
    with pytest.raises(RecipeError, match="not a dataset of the recipe"):
        make("sources: {b: {}}", a=lines(tmp_path / "a.jsonl", ["one"]))


def receipts(out):
    return json.loads((out / "receipts.json").read_text())


def content(out):
    names = ("a.bin", "a.idx", "b.bin", "b.idx", "blend.json")
    return {name: (out / name).read_bytes() for name in names if (out / name).exists()}


def hugging_face_alone(monkeypatch):
    monkeypatch.setattr(fast, "_fastokens", lambda tokenizer: (None, "not wanted"))


@pytest.mark.parametrize("cores", ["2", "3"])
def test_the_bytes_do_not_depend_on_cores_nor_on_the_library(
    make, tmp_path, monkeypatch, cores
):
    a = lines(tmp_path / "a.jsonl", TEXTS * 40)
    b = lines(tmp_path / "b.jsonl", ["", "six é", "\0"] * 9)
    monkeypatch.setattr(chunks, "BATCH_DOCUMENTS", 7)
    first = content(make(a=a, b=b))
    wanted = receipts(tmp_path / "out")
    for number in itertools.count():
        shutil.rmtree(tmp_path / "out")
        shutil.rmtree(tmp_path / "out.work")
        if number == 2:
            break
        if number:
            hugging_face_alone(monkeypatch)
        else:
            monkeypatch.setattr(tokenize, "BYTES_OF_A_WORKER", 1)
            monkeypatch.setenv("OMP_NUM_THREADS", cores)
        assert content(make(a=a, b=b)) == first
        if not number:
            assert receipts(tmp_path / "out") == wanted


def test_receipts_tell_of_each_file(make, tmp_path, tokenizer_folder):
    a = tmp_path / "a"
    a.mkdir()
    lines(a / "1.jsonl", ["one", "two"])
    lines(a / "2.jsonl", ["", "漢字"])
    out = make(a=a)
    found = receipts(out)["sources"]["a"]
    assert found["settings"]["tokenizer.json"] == tokenize.digest(
        tokenizer_folder / "tokenizer.json"
    )
    first, second = found["files"]
    assert first["file"] == "1.jsonl"
    assert first["digest"] == tokenize.digest(a / "1.jsonl")
    assert (first["encoder"], first["checked"]) == ("fastokens", 1)
    assert (second["documents"], second["bytes"]) == (2, 2 * second["tokens"])
    assert first["bytes"] + second["bytes"] == (out / "a.bin").stat().st_size


def test_one_wrong_document_leaves_its_whole_file_to_hugging_face(
    make, tmp_path, monkeypatch, capsys
):
    a = tmp_path / "a"
    a.mkdir()
    for name, texts in (("1", ["one"]), ("2", ["two"] * 9 + ["zwölf"]), ("3", ["six"])):
        lines(a / f"{name}.jsonl", texts)
    monkeypatch.setattr(chunks, "BATCH_DOCUMENTS", 2)
    right = content(make(a=a))
    shutil.rmtree(tmp_path / "out")
    shutil.rmtree(tmp_path / "out.work")

    ids = fast.Encoder.fastokens

    def wrong(encoder, texts):
        return ids(encoder, [text.replace("z", "q") for text in texts])

    monkeypatch.setattr(fast.Encoder, "fastokens", wrong)
    assert content(make(a=a)) == right
    assert "2.jsonl: other ids" in capsys.readouterr().err
    found = receipts(tmp_path / "out")["sources"]["a"]["files"]
    encoders = [file["encoder"] for file in found]
    assert encoders == ["fastokens", "tokenizers", "fastokens"]
    assert "zwölf" in found[1]["because"]


def test_a_refused_tokenizer_is_encoded_all_the_same_and_said(
    make, tmp_path, monkeypatch, capsys
):
    hugging_face_alone(monkeypatch)
    out = make(a=lines(tmp_path / "a.jsonl", TEXTS))
    assert "fastokens refuses this tokenizer (not wanted)" in capsys.readouterr().err
    assert receipts(out)["sources"]["a"]["files"][0]["because"] == "refused"


def test_a_run_goes_on_at_the_file_it_was_at(
    make, tmp_path, tokenizer_folder, monkeypatch
):
    a = tmp_path / "a"
    a.mkdir()
    for name in "123":
        lines(a / f"{name}.jsonl", [f"{name} one", "", "two"] * 5)
    monkeypatch.setattr(chunks, "BATCH_DOCUMENTS", 4)
    whole = content(make(a=a))
    shutil.rmtree(tmp_path / "out")
    shutil.rmtree(tmp_path / "out.work")

    encode, encoded = DocumentEncoder.encode, []

    def killed(encoder, texts, check):
        encoded.extend(texts)
        if "3 one" in texts:
            raise KeyboardInterrupt
        return encode(encoder, texts, check)

    with monkeypatch.context() as patch:
        patch.setattr(DocumentEncoder, "encode", killed)
        with pytest.raises(KeyboardInterrupt):
            make(a=a)
        journal = tmp_path / "out" / "a.receipts.jsonl"
        journal.write_text(journal.read_text() + '{"torn')
        encoded.clear()
        with pytest.raises(KeyboardInterrupt):
            make(a=a)
        assert not {"1 one", "2 one"} & set(encoded), "these were whole"
    assert content(make(a=a)) == whole
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"a.bin", "a.idx", "blend.json", "receipts.json"}


def test_workers_end_with_a_killed_run_and_another_goes_on(tmp_path, tokenizer_folder):
    data = lines(tmp_path / "a.jsonl", [f"one {i} é" * 40 for i in range(30_000)])
    (tmp_path / "r.yaml").write_text("{}")
    command = [sys.executable, "-m", "scripts.data.tokenize"]
    command += ["--tokenizer", str(tokenizer_folder), "--data", f"a={data}"]
    command += ["--recipe", str(tmp_path / "r.yaml"), "--out", str(tmp_path / "out")]
    two = {**os.environ, "OMP_NUM_THREADS": "2"}
    process = subprocess.Popen(command, env=two)
    deadline = time.monotonic() + 60
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    while len(workers := children.read_text().split()) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert process.poll() is None
    process.kill()
    process.wait()
    while any(map(alive, workers)) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not any(map(alive, workers))
    assert not (tmp_path / "out" / "a.bin").exists()
    subprocess.run(command, env=two, check=True)
    assert len(IndexedReader(tmp_path / "out" / "a")) == 30_000


def alive(pid):
    try:
        return (
            Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
        )
    except OSError:
        return False


def test_bad_input_is_named_and_the_rest_is_kept(
    make, tmp_path, tokenizer_folder, capsys
):
    path = tmp_path / "a.jsonl"
    good = [json.dumps({"text": text}).encode() for text in ("one", "nul \0 nul", "")]
    bad = [b'{"text": "\\ud800"}', b'{"text": "\xff"}', b'{"text": null}', b"\0"]
    path.write_bytes(b"\n".join([good[0], *bad, *good[1:]]) + b"\n")
    for allowed in (0, 3):
        with pytest.raises(DataError, match="bad rows") as caught:
            make(f"sources: {{a: {{max_bad_rows: {allowed}}}}}", a=path)
        for number, what in enumerate(
            ("lone surrogate", "not UTF-8", "is null", "not JSON"), 2
        ):
            line = next(x for x in str(caught.value).splitlines() if f":{number}:" in x)
            assert what in line
    out = make("sources: {a: {max_bad_rows: 4}}", a=path)
    assert documents(out / "a") == expected(tokenizer_folder, ["one", "nul \0 nul", ""])
    blend = json.loads((out / "blend.json").read_text())
    assert (blend["sources"][0]["bad_rows"], blend["sources"][0]["documents"]) == (4, 3)


def test_bad_rows_are_counted_over_all_files_of_a_source(make, tmp_path):
    a = tmp_path / "a"
    a.mkdir()
    (a / "1.jsonl").write_text("no\n")
    (a / "2.jsonl").write_text('{"text": "one"}\nno\n')
    with pytest.raises(DataError, match=r"2\.jsonl:2: not JSON"):
        make("sources: {a: {max_bad_rows: 1}}", a=a)
    blend = make("sources: {a: {max_bad_rows: 2}}", a=a) / "blend.json"
    assert json.loads(blend.read_text())["sources"][0]["bad_rows"] == 2
    (a / "2.jsonl").write_text("no\n")
    with pytest.raises(DataError, match="holds no usable row"):
        make("sources: {a: {max_bad_rows: 2}}", a=a)


def test_a_line_longer_than_a_batch_is_one_document(make, tmp_path, tokenizer_folder):
    text = "one two three zwölf 漢字 " * 50_000
    assert len(text) > chunks.BATCH_CHARACTERS
    out = make(a=lines(tmp_path / "a.jsonl", ["one", text, "two"]))
    reader = IndexedReader(out / "a")
    assert len(reader) == 3
    tok = tokenizers.Tokenizer.from_file(str(tokenizer_folder / "tokenizer.json"))
    assert reader[1].tolist() == [*tok.encode(text).ids, EOS]


def test_ids_beyond_uint16_are_stored_as_int32(make, tmp_path, tokenizer_folder):
    folder = tmp_path / "large"
    shutil.copytree(tokenizer_folder, folder)
    tok = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    tok.add_tokens([f"<|{i}|>" for i in range(70_000)])
    tok.save(str(folder / "tokenizer.json"))
    texts = ["one <|69999|> two", "", "<|0|>"]
    out = make(folder=folder, a=lines(tmp_path / "a.jsonl", texts))
    assert IndexedReader(out / "a").dtype.itemsize == 4
    found = documents(out / "a")
    assert found == expected(folder, texts)
    assert max(found[0]) > 65_535
