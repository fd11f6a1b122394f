"""A model's own answers as data, by the real tools."""

from __future__ import annotations

import json

from tests.workflow.conftest import Project

NODES = """\
rollouts:
  own: {from: instruct, data: sums, environment: {short: {import: "rewards:Short"}}, samples: 2, max_completion_tokens: 48, filter: {min_reward: 0.5}}
"""
SHORT = """
class Short:
    def step(self, messages, row):
        return float(len(messages[-1]["content"]) < 100)
"""


def test_an_sft_on_rollouts_is_built_and_their_environment_counts(project: Project):
    (project.path / "rewards.py").write_text(SHORT)
    pack, sft = (
        "  own: {tokenizer: tiny, data: own",
        "  own: {from: instruct, data: own",
    )
    project.edit(
        "config/config.yaml",
        "pack:\n",
        f"{NODES}pack:\n{pack}, sequence_length: 128}}\n",
    )
    project.edit(
        "config/config.yaml",
        "sft:\n",
        f"sft:\n{sft}, steps: 2, batch_size: 4, lr: 1.0e-3}}\n",
    )
    done = project.build("sft/own")
    new = {"rollouts/own", "pack/own", "sft/own"}
    assert done == dict.fromkeys(new, "built")
    assert "rollouts/own  100%  kept" in project.output
    folder = project.path / "artifacts/rollouts/own/data"
    counts = json.loads((folder / "rollouts.json").read_text())
    assert counts["kept"] == len((folder / "rows.jsonl").read_text().splitlines()) > 0
    project.edit("rewards.py", "100", "1")
    assert project.planned("sft/own") >= new
