"""The engine nvidia in the plan: who runs what, what counts, what is refused."""

from __future__ import annotations

import json
import os
import shutil
import struct
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from scripts.lib import graph, identity, run
from scripts.lib.errors import UserError
from scripts.lib.graph import Graph, Node
from scripts.lib.schema import PARALLEL, Placement
from scripts.lib.stages import STAGES
from scripts.nvidia import versions

ROOT = Path(__file__).parents[2]
OF_NVIDIA = {"pretrain/base", "sft/instruct", "grpo/reasoner", "export/nano"}
OF_NVIDIA.add("eval/arithmetic")
STAGES_OF_NVIDIA = ("pretrain", "sft", "grpo", "export", "eval")
ONE = "{default: {gpus: 1}}"
RL = "grpo: {default: {gpus: 1, cpus: 8}}"
REST = f"{RL}, export: {ONE}, eval: {ONE}"
GPUS = f"placement: {{pretrain: {ONE}, sft: {ONE}, {REST}}}\n"
REVISION = "0123456789abcdef0123456789abcdef01234567"
CHANGED = {
    "tensor_parallel": 2,
    "pipeline_parallel": 2,
    "context_parallel": 2,
    "expert_parallel": 2,
    "expert_tensor_parallel": 2,
    "micro_batch_size": 2,
    "virtual_pipeline": 2,
    "sequence_parallel": "false",
    "distributed_optimizer": "false",
    "python": "bin/python",
    "gpus": 4,
    "nodes": 2,
}


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A copy of the project's definitions, with a lock and scripts of the engine."""
    for name in ("config", "envs", "scripts"):
        shutil.copytree(ROOT / name, tmp_path / name)
    monkeypatch.chdir(tmp_path)
    Path("scripts/nvidia").mkdir(exist_ok=True)
    for stage in STAGES_OF_NVIDIA:
        Path(f"scripts/nvidia/{stage}.py").write_text(f"STAGE = '{stage}'\n")
    packages = {p for s in STAGES.values() for p in s.nvidia_packages}
    packages = sorted(packages - set(versions.pins(ROOT / "envs/nemo-rl.lock")))
    lines = ["# The engine, exactly.", "packaging==1.0"]
    lines += [f"{p}==1.{i} \\\n    --hash=sha256:00" for i, p in enumerate(packages)]
    Path("envs/nvidia.lock").write_text("\n".join(lines) + "\n")
    identity.forget()
    yield tmp_path
    identity.forget()


def built(text: str = "", engine: str = "nvidia", cluster: str = "") -> Graph:
    """The graph of the default config under an overlay."""
    config, there = Path("config/top.yaml"), Path("cluster.yaml")
    if engine == "nvidia" and "placement:" not in text:
        text += GPUS
    config.write_text(f"extends: config.yaml\nengine: {engine}\n{text}")
    there.write_text(cluster)
    return graph.build(config, there if cluster else None)


def refused(text: str, engine: str = "nvidia", cluster: str = "") -> str:
    with pytest.raises(UserError) as error:
        built(text, engine, cluster)
    return str(error.value)


def plain() -> Graph:
    return graph.build(Path("config/config.yaml"))


# ---- who runs what ---------------------------------------------------------------


def test_five_stages_have_scripts_of_the_engine_and_the_others_stay():
    nodes = built().nodes
    assert {id for id, n in nodes.items() if n.engine == "nvidia"} == OF_NVIDIA
    assert nodes["pretrain/base"].script == "scripts.nvidia.pretrain"
    assert nodes["grpo/reasoner"].script == "scripts.nvidia.grpo"
    assert nodes["report/main"].script == "scripts.report"
    assert all(n.engine == "transformers" for n in plain().nodes.values())


def test_the_engine_starts_its_scripts_by_torchrun_or_beside_ray():
    launchers = {s.name: s.launcher_of("nvidia") for s in STAGES.values() if s.nvidia}
    by_torchrun = dict.fromkeys(("pretrain", "sft", "export"), "torchrun")
    beside_ray = dict.fromkeys(("dpo", "rm", "grpo"), "ray")
    assert launchers == by_torchrun | beside_ray | {"eval": ""}
    assert STAGES["export"].launcher_of("transformers") == ""


def test_a_graph_keeps_its_engines_in_json():
    whole = built()
    assert Graph.from_json(whole.to_json()).nodes == whole.nodes


# ---- what counts -----------------------------------------------------------------


