"""Reinforcement learning in the plan: what its nodes read, what counts, what is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from scripts.lib import graph, identity, run
from scripts.lib.errors import UserError
from scripts.lib.graph import Graph
from scripts.lib.schema import RL_PLACEMENT, GrpoRecipe, Placement
from scripts.lib.stages import STAGES

ROOT = Path(__file__).parents[2]
ONE = {"gpus": 1}
RL = {"gpus": 1, "cpus": 8}
PLACED = {stage: {"default": ONE} for stage in ("pretrain", "sft", "export", "eval")}
PLACED |= {stage: {"default": RL} for stage in ("dpo", "rm", "grpo")}
PAIRS = {"steps": 5, "batch_size": 8, "lr": 0.001, "data": "sums"}
BASE: dict[str, Any] = {
    "extends": "config.yaml",
    "engine": "nvidia",
    "generate": {"pairs": {"kind": "preferences", "count": 200}},
    "preferences": {"sums": {"tokenizer": "tiny", "data": "pairs", "max_tokens": 64}},
    "pretrain": {"base": {"model": "qwen3_small"}},
    "dpo": {"polite": {"from": "instruct", **PAIRS}},
    "rm": {"helpful": {"from": "instruct", **PAIRS}},
    "placement": PLACED,
}
OWN = "environments.length:Short"


@pytest.fixture(scope="module", autouse=True)
def read_once() -> Iterator[None]:
    """Each test has the same code, but for one that edits it."""
    identity.forget()
    yield
    identity.forget()


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the project's definitions, as the working folder."""
    for name in ("config", "envs", "scripts"):
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, tmp_path / name, ignore=ignored)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def over(base: Mapping[str, Any], change: Mapping[str, Any]) -> dict[str, Any]:
    """`change` laid over `base`, section by section."""
    result = dict(base)
    for key, value in change.items():
        both = isinstance(value, dict) and isinstance(result.get(key), dict)
        result[key] = over(result[key], value) if both else value
    return result


def built(*changes: Mapping[str, Any], cluster: str = "") -> Graph:
    """The graph of a chain with preferences, under changes."""
    config: Mapping[str, Any] = BASE
    for change in changes:
        config = over(config, change)
    Path("config/top.yaml").write_text(json.dumps(config))
    Path("cluster.yaml").write_text(cluster)
    there = Path("cluster.yaml") if cluster else None
    return graph.build(Path("config/top.yaml"), there)


def refused(*changes: Mapping[str, Any]) -> str:
    with pytest.raises(UserError) as error:
        built(*changes)
    return str(error.value)


def grpo(**settings: Any) -> dict[str, Any]:
    return {"grpo": {"reasoner": settings}}


def rewards(**environments: Any) -> dict[str, Any]:
    return grpo(environment=environments)


def pretrained(model: str) -> dict[str, Any]:
    return {"pretrain": {"base": {"model": model}}}


def placed(stage: str, **keys: Any) -> dict[str, Any]:
    return {"placement": {stage: {"default": keys}}}


HYBRID = over(pretrained("tiny"), {"rm": None, "placement": {"rm": None}})
"""A model of Mamba layers, of which there are no reward models."""
EXPERTS = over(HYBRID, pretrained("nano3_small"))


@pytest.fixture
def own(folder: Path) -> Path:
    """An environment of the user's."""
    path = folder / "environments/length.py"
    path.parent.mkdir()
    path.write_text(
        "class Short:\n    def step(self, messages, row):\n        return 1\n"
    )
    return path


# ---- what the nodes read ---------------------------------------------------------


@pytest.mark.parametrize("id", ["dpo/polite", "rm/helpful"])
def test_a_node_that_learns_from_pairs_reads_its_parent_and_its_pairs(id: str):
    node = built().nodes[id]
    assert node.parents == ("sft/instruct", "preferences/sums")
    assert node.flags == (
        ("--parent", "artifacts/sft/instruct/model"),
        ("--preferences", "artifacts/preferences/sums/data"),
    )
    assert node.engine == "nvidia" and node.script == f"scripts.nvidia.{node.stage}"
    assert node.packages == identity.versions(("nemo-rl", "vllm", "ray"), "nvidia")
    assert "from" not in node.recipe and "data" not in node.recipe
    assert STAGES[node.stage].recipe.model_validate(node.recipe)


