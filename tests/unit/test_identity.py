"""Code counts by what it does, and every package a stage imports is pinned."""

from __future__ import annotations

import ast
import importlib.metadata
import sys
from pathlib import Path

import pytest

from scripts.lib import identity
from scripts.lib.stages import STAGES

NO_EFFECT = {"datasets", "orjson", "pyarrow", "ruamel", "zstandard", "markupsafe"}
"""Readers whose results do not depend on their version."""


def same(one: str, other: str) -> bool:
    return identity._canonical(ast.parse(one)) == identity._canonical(ast.parse(other))


def test_comments_docstrings_and_formatting_do_not_count():
    assert same(
        'def f(a):\n    """Doc."""\n    return a+1  # one', "def f(a): return (a + 1)"
    )
    assert same('class A:\n    """Doc."""\n    x = "a"\n', "class A:\n    x = 'a'\n")


def test_strings_names_and_defaults_count():
    assert not same("x = 'a'", "x = 'b'")
    assert not same("def f(a=1): return a", "def f(a=2): return a")
    assert not same("f(a=b)", "f(b=a)")


@pytest.mark.parametrize("stage", STAGES)
def test_every_package_a_stage_imports_is_part_of_its_identity(stage: str):
    spec = STAGES[stage]
    owners = importlib.metadata.packages_distributions()
    names = identity.third_party_of(spec.script) - set(sys.stdlib_module_names)
    imported = {
        d.lower().replace("_", "-")
        for n in names - NO_EFFECT
        for d in owners.get(n, [n])
    }
    assert imported <= set(spec.packages), f"add to {stage}: packages"


@pytest.mark.parametrize("stage", [s.name for s in STAGES.values() if s.nvidia])
def test_every_package_that_a_stage_of_nvidia_imports_counts(stage: str):
    if {"nemo-rl", "vllm"} & set(STAGES[stage].nvidia_packages):
        return  # that one's version decides the others, in its container
    owners = {"megatron": {"megatron-core", "megatron-bridge"}}
    names = identity.third_party_of(STAGES[stage].nvidia) - set(sys.stdlib_module_names)
    imported: set[str] = set()
    for name in names - NO_EFFECT - {"huggingface_hub", "pydantic"}:
        imported |= owners.get(name, {name.replace("_", "-")})
    assert imported <= set(STAGES[stage].nvidia_packages), f"add to {stage}"


@pytest.mark.parametrize("stage", STAGES)
def test_every_stage_shows_help_and_reads_neither_config_nor_build(stage: str):
    script = STAGES[stage].script
    modules = identity.modules_of(script)
    assert not {"scripts.lib.store", "scripts.lib.load", "scripts.lib.graph"} & set(
        modules
    )
    text = Path(*script.split(".")).with_suffix(".py").read_text()
    doc = ast.get_docstring(ast.parse(text)) or ""
    assert "Reads" in doc and "Writes" in doc and script in doc
    assert "config/config.yaml" not in text and "snakemake" not in text
