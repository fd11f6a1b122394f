"""What is told to NeMo-RL, and what is published of its saves; none needs a GPU.

$NEMO_RL_PYTHON names an interpreter that has NeMo-RL, at the version of
envs/nemo-rl.lock; without it nothing here is tested.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from scripts.data import preferences, prompts
from scripts.environments.reward_model import RewardModel
from scripts.lib.attest import attest
from scripts.lib.outputs import TOKENIZER_FILES
from tests.bridge.conftest import ROOT

NEMO_RL = os.environ.get("NEMO_RL_PYTHON", "")
FIND = "from importlib.util import find_spec as f; raise SystemExit(not f('nemo_rl'))"


def missing() -> str:
    """Why nothing here can run, or nothing."""
    if not NEMO_RL:
        return "NEMO_RL_PYTHON is not set"
    if not Path(NEMO_RL).exists():
        return f"no {NEMO_RL}"
    asked = subprocess.run([NEMO_RL, "-c", FIND], capture_output=True, check=False)
    return f"{NEMO_RL} has none" if asked.returncode else ""


pytestmark = pytest.mark.skipif(
    bool(missing()), reason=f"NOT TESTED: no interpreter with NeMo-RL: {missing()}"
)

# ---- settings: what is asked, and what NeMo-RL reads -----------------------------

TRAINED = {
    "steps": 30,
    "batch_size": 32,
    "lr": 4e-4,
    "lr_scheduler": "cosine",
    "warmup_steps": 5,
    "weight_decay": 0.1,
    "max_grad_norm": 0.7,
    "seed": 21,
}
GRPO = TRAINED | {
    "num_generations": 4,
    "max_completion_tokens": 12,
    "temperature": 0.9,
    "beta": 0.02,
}
DPO = TRAINED | {"beta": 0.2, "sft_weight": 0.5}

KEYS = {
    "policy.model_name": "PARENT",
    "policy.tokenizer.name": "PARENT",
    "policy.train_global_batch_size": 32,
    "policy.train_micro_batch_size": 4,
    "policy.logprob_batch_size": 4,
    "policy.precision": "bfloat16",
    "policy.max_grad_norm": 0.7,
    "policy.dynamic_batching.enabled": False,
    "policy.sequence_packing.enabled": False,
    "checkpointing.enabled": True,
    "checkpointing.checkpoint_dir": "WORK/saves",
    "checkpointing.save_period": 7,
    "checkpointing.metric_name": None,
    "checkpointing.checkpoint_must_save_by": None,
    "checkpointing.save_optimizer": True,
    "logger.log_dir": "WORK/logs",
    "logger.wandb_enabled": False,
    "logger.tensorboard_enabled": False,
    "logger.mlflow_enabled": False,
    "logger.swanlab_enabled": False,
    "cluster.gpus_per_node": 1,
    "cluster.num_nodes": 1,
    "data.train.data_path": "WORK/rows/train.jsonl",
    "data.validation.data_path": "WORK/rows/validation.jsonl",
    "data.shuffle": True,
}
OF_GRPO = KEYS | {
    "grpo.num_prompts_per_step": 8,
    "grpo.num_generations_per_prompt": 4,
    "grpo.max_rollout_turns": 1,
    "grpo.max_num_steps": 30,
    "grpo.seed": 21,
    "grpo.val_period": 0,
    "grpo.use_dynamic_sampling": False,
    "grpo.reward_shaping.enabled": False,
    "grpo.reward_scaling.enabled": False,
    "loss_fn.reference_policy_kl_penalty": 0.02,
    "policy.generation.backend": "vllm",
    "policy.generation.max_new_tokens": 12,
    "policy.generation.temperature": 0.9,
    "policy.generation.top_p": 1.0,
    "policy.generation.top_k": None,
    "policy.generation.vllm_cfg.gpu_memory_utilization": 0.3,
    "policy.generation.vllm_cfg.tensor_parallel_size": 1,
    "policy.generation.vllm_cfg.async_engine": False,
    "policy.generation.colocated.enabled": True,
    "data.train.env_name": "build",
    "data.train.prompt_file": None,
    "data.train.system_prompt_file": None,
    "env.build": {
        "environments": {"math": {"weight": 1.0}},
        "gpus": "",
        "prompts": "INPUTS/prompts",
        "tokenizer": "PARENT",
        "workers": 8,
        "log": "WORK/rewards.jsonl",
    },
}
MEGATRON = {
    "policy.megatron_cfg.enabled": True,
    "policy.dtensor_cfg.enabled": False,
    "policy.optimizer": None,
    "policy.megatron_cfg.optimizer.lr": 4e-4,
    "policy.megatron_cfg.optimizer.min_lr": 0.0,
    "policy.megatron_cfg.optimizer.weight_decay": 0.1,
    "policy.megatron_cfg.optimizer.clip_grad": 0.7,
    "policy.megatron_cfg.optimizer.adam_beta1": 0.9,
    "policy.megatron_cfg.optimizer.adam_beta2": 0.95,
    "policy.megatron_cfg.optimizer.use_distributed_optimizer": True,
    "policy.megatron_cfg.scheduler.lr_decay_style": "cosine",
    "policy.megatron_cfg.scheduler.lr_decay_iters": 30,
    "policy.megatron_cfg.scheduler.lr_warmup_iters": 5,
    "policy.megatron_cfg.scheduler.lr_warmup_init": 0.0,
    "policy.megatron_cfg.tensor_model_parallel_size": 1,
    "policy.megatron_cfg.sequence_parallel": False,
    "checkpointing.model_save_format": None,
}
DTENSOR = {
    "policy.megatron_cfg.enabled": False,
    "policy.dtensor_cfg.enabled": True,
    "policy.dtensor_cfg._v2": False,
    "policy.dtensor_cfg.tensor_parallel_size": 1,
    "policy.dtensor_cfg.context_parallel_size": 1,
    "policy.dtensor_cfg.cpu_offload": False,
    "policy.optimizer.name": "torch.optim.AdamW",
    "policy.optimizer.kwargs": {
        "lr": 4e-4,
        "weight_decay": 0.1,
        "betas": [0.9, 0.95],
        "eps": 1e-8,
        "foreach": False,
        "fused": False,
    },
    "policy.scheduler": [
        {
            "name": "torch.optim.lr_scheduler.LinearLR",
            "kwargs": {"start_factor": 1 / 6, "end_factor": 1.0, "total_iters": 5},
        },
        {
            "name": "torch.optim.lr_scheduler.CosineAnnealingLR",
            "kwargs": {"T_max": 25, "eta_min": 0.0},
        },
        {"milestones": [5]},
    ],
    "checkpointing.model_save_format": None,
}
AUTOMODEL = DTENSOR | {
    "policy.dtensor_cfg._v2": True,
    "checkpointing.model_save_format": "torch_save",
    "checkpointing.is_async": False,
}
BACKENDS = {"megatron": MEGATRON, "dtensor": DTENSOR, "automodel": AUTOMODEL}
DAPO = {
    "grpo.use_dynamic_sampling": True,
    "grpo.batch_multiplier": 3,
    "grpo.adv_estimator.name": "grpo",
    "grpo.adv_estimator.use_leave_one_out_baseline": False,
    "grpo.reward_scaling.enabled": True,
    "grpo.reward_scaling.target_min": -1.0,
    "grpo.reward_scaling.target_max": 1.0,
    "grpo.reward_shaping.enabled": True,
    "grpo.reward_shaping.overlong_buffer_length": 2,
    "grpo.reward_shaping.max_response_length": 12,
    "loss_fn.ratio_clip_min": 0.2,
    "loss_fn.ratio_clip_max": 0.28,
    "loss_fn.ratio_clip_c": 10,
    "loss_fn.token_level_loss": True,
}
OF_PAIRS = KEYS | {
    "ALGORITHM.max_num_steps": 30,
    "ALGORITHM.seed": 21,
    "ALGORITHM.val_period": 0,
    "ALGORITHM.val_at_start": False,
    "ALGORITHM.val_at_end": True,
    "ALGORITHM.val_global_batch_size": 4,
    "ALGORITHM.val_micro_batch_size": 4,
}
OF_DPO = {
    "dpo.reference_policy_kl_penalty": 0.2,
    "dpo.sft_loss_weight": 0.5,
    "dpo.preference_loss_weight": 1,
}
OF_RM = {
    "policy.reward_model_cfg.enabled": True,
    "policy.reward_model_cfg.reward_model_type": "bradley_terry",
}
OVERRIDES = {
    "policy.generation.vllm_cfg.enforce_eager": True,
    "grpo.overlong_filtering": True,
    "loss_fn.ratio_clip_max": 0.3,
}

Case = tuple[dict[str, Any], dict[str, Any]]
CASES: dict[str, Case] = {
    **{
        f"grpo {name}": ({"backend": name}, OF_GRPO | own)
        for name, own in BACKENDS.items()
    },
    "grpo of a hybrid": (
        {"parent": "hybrid"},
        OF_GRPO | MEGATRON | {"policy.megatron_cfg.bias_activation_fusion": False},
    ),
    **{
        f"dapo {name}": (
            {"backend": name, "recipe": {"algorithm": "dapo"}},
            OF_GRPO | own | DAPO,
        )
        for name, own in BACKENDS.items()
    },
    "several turns": (
        {"recipe": {"max_turns": 3, "max_conversation_tokens": 99}},
        {
            "grpo.max_rollout_turns": 3,
            "policy.max_total_sequence_length": 100,
            "policy.generation.vllm_cfg.max_model_len": 100,
            "policy.generation.max_new_tokens": 12,
        },
    ),
    "split": (
        {
            "flags": "--gpus 8 --tensor-parallel 2 --pipeline-parallel 2 "
            "--generation-gpus 4 --generation-tensor-parallel 2",
        },
        {
            "policy.megatron_cfg.tensor_model_parallel_size": 2,
            "policy.megatron_cfg.pipeline_model_parallel_size": 2,
            "policy.megatron_cfg.sequence_parallel": True,
            "policy.make_sequence_length_divisible_by": 2,
            "policy.generation.vllm_cfg.tensor_parallel_size": 2,
            "policy.generation.colocated.enabled": False,
            "policy.generation.colocated.resources.gpus_per_node": 4,
            "policy.generation.colocated.resources.num_nodes": None,
            "cluster.gpus_per_node": 8,
        },
    ),
    "overrides": (
        {"recipe": {"overrides": OVERRIDES}},
        OVERRIDES | {"policy.generation.vllm_cfg.tensor_parallel_size": 1},
    ),
    "constant": (
        {"backend": "dtensor", "recipe": {"lr_scheduler": "constant"}},
        {
            "policy.scheduler": [
                {
                    "name": "torch.optim.lr_scheduler.ConstantLR",
                    "kwargs": {"factor": 1.0, "total_iters": 1},
                },
                {"milestones": []},
            ]
        },
    ),
    **{
        f"dpo {name}": ({"stage": "dpo", "backend": name}, OF_PAIRS | own | OF_DPO)
        for name, own in BACKENDS.items()
    },
    **{
        f"rm {name}": (
            {"stage": "rm", "backend": name},
            OF_PAIRS | BACKENDS[name] | OF_RM,
        )
        for name in ("dtensor", "automodel")
    },
}
RECIPES = {"grpo": GRPO, "dpo": DPO, "rm": TRAINED}

# ---- saves: what was trained, and what is published ------------------------------

Save = dict[str, str]
PUBLISHED: dict[str, Save] = {
    "causal": {},
    "causal untied": {"parent": "untied"},
    "causal of automodel": {"save": "automodel", "backend": "automodel"},
    "reward": {"kind": "reward"},
    "reward untied": {"kind": "reward", "parent": "untied"},
}
REFUSED: dict[str, tuple[Save, str]] = {
    "one bit": ({"harm": "one bit"}, "q_proj.weight is not what"),
    "one bit of a reward model": (
        {"kind": "reward", "harm": "one bit"},
        "q_proj.weight is not what",
    ),
    "a tensor lost": ({"harm": "a tensor lost"}, "model.norm.weight is not what"),
    "without a tensor": (
        {"save": "without a tensor"},
        "model.embed_tokens.weight: not in both the trained weights and",
    ),
    "renamed": ({"save": "renamed"}, "module.model.embed_tokens.weight: not in both"),
    "another kind": (
        {"kind": "reward", "save": "as causal"},
        "score.weight: not in both the trained weights and",
    ),
}
MODELS = {"dense": "qwen3_small", "untied": "qwen3_small", "hybrid": "tiny"}
ODD = "one\u2028two\x85three"
TEMPLATE = """{% for m in messages -%}
{% if m.role == 'assistant' and not loop.last -%}
<|assistant|>{{ m.content.split('</think>')[-1] + eos_token }}
{% elif m.role == 'assistant' -%}
<|assistant|><think></think>{{ m.content + eos_token }}
{% else -%}
<|user|>{{ m.content }}
{% endif %}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"""
"""Writes an answer otherwise once a turn follows, as Qwen3's does."""