def test_preferences_are_made_with_the_tokenizer_from_pairs_alone():
    nodes = built().nodes
    assert nodes["preferences/sums"].parents == ("tokenizer/tiny", "generate/pairs")
    said = refused({"preferences": {"sums": {"data": "chat"}}})
    assert "preferences.sums.data: chat holds chats, not preferences" in said


def test_pairs_longer_than_the_model_are_refused():
    said = refused({"preferences": {"sums": {"max_tokens": 600}}})
    assert "dpo.polite.data: preferences/sums has pairs of 600 tokens" in said


def test_a_chain_may_go_on_from_a_dpo_node():
    whole = built(grpo(**{"from": "polite"}))
    assert "dpo/polite" in whole.nodes["grpo/reasoner"].parents
    assert "dpo/polite" in whole.nodes["report/main"].parents


def test_no_node_starts_from_a_reward_model():
    assert "no such node: helpful" in refused(grpo(**{"from": "helpful"}))
    assert "no such node: rm/helpful" in refused(
        {"eval": {"arithmetic": {"from": ["rm/helpful"]}}}
    )


def test_a_grpo_node_is_rewarded_by_a_reward_model_and_more():
    whole = built(
        rewards(reward_model={"from": "rm/helpful"}, math={"weight": 0.5}),
    )
    node = whole.nodes["grpo/reasoner"]
    assert node.parents == ("sft/instruct", "prompts/arithmetic", "rm/helpful")
    assert ("--reward-model", "artifacts/rm/helpful/model") in node.flags
    assert "artifacts/rm/helpful/model" in node.artifacts
    assert node.recipe["environment"] == {
        "reward_model": {"weight": 1.0},
        "math": {"weight": 0.5},
    }
    assert GrpoRecipe.model_validate(node.recipe).environments() == {
        "reward_model": {"weight": 1.0},
        "math": {"weight": 0.5},
    }
    assert "rm/helpful" in whole.ancestors("export/nano")
    assert "preferences/sums" in whole.before("pretrain/base"), "bad pairs stop early"


def test_a_reward_model_may_be_named_without_its_stage():
    node = built(rewards(reward_model={"from": "helpful"})).nodes["grpo/reasoner"]
    assert "rm/helpful" in node.parents


def test_an_environment_is_named_alone_or_with_settings():
    short = built(grpo(environment="math")).nodes["grpo/reasoner"]
    assert short.recipe == built(rewards(math={})).nodes["grpo/reasoner"].recipe
    assert short.recipe == built().nodes["grpo/reasoner"].recipe
    assert short.recipe["environment"] == {"math": {"weight": 1.0}}


# ---- environments of one's own ---------------------------------------------------


def test_an_own_environments_file_counts(own: Path):
    mine = {"import": OWN, "settings": {"most": 3}}
    node = built(rewards(mine=mine)).nodes["grpo/reasoner"]
    assert node.files == ("environments/length.py",)
    assert node.recipe["environment"] == {"mine": {"weight": 1.0, **mine}}


def test_a_tools_file_counts(own: Path):
    tools = {"words": {"import": "environments.length:count"}, "sum": {"import": "x"}}
    node = built(rewards(tool_use={"settings": {"tools": tools}}))
    assert node.nodes["grpo/reasoner"].files == ("environments/length.py",)
    tools["words"]["import"] = "environments.lenght:count"
    said = refused(rewards(tool_use={"settings": {"tools": tools}}))
    assert "tool_use.settings.tools: environments/lenght.py: no such file" in said