def test_the_engine_counts_for_the_stages_it_runs_and_for_no_other():
    ours, theirs = built().nodes, plain().nodes
    differ = {id for id in theirs if ours[id].params != theirs[id].params}
    assert differ == OF_NVIDIA
    assert ours["sft/instruct"].packages["megatron-core"].startswith("1.")
    assert "scripts/nvidia/sft.py" in ours["sft/instruct"].code
    assert ours["sft/instruct"].recipe == theirs["sft/instruct"].recipe


def test_a_package_of_the_engine_counts_where_its_version_can_change_a_result():
    lock = Path("envs/nvidia.lock")
    before = built().nodes
    lock.write_text(lock.read_text().replace("mamba-ssm==1.", "mamba-ssm==2."))
    identity.forget()
    after = built().nodes
    differ = {id for id in before if after[id].params != before[id].params}
    assert differ == {"pretrain/base", "sft/instruct"}


def test_a_package_that_the_lock_lacks_is_named():
    lock = Path("envs/nvidia.lock")
    lock.write_text(lock.read_text().replace("megatron-core==", "megatron-else=="))
    identity.forget()
    assert "envs/nvidia.lock megatron-core: not pinned" in refused("")
    lock.unlink()
    identity.forget()
    assert "envs/nvidia.lock: no such file, with engine: nvidia" in refused("")


@pytest.mark.parametrize("text", ["Torch[cuda]==2.1 \\\n  --hash=x\n", "torch==2.1#\n"])
def test_a_lock_may_have_hashes_comments_and_extras(text: str):
    Path("envs/nvidia.lock").write_text(f"# torch==9\n{text}a @ https://x\n")
    identity.forget()
    assert identity.pins("nvidia")["torch"] == "2.1"


@pytest.mark.parametrize("key", [*PARALLEL, "python", "gpus", "nodes"])
def test_where_it_is_trained_is_no_identity(key: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(graph.parallel, "problems", lambda *args: [])
    given = {"gpus": 1, key: CHANGED[key]}
    text = ", ".join(f"{k}: {v}" for k, v in given.items())
    placed = ", ".join(f"{s}: {{default: {{{text}}}}}" for s in ("pretrain", "sft"))
    moved = built(f"placement: {{{placed}, {REST}}}\n")
    for id, node in built().nodes.items():
        assert moved.nodes[id].params == node.params, id
    assert moved.nodes["pretrain/base"].placement[key] != Placement().model_dump()[key]


def test_an_adapter_is_in_the_recipe_without_what_is_not_set():
    peft = "{method: lora, target_modules: linear_qkv}"
    whole = built(f"sft: {{instruct: {{peft: {peft}, precision: bf16}}}}\n")
    found = whole.nodes["sft/instruct"].recipe
    assert found["precision"] == "bf16" and "overrides" not in found
    assert found["peft"] == {
        "method": "lora",
        "rank": 16,
        "alpha": 32,
        "dropout": 0.0,
        "target_modules": ["linear_qkv"],
    }
    bare = built("sft: {instruct: {peft: {method: dora}}}\n").nodes["sft/instruct"]
    assert "target_modules" not in bare.recipe["peft"]


def test_either_engine_trains_an_adapter():
    text = "sft: {instruct: {peft: {method: dora, target_modules: [q_proj]}}}\n"
    node = built(text, "transformers").nodes["sft/instruct"]
    assert node.recipe["peft"]["method"] == "dora"
    assert "peft" in node.packages
    assert "scripts/transformers/adapter.py" in node.code


def test_overrides_and_a_named_recipe_are_in_the_recipe():
    text = "overrides: {optimizer.adam_beta2: 0.95, model.recompute_method: null}"
    recipe = "recipe: llama32_1b_pretrain_config"
    node = built(f"pretrain: {{base: {{{recipe}, {text}}}}}\n").nodes["pretrain/base"]
    assert node.recipe["overrides"] == {
        "optimizer.adam_beta2": 0.95,
        "model.recompute_method": None,
    }
    assert node.recipe["recipe"] == "llama32_1b_pretrain_config"


# ---- what is refused -------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("pretrain: {base: {recipe: x}}", ":3 pretrain.base.recipe: belongs to engine: nvidia"),
        ("pretrain: {base: {precision: bf16}}", "pretrain.base.precision: belongs to engine: nvidia"),
        ("pretrain: {base: {overrides: {a.b: 1}}}", "pretrain.base.overrides: belongs to engine: nvidia"),
        ("sft: {instruct: {peft: {method: lora, target_modules: linear_qkv}}}", "sft.instruct.peft.target_modules: linear_qkv is Megatron's name"),
        ("sft: {instruct: {peft: {method: lora, target_modules: [q_proj, out_proj]}}}", "sft.instruct.peft.target_modules: out_proj of Mamba is fused into a kernel"),
        ("grpo: {reasoner: {precision: bf16}}", "grpo.reasoner.precision: unknown key"),
        ("placement: {sft: {instruct: {tensor_parallel: 2}}}", ":3 placement.sft.instruct.tensor_parallel: belongs to engine: nvidia"),
        ("placement: {sft: {default: {distributed_optimizer: false}}}", "placement.sft.default.distributed_optimizer: belongs to engine: nvidia"),
        ("placement: {sft: {default: {python: x}}}", "placement.sft.default.python: belongs to engine: nvidia"),
    ],
)  # fmt: skip
def test_on_transformers_what_only_nvidia_knows_is_refused(text: str, said: str):
    assert said in refused(f"{text}\n", "transformers")


