"""A file added or changed is encoded alone: others' tokens are taken from before."""

import json
import shutil

import pytest

from scripts.data import tokenize, tokenizer
from scripts.data.documents import DocumentEncoder
from scripts.lib.errors import DataError

FILES = {
    "1.jsonl": ["one two", "", "zwölf 🙂"],
    "2.jsonl": ["", "two"],
    "3.txt": ["three\n\nthree"],
    "4.jsonl": [f"four {i}" for i in range(50)],
}


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    write(folder / "data", {"a.jsonl": ["one two three four"] * 9})
    run(tokenizer, folder / "made", "vocab_size: 280", f"--data=a={folder / 'data'}")
    return folder / "made"


def run(stage, out, recipe, *flags):
    path = out.with_name(f"{out.name}.yaml")
    path.write_text(recipe)
    assert stage.main(["--recipe", str(path), "--out", str(out), *flags]) == 0


def write(folder, files):
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for name, texts in files.items():
        lines = (json.dumps({"text": text}) + "\n" for text in texts)
        content = texts[0] if name.endswith(".txt") else "".join(lines)
        (folder / name).write_text(content)
    return folder


@pytest.fixture
def make(tmp_path, tokenizer_folder, monkeypatch):
    """Tokenize these files into a new folder; the texts that were encoded for it."""
    encode, encoded = DocumentEncoder.encode, []

    def noting(encoder, texts, check):
        encoded.extend(texts)
        return encode(encoder, texts, check)

    monkeypatch.setattr(DocumentEncoder, "encode", noting)
    monkeypatch.setattr(tokenize, "BATCH_DOCUMENTS", 3)

    def make(files, out, earlier=(), recipe="{}", source="a"):
        if isinstance(files, dict):
            paths = [write(tmp_path / "data", files)]
        else:
            paths = [tmp_path / "data" / name for name in files]
        flags = [f"--data={source}={path}" for path in paths]
        flags += [f"--earlier={tmp_path / folder}" for folder in earlier]
        flags += [f"--tokenizer={tokenizer_folder}"]
        encoded.clear()
        run(tokenize, tmp_path / out, recipe, *flags)
        return set(encoded)

    return make


