"""The documents say what the code does."""

from __future__ import annotations

from pathlib import Path

from scripts.lib import docs, graph
from scripts.lib.store import Store

ROOT = Path(__file__).parents[2]


def test_the_readmes_reference_is_the_schemas():
    assert docs.main([str(ROOT / "README.md"), "--check"]) == 0


def test_dvc_yaml_is_the_configs_graph():
    store = Store(graph.build(Path("config/config.yaml")))
    for path, text in store.declarations().items():
        assert (ROOT / path).read_text() == text, f"{path}: run `make docs`"
