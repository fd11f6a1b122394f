"""Lineages of untrusted files: what is read, what is refused, what is found."""

from __future__ import annotations

import hashlib
import json
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from scripts.lib import lineage, verify
from scripts.lib.compare import paired
from scripts.lib.errors import UserError

EVIL = "\x1b[2J\u202e"


def entry(outs: dict[str, str], deps: dict[str, str] | None = None) -> dict[str, Any]:
    def listed(digests: dict[str, str]) -> list[dict[str, str]]:
        return [{"path": p, "md5": md5} for p, md5 in digests.items()]

    return {"outs": listed(outs), "deps": listed(deps or {})}


def md5(text: str) -> str:
    return hashlib.md5(text.encode()).hexdigest()


def row(id: str, inputs: dict[str, str] | None = None, **more: Any) -> dict[str, Any]:
    stage = id.split("/")[0]
    return {
        "node": id,
        "outs": {f"artifacts/{id}/model": md5(stage)},
        "inputs": inputs or {},
        "recipe": {},
        "code": {},
        "packages": {},
        "seed": None,
        "tokens": None,
        "counts": {},
        "made": None,
        **more,
    }


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An export's folder with one ancestor."""
    path = tmp_path / "nano"
    (path / "model").mkdir(parents=True)
    (path / "model/weights").write_text("12")
    inputs = {"artifacts/pretrain/base/model": md5("pretrain")}
    made = {"node": "export/nano", "recipe": {}, "inputs": inputs, "code": {}}
    made = {**made, "packages": {}, "host": "a", "seconds": 1.5, "gpu_hours": 0.0}
    sums = {"model/weights": md5("12")}
    write(path, lineage.carried(made, sums, [row("pretrain/base")]))
    return path


def write(folder: Path, made: dict[str, Any]) -> None:
    (folder / "provenance.json").write_text(json.dumps(made, indent=1))


def edit(folder: Path, **changes: Any) -> None:
    """Another lineage, with a digest of its own that is right."""
    made = json.loads((folder / "provenance.json").read_text())
    made.pop("sha256")
    write(folder, lineage.sealed({**made, **changes}))


def test_ancestors_come_before_descendants_even_in_a_circle():
    a, b, c = (f"artifacts/sft/{name}/model" for name in "abc")
    entries = {
        "sft-a": entry({a: md5("a")}, {c: md5("c")}),
        "sft-b": entry({b: md5("b")}, {a: md5("a")}),
        "sft-c": entry({c: md5("c")}, {b: md5("b"), "data/rows.jsonl": md5("d")}),
    }
    assert lineage.ancestors(entries, [c]) == ["sft/a", "sft/b", "sft/c"]
    del entries["sft-a"]["deps"]
    assert lineage.chain(entries, "sft/c") == ["sft/a", "sft/b", "sft/c"]
    with pytest.raises(UserError, match="did you mean `sft/a`"):
        lineage.chain(entries, "sft/aa")


@pytest.mark.parametrize("path", ["../x", "/etc/passwd", "a/../../b", "", "a\0b"])
def test_no_recorded_path_leads_out(path: str, folder: Path):
    for entries in (
        {"sft-a": entry({path: md5("a")})},
        {"sft-a": entry({}, {path: md5("a")})},
    ):
        with pytest.raises(UserError, match="leads out"):
            lineage.recorded(entries, "sft/a")
    edit(folder, md5sums=[f"{md5('12')}  {path}"])
    with pytest.raises(UserError, match="leads out"):
        verify.folder(folder)


@pytest.mark.parametrize("digest", ["../../x", "0" * 31, None, 7])
def test_no_recorded_digest_names_another_file(digest: object):
    with pytest.raises(UserError, match="no digest"):
        lineage.recorded({"sft-a": entry({"artifacts/sft/a/m": digest})}, "sft/a")  # type: ignore[dict-item]


def test_a_cached_listing_is_read_only_if_it_is_what_its_name_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    text = json.dumps([{"relpath": "../../x", "md5": md5("a")}])
    shelf = lineage.Shelf()
    cached = shelf.cache.object(md5(text) + ".dir")
    cached.parent.mkdir(parents=True)
    cached.write_text(text)
    with pytest.raises(UserError, match="leads out"):
        shelf.listing(md5(text) + ".dir")
    cached.write_text("[]")
    assert shelf.listing(md5(text) + ".dir") is None