def content(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


CHANGES = {
    "nothing": (FILES, set()),
    "added": ({"0.jsonl": ["none"], **FILES}, {"none"}),
    "changed": ({**FILES, "2.jsonl": ["", "six"]}, {"", "six"}),
    "removed": ({k: v for k, v in FILES.items() if k != "2.jsonl"}, set()),
    "renamed": ({**FILES, "3.txt": ["new"], "5.txt": FILES["3.txt"]}, {"new", "three\n\nthree"}),
    "two alike": ({**FILES, "5.jsonl": FILES["4.jsonl"]}, set(FILES["4.jsonl"])),
}  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_only_what_changed_is_encoded_and_the_bytes_are_those_of_a_fresh_run(
    make, tmp_path, change, capsys
):
    files, wanted = CHANGES[change]
    make(FILES, "before")
    assert make(files, "after", ["before"]) == wanted
    kept = len(files) - (len(wanted) > 0) - (change == "renamed")
    assert f"{kept} of {len(files)} files as before" in capsys.readouterr().err
    everything = {text for texts in files.values() for text in texts}
    assert make(files, "fresh") == everything
    assert content(tmp_path / "after") == content(tmp_path / "fresh")


def test_files_in_another_order_are_not_encoded(make, tmp_path):
    make(FILES, "before")
    others = sorted(FILES, reverse=True)
    assert make(others, "after", ["before"]) == set()
    make(others, "fresh")
    assert content(tmp_path / "after") == content(tmp_path / "fresh")
    assert (tmp_path / "after/a.bin").read_bytes() != (
        tmp_path / "before/a.bin"
    ).read_bytes()


HOW = ("edited", "wild", "cut", "gone")


@pytest.mark.parametrize(
    "harm",
    ["a.bin edited", "a.bin cut", *(f"a.idx {how}" for how in HOW)],
)
def test_what_was_damaged_is_not_taken_over(make, tmp_path, capsys, harm):
    make(FILES, "before")
    fresh = content(tmp_path / "before")
    name, how = harm.split()
    path = tmp_path / "before" / name
    damaged = bytearray(path.read_bytes())
    if how == "edited":
        at = 0 if name == "a.bin" else 34  # the first sequence's length
        damaged[at] ^= 1
    if how == "wild":
        damaged[-400:] = b"\x7f" * 400  # where documents begin
    path.write_bytes(damaged[: -2 if how == "cut" else None])
    if how == "gone":
        path.unlink()
    encoded = make(FILES, "after", ["before"])
    assert content(tmp_path / "after") == fresh
    err = capsys.readouterr().err
    assert "its tokens of before are damaged; it is encoded again" in err
    if harm == "a.bin edited":  # within the first file
        assert encoded == set(FILES["1.jsonl"])


@pytest.mark.parametrize("what", ["{", "[]", '{"sources": {"a": []}}', "gone"])
def test_receipts_that_cannot_be_read_count_for_nothing(make, tmp_path, what):
    make(FILES, "before")
    fresh = content(tmp_path / "before")
    path = tmp_path / "before/receipts.json"
    path.write_text(what)
    if what == "gone":
        path.unlink()
    assert make(FILES, "after", ["before", "nowhere"]) > set(FILES["4.jsonl"])
    assert content(tmp_path / "after") == fresh


@pytest.mark.parametrize(
    "recipe",
    ["append_eod: false", "special_tokens: escape", "sources: {a: {column: text}}"],
)
def test_other_settings_take_nothing_over(make, tmp_path, recipe):
    make(FILES, "before")
    everything = {text for texts in FILES.values() for text in texts}
    assert make(FILES, "after", ["before"], recipe) == everything


def test_another_version_of_a_library_takes_nothing_over(make, monkeypatch):
    make(FILES, "before")
    monkeypatch.setattr(tokenize, "version", lambda name: "99")
    assert "one two" in make(FILES, "after", ["before"])


def test_a_weight_or_more_bad_rows_allowed_take_all_over(make, tmp_path):
    make(FILES, "before")
    recipe = "sources: {a: {weight: 2.0, max_bad_rows: 5}}"
    assert make(FILES, "after", ["before"], recipe) == set()
    (blend,) = json.loads((tmp_path / "after/blend.json").read_text())["sources"]
    assert blend["weight"] == 2.0


def test_a_file_mended_after_a_failed_run_is_the_only_one_encoded(make, tmp_path):
    folder = write(tmp_path / "data", FILES)
    bad = folder / "4.jsonl"
    good = bad.read_text()
    bad.write_text(good + "no\n")
    with pytest.raises(DataError, match=r"4\.jsonl:51: not JSON"):
        make(list(FILES), "stopped")
    bad.write_text(good)
    assert make(list(FILES), "after", ["stopped"]) == set(FILES["4.jsonl"])
    make(FILES, "fresh")
    assert content(tmp_path / "after") == content(tmp_path / "fresh")


def test_bad_rows_that_are_taken_over_count(make, tmp_path):
    folder = write(tmp_path / "data", FILES)
    names = ["1.jsonl", "2.jsonl"]
    for name in names:
        (folder / name).write_text((folder / name).read_text() + "no\n")
    allowed = "sources: {{a: {{max_bad_rows: {}}}}}".format
    make(names, "before", recipe=allowed(2))
    assert make(names, "after", ["before"], allowed(2)) == set()
    assert content(tmp_path / "after") == content(tmp_path / "before")
    for out in ("less", "before"):
        with pytest.raises(DataError, match=r"2\.jsonl:3: not JSON"):
            make(names, out, ["after"], allowed(1))


def test_a_run_that_takes_over_and_stops_goes_on(make, tmp_path, monkeypatch):
    make(FILES, "before")
    files = {**FILES, "2.jsonl": ["two", "stop"], "5.jsonl": ["five"]}
    noting = DocumentEncoder.encode

    def stopped(encoder, texts, check):
        if "stop" in texts:
            raise KeyboardInterrupt
        return noting(encoder, texts, check)

    with monkeypatch.context() as patch:
        patch.setattr(DocumentEncoder, "encode", stopped)
        with pytest.raises(KeyboardInterrupt):
            make(files, "after", ["before"])
    assert make(files, "after", ["before"]) == {"two", "stop", "five"}
    make(files, "fresh")
    assert content(tmp_path / "after") == content(tmp_path / "fresh")