def test_for_all_stages_at_once_a_size_may_be_given():
    text = "placement: {default: {default: {micro_batch_size: 2, gpus: 0}}}\n"
    assert built(text, "transformers").nodes


SOME = f"placement: {{pretrain: {ONE}, sft: {ONE}, {RL}, eval: {ONE}, "


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (f"{SOME}export: {{default: {{gpus: 0}}}}}}", "placement.export.default.gpus: export on engine nvidia needs a GPU"),
        (f"{SOME}prompts: {{arithmetic: {{tensor_parallel: 2}}}}}}", "prompts runs on engine transformers here"),
        (f"{SOME}tokenize: {{corpus: {{pipeline_parallel: 2}}}}}}", "tokenize runs on engine transformers here"),
        ("placement: {pretrain: {base: {gpus: 2, tensor_parallel: 2}}}", "placement.pretrain.base.tensor_parallel: n_groups 1 does not divide among 2 GPUs"),
        ("placement: {pretrain: {base: {gpus: 3}}}", "placement.pretrain.base.gpus: batch_size 16 does not divide among 3 replicas"),
        (f"{SOME[:-2].replace('sft: {default: {gpus: 1', 'sft: {default: {gpus: 1, micro_batch_size: 2')}}}", "placement.sft.default.micro_batch_size: 2, but a packed row"),
        ("pretrain: {base: {recipe: llama32_1b_pretrain_confg}}", ":3 pretrain.base.recipe: Megatron-Bridge"),
        ("pretrain: {base: {overrides: {train.train_iters: 3}}}", ":3 pretrain.base.overrides.train.train_iters: the build sets it"),
        ("sft: {instruct: {overrides: {modle.x: 3}}}", "sft.instruct.overrides.modle.x: Megatron-Bridge"),
        ("pretrain: {base: {precision: fp8}}", "pretrain.base.precision: input should be 'bf16'"),
        ("sft: {instruct: {peft: {rank: 4}}}", "sft.instruct.peft.method: missing"),
        ("sft: {instruct: {peft: {method: lora, ranks: 4}}}", "sft.instruct.peft.ranks: unknown key"),
        ("sft: {instruct: {parent: {hf: x}}}", "did you mean `from`?"),
    ],
)  # fmt: skip
def test_on_nvidia_mistakes_are_named_with_their_key(text: str, said: str):
    assert said in refused(f"{text}\n")


def test_a_precision_that_the_clusters_gpu_lacks_is_refused_at_the_node():
    stages = STAGES_OF_NVIDIA
    places = ", ".join(
        f"{s}: {{default: {{gpus: 1, cpus: 8, gres: 'gpu:a100'}}}}" for s in stages
    )
    text = "pretrain: {base: {precision: fp8_current}}\n"
    said = refused(text, cluster=f"placement: {{{places}}}\n")
    assert "config/top.yaml:3 pretrain.base.precision: fp8_current needs a GPU" in said


def test_a_model_that_bridge_cannot_convert_is_refused():
    path = Path("config/models/tiny/config.json")
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"architectures": ["Unheard"]}))
    assert "pretrain.base.model: Megatron-Bridge" in refused("")


# ---- released models -------------------------------------------------------------

READY = """
tokenizer: {ready: {path: models/small}}
pack: {chat: {tokenizer: ready}}
"""
LOCAL = READY + "prompts: {arithmetic: {tokenizer: ready}}\n"


@pytest.fixture
def released() -> Path:
    """A folder with a model, as it would be downloaded."""
    place = Path("models/small")
    place.mkdir(parents=True)
    shutil.copy("config/models/tiny/config.json", place)
    header = json.dumps({"w": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}})
    data = struct.pack("<Q", len(header)) + header.encode() + bytes(4)
    (place / "model.safetensors").write_bytes(data)
    (place / "tokenizer.json").write_text("{}")
    return place


