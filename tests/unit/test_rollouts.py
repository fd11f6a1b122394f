"""Rollouts in the plan: what they read, who reads them, what is refused."""

from __future__ import annotations

from typing import Any

import pytest

from scripts.lib.stages import STAGES
from tests.unit.test_rl_graph import BASE, OWN, built, folder, own, read_once, refused

__all__ = ["folder", "own", "read_once"]  # fixtures

SOLVED = {"from": "instruct", "data": "arithmetic", "max_completion_tokens": 4}
SOLVED |= {"filter": {"min_reward": 1.0}}
PACKED = {"tokenizer": "tiny", "data": ["solved"], "sequence_length": 256}
TRAINED = {"steps": 5, "batch_size": 8, "lr": 0.001}
BETTER = {
    "engine": "transformers",
    "placement": None,
    "rollouts": {"solved": SOLVED},
    "pack": {"solved": PACKED},
    "sft": {"better": {"from": "instruct", "data": "solved", **TRAINED}},
}


def rollouts(**settings: Any) -> dict[str, Any]:
    return {"rollouts": {"solved": settings}}


def test_rollouts_read_a_model_and_prompts_and_feed_an_sft():
    whole = built(BETTER)
    node = whole.nodes["rollouts/solved"]
    assert node.parents == ("sft/instruct", "prompts/arithmetic")
    assert node.flags == (
        ("--parent", "artifacts/sft/instruct/model"),
        ("--prompts", "artifacts/prompts/arithmetic/data"),
    )
    assert node.recipe["environment"] == {"math": {"weight": 1.0}}
    assert "scripts/environments/math.py" in node.code
    packed = whole.nodes["pack/solved"]
    assert ("--data", "solved=artifacts/rollouts/solved/data") in packed.flags
    assert packed.recipe["sources"] == {"solved": {}}
    assert "rollouts/solved" in whole.ancestors("sft/better")


@pytest.mark.parametrize("model", ["base", "polite", "reasoner", "nano", "export/nano"])
def test_any_language_model_may_be_sampled(model: str):
    assert built(BETTER, rollouts(**{"from": model})).nodes["rollouts/solved"]


def test_a_recipe_is_one_that_the_script_reads():
    released = {"from": {"hf": "org/small", "revision": "a" * 40}, "data": "theirs"}
    theirs = {
        "tokenizer": {"theirs": {"hf": "org/small", "revision": "a" * 40}},
        "prompts": {"theirs": {"tokenizer": "theirs", "data": "arithmetic", "max_prompt_tokens": 32}},
        "pack": {"solved": {"tokenizer": "theirs"}},
        "sft": {"better": {"from": {"hf": "org/small", "revision": "a" * 40}}},
    }  # fmt: skip
    whole = built(BETTER, theirs, rollouts(**released))
    for node in whole.nodes.values():
        STAGES[node.stage].recipe.model_validate(node.recipe)
    assert whole.nodes["rollouts/solved"].recipe["parent"]["hf"] == "org/small"
    parent = {"parent": {"hf": "org/small", "revision": "a" * 40}}
    said = refused(BETTER, {"dpo": {"polite": parent}})
    assert "dpo.polite.parent: unknown key" in said


def test_the_best_of_several_may_be_sampled_unless_rollouts_train_it():
    best = {"best": ["instruct", "polite"], "by": "metrics.loss"}
    node = built(BETTER, rollouts(**{"from": best})).nodes["rollouts/solved"]
    assert node.parents[0] == "best/instruct_or_polite_by_metrics_loss"
    best["best"].append("better")
    assert "rollouts.solved.from: a cycle: " in refused(
        BETTER, rollouts(**{"from": best})
    )


def test_pairs_of_rollouts_feed_dpo():
    of_pairs = rollouts(kind="preferences", filter={"min_reward": None, "margin": 0.5})
    read = {"preferences": {"sums": {"data": ["solved"]}}}
    whole = built(BETTER, of_pairs, read, {"pack": {"solved": {"data": ["chat"]}}})
    assert "rollouts/solved" in whole.ancestors("dpo/polite")
    assert whole.nodes["rollouts/solved"].recipe["filter"] == {"margin": 0.5}