def build(inputs: Path, root: Path) -> None:
    """Parents, prompts and preferences, as a build makes them."""
    from transformers import AutoConfig, AutoModelForCausalLM

    for name, model in MODELS.items():
        config = json.loads((ROOT / f"config/models/{model}/config.json").read_text())
        config |= {"tie_word_embeddings": False} if name == "untied" else {}
        folder = root / name
        shutil.copytree(inputs / "tokenizer", folder)
        (folder / "config.json").write_text(json.dumps(config))
        if name != "hybrid":
            made = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
            made.to(torch.bfloat16).save_pretrained(folder)
    shutil.copytree(inputs / "tokenizer", root / "thinking")
    (root / "thinking/chat_template.jinja").write_text(TEMPLATE)

    def stage(main: Any, name: str, recipe: Any, rows: list[Any]) -> None:
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
        (root / f"{name}.jsonl").write_text("".join(lines))
        recipe |= {"seed": 0, "sources": {"rows": {}}}
        (root / f"{name}.yaml").write_text(json.dumps(recipe))
        argv = ["--recipe", root / f"{name}.yaml", "--out", root / name]
        argv += ["--tokenizer", inputs / "tokenizer"]
        argv += ["--data", f"rows={root / name}.jsonl"]
        assert main([str(word) for word in argv]) == 0

    asked = [ODD, *(f"{a} + 1 = " for a in range(60))]
    rows = [{"input": text, "output": "2"} for text in asked]
    stage(prompts.main, "prompts", {"max_prompt_tokens": 64}, rows)
    pairs = [{"prompt": text, "chosen": "22", "rejected": "3"} for text in asked]
    stage(preferences.main, "preferences", {"max_tokens": 64}, pairs)


