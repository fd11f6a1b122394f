"""Placement on a cluster: what its file may say, what is refused, what Slurm is asked."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from scripts.lib import graph
from scripts.lib.errors import UserError
from scripts.lib.store import Store
from scripts.lib.workflow import Workflow

CONFIG = Path("config/config.yaml")


def placed(tmp_path: Path, text: str, node: str = "sft/instruct") -> dict[str, object]:
    file = tmp_path / "cluster.yaml"
    file.write_text(text)
    return graph.build(CONFIG, file).nodes[node].placement


def refused(tmp_path: Path, text: str) -> str:
    with pytest.raises(UserError) as error:
        placed(tmp_path, text)
    return str(error.value)


def test_the_file_that_is_shipped_is_valid_and_changes_no_identity():
    with_cluster = graph.build(CONFIG, Path("slurm/cluster.yaml"))
    without = graph.build(CONFIG)
    for id, node in without.nodes.items():
        assert with_cluster.nodes[id].params == node.params


def test_the_more_specific_level_counts_and_then_the_cluster(tmp_path: Path):
    found = placed(
        tmp_path,
        """
placement:
  default: {default: {cpus: 7, minutes: 11, partition: small}}
  sft: {default: {partition: big}}
""",
    )
    assert found["cpus"] == 2, "the config's sft.default is more specific"
    assert found["minutes"] == 11 and found["partition"] == "big"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("placement: {sft: {default: {partitoin: x}}}", ":1 placement.sft.default.partitoin: unknown key"),
        ("placement: {sfd: {}}", "did you mean `sft`?"),
        ("placement: {sft: {other: {}}}", "no such node"),
        ("placement: {sft: {default: {partition: 'x; rm'}}}", "string should match"),
        ("container: {runtime: docker}", "container.runtime"),
        ("container: {mounts: ['data:/data']}", "container.mounts"),
        ("containr: {}", "did you mean `container`?"),
        ("placement: {sft: {default: {nodes: 3}}}", "batch_size 32 does not divide among 3 processes"),
        ("placement: {grpo: {default: {nodes: 2}}}", "grpo runs on one machine"),
        ("placement: {tokenize: {corpus: {nodes: 2}}}", "`jobs` share its files"),
        ("placement: {sft: {default: {jobs: 2}}}", ":1 placement.sft.default.jobs: sft is one job"),
        ("placement: {tokenize: {corpus: {jobs: 0}}}", "placement.tokenize.corpus.jobs"),
        ("placement: {grpo: {default: {processes: 2}}}", "grpo is one process"),
        ("placement: {sft: {default: {processes: 4}}}", "4 processes, but 2 CPU cores"),
        ("machine: {cpus: 8, memory_gb: 64, gpus: 8}\nplacement: {sft: {default: {gpus: 16}}}", ":2 placement.sft.default.gpus: 16, but a machine has 8"),
    ],
)  # fmt: skip
def test_mistakes_are_named_with_their_line(tmp_path: Path, text: str, said: str):
    assert said in refused(tmp_path, text)


def test_a_key_of_the_cluster_in_the_config_is_sent_to_its_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    for name in ("config", "envs", "scripts"):
        shutil.copytree(name, tmp_path / name)
    monkeypatch.chdir(tmp_path)
    config = Path("config/mine.yaml")
    config.write_text(
        "extends: config.yaml\nplacement: {sft: {default: {partition: gpu}}}\n"
    )
    with pytest.raises(UserError, match=r"it belongs in .*slurm/cluster\.yaml"):
        graph.build(config)


def test_placement_becomes_slurms_resources(tmp_path: Path):
    file = tmp_path / "cluster.yaml"
    file.write_text(
        """
placement:
  default: {default: {account: lab, partition: gpu, qos: night, gres: "gpu:h200"}}
  sft: {default: {nodes: 2, gpus: 8, cpus: 16, memory_gb: 100, minutes: 240}}
"""
    )
    store = Store(graph.build(CONFIG, file))
    slurm = Workflow(store, file)
    assert slurm.resources("sft", "instruct") == {
        "mem_mb": 100_000,
        "runtime": 240,
        "nodes": 2,
        "gres": "gpu:h200:8",
        "slurm_account": "lab",
        "slurm_partition": "gpu",
        "qos": "night",
        "slurm_extra": "--ntasks-per-node=1 --open-mode=append --signal=B:USR1@120",
    }
    tokenize = slurm.resources("tokenize", "corpus")
    assert tokenize["tasks"] == 1 and "gres" not in tokenize
    assert "--signal" not in str(tokenize["slurm_extra"]), "it could not resume"
    local = Workflow(store).resources("sft", "instruct")
    assert local == {"mem_mb": 100_000, "runtime": 240, "gpu": 8}


JOBS = """
placement:
  default: {default: {jobs: 3}}
  tokenize: {default: {minutes: 5, partition: small}}
"""


def test_jobs_share_the_files_of_a_node_and_its_placement(tmp_path: Path):
    file = tmp_path / "cluster.yaml"
    file.write_text(JOBS)
    built = graph.build(CONFIG, file)
    assert not built.shards, "one folder is one job, and other stages are one"
    node = built.nodes["tokenize/corpus"]

    def jobs_for(file):
        one = replace(node, flags=(("--data", f"corpus={file}"),))
        return len(one.shards())

    assert jobs_for("data/a.jsonl") == jobs_for("data/a.parquet") == 3, "they are cut"
    assert jobs_for("data/a.jsonl.gz") == jobs_for("data/a.txt") == 0
    more = tuple(("--data", f"more=data/{i}.jsonl") for i in range(9))
    several = graph.Graph([replace(node, parents=(), flags=node.flags + more)], "", [])
    assert [*several.shards] == ["tokenize/corpus"]
    assert [*several.jobs] == ["tokenize/corpus", *OF_THREE]
    store = Store(graph.Graph.from_json(several.to_json()))
    workflow = Workflow(store, file)
    assert [f"tokenize/{name}" for name in workflow.shards("tokenize")] == OF_THREE
    assert workflow.resources("tokenize", "corpus-2of3") == workflow.resources(
        "tokenize", "corpus"
    )
    one = several.jobs["tokenize/corpus-2of3"]
    assert one.manifest == "state/tokenize/corpus-2of3.json"
    same = ("whole", "dvc", "outs", "params", "command", "name", "content")
    assert all(getattr(one, key) == getattr(node, key) for key in same)


OF_THREE = [f"tokenize/corpus-{i}of3" for i in (1, 2, 3)]
