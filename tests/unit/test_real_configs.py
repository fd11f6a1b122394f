"""The configs of real models plan, name the data they lack, and have a small run each."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from scripts.lib import graph, identity
from scripts.lib.errors import UserError
from scripts.lib.load import load_config

ROOT = Path(__file__).parents[2]
REAL = ("nano3", "hybrid4b", "qwen3")
MODELS = sorted(p.parent.name for p in (ROOT / "config/models").glob("*/config.json"))
NVIDIA = os.environ.get("NVIDIA_PYTHON", str(ROOT / ".venv-nvidia/bin/python"))
PARAMETERS = {
    "nano3": 31_577_937_344,
    "hybrid4b": 3_973_556_832,
    "qwen3": 596_049_920,
}

NANO3 = {  # nemotron_3_nano_pretrain_config of Megatron-Bridge 0.6.2
    "hybrid_layer_pattern": "MEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEMEM*EMEMEMEME",
    "num_layers": 52,
    "hidden_size": 2688,
    "mamba_num_heads": 64,
    "kv_channels": 128,
    "mamba_state_dim": 128,
    "ffn_hidden_size": 1856,
    "num_attention_heads": 32,
    "mamba_head_dim": 64,
    "num_query_groups": 2,
    "num_moe_experts": 128,
    "moe_ffn_hidden_size": 1856,
    "moe_shared_expert_intermediate_size": 3712,
    "moe_router_topk": 6,
    "moe_router_topk_scaling_factor": 2.5,
    "moe_router_num_groups": 1,
    "moe_router_group_topk": 1,
    "mamba_num_groups": 8,
    "moe_router_score_function": "sigmoid",
    "moe_router_enable_expert_bias": True,
    "init_method_std": 0.0173,
}
HYBRID4B = {  # nemotron_3_nano_4b_pretrain_config of the same
    "hybrid_layer_pattern": "M-M-M-MM-M-M*-M-M*-M-M-M*-M-M-MM*-MMM-M-M-",
    "num_layers": 42,
    "hidden_size": 3136,
    "ffn_hidden_size": 12544,
    "num_attention_heads": 40,
    "num_query_groups": 8,
    "kv_channels": 128,
    "mamba_num_heads": 96,
    "mamba_head_dim": 80,
    "mamba_state_dim": 128,
    "mamba_num_groups": 8,
    "mamba_chunk_size": 256,
    "vocab_size": 131072,
    "share_embeddings_and_output_weights": False,
    "position_embedding_type": "none",
    "layernorm_epsilon": 1e-5,
    "init_method_std": 0.02,
}
QWEN3 = {
    "num_layers": 28,
    "hidden_size": 1024,
    "ffn_hidden_size": 3072,
    "num_attention_heads": 16,
    "num_query_groups": 8,
    "kv_channels": 128,
    "rotary_base": 1_000_000.0,
    "qk_layernorm": True,
    "share_embeddings_and_output_weights": True,
    "layernorm_epsilon": 1e-6,
}
SHAPES: dict[str, dict[str, Any]] = {
    "nano3": NANO3,
    "hybrid4b": HYBRID4B,
    "qwen3": QWEN3,
    "tiny": {"hybrid_layer_pattern": "M*-M*-", "num_layers": 6, "hidden_size": 128},
    "nano3_small": {"hybrid_layer_pattern": "MEM*EM", "num_moe_experts": 8},
    "hybrid4b_small": {"hybrid_layer_pattern": "M-M*-MM-"},
    "qwen3_small": {"num_layers": 4},
}
PROVIDERS = """
import json, sys
from transformers import AutoConfig
from megatron.bridge import AutoBridge

found = {}
for folder, names in json.loads(sys.argv[1]).items():
    config = AutoConfig.from_pretrained(folder)
    bridge = AutoBridge.from_hf_config(config)
    provider = bridge.to_megatron_provider(load_weights=False)
    found[folder] = {name: getattr(provider, name) for name in names}
print("FOUND " + json.dumps(found))
"""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A copy of the project's definitions, as the working folder."""
    for name in ("config", "envs", "scripts"):
        shutil.copytree(ROOT / name, tmp_path / name)
    monkeypatch.chdir(tmp_path)
    identity.forget()
    yield tmp_path
    identity.forget()


def engines(config: str) -> dict[str, str]:
    return {id: n.engine for id, n in graph.build(Path(config)).nodes.items()}


def fill(config: str) -> list[str]:
    """Put a file where each of a config's own datasets is to be."""
    loaded, _, _ = load_config(Path(config))
    made = []
    for source in loaded.data.values():
        for pattern in source.files or []:
            path = Path(pattern.replace("*", "part-0"))
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(b"0")
            made.append(str(path))
    return made


def test_the_tiny_chain_is_planned_for_one_gpu():
    planned = engines("config/nvidia.yaml")
    assert {id for id, engine in planned.items() if engine == "nvidia"} == {
        "pretrain/base",
        "sft/instruct",
        "grpo/reasoner",
        "export/nano",
        "eval/arithmetic",
    }
    assert set(planned) == set(engines("config/config.yaml"))