def test_a_whole_folder_verifies_and_its_lineage_is_shown(folder: Path):
    found = verify.folder(folder)
    assert not found.changed and not found.unchecked and found.num_files == 1
    rows = lineage.rows_at(str(folder / "model"))
    assert [one["node"] for one in rows] == ["pretrain/base", "export/nano"]
    assert "export/nano" in lineage.text_of(rows)


@pytest.mark.parametrize("at", [0, 5, 40, 200, -1])
def test_any_byte_of_the_record_counts(folder: Path, at: int):
    path = folder / "provenance.json"
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)
    with suppress(UserError):  # no longer JSON, or no longer a lineage
        assert verify.folder(folder).changed


def test_a_space_added_to_the_record_counts(folder: Path):
    path = folder / "provenance.json"
    path.write_text(path.read_text() + "\n")
    assert "sha256" in verify.folder(folder).changed[0]


def test_records_that_do_not_agree_are_found(folder: Path):
    edit(
        folder,
        lineage=[
            row("pretrain/base", outs={"artifacts/pretrain/base/model": md5("x")})
        ],
    )
    (what,) = verify.folder(folder).changed
    assert "export/nano was made from another artifacts/pretrain/base/model" in what


def test_links_are_not_followed(folder: Path, tmp_path: Path):
    weights = folder / "model/weights"
    weights.rename(tmp_path / "weights")
    weights.symlink_to(tmp_path / "weights")
    assert "not followed" in verify.folder(folder).changed[0]
    (folder / "provenance.json").rename(tmp_path / "provenance.json")
    (folder / "provenance.json").symlink_to(tmp_path / "provenance.json")
    with pytest.raises(UserError, match="is a link"):
        verify.folder(folder)


@pytest.mark.parametrize(
    "changes",
    [
        {"lineage": [7]},
        {"lineage": {}},
        {"lineage": [{k: v for k, v in row("a/b").items() if k != "seed"}]},
        {"lineage": [row("a/b", tokens="many")]},
        {"lineage": [row("a/b", inputs={"x": 1})]},
        {"lineage": [row("a/b", made=[1])]},
        {"recipe": []},
        {"md5sums": ["nothing"]},
        {"md5sums": 3},
        {"seconds": "x"},
    ],
)
def test_what_is_no_lineage_is_refused(folder: Path, changes: dict[str, Any]):
    edit(folder, **changes)
    with pytest.raises(UserError, match=r"not a lineage|carries no lineage"):
        lineage.rows_at(str(folder))


def test_a_folder_without_a_lineage_says_so(folder: Path, tmp_path: Path):
    write(folder, {"node": "export/nano"})
    with pytest.raises(UserError, match="carries no lineage"):
        verify.folder(folder)
    (tmp_path / "other/model").mkdir(parents=True)
    with pytest.raises(UserError, match=r"has no provenance\.json"):
        lineage.find_folder(str(tmp_path / "other/model"))
    assert lineage.find_folder("export/nano") is None


def test_a_terminal_is_shown_no_control_characters(folder: Path):
    edit(folder, host=EVIL, recipe={EVIL: EVIL})
    text = lineage.text_of(lineage.rows_at(str(folder)))
    assert "\x1b" not in text and "\u202e" not in text


def test_nodes_of_other_names_are_compared_where_only_one_can_be_meant():
    class Fake:
        def __init__(self, id: str, *ids: str) -> None:
            self.id, self.name = id, id
            self.rows = {one: row(one) for one in (*ids, id)}

    old = Fake("grpo/a", "pretrain/base", "sft/x", "pack/one")
    new = Fake("grpo/b", "pretrain/base", "sft/y", "pack/one", "pack/two")
    pairs, alone = paired(old, new)  # type: ignore[arg-type]
    assert [(a["node"], b["node"]) for a, b in pairs] == [
        ("pretrain/base", "pretrain/base"),
        ("sft/x", "sft/y"),
        ("pack/one", "pack/one"),
        ("grpo/a", "grpo/b"),
    ]
    assert alone == ["pack/two: only above grpo/b"]
