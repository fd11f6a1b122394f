"""The quick reader of configs sees what the thorough one sees, or leaves it to that."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from scripts.lib import load

ROOT = Path(__file__).parents[2]
FILES = sorted([*(ROOT / "config").rglob("*.yaml"), *(ROOT / "slurm").rglob("*.yaml")])
VALUES = [
    "010",
    "0o17",
    "0x1f",
    "0b11",
    "1_000",
    "1e3",
    "3e-4",
    "3.0e-4",
    ".inf",
    "-.inf",
    "1.",
    ".5",
    "+1",
    "-0",
    "12e03",
    "yes",
    "on",
    "True",
    "~",
    "null",
    "2024-01-01",
    "'x'",
    '"a\\nb"',
    "1:30",
    "a:b",
    "a#b",
    "[a:b,c]",
    "{x:1}",
    "[{a:1}]",
    "{a,b}",
    "data/*.jsonl",
    '{"a":1}',
    "é",
]
DOCUMENTS = [
    *(f"k:\n  m: {value}\n  n: 2\nz: [a,\n  b]\n" for value in VALUES),
    "a:\n\n  # a comment\n  b: 1\n",
    "{a: 1,\n b: {c: 2}}\n",
    "? a\n: b\n",
    "---\na: 1\n...\n",
    "a: |\n  text\n   more\nb: >-\n  folded\n  twice\nc: 1\n",
    "a: 'on two\n  lines'\nb:\nc:\n- 1\n- {d: 2}\n",
    "a: {b: [1, {c: d}]}\n",
]
LEFT = [
    "a: 1\na: 2\n",
    "a: &x 1\nb: *x\n",
    "a: !!str 1\n",
    "1: a\n",
    "- a\n",
    "",
    "a: [",
]


def seen(section: load.Section) -> list[Any]:
    """Keys in order, lines, values with their types."""
    return [
        (k, section.lines[k], seen(v) if isinstance(v, load.Section) else repr(v))
        for k, v in section.items()
    ]


@pytest.mark.parametrize("text", [*(f.read_text() for f in FILES), *DOCUMENTS])
def test_the_quick_reader_sees_the_same_keys_values_and_lines(text: str):
    quick = load._Quick().read(text)
    if quick is not None:
        assert seen(quick) == seen(load._section(YAML(typ="rt").load(text)))


def test_the_default_config_is_read_quickly():
    text = (ROOT / "config/config.yaml").read_text()
    assert load._Quick().read(text) is not None


@pytest.mark.parametrize("text", LEFT)
def test_what_is_unusual_or_wrong_is_left_to_the_thorough_reader(text: str):
    assert load._Quick().read(text) is None