def test_every_method_is_planned_for_a_cpu():
    nodes = graph.build(Path("config/methods.yaml")).nodes
    assert {node.engine for node in nodes.values()} == {"transformers"}
    assert {node.placement["gpus"] for node in nodes.values()} == {0}
    methods = {
        node.recipe.get("peft", {}).get("method") or node.recipe.get("algorithm")
        for node in nodes.values()
    }
    assert methods >= {"lora", "dora", "grpo", "dapo"}
    assert {"dpo", "rm", "rollouts"} <= {node.stage for node in nodes.values()}


@pytest.mark.parametrize("name", REAL)
def test_a_real_config_is_refused_at_the_first_data_that_is_missing(name: str):
    with pytest.raises(UserError) as caught:
        graph.build(Path(f"config/{name}.yaml"))
    lines = Path(f"config/{name}.yaml").read_text().splitlines()
    number = next(i for i, x in enumerate(lines, 1) if x.startswith("  web:"))
    assert str(caught.value).startswith(f"config/{name}.yaml:{number} data.web.files")
    assert "no file matches" in str(caught.value)


@pytest.mark.parametrize("name", REAL)
def test_each_dataset_that_is_missing_is_asked_for(name: str):
    made = fill(f"config/{name}.yaml")
    assert len(made) >= 5
    for path in made:
        Path(path).unlink()
        with pytest.raises(UserError, match="data/"):
            graph.build(Path(f"config/{name}.yaml"))
        Path(path).write_bytes(b"0")


@pytest.mark.parametrize("name", REAL)
def test_a_real_config_plans_once_its_data_are_there(name: str):
    fill(f"config/{name}.yaml")
    nodes = graph.build(Path(f"config/{name}.yaml")).nodes
    stages = {node.stage for node in nodes.values()}
    assert {"pretrain", "sft", "grpo", "export", "eval", "report"} <= stages
    assert nodes["pretrain/base"].engine == "nvidia"
    assert nodes["pretrain/base"].placement["gpus"] == 8
    weights = nodes["tokenize/blend"].recipe["sources"]
    assert sum(s["weight"] for s in weights.values()) == pytest.approx(1)


@pytest.mark.parametrize("name", REAL)
def test_a_real_config_has_a_small_run_of_the_same_stages(name: str):
    small = graph.build(Path(f"config/scaled/{name}.yaml")).nodes
    fill(f"config/{name}.yaml")
    whole = graph.build(Path(f"config/{name}.yaml")).nodes
    assert set(whole) == {id for id in small if not id.startswith("generate/")}
    for id, node in small.items():
        assert node.engine == whole.get(id, node).engine
        assert node.placement["nodes"] == 1 and node.placement["gpus"] <= 1
        assert node.placement["minutes"] <= 30


@pytest.mark.parametrize("name", REAL)
def test_a_small_model_has_the_kinds_of_layers_of_its_original(name: str):
    def read(model: str) -> dict[str, Any]:
        return json.loads(Path(f"config/models/{model}/config.json").read_text())

    whole, small = read(name), read(f"{name}_small")
    assert set(whole) == set(small)
    layers = [set(c.get("hybrid_override_pattern", "")) for c in (whole, small)]
    assert layers[0] == layers[1]
    same = {"architectures", "model_type", "tie_word_embeddings", "conv_kernel"}
    assert all(whole.get(key) == small.get(key) for key in same)


@pytest.mark.parametrize("name", PARAMETERS)
def test_a_model_has_as_many_parameters_as_the_released_one(name: str):
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(f"config/models/{name}")
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert sum(p.numel() for p in model.parameters()) == PARAMETERS[name]


@pytest.mark.parametrize(
    "template",
    ["config/models/chatml.jinja", "config/models/nano3/chat_template.jinja"],
)
def test_a_chat_template_marks_what_the_assistant_says_and_its_end(template: str):
    from transformers.utils.chat_template_utils import render_jinja_template

    text = Path(template).read_text()
    chat = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "1 + 1"},
        {"role": "assistant", "content": "2"},
    ]
    rendered, spans = render_jinja_template(
        conversations=[chat],
        chat_template=text,
        return_assistant_tokens_mask=True,
        eos_token="<eos>",
    )
    ((start, end),) = spans[0]
    assert rendered[0][start:end] == "2<eos>"
    opened, _ = render_jinja_template(
        conversations=[chat[:2]], chat_template=text, add_generation_prompt=True
    )
    assert rendered[0].startswith(opened[0])


@pytest.mark.skipif(
    not Path(NVIDIA).exists(), reason=f"no {NVIDIA}: no Megatron-Bridge"
)
def test_megatron_reads_each_model_as_transformers_does():
    assert set(SHAPES) == set(MODELS)
    wanted = {f"config/models/{name}": shape for name, shape in SHAPES.items()}
    done = subprocess.run(
        [NVIDIA, "-c", PROVIDERS, json.dumps(wanted)],
        check=True,
        capture_output=True,
        text=True,
    )
    (line,) = [x for x in done.stdout.splitlines() if x.startswith("FOUND ")]
    assert json.loads(line.removeprefix("FOUND ")) == wanted