@pytest.mark.parametrize("tools", [["calculator"], "calculator", {"a": "b"}])
def test_tools_of_another_form_are_left_to_the_script_that_names_them(tools: object):
    assert built(rewards(tool_use={"settings": {"tools": tools}})).nodes


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        ({"mine": {"import": "environments.lenght:Short"}}, "environment.mine.import: environments/lenght.py: no such file or folder"),
        ({"mine": {"import": "environments.lenght:Short"}}, "did you mean `environments/length.py`?"),
        ({"mine": {"import": "environments/length.py:Short"}}, "environment.mine.import: string should match pattern"),
        ({"mine": {"import": "../length:Short"}}, "environment.mine.import: string should match pattern"),
        ({"mine": {"import": "environments.length"}}, "environment.mine.import: string should match pattern"),
        ({"mine": {"import": "work.length:Short"}}, "environment.mine.import: 'work/length.py' cannot be an input"),
        ({"mine": {"imports": OWN}}, "environment.mine.imports: unknown key"),
        ({"mine": {"import": OWN, "from": "helpful"}}, "environment.mine.from: unknown key"),
        ({"reward_model": {"import": OWN, "from": "helpful"}}, "environment.reward_model.from: unknown key"),
        ({"maths": {}}, "environment.maths: no such environment\n\nhint: did you mean `math`?"),
        ("slide", "environment.slide: no such environment"),
        ("nemo_gym", "environment.nemo_gym: no such environment\n\nhint: NeMo-RL 0.7.0 runs it by another entry point"),
        ("reward_model", "environment.reward_model.from: missing\n\nhint: name an rm node: `reward_model: {from: helpful}`"),
        ({"math": {"from": "helpful"}}, "environment.math.from: unknown key"),
        ({"reward_model": {"from": "helpfull"}}, "environment.reward_model.from: no such node: helpfull (of rm)\n\nhint: did you mean `helpful`?"),
        ({"reward_model": {"from": "polite"}}, "environment.reward_model.from: no such node: polite (of rm)"),
        ({}, "grpo.reasoner.environment: value should have at least 1 item"),
        ({"Math": {}}, "'Math' cannot name a node"),
    ],
)  # fmt: skip
def test_mistakes_with_environments_are_named(environment: Any, said: str, own: Path):
    assert said in refused(grpo(environment=environment))


# ---- circles ---------------------------------------------------------------------

CIRCLES = {
    "through its reward model": {
        "grpo": {"reasoner": {"environment": {"reward_model": {"from": "helpful"}}}},
        "rm": {"helpful": {"from": "reasoner"}},
    },
    "through a node between": {
        "grpo": {"reasoner": {"environment": {"reward_model": {"from": "helpful"}}}},
        "dpo": {"polite": {"from": "reasoner"}},
        "rm": {"helpful": {"from": "polite"}},
    },
    "through parents alone": {
        "grpo": {"reasoner": {"from": "polite"}},
        "dpo": {"polite": {"from": "reasoner"}},
        "rm": {"helpful": {"from": "base"}},
    },
}


@pytest.mark.parametrize("name", CIRCLES)
def test_a_circle_is_refused_and_shown(name: str):
    said = refused(CIRCLES[name])
    assert ".from: a cycle: " in said
    way = said.partition("a cycle: ")[2].split(" <- ")
    assert way[0] == way[-1] and len(way) >= 3 and "grpo/reasoner" in way


def test_path_to_finds_a_way_back_and_ends_where_there_is_none():
    above = {"a": ["b", "c"], "b": ["d"], "c": ["b", "d"], "d": []}
    assert graph.path_to("a", above) == ""
    assert graph.path_to("a", above | {"d": ["a"]}) == "a <- c <- d <- a"
    assert graph.path_to("a", above | {"d": ["c"]}) == "", "a circle elsewhere"
    assert graph.path_to("x", {"x": ["x"]}) == "x <- x"


# ---- who can run it --------------------------------------------------------------

ON_CPU = {"engine": "transformers", "dpo": None, "rm": None}
WITHOUT_GPU = {"placement": {"pretrain": None, "sft": None, "grpo": None, "eval": None}}
WITHOUT_GPU["placement"] |= {"export": None, "dpo": None, "rm": None}


