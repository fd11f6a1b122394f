"""A sweep by the real tools: trained, scored, the best of it exported."""

from __future__ import annotations

import json

from tests.workflow.conftest import Project

SWEEP = """\
pretrain:
  tried: {model: tiny, data: corpus, sequence_length: 64, steps: 1, batch_size: 8,
    lr: 1.0e-3, sweep: {lr: [1.0e-3, 2.0e-3]}}
eval:
  graded:
    from: tried
    limit: 2
    max_new_tokens: 4
    tasks:
      arithmetic: {file: config/tasks/arithmetic.yaml, data: sums}
export:
  picked: {from: {best: tried, by: graded}}
"""
BEST = "artifacts/best/tried_by_graded"


def test_a_sweep_is_scored_and_the_best_of_it_is_a_parent(project: Project):
    def read(file: str) -> dict:
        return json.loads((project.path / file).read_text())

    def nodes(*lrs: str) -> set[str]:
        named = [f"tried_lr_{lr}" for lr in lrs]
        return {f"pretrain/{n}" for n in named} | {f"eval/graded_{n}" for n in named}

    (project.path / "config/more.yaml").write_text(f"extends: config.yaml\n{SWEEP}")
    more = {"PIPELINE_CONFIG": "config/more.yaml"}
    after = {"best/tried_by_graded", "export/picked"}
    done = project.build("export/picked", **more)
    assert done == dict.fromkeys(nodes("0p001", "0p002") | after, "built")
    best = read(f"{BEST}/choice.json")["best"]
    assert best == "pretrain/tried_lr_0p001", "of equals the first"
    chosen = read(f"{BEST}/provenance.json")["inputs"][f"artifacts/{best}/model"]
    exported = read("artifacts/export/picked/provenance.json")["inputs"]
    assert exported == {f"{BEST}/model": chosen}
    assert "up to date" in project.sh("dvc", "status", "best-tried_by_graded")

    project.edit("config/more.yaml", "2.0e-3]", "2.0e-3, 3.0e-3]")
    assert project.planned("export/picked", **more) == nodes("0p003") | after
    project.edit("config/more.yaml", ", 2.0e-3, 3.0e-3]", "]")
    done = project.build("export/picked", **more)
    assert done == {"best/tried_by_graded": "built"}, "its model is the same bytes"


def test_a_target_that_is_no_node_is_refused_with_the_nearest(built: Project):
    text = built.snakemake("-n", "grpo/reasonr", check=False)
    assert built.code and "[plan]" not in text
    assert (
        "error: grpo/reasonr: no such target\n\nhint: did you mean `grpo/reas" in text
    )