def test_a_reward_model_and_an_own_environment_may_judge_and_count(own: Any):
    judged = {"reward_model": {"from": "helpful"}, "mine": {"import": OWN}}
    node = built(BETTER, rollouts(environment=judged)).nodes["rollouts/solved"]
    assert ("--reward-model", "artifacts/rm/helpful/model") in node.flags
    assert node.files == ("environments/length.py",)
    assert "scripts/environments/reward_model.py" in node.code


def test_no_training_waits_for_data_that_a_model_makes():
    other = {"from": "polite", "data": "solved", **TRAINED}
    whole = built(BETTER, {"sft": {"better": other}})
    assert "pack/chat" in whole.before("pretrain/base"), "data stops a build early"
    assert "pack/solved" not in whole.before("dpo/polite")
    assert "pack/solved" in whole.before("sft/better")


def test_the_model_that_rollouts_train_may_not_make_them():
    said = refused(BETTER, rollouts(**{"from": "better"}))
    way = "rollouts/solved <- sft/better <- pack/solved <- rollouts/solved"
    assert f"rollouts.solved.from: a cycle: {way}" in said


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"from": "instruckt"}, "rollouts.solved.from: no such node: instruckt"),
        ({"from": "helpful"}, "rollouts.solved.from: no such node: helpful"),
        ({"data": "arithmetics"}, "rollouts.solved.data: no such node: arithmetics (of prompts)"),
        ({"environment": "maths"}, "rollouts.solved.environment.maths: no such environment\n\nhint: did you mean `math`?"),
        ({"environment": "tool_use"}, "environment.tool_use: replies to the model, and rollouts are of one turn"),
        ({"environment": "sliding_puzzle"}, "environment.sliding_puzzle: replies to the model"),
        ({"environment": {"reward_model": {"from": "polite"}}}, "rollouts.solved.environment.reward_model.from: no such node: polite (of rm)"),
        ({"filter": {"min_reward": None}}, "rollouts.solved.filter: would keep every answer"),
        ({"filter": {"margin": 1.0}}, "rollouts.solved.filter.margin: belongs to kind: preferences"),
        ({"top_p": 1.5}, "rollouts.solved.top_p: "),
        ({"sample": 3}, "rollouts.solved.sample: unknown key\n\nhint: did you mean `samples`?"),
        ({"max_completion_tokens": 5000}, "rollouts.solved.max_completion_tokens: prompt and completion of 5032 tokens"),
        ({"kind": "preferences"}, "pack.solved.data: solved holds preferences, not chats"),
    ],
)  # fmt: skip
def test_mistakes_are_named(settings: dict[str, Any], said: str):
    assert said in refused(BETTER, rollouts(**settings))


def test_transformers_samples_them_whatever_the_engine():
    on_gpus = {"engine": "nvidia", "placement": BASE["placement"]}
    node = built(BETTER, on_gpus).nodes["rollouts/solved"]
    assert node.script == "scripts.transformers.rollouts"
    said = refused(BETTER, {"engine": {"default": "nvidia", "rollouts": "nvidia"}})
    assert "engine.rollouts: nvidia has no rollouts\n\nhint: transformers" in said


def test_a_dataset_and_rollouts_have_no_name_together():
    same = {"generate": {"solved": {"kind": "chats", "count": 2}}}
    assert "two nodes with one name" in refused(BETTER, same)


def test_curation_counts_for_rollouts_and_for_no_trainer():
    nodes = built(BETTER).nodes
    assert "scripts/data/curation.py" in nodes["rollouts/solved"].code
    others = [n for n in nodes.values() if "scripts/data/curation.py" in n.code]
    assert [n.id for n in others] == ["rollouts/solved"]
