"""`snakemake --profile slurm export` on a real cluster: the chain, and what is rebuilt."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.cluster.builds import Site, forget
from tests.cluster.kit import Cluster
from tests.workflow.conftest import Project, make_project


def test_the_whole_chain_on_two_nodes(built: Project, cluster: Cluster, tmp_path: Path):
    site = Site(make_project(tmp_path / "chain"), cluster)
    site.place("sft", nodes=2)
    site.place("pretrain", gpus=2, processes=1, partition="high", minutes=7)
    build = site.build("export")
    assert build.done() == set(built.first)
    jobs = {job["comment"].removeprefix("rule_"): job for job in cluster.jobs()}
    assert "report/main" not in jobs, "light: on the controller"
    sft, pretrain = (
        cluster.job(jobs[node]["id"]) for node in ("sft/instruct", "pretrain/base")
    )
    assert sft["NumNodes"] == "2" and sft["NodeList"] == "n[1-2]"
    assert pretrain["Partition"] == "high" and pretrain["TimeLimit"] == "00:07:00"
    assert pretrain["TresPerNode"].endswith("gpu:2")
    folder = site.project.path / "artifacts/pretrain/base"
    provenance = json.loads((folder / "provenance.json").read_text())
    assert provenance["host"] in ("n1", "n2") and provenance["gpu_hours"] > 0
    other = (
        built.path / "artifacts/pretrain/base/model/model.safetensors"
    ).read_bytes()
    assert site.weights("pretrain/base") == other, "as on one machine"
    assert site.project.planned() == set(), "nothing to do, with or without a cluster"
    assert site.build("export").done() == set()


def test_two_nodes_give_the_loss_curve_of_one(site: Site):
    site.change(
        "config/config.yaml", sft={"instruct": {"steps": 20, "log_steps": 1, "seed": 3}}
    )
    site.build("sft").done()
    one = site.losses("sft/instruct")
    forget(site, "sft/instruct")
    site.place("sft", nodes=2)
    build = site.build("sft")
    build.done()
    assert "sft/instruct  starts on n[1-2]" in build.said
    assert len(one) == 20
    assert site.losses("sft/instruct") == pytest.approx(one, rel=1e-5)


def test_one_changed_setting_submits_its_node_and_what_follows(site: Site):
    site.project.edit("config/config.yaml", "weight_decay: 0.1", "weight_decay: 0.2")
    build = site.build("export")
    build.done()
    after = ["grpo/reasoner", "export/nano", "eval/sums"]
    assert site.submitted() == after, "and the report on the controller"


def test_independent_branches_run_at_the_same_time(site: Site):
    node = {"from": "instruct", "data": "sums", "steps": 2, "batch_size": 8}
    node |= {"num_generations": 4, "max_completion_tokens": 4, "lr": 1.0e-5}
    node |= {"weight_decay": 0.1}  # with rewards all alike, what changes the weights
    site.change("config/config.yaml", grpo={"a": node, "b": node | {"seed": 5}})
    build = site.build("grpo")
    build.until(r"^grpo/a  starts on")
    build.until(r"^grpo/b  starts on")
    assert "  done in" not in build.said
    assert build.done() == {"grpo/a", "grpo/b"}
    assert sorted(site.submitted()) == ["grpo/a", "grpo/b"]
