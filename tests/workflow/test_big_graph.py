"""A graph of 200 nodes: what changed would run, and nothing else."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.bench.big_config import big_config, make_built
from tests.workflow.conftest import Project

NODES = 200


@pytest.fixture(scope="module")
def big(tmp_path_factory: pytest.TempPathFactory) -> Project:
    path = tmp_path_factory.mktemp("big") / "project"
    assert len(make_built(path, big_config(NODES)).nodes) == NODES
    return Project(path)


def test_only_what_changed_in_a_big_graph_would_run(big: Project):
    assert big.planned() == set()
    big.edit(
        "config/config.yaml",
        "batch_size: 8, lr: 3.0e-3, seed: 7}",
        "batch_size: 8, lr: 2.0e-3, seed: 7}",
    )
    assert big.planned() == {
        "sft/s7", "grpo/g7", "export/x7", "eval/e0", "report/main",
    }  # fmt: skip
    assert "[plan] run      sft/s7" in big.output
    assert "lr 0.003 -> 0.002" in big.output


@pytest.mark.parametrize("count", [24, 25, 26, 27, 99, 200])
def test_a_big_config_has_the_nodes_asked_for(
    count: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    from scripts.lib import graph
    from tests.workflow.conftest import ROOT

    for name in ("config", "envs", "scripts"):
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.chdir(tmp_path)
    Path("big.yaml").write_text(big_config(count))
    assert len(graph.build(Path("big.yaml")).nodes) == count