@pytest.mark.parametrize("id", ["dpo/polite", "rm/helpful"])
def test_on_transformers_pairs_are_learned_by_trl_from_the_same_inputs(id: str):
    node = built({"engine": "transformers"}, WITHOUT_GPU).nodes[id]
    assert node.script == f"scripts.transformers.{node.stage}"
    assert node.flags == built().nodes[id].flags
    assert {"trl", "transformers", "torch"} <= set(node.packages)
    assert "scripts/transformers/pairs.py" in node.code
    assert not any(name.startswith("scripts/nvidia/") for name in node.code)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"overrides": {"grpo.normalize_rewards": True}}, "grpo.reasoner.overrides: belongs to engine: nvidia"),
    ],
)  # fmt: skip
def test_on_transformers_what_only_nemo_rl_knows_is_refused(
    settings: dict[str, Any], said: str
):
    found = refused(ON_CPU, WITHOUT_GPU, grpo(**settings))
    assert said in found and "grpo runs on engine transformers here" in found


@pytest.mark.parametrize("asked", [{}, {"dynamic_sampling": True}])
def test_on_transformers_dapo_names_what_trl_lacks(asked: dict[str, bool]):
    dapo = grpo(algorithm="dapo", **asked)
    said = refused(ON_CPU, WITHOUT_GPU, dapo)
    assert "grpo.reasoner.dynamic_sampling: TRL has no dynamic sampling" in said
    rest = grpo(dynamic_sampling=False)
    node = built(ON_CPU, WITHOUT_GPU, dapo, rest).nodes["grpo/reasoner"]
    assert node.recipe["algorithm"] == "dapo"
    assert node.recipe["dynamic_sampling"] is False
    assert built(dapo).nodes["grpo/reasoner"].recipe.items() >= asked.items()


def test_on_transformers_conversations_have_several_turns_but_not_with_dapo():
    turns = grpo(max_turns=2, max_conversation_tokens=90)
    node = built(ON_CPU, WITHOUT_GPU, turns).nodes["grpo/reasoner"]
    assert node.recipe["max_turns"] == 2
    assert "scripts/transformers/turns.py" in node.code
    dapo = grpo(algorithm="dapo", dynamic_sampling=False)
    said = refused(ON_CPU, WITHOUT_GPU, turns, dapo)
    assert "grpo.reasoner.max_turns: TRL's overlong penalty takes" in said
    said = refused(ON_CPU, WITHOUT_GPU, grpo(max_turns=2))
    assert "grpo.reasoner.max_conversation_tokens: missing, with max_turns 2" in said


def test_dynamic_sampling_is_dapos():
    said = refused(grpo(dynamic_sampling=False))
    assert "dynamic_sampling: belongs to algorithm: dapo, and this is grpo" in said


@pytest.mark.parametrize("key", RL_PLACEMENT[:4])
def test_on_transformers_placement_of_nemo_rl_is_refused(key: str):
    value = {"backend": "dtensor", "generation_memory": 0.5}.get(key, 2)
    said = refused(
        ON_CPU, WITHOUT_GPU, {"placement": {"grpo": {"default": {key: value}}}}
    )
    assert f"placement.grpo.default.{key}: belongs to engine: nvidia" in said


def test_a_reward_model_rewards_on_either_engine():
    reward = rewards(reward_model={"from": "helpful"})
    nodes = built({"engine": "transformers"}, WITHOUT_GPU, reward).nodes
    node = nodes["grpo/reasoner"]
    assert node.engine == "transformers" and "rm/helpful" in node.parents
    assert node.flags == built(reward).nodes["grpo/reasoner"].flags
    assert "scripts/environments/reward_model.py" in node.code
    assert "rm/helpful" in nodes["report/main"].parents


def test_one_stage_may_be_on_another_engine():
    engine = {"default": "transformers", "dpo": "nvidia", "rm": "nvidia"}
    rest = {s: None for s in ("pretrain", "sft", "grpo", "export", "eval")}
    nodes = built({"engine": engine, "placement": rest}).nodes
    assert nodes["dpo/polite"].engine == "nvidia"
    assert nodes["grpo/reasoner"].engine == "transformers"


@pytest.mark.parametrize("model", ["tiny", "hybrid4b_small", "nano3_small"])
@pytest.mark.parametrize("engine", ["nvidia", "transformers"])
def test_a_reward_model_of_mamba_layers_is_refused(model: str, engine: str):
    on = {"engine": {"default": "nvidia", "rm": engine}}
    on |= {"placement": {"rm": None}} if engine == "transformers" else {}
    said = refused(pretrained(model), on)
    assert (
        "rm.helpful.from: Transformers has no classifier of nemotron_h models" in said
    )
    assert "start from a transformer: Llama, Qwen" in said