def argv_of(case: dict[str, Any], name: str, root: Path) -> list[str]:
    """The command line of a stage's script."""
    stage = case.get("stage", "grpo")
    recipe = root / "recipes" / f"{name}.json".replace(" ", "_")
    recipe.parent.mkdir(exist_ok=True)
    recipe.write_text(json.dumps(RECIPES[stage] | case.get("recipe", {})))
    data = "prompts" if stage == "grpo" else "preferences"
    words = [
        "--recipe",
        recipe,
        "--out",
        root / "unused",
        "--work",
        work_of(name, root),
    ]
    words += ["--parent", root / case.get("parent", "dense"), f"--{data}", root / data]
    words += ["--backend", case.get("backend", "megatron"), "--gpus", 1, "--cpus", 8]
    words += ["--micro-batch-size", 4, "--save-steps", 7, "--generation-memory", 0.3]
    return [*map(str, words), *case.get("flags", "").split()]


def work_of(name: str, root: Path) -> Path:
    return root / "work" / name.replace(" ", "_")


def saved(case: Save, root: Path) -> Save:
    """A save that is asked for, as the program takes it."""
    default = {"kind": "causal", "save": "dtensor", "backend": "dtensor", "harm": ""}
    return default | case | {"parent": str(root / case.get("parent", "dense"))}


