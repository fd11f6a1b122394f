"""A file added or changed is encoded alone: others' tokens are taken from before."""

import json
import shutil

import pytest

from scripts.data import chunks, tokenize
from scripts.data.documents import DocumentEncoder
from scripts.data.share import parsed, share_of
from scripts.lib.errors import DataError, RecipeError
from tests.unit.conftest import run

FILES = {
    "1.jsonl": ["one two", "", "zwölf 🙂"],
    "2.jsonl": ["", "two"],
    "3.txt": ["three\n\nthree"],
    "4.jsonl": [f"four {i}" for i in range(50)],
}


def write(folder, files):
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for name, texts in files.items():
        lines = (json.dumps({"text": text}) + "\n" for text in texts)
        content = texts[0] if name.endswith(".txt") else "".join(lines)
        (folder / name).write_text(content)
    return folder


@pytest.fixture
def make(tmp_path, tokenizer_folder, encoded, monkeypatch):
    """Tokenize these files into a new folder; the texts that were encoded for it."""
    monkeypatch.setattr(chunks, "BATCH_DOCUMENTS", 3)

    def make(files, out, earlier=(), recipe="{}", source="a", share=""):
        if isinstance(files, dict):
            paths = [write(tmp_path / "data", files)]
        else:
            paths = [tmp_path / "data" / name for name in files]
        flags = [f"--data={source}={path}" for path in paths]
        flags += [f"--earlier={tmp_path / folder}" for folder in earlier]
        flags += [f"--tokenizer={tokenizer_folder}"]
        flags += [f"--share={share}"] if share else []
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
    assert f"{kept} of {len(files)} chunks as before" in capsys.readouterr().err
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
    monkeypatch.setattr(tokenize, "version_of", lambda name: "99")
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


SHARES = ("1/3", "2/3", "3/3")


def shares(make, files, earlier=()):
    """Make all shares of these files; what was encoded for each, by their folders."""
    return {
        share[0]: make([*files], share[0], earlier, share=share) for share in SHARES
    }


def test_shares_together_give_the_bytes_of_one_run(make, tmp_path):
    make(FILES, "fresh")
    encoded = shares(make, FILES)
    everything = {text for texts in FILES.values() for text in texts}
    assert set().union(*encoded.values()) == everything and all(encoded.values())
    assert not (tmp_path / "1/blend.json").exists()
    assert make([*FILES], "after", [*encoded]) == set()
    assert content(tmp_path / "after") == content(tmp_path / "fresh")
    some = make([*FILES], "most", ["1", "3", "nowhere"])
    assert some == encoded["2"]
    assert content(tmp_path / "most") == content(tmp_path / "fresh")


def test_shares_leave_out_what_was_done_before(make, tmp_path):
    make(FILES, "before")
    write(tmp_path / "data", {**FILES, "0.jsonl": ["zero"], "9.jsonl": ["nine"]})
    names = [f"{name}.jsonl" for name in "0129"] + ["3.txt", "4.jsonl"]
    encoded = shares(make, names, ["before"])
    assert sorted(map(len, encoded.values())) == [0, 1, 1], (
        "one new file for each of two"
    )
    make(names, "fresh")
    assert make(names, "after", ["before", *encoded]) == set()
    assert content(tmp_path / "after") == content(tmp_path / "fresh")


def test_a_share_that_stopped_goes_on_and_one_that_ended_does_nothing(make, tmp_path):
    files = {f"{i}.jsonl": [f"text {i}"] for i in range(6)}
    bad = write(tmp_path / "data", files) / "3.jsonl"
    good = bad.read_text()
    bad.write_text(good + "no\n")
    with pytest.raises(DataError, match=r"3\.jsonl:2: not JSON"):
        make([*files], "1", share="1/1")
    bad.write_text(good)
    assert make([*files], "1", share="1/1") == {"text 3", "text 4", "text 5"}
    assert make([*files], "1", share="1/1") == set()


def test_a_share_without_a_document_is_no_error(make, tmp_path):
    names = ["1.jsonl", "2.jsonl", "3.jsonl"]
    write(tmp_path / "data", dict(zip(names, (["one"], [""], ["", ""]), strict=True)))
    assert set().union(*shares(make, names).values()) == {"one", ""}
    assert not set().union(*shares(make, names).values()) - {""}
    make(names, "fresh")
    assert make(names, "after", "123") - {""} == set()
    assert content(tmp_path / "after") == content(tmp_path / "fresh")


def test_chunks_are_dealt_out_once_by_size_and_those_known_last():
    sizes = {"a": 9, "b": 5, "c": 4, "d": 3, "e": 8}

    def dealt(of, known=""):
        flags = [name in known for name in sizes]
        each = [share_of([*sizes.values()], flags, (i + 1, of)) for i in range(of)]
        return ["".join([*sizes][i] for i in mine) for mine in each]

    assert dealt(2) == ["acd", "be"] and dealt(9)[5:] == [""] * 4
    assert dealt(2, "a") == ["de", "abc"]
    assert parsed("2/8") == (2, 8)
    for wrong in ("0/2", "3/2", "2", "a/b", "-1/2"):
        with pytest.raises(RecipeError, match="2/8"):
            parsed(wrong)