def test_a_reward_model_of_a_transformer_is_planned():
    assert built().nodes["rm/helpful"].placement["backend"] == "dtensor"


# ---- overrides -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (grpo(overrides={"grpo.normalise_rewards": True}), "grpo.reasoner.overrides.grpo.normalise_rewards: NeMo-RL 0.7.0 has no grpo.normalise_rewards\n\nhint: did you mean `normalize_rewards`?"),
        (grpo(overrides={"policy.generation.max_new_tokens": 9}), "grpo.reasoner.overrides.policy.generation.max_new_tokens: the build sets it\n\nhint: set `max_completion_tokens` of the node"),
        ({"dpo": {"polite": {"overrides": {"dpo.reference_policy_kl_penalty": 1.0}}}}, "dpo.polite.overrides.dpo.reference_policy_kl_penalty: the build sets it\n\nhint: set `beta` of the node"),
        ({"rm": {"helpful": {"overrides": {"grpo.normalize_rewards": True}}}}, "rm.helpful.overrides.grpo.normalize_rewards: "),
        ({"dpo": {"polite": {"overrides": {"optimizer.adam_beta2": 0.9}}}}, "dpo.polite.overrides.optimizer.adam_beta2: "),
        ({"dpo": {"polite": {"precision": "bf16"}}}, "dpo.polite.precision: unknown key"),
        ({"rm": {"helpful": {"beta": 0.1}}}, "rm.helpful.beta: unknown key"),
        ({"dpo": {"polite": {"seed": 0}}}, "dpo.polite.seed: 0, but Megatron takes 1 and above"),
        ({"dpo": {"polite": {"warmup_steps": 5}}}, "dpo.polite.warmup_steps: 5 of 5 steps leaves none to train"),
    ],
)  # fmt: skip
def test_what_a_recipe_cannot_say_is_named(change: dict[str, Any], said: str):
    assert said in refused(change)


def test_an_override_of_nemo_rl_is_in_the_recipe():
    given = {"grpo.normalize_rewards": False, "loss_fn.ratio_clip_max": 0.28}
    node = built(grpo(overrides=given)).nodes["grpo/reasoner"]
    assert node.recipe["overrides"] == given


# ---- sizes -----------------------------------------------------------------------