@pytest.fixture(scope="module")
def root(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("nemo_rl")
    build(inputs, folder)
    return folder


@pytest.fixture(scope="module")
def found(root: Path) -> dict[str, Any]:
    """What NeMo-RL's interpreter says of all that is asked here, at once."""
    stages = {
        name: {
            "stage": case.get("stage", "grpo"),
            "argv": argv_of(case, name, root),
            "fields": [*fields_of(name, wanted, root), "data.max_input_seq_length"],
        }
        for name, (case, wanted) in CASES.items()
    }
    asked = {
        "stages": stages,
        "chat": {"parent": str(root / "thinking"), "prompts": str(root / "prompts")},
        "published": {
            name: saved(case, root)
            for name, case in (
                PUBLISHED | {name: case for name, (case, _) in REFUSED.items()}
            ).items()
        },
    }
    question, answer = root / "asked.json", root / "found.json"
    question.write_text(json.dumps(asked))
    ran = subprocess.run(
        [NEMO_RL, "-m", "tests.bridge.programs.rl_settings", question, answer],
        cwd=root,
        env={
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "CUDA_VISIBLE_DEVICES": "",
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "2",
        },
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )
    assert ran.returncode == 0, ran.stdout[-3000:] + ran.stderr[-6000:]
    return dict(json.loads(answer.read_text()))


def fields_of(name: str, wanted: dict[str, Any], root: Path) -> dict[str, Any]:
    """What NeMo-RL is to read, with the folders' names filled in."""
    case = CASES[name][0]
    text = json.dumps(wanted)
    for word, path in (
        ("PARENT", root / case.get("parent", "dense")),
        ("WORK", work_of(name, root)),
        ("INPUTS", root),
    ):
        text = text.replace(f'"{word}', f'"{path}')
    return dict(json.loads(text.replace("ALGORITHM", case.get("stage", "grpo"))))


@pytest.mark.parametrize("visible", ["0,1", "1", "3,2"])
def test_each_worker_takes_a_gpu_of_its_own_that_the_run_was_given(
    visible: str, tmp_path: Path
):
    ran = subprocess.run(
        [NEMO_RL, "-m", "tests.bridge.programs.ray_gpus", tmp_path / "found"],
        cwd=ROOT,
        env={
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "CUDA_VISIBLE_DEVICES": visible,
            "RAY_ADDRESS": "local",
            "RAY_USAGE_STATS_ENABLED": "0",
        },
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert ran.returncode == 0, ran.stdout[-3000:] + ran.stderr[-6000:]
    found = json.loads((tmp_path / "found").read_text())
    assert sorted(found) == sorted(visible.split(","))


# ---- settings --------------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
def test_nemo_rl_reads_what_the_recipe_says(
    name: str, found: dict[str, Any], root: Path
):
    wanted = fields_of(name, CASES[name][1], root)
    read = found["stages"][name]
    assert {key: read[key] for key in wanted} == wanted


@pytest.mark.parametrize("name", CASES)
def test_no_row_is_cut_or_left_out(name: str, found: dict[str, Any]):
    read = found["stages"][name]
    data = read["data"]
    assert data["used"] == len(data["rows"]) == 58, "61, and 3 held back"
    assert data["held"] == {"default": 3}
    assert data["longest"] <= read["data.max_input_seq_length"]
    length = read.get("policy.max_total_sequence_length", 512)
    assert data["longest"] <= length <= 512


@pytest.mark.parametrize("name", CASES)
def test_chats_are_rendered_with_the_parents_template(
    name: str, found: dict[str, Any], root: Path
):
    from transformers import AutoTokenizer

    words = AutoTokenizer.from_pretrained(root / "dense")
    chat = [{"role": "user", "content": "1 + 1"}]
    wanted = words.apply_chat_template(chat, tokenize=False)
    assert found["stages"][name]["data"]["template"] == wanted


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().split("\n") if line]


def test_a_prompts_number_leads_to_its_row(found: dict[str, Any], root: Path):
    written = lines(root / "prompts/train.jsonl")
    assert ODD in {row["input"] for row in written}, "a row that splitlines would cut"
    for number, row in enumerate(written, 1):
        assert found["chat"]["rows"][f"train row {number}"] == row["input"]
    held = lines(root / "prompts/validation.jsonl")
    assert found["chat"]["rows"]["validation row 1"] == held[0]["input"]


@pytest.mark.parametrize("name", ["dpo megatron", "dpo dtensor", "rm dtensor"])
def test_pairs_are_rendered_as_they_are_scored(
    name: str, found: dict[str, Any], root: Path
):
    from transformers import AutoTokenizer

    words = AutoTokenizer.from_pretrained(root / "dense")
    assert words.bos_token, "which NeMo-RL would put before each"
    wanted = [
        [
            words.apply_chat_template(
                [*row["messages"], {"role": "assistant", "content": row[side]}],
                tokenize=False,
            )
            for side in ("chosen", "rejected")
        ]
        for row in lines(root / "preferences/train.jsonl")
    ]
    assert found["stages"][name]["data"]["rows"] == wanted


def test_prompts_are_rendered_as_the_template_asks_for_an_answer(
    found: dict[str, Any], root: Path
):
    from transformers import AutoTokenizer

    words = AutoTokenizer.from_pretrained(root / "dense")
    wanted = {
        f"train row {number}": words.apply_chat_template(
            [{"role": "user", "content": row["input"]}],
            tokenize=False,
            add_generation_prompt=True,
        )
        for number, row in enumerate(lines(root / "prompts/train.jsonl"), 1)
    }
    assert found["stages"]["grpo dtensor"]["data"]["rows"] == wanted


# ---- environments ----------------------------------------------------------------


def test_nemo_rl_finds_the_actor_of_the_environments(found: dict[str, Any]):
    assert found["chat"]["actor"] == "scripts.nvidia.environments.Environments"
    assert found["chat"]["same_python"]


def test_a_reply_is_written_as_the_template_writes_a_users_turn(found: dict[str, Any]):
    (first, second, last) = found["chat"]["told"]
    assert first[:2] == [[0.25], [False]]
    assert first[2]["role"] == "environment"
    assert first[2]["content"] == "\n<|user|>go on\n<|assistant|>"
    assert second == [
        [0.5],
        [False],
        {"role": "environment", "content": "\n<|user|>\n<|assistant|>"},
    ]
    assert last == [[1.0], [True], {"role": "environment", "content": ""}]


def test_environments_see_the_conversation_without_its_template(
    found: dict[str, Any], root: Path
):
    row = lines(root / "prompts/train.jsonl")[1]
    answers = [f"<think>x</think>answer {number}" for number in range(3)]
    (conversations, rows) = found["chat"]["asked"][-1]
    assert rows == [row]
    assert conversations == [
        [
            {"role": "user", "content": row["input"]},
            {"role": "assistant", "content": answers[0]},
            {"role": "user", "content": "go on"},
            {"role": "assistant", "content": answers[1]},
            {"role": "user", "content": ""},
            {"role": "assistant", "content": answers[2]},
        ]
    ]


# ---- publishing ------------------------------------------------------------------


def place(name: str, root: Path) -> Path:
    return root / "published" / name.replace(" ", "_")


def folder_of(name: str, found: dict[str, Any], root: Path) -> Path:
    told = found["published"][name]
    assert "error" not in told, told
    return place(name, root) / "out/model"


@pytest.mark.parametrize("name", PUBLISHED)
def test_what_is_published_are_the_trained_weights(
    name: str, found: dict[str, Any], root: Path
):
    out = folder_of(name, found, root)
    wanted = load_file(place(name, root) / "wanted.safetensors")
    ours = load_file(out / "model.safetensors")
    tied = PUBLISHED[name].get("parent") != "untied"
    dropped = {"lm_head.weight"} if tied else set()
    assert set(ours) == set(wanted) - dropped
    assert all(t.dtype == torch.bfloat16 for t in ours.values())
    assert all(torch.equal(ours[key], wanted[key]) for key in ours)
    parity = json.loads((out / "parity.json").read_text())
    assert parity["differs_on_disk"] == [] and parity["tensors"] == len(ours)
    assert 0 < parity["relative_logit_difference"] <= parity["tolerance"]
    assert "weights.pt" not in found["published"][name]["left"]


@pytest.mark.parametrize("name", PUBLISHED)
def test_what_is_published_is_attested_and_goes_on(
    name: str, found: dict[str, Any], root: Path
):
    out = folder_of(name, found, root)
    case = saved(PUBLISHED[name], root)
    stage = "rm" if case["kind"] == "reward" else "dpo"
    (out.parent / "metrics.jsonl").write_text('{"step": 30}\n')
    attest(stage, {"steps": 30}, out, Path(case["parent"]))
    for file in TOKENIZER_FILES:
        source = Path(case["parent"], file)
        assert (out / file).exists() is source.exists()
        if source.exists():
            assert (out / file).read_bytes() == source.read_bytes()
    config = json.loads((out / "config.json").read_text())
    assert config["dtype"] == "bfloat16" and "torch_dtype" not in config


@pytest.mark.parametrize("name", ["causal", "causal untied", "causal of automodel"])
def test_a_language_model_answers_here_too(
    name: str, found: dict[str, Any], root: Path
):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    out = folder_of(name, found, root)
    model, told = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not any(told.values()), told
    words = AutoTokenizer.from_pretrained(out)
    assert model.generation_config.eos_token_id == words.eos_token_id
    assert model.config.architectures == ["Qwen3ForCausalLM"]


@pytest.mark.parametrize("name", ["reward", "reward untied"])
def test_a_reward_model_rewards(name: str, found: dict[str, Any], root: Path):
    out = folder_of(name, found, root)
    config = json.loads((out / "config.json").read_text())
    assert config["architectures"] == ["Qwen3ForSequenceClassification"]
    assert not (out / "generation_config.json").exists()
    model = RewardModel(str(out))
    assert model.model.config.num_labels == 1
    chats = [
        [{"role": "user", "content": "1 + 1"}, {"role": "assistant", "content": answer}]
        for answer in ("2", "a rather long answer, to be filled up to", "33")
    ]
    scores = model.steps(chats, [{}] * 3)
    alone = [model.step(chat, {}) for chat in chats]
    assert len(set(scores)) == 3
    assert scores == pytest.approx(alone, rel=0.05, abs=0.01), (
        "what fills up counts not"
    )


@pytest.mark.parametrize("name", REFUSED)
def test_a_save_that_went_wrong_is_not_published(
    name: str, found: dict[str, Any], root: Path
):
    kind, where, what, _ = found["published"][name]["error"]
    assert kind == "AttestError" and str(place(name, root)) in where
    assert REFUSED[name][1] in what
