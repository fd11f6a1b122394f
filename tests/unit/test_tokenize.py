"""The tokenize stage: the ids preprocess_data.py writes, kept only while they hold."""

import itertools
import json

import pytest
import tokenizers
from tokenizers import processors

from scripts.data import tokenize, tokenizer
from scripts.lib.errors import DataError, RecipeError
from scripts.lib.indexed import IndexedReader

EOS = 1
TEXTS = ["one two", "", "three <eos> four", "zwölf 🙂 漢字", "one two"]


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    lines(folder / "corpus.jsonl", ["one two three four"] * 9)
    run(
        tokenizer,
        folder / "made",
        "vocab_size: 280",
        f"--data=corpus={folder / 'corpus.jsonl'}",
    )
    return folder / "made"


def run(stage, out, recipe, *flags):
    path = out.with_name(f"{out.name}.yaml")
    path.write_text(recipe)
    assert stage.main(["--recipe", str(path), "--out", str(out), *flags]) == 0


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
    (tmp_path / "out.work" / "a.receipts.jsonl").unlink()
    monkeypatch.setattr(tokenize, "BATCH_DOCUMENTS", 2)
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