def test_several_turns_need_a_limit_that_the_model_takes():
    node = built(grpo(max_turns=3, max_conversation_tokens=200)).nodes["grpo/reasoner"]
    assert node.recipe["max_turns"] == 3
    missing = refused(grpo(max_turns=3))
    assert "grpo.reasoner.max_conversation_tokens: missing, with max_turns 3" in missing
    long = refused(grpo(max_turns=3, max_conversation_tokens=513))
    assert "max_conversation_tokens: conversations of 513 tokens, but the model" in long


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (grpo(batch_size=100), "grpo.reasoner.batch_size: 100 completions a step do not divide into groups of num_generations = 8\n\nhint: try 96 or 104"),
        (placed("grpo", gpus=3), "placement.grpo.default.gpus: batch_size 128 does not divide among 3 replicas"),
        (placed("grpo", micro_batch_size=48), "placement.grpo.default.micro_batch_size: batch_size 128 does not divide"),
        (placed("grpo", gpus=8, generation_gpus=2), "batch_size 128 does not divide among 6 replicas"),
        (placed("dpo", gpus=3), "placement.dpo.default.gpus: batch_size 8 does not divide among 3 replicas"),
        (placed("grpo", gpus=0), "placement.grpo.default.gpus: grpo on engine nvidia needs a GPU"),
        (placed("grpo", gpus=2, generation_gpus=2), "placement.grpo.default.generation_gpus: 2 of 2 leave none to train"),
        (placed("grpo", gpus=2, nodes=2, generation_gpus=1), "placement.grpo.default.generation_gpus: 1 of each machine, but NeMo-RL sets GPUs of one machine apart"),
        (placed("grpo", gpus=8, generation_tensor_parallel=8), "placement.grpo.default.generation_tensor_parallel: num_attention_heads 4 does not divide among 8\n\nhint: one of 1, 2, 4"),
        (placed("grpo", gpus=4, generation_gpus=2, generation_tensor_parallel=4), "generation_tensor_parallel: 4 does not divide the 2 GPUs that generate"),
        (placed("grpo", cpus=2), "placement.grpo.default.cpus: 2, but Ray starts NeMo-RL's workers on 4 at least\n\nhint: cpus: 8"),
        (placed("rm", cpus=1), "placement.rm.default.cpus: 1, but Ray"),
        (placed("grpo", generation_memory=1.0), "placement.grpo.default.generation_memory: input should be less than 1"),
        (placed("grpo", backend="fsdp"), "placement.grpo.default.backend: input should be 'megatron', 'dtensor' or 'automodel'"),
        (placed("rm", backend="megatron"), "placement.rm.default.backend: NeMo-RL has no reward models on Megatron\n\nhint: backend: dtensor"),
        (placed("grpo", backend="dtensor", gpus=2, pipeline_parallel=2), "placement.grpo.default.pipeline_parallel: dtensor cannot split by it\n\nhint: backend: megatron"),
        (placed("dpo", backend="automodel", gpus=2, pipeline_parallel=2), "placement.dpo.default.pipeline_parallel: automodel cannot split by it"),
        (placed("rm", gpus=2, pipeline_parallel=2), "placement.rm.default.pipeline_parallel: dtensor cannot split by it"),
        (placed("grpo", gpus=4, pipeline_parallel=2, virtual_pipeline=2), "placement.grpo.default.virtual_pipeline: NeMo-RL has none"),
        (placed("dpo", gpus=8, tensor_parallel=8), "placement.dpo.default.tensor_parallel: num_attention_heads 4 does not divide among 8"),
    ],
)  # fmt: skip
def test_a_placement_that_nemo_rl_refuses_is_refused_first(
    change: dict[str, Any], said: str
):
    assert said in refused(change)


@pytest.mark.parametrize(
    "keys",
    [
        {"gpus": 4, "generation_gpus": 2, "generation_tensor_parallel": 2},
        {"gpus": 2, "nodes": 2},
        {"gpus": 2, "tensor_parallel": 2, "generation_tensor_parallel": 2},
        {"gpus": 2, "pipeline_parallel": 2, "micro_batch_size": 64},
    ],
)
def test_a_placement_that_fits_is_planned(keys: dict[str, int]):
    assert built(placed("grpo", **keys)).nodes


def test_gpus_that_generate_are_those_of_grpo_alone():
    every = {"placement": {"default": {"default": {"generation_gpus": 3}}}}
    nodes = built(every, placed("grpo", gpus=4), placed("dpo", gpus=2)).nodes
    assert nodes["dpo/polite"].placement["gpus"] == 2
    assert nodes["grpo/reasoner"].placement["generation_gpus"] == 3


@pytest.mark.parametrize("stage", ["dpo", "grpo"])
def test_dtensor_is_refused_for_a_model_with_experts(stage: str):
    said = refused(EXPERTS, placed(stage, backend="dtensor"))
    assert f"placement.{stage}.default.backend: what dtensor saves of experts" in said


# ---- what trains it --------------------------------------------------------------


def backend(id: str, *changes: Mapping[str, Any]) -> object:
    return built(*changes).nodes[id].placement["backend"]


def test_the_backend_follows_from_the_model_and_how_it_is_split():
    assert backend("grpo/reasoner", HYBRID) == "megatron"
    assert backend("grpo/reasoner", EXPERTS) == "megatron"
    assert backend("grpo/reasoner") == backend("dpo/polite") == "dtensor"
    assert backend("rm/helpful") == "dtensor"
    two = placed("grpo", gpus=2, pipeline_parallel=2)
    assert backend("grpo/reasoner", two) == "megatron"
    assert backend("dpo/polite", two) == "dtensor"
    shared = placed("grpo", gpus=2, tensor_parallel=2)
    assert backend("grpo/reasoner", shared) == "dtensor"


