"""dvc.lock, written line by line, is as DVC would write it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from dvc.utils.serialize import dumps_yaml, modify_yaml
from hypothesis import given
from hypothesis import strategies as st

from scripts.lib.store import EMPTY, replaced

TEXTS = st.text(
    st.characters(codec="utf-8", exclude_categories=("Cc", "Cs")), max_size=90
)
NAMES = st.from_regex(r"[a-z][a-z0-9]{0,6}-[a-z0-9-]{1,9}", fullmatch=True)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | TEXTS,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3)
    ),
    max_leaves=8,
)
ENTRIES = st.fixed_dictionaries(
    {
        "cmd": TEXTS,
        "params": st.dictionaries(st.just("config/params.yaml"), VALUES),
        "outs": st.lists(st.fixed_dictionaries({"path": TEXTS, "md5": TEXTS})),
    }
)


def written(text: str, name: str, entry: dict[str, Any]) -> str:
    lines = dumps_yaml({"stages": {name: entry}}).splitlines(keepends=True)[1:]
    return replaced(text, lines)


@given(st.lists(st.tuples(NAMES, ENTRIES), min_size=1, max_size=6))
def test_each_entry_is_written_as_dvc_writes_them_at_once(
    entries: list[tuple[str, Any]],
):
    ours, stages = EMPTY, {}
    for name, entry in entries:
        stages[name] = entry
        whole = dumps_yaml({"schema": "2.0", "stages": stages})
        ours = written(ours, name, entry) or whole  # some are left to DVC
        assert ours == whole


def test_a_file_goes_on_as_dvc_would_go_on_with_it(tmp_path: Path):
    path, ours = tmp_path / "dvc.lock", EMPTY
    path.write_text(dumps_yaml({"schema": "2.0"}))
    for number in (1, 2, 3, 2, 1):
        entry = {"cmd": f"python -m x {number}", "outs": [{"path": "a", "size": 1e-5}]}
        with modify_yaml(str(path)) as data:
            data.setdefault("stages", {}).update({f"sft-{number}": entry})
        ours = written(ours, f"sft-{number}", entry)
        assert ours == path.read_text()


def test_an_entry_is_replaced_where_it_was():
    text = written(written(EMPTY, "a", {"cmd": "one"}), "ab", {"cmd": "two"})
    text = written(text, "a", {"cmd": "three", "outs": [{"path": "x"}]})
    assert text == (
        EMPTY + "  a:\n    cmd: three\n    outs:\n    - path: x\n  ab:\n    cmd: two\n"
    )


@pytest.mark.parametrize(
    "text",
    [
        "",
        "schema: '2.0'\n",
        "schema: '2.0'\nstages: {}\n",
        "<<<<<<< HEAD\n" + EMPTY,
        EMPTY + "  a:\n    cmd: one",
        EMPTY + "  a:\n    cmd: one\ndatasets: []\n",
        "# mine\n" + EMPTY,
    ],
)
def test_a_file_of_another_form_is_left_to_dvc(text: str):
    assert written(text, "b", {"cmd": "two"}) == ""