@pytest.mark.parametrize("engine", ["transformers", "nvidia"])
def test_sft_starts_from_a_released_model_in_a_folder(engine: str, released: Path):
    text = LOCAL + "sft: {instruct: {from: {hf: models/small}}}\n"
    whole = built(text, engine)
    node = whole.nodes["sft/instruct"]
    assert node.files == ("models/small",), "its bytes count"
    assert node.parents == ("pack/chat",)
    assert ("--parent", "models/small") in node.flags
    assert "parent" not in node.recipe and "from" not in node.recipe
    assert run.parent_of(node) == Path("models/small")
    assert whole.ancestors("grpo/reasoner")[-2:] == [
        "prompts/arithmetic",
        "sft/instruct",
    ]
    assert "sft/instruct" in whole.nodes["report/main"].parents


def test_grpo_starts_from_a_released_model_in_a_folder(released: Path):
    node = built(
        LOCAL + "grpo: {reasoner: {from: {hf: models/small}}}\n"
        "sft: null\neval: null\nreport: null\nplacement: {sft: null}\n",
        "transformers",
    ).nodes["grpo/reasoner"]
    assert node.files == ("models/small",)
    assert ("--parent", "models/small") in node.flags


HUB = f"""
tokenizer: {{ready: {{hf: org/small, revision: {REVISION}}}}}
pack: {{chat: {{tokenizer: ready}}}}
prompts: {{arithmetic: {{tokenizer: ready}}}}
sft: {{instruct: {{from: {{hf: org/small, revision: {REVISION}}}}}}}
"""


def test_sft_starts_from_a_model_on_the_hub_at_its_revision():
    node = built(HUB).nodes["sft/instruct"]
    assert ("--parent", f"hf:org/small@{REVISION}") in node.flags
    assert node.recipe["parent"] == {"hf": "org/small", "revision": REVISION}
    assert node.files == () and node.parents == ("pack/chat",)
    assert run.parent_of(node) is None
    recipe = STAGES["sft"].recipe.model_validate(node.recipe)
    assert recipe.parent.revision == REVISION  # type: ignore[attr-defined]


FROM = "sft: {instruct: {from: "


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (f"{FROM}{{hff: models/small}}}}}}", "sft.instruct.from.hff: unknown key"),
        (f"{FROM}{{hff: models/small}}}}}}", "did you mean `hf`? Keys: hf, revision"),
        (f"{FROM}{{}}}}}}", "sft.instruct.from.hf: missing"),
        (f"{FROM}7}}}}", "sft.instruct.from: should be a node, `{hf: ...}`, or `{best: ..., by: ...}`; found 7"),
        (f"{FROM}{{hf: org/small, revision: main}}}}}}", "sft.instruct.from.revision: string should match"),
        (f"{FROM}{{hf: org/small}}}}}}", "sft.instruct.from.revision: missing: a model on the hub can change"),
        (f"{FROM}{{hf: models/smaller/x}}}}}}", "models/smaller/x: no such file or folder"),
        (f"{FROM}{{hf: /models/small}}}}}}", "leads out of the project"),
        (f"{FROM}{{hf: models/small, revision: {REVISION}}}}}}}", "sft.instruct.from.revision: models/small is a folder here"),
        (f"{FROM}{{hf: models/small}}}}}}", "sft.instruct.data: made with tokenizer/tiny, which is not the one of models/small"),
        (f"{FROM}{{hf: models/small}}}}}}", "make it with a tokenizer node {path: models/small}"),
        (f"{FROM}{{hf: org/small, revision: {REVISION}}}}}}}", f"make it with a tokenizer node {{hf: org/small, revision: {REVISION}}}"),
        (f"{READY}{FROM}{{hf: models/small}}}}}}", "prompts/arithmetic is made with tokenizer/tiny, sft/instruct with tokenizer/ready"),
        ("export: {nano: {from: {hf: models/small}}}", "export.nano.from: input should be a valid string"),
        ("grpo: {reasoner: {from: {hf: org/small, revision: " + REVISION + "}}}", "grpo takes no model from the hub"),
        (f"{LOCAL}pack: {{chat: {{tokenizer: ready, sequence_length: 1024}}}}\n{FROM}{{hf: models/small}}}}}}".replace("pack: {chat: {tokenizer: ready}}\n", ""), "the model's longest is 512"),
    ],
)  # fmt: skip
def test_mistakes_with_released_models_are_named(text: str, said: str, released: Path):
    assert said in refused(f"{text}\n")