def test_a_large_model_is_megatrons():
    path = Path("config/models/qwen3_small/config.json")
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"hidden_size": 8192, "num_hidden_layers": 32}))
    assert backend("grpo/reasoner") == "megatron"
    assert backend("rm/helpful") == "dtensor"


def test_a_backend_that_is_named_is_taken():
    named = placed("grpo", backend="automodel")
    assert backend("grpo/reasoner", named) == "automodel"
    node = built(named).nodes["grpo/reasoner"]
    flags = run.placement_flags(node)
    assert flags[flags.index("--backend") + 1] == "automodel"
    assert built().nodes["pretrain/base"].placement["backend"] is None


ELSEWHERE = {
    "backend": "automodel",
    "generation_gpus": 2,
    "generation_tensor_parallel": 2,
    "generation_memory": 0.3,
    "nodes": 2,
    "gpus": 4,
    "cpus": 16,
}


@pytest.mark.parametrize("key", RL_PLACEMENT)
def test_where_it_learns_is_no_identity(key: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(graph.parallel, "of_rl", lambda *args: [])
    monkeypatch.setattr(graph.parallel, "problems", lambda *args: [])
    before = built().nodes
    moved = built(*(placed(s, **{key: ELSEWHERE[key]}) for s in ("grpo", "dpo", "rm")))
    for id, node in before.items():
        assert moved.nodes[id].params == node.params, id
    assert moved.nodes["grpo/reasoner"].placement[key] == ELSEWHERE[key]
    assert ELSEWHERE[key] not in (RL.get(key), Placement.model_fields[key].default)


# ---- eval ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"gpus": 0}, "placement.eval.default.gpus: eval on engine nvidia needs a GPU"),
        ({"gpus": 1, "tensor_parallel": 2}, "placement.eval.default.tensor_parallel: 2, but 1 GPUs"),
        ({"gpus": 8, "tensor_parallel": 8}, "placement.eval.default.tensor_parallel: num_attention_heads 4 does not divide among 8\n\nhint: one of 1, 2, 4"),
    ],
)  # fmt: skip
def test_eval_on_nvidia_is_placed_as_vllm_takes_it(keys: dict[str, int], said: str):
    assert said in refused(placed("eval", **keys))


def test_eval_on_nvidia_is_told_its_gpus():
    node = built(placed("eval", gpus=2, tensor_parallel=2)).nodes["eval/arithmetic"]
    assert node.script == "scripts.nvidia.eval"
    assert run.placement_flags(node)[:2] == ["--tensor-parallel", "2"]


# ---- code ------------------------------------------------------------------------


def code(**environments: Any) -> set[str]:
    found = built(rewards(**environments)).nodes["grpo/reasoner"].code
    return {Path(file).name for file in found if "environments/" in file}


def test_only_the_environments_that_reward_are_of_a_nodes_code():
    assert code(math={}) == {"__init__.py", "math.py", "mix.py"}
    assert {"code.py", "sandbox.py"} <= code(code={})
    assert "math.py" not in code(sliding_puzzle={})
    assert {"code.py", "math.py"} <= code(math={}, code={})
    assert "reward_model.py" in code(reward_model={"from": "helpful"})


def test_an_edit_of_an_environment_reruns_whom_it_rewards(
    request: pytest.FixtureRequest,
):
    request.addfinalizer(identity.forget)

    def params(**environments: Any) -> Any:
        identity.forget()
        return built(rewards(**environments)).nodes["grpo/reasoner"].params

    before = params(math={}), params(code={})
    path = Path("scripts/environments/code.py")
    path.write_text(path.read_text() + "\nMORE = 1\n")
    assert params(math={}) == before[0]
    assert params(code={}) != before[1]


@pytest.mark.parametrize("id", ["dpo/polite", "rm/helpful", "grpo/reasoner"])
def test_what_converts_and_starts_a_node_is_of_its_code(id: str):
    found = built().nodes[id].code
    assert {"scripts/nvidia/rl.py", "scripts/nvidia/publish.py"} <= set(found)
    assert not any(name.startswith("scripts/transformers/") for name in found)