def test_an_adapter_is_no_model_to_start_from(released: Path):
    (released / "adapter_config.json").write_text("{}")
    said = refused(LOCAL + "sft: {instruct: {from: {hf: models/small}}}\n")
    assert "sft.instruct.from.hf: models/small is an adapter" in said
    assert "merge it" in said


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_folder_without_a_model_is_refused(name: str, released: Path):
    (released / name).unlink()
    said = refused(LOCAL + "sft: {instruct: {from: {hf: models/small}}}\n")
    assert "sft.instruct.from.hf: models/small holds no " in said


# ---- how a script is started -----------------------------------------------------


def test_a_script_of_the_engine_is_told_how_to_split():
    sizes = "gpus: 2, pipeline_parallel: 2, sequence_parallel: false, save_steps: 7"
    nodes = built(
        f"placement: {{pretrain: {{default: {{{sizes}}}}}, sft: {{default: {{gpus: 1}}}},"
        f" {REST}}}\n"
    ).nodes
    assert run.placement_flags(nodes["pretrain/base"]) == [
        *("--tensor-parallel", "1", "--pipeline-parallel", "2"),
        *("--context-parallel", "1", "--expert-parallel", "1"),
        *("--expert-tensor-parallel", "1", "--micro-batch-size", "1"),
        *("--sequence-parallel", "false", "--distributed-optimizer", "true"),
        *("--save-steps", "7"),
    ]
    export = run.placement_flags(nodes["export/nano"])
    assert "--tensor-parallel" in export and "--save-steps" not in export
    grpo = run.placement_flags(nodes["grpo/reasoner"])
    assert grpo[grpo.index("--backend") :] == [
        *("--backend", "megatron", "--generation-gpus", "0"),
        *("--generation-tensor-parallel", "1", "--generation-memory", "0.6"),
        *("--nodes", "1", "--gpus", "1", "--cpus", "8", "--save-steps", "100"),
    ]
    evaluated = run.placement_flags(nodes["eval/arithmetic"])
    assert evaluated == ["--tensor-parallel", "1", "--generation-memory", "0.6"]
    assert run.placement_flags(nodes["tokenize/corpus"]) == []


def node(engine: str = "nvidia", **placement: object) -> Node:
    return Node("sft", "x", {}, placement=placement, engine=engine)  # type: ignore[arg-type]


def test_the_interpreter_is_the_named_one_or_the_engines_own_as_a_link():
    with pytest.raises(UserError, match="no Python with Megatron-Bridge"):
        run.interpreter(node())
    for name in (".venv-nvidia", "other"):
        Path(name, "bin").mkdir(parents=True)
        Path(name, "bin/python").symlink_to(sys.executable)
    assert run.interpreter(node()) == str(Path(".venv-nvidia/bin/python").absolute())
    found = run.interpreter(node(python="other/bin/python"))
    assert found == os.path.abspath("other/bin/python")
    assert run.interpreter(node("transformers")) == sys.executable


def test_an_interpreter_that_cannot_be_run_is_named():
    with pytest.raises(
        UserError, match=r"placement\.sft\.x\.python gone: no such file"
    ):
        run.interpreter(node(python="gone"))
    Path("text").write_text("")
    with pytest.raises(
        UserError, match=r"placement\.sft\.x\.python text: cannot be run"
    ):
        run.interpreter(node(python="text"))
    inside = {"runtime": "apptainer", "image": "x.sif"}
    assert run.interpreter(node(python="gone", container=inside)) == sys.executable


def test_a_stage_may_have_an_engine_of_its_own():
    text = "engine: {default: nvidia, grpo: transformers, eval: transformers}\n"
    places = f"placement: {{pretrain: {ONE}, sft: {ONE}, export: {ONE}}}\n"
    Path("config/top.yaml").write_text(f"extends: config.yaml\n{text}{places}")
    nodes = graph.build(Path("config/top.yaml")).nodes
    found = {id for id, n in nodes.items() if n.engine == "nvidia"}
    assert found == {"pretrain/base", "sft/instruct", "export/nano"}
    assert nodes["grpo/reasoner"].params == plain().nodes["grpo/reasoner"].params


def test_an_engine_of_an_unknown_stage_is_refused():
    Path("config/top.yaml").write_text("extends: config.yaml\nengine: {grop: nvidia}\n")
    with pytest.raises(UserError, match=r"top.yaml:2 engine.grop: no such stage"):
        graph.build(Path("config/top.yaml"))
