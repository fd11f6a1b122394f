"""What is told to Megatron-Bridge, and what comes back from it; none needs a GPU."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.bridge.conftest import ROOT, answer, run

MODELS = ROOT / "config/models"
SFT = {
    "steps": 50,
    "batch_size": 8,
    "lr": 1e-3,
    "lr_scheduler": "cosine",
    "warmup_steps": 5,
    "weight_decay": 0.1,
    "max_grad_norm": 0.7,
    "log_steps": 5,
    "seed": 21,
}
PRETRAIN = SFT | {"sequence_length": 128}

# ---- settings: what is asked, and what Bridge is told ----------------------------

KEYS = {
    "train.train_iters": 50,
    "train.global_batch_size": 8,
    "train.micro_batch_size": 4,
    "train.exit_signal_handler": True,
    "validation.eval_iters": 0,
    "optimizer.lr": 1e-3,
    "optimizer.min_lr": 0.0,
    "optimizer.weight_decay": 0.1,
    "optimizer.clip_grad": 0.7,
    "optimizer.adam_beta1": 0.9,
    "optimizer.adam_beta2": 0.95,
    "optimizer.use_distributed_optimizer": True,
    "ddp.use_distributed_optimizer": True,
    "scheduler.lr_warmup_iters": 5,
    "scheduler.lr_decay_iters": 50,
    "scheduler.lr_decay_style": "cosine",
    "scheduler.start_weight_decay": 0.1,
    "scheduler.end_weight_decay": 0.1,
    "rng.seed": 21,
    "tokenizer.tokenizer_type": "HuggingFaceTokenizer",
    "tokenizer.tokenizer_model": "INPUTS/tokenizer",
    "tokenizer.use_tokenizer_vocab_size": False,
    "logger.log_interval": 5,
    "logger.tensorboard_dir": "WORK/tensorboard",
    "checkpoint.save": "WORK/saves",
    "checkpoint.load": "WORK/saves",
    "checkpoint.save_interval": 30,
    "checkpoint.most_recent_k": 2,
    "checkpoint.async_save": False,
    "checkpoint.dist_ckpt_optim_fully_reshardable": True,
    "mixed_precision.bf16": True,
    "mixed_precision.fp8": None,
    "mixed_precision.fp8_param_gather": False,
    "model.tensor_model_parallel_size": 1,
    "model.sequence_parallel": False,
    "comm_overlap": None,
    "default_folders": [],
}
BLEND = {
    "model.seq_length": 128,
    "dataset.seq_length": 128,
    "dataset.random_seed": 21,
    "dataset.split": "100,0,0",
    "dataset.blend": [["INPUTS/blend/corpus"], [1.0]],
    "dataset.blend_per_split": None,
    "dataset.path_to_cache": "WORK/index",
    "checkpoint.pretrained_checkpoint": None,
    "model.calculate_per_token_loss": False,
}
PACKED = {
    "model.seq_length": 256,
    "model.calculate_per_token_loss": True,
    "ddp.average_in_collective": False,
    "dataset": "GPTSFTDatasetConfig",
    "dataset.seq_length": 256,
    "dataset.seed": 21,
    "dataset.enable_offline_packing": True,
    "dataset.offline_packing_specs.packed_sequence_size": 256,
    "dataset.offline_packing_specs.packed_train_data_path": "INPUTS/packed/packed.parquet",
    "dataset.do_validation": False,
    "dataset.do_test": False,
    "checkpoint.pretrained_checkpoint": "MODEL",
}


def shape(layers: int, width: int, ffn: int, heads: int, groups: int, words: int = 512):
    return {
        "model.num_layers": layers,
        "model.hidden_size": width,
        "model.ffn_hidden_size": ffn,
        "model.num_attention_heads": heads,
        "model.num_query_groups": groups,
        "model.vocab_size": words,
        "model.share_embeddings_and_output_weights": False,
    }


def experts(count: int, width: int, shared: int, topk: int) -> dict[str, Any]:
    return {
        "model.num_moe_experts": count,
        "model.moe_ffn_hidden_size": width,
        "model.moe_shared_expert_intermediate_size": shared,
        "model.moe_router_topk": topk,
    }


LAYERS = "model.hybrid_layer_pattern"
SHAPES = {
    "tiny": shape(6, 128, 256, 4, 4) | {LAYERS: "M*-M*-"},
    "hybrid4b_small": shape(8, 128, 256, 4, 2) | {LAYERS: "M-M*-MM-"},
    "nano3_small": shape(6, 128, 128, 4, 2)
    | {LAYERS: "MEM*EM"}
    | experts(8, 128, 128, 2),
    "nano3": shape(52, 2688, 1856, 32, 2, 131072)
    | {LAYERS: "MEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEMEM*EMEMEMEME"}
    | experts(128, 1856, 3712, 6),
    "qwen3_small": shape(4, 128, 256, 4, 2)
    | {
        "model.num_moe_experts": None,
        "model.share_embeddings_and_output_weights": True,
    },
}
EIGHT = "mixed_precision.fp8_recipe"
PRECISIONS: dict[str | None, dict[str, Any]] = {
    None: {"mixed_precision.fp8": None, "mixed_precision.fp4": None},
    "bf16": {"mixed_precision.fp8": None, "mixed_precision.fp4": None},
    "fp8_delayed": {"mixed_precision.fp8": "hybrid", EIGHT: "delayed"},
    "fp8_current": {"mixed_precision.fp8": "hybrid", EIGHT: "tensorwise"},
    "fp8_block": {"mixed_precision.fp8": "hybrid", EIGHT: "blockwise"},
    "mxfp8": {"mixed_precision.fp8": "e4m3", EIGHT: "mxfp8"},
    "nvfp4": {"mixed_precision.fp8": None, "mixed_precision.fp4": "e2m1"},
}
KEPT = dict.fromkeys(
    [
        "mixed_precision.fp8_param_gather",
        "mixed_precision.fp4_param_gather",
        "mixed_precision.reuse_grad_buf_for_mxfp8_param_ag",
    ],
    False,
)
"""Weights are bfloat16 whatever the products are computed in."""

OVERRIDES = {
    "model.attention_backend": "unfused",
    "model.moe_aux_loss_coeff": 0.5,
    "train.manual_gc_interval": 7,
    "optimizer.adam_beta2": 0.9,
    "optimizer.min_lr": 1e-5,
    "scheduler.lr_warmup_init": 1e-6,
    "dataset.split": "90,10,0",
    "checkpoint.most_recent_k": 5,
    "mixed_precision.grad_reduce_in_fp32": False,
    "ddp.check_for_nan_in_grad": False,
    "comm_overlap.tp_comm_overlap": False,
    "comm_overlap.bucket_size": 1000,
    "logger.log_throughput": True,
    "rng.te_rng_tracker": True,
}
"""One of each section, each other than its default."""

ALL = ["linear_qkv", "linear_proj", "linear_fc1", "linear_fc2", "in_proj"]
NANO = "nemotron_3_nano_pretrain_config"
QWEN = "qwen3_600m_pretrain_config"
NANO_TUNING = {
    "model.moe_token_dispatcher_type": "flex",
    "model.attention_backend": "fused",
    "model.recompute_granularity": "selective",
    "model.cuda_graph_impl": "transformer_engine",
    "ddp.overlap_param_gather": False,
}
"""What Bridge's recipe for that model has otherwise than Bridge's defaults."""

Case = tuple[dict[str, Any], dict[str, Any]]
CASES: dict[str, Case] = {
    **{f"pretrain {m}": ({"model": m}, KEYS | BLEND | SHAPES[m]) for m in SHAPES},
    **{
        f"precision {p}": ({"recipe": {"precision": p}}, PRECISIONS[p] | KEPT)
        for p in PRECISIONS
    },
    **{
        f"schedule {ours}": (
            {"recipe": {"lr_scheduler": ours}},
            {
                "scheduler.lr_decay_style": theirs,
                "scheduler.lr_warmup_iters": warmup,
            },
        )
        for ours, theirs, warmup in (
            ("linear", "linear", 5),
            ("constant", "constant", 0),
            ("constant_with_warmup", "constant", 5),
        )
    },
    "parallel": (
        {
            "model": "nano3_small",
            "flags": "--tensor-parallel 2 --pipeline-parallel 3 --expert-parallel 2 "
            "--distributed-optimizer false",
        },
        {
            "model.tensor_model_parallel_size": 2,
            "model.pipeline_model_parallel_size": 3,
            "model.expert_model_parallel_size": 2,
            "model.context_parallel_size": 1,
            "model.sequence_parallel": True,
            "optimizer.use_distributed_optimizer": False,
            "ddp.use_distributed_optimizer": False,
        },
    ),
    "not sequence parallel": (
        {"flags": "--tensor-parallel 2 --sequence-parallel false"},
        {"model.tensor_model_parallel_size": 2, "model.sequence_parallel": False},
    ),
    "contexts and chunks": (
        {
            "flags": "--context-parallel 2 --pipeline-parallel 2 --virtual-pipeline 2 "
            "--micro-batch-size 1"
        },
        {
            "model.context_parallel_size": 2,
            "model.pipeline_model_parallel_size": 2,
            "model.virtual_pipeline_model_parallel_size": 2,
        },
    ),
    "overrides": (
        {"model": "nano3_small", "recipe": {"overrides": OVERRIDES}},
        OVERRIDES,
    ),
    "overrides of an adapter": (
        {
            "stage": "sft",
            "recipe": {
                "peft": {"method": "lora"},
                "overrides": {"peft.dropout_position": "post"},
            },
        },
        {"peft.dropout_position": "post", "peft.dim": 16},
    ),
    "recipe nano": (
        {"model": "nano3_small", "recipe": {"recipe": NANO}},
        {key: KEYS[key] for key in KEYS if key != "comm_overlap"}
        | BLEND
        | SHAPES["nano3_small"]
        | NANO_TUNING,
    ),
    "recipe nano of a dense model": (
        {"model": "tiny", "recipe": {"recipe": NANO}},
        SHAPES["tiny"] | {"model.init_method_std": 0.02} | NANO_TUNING,
    ),
    "recipe qwen": (
        {"recipe": {"recipe": QWEN}},
        KEYS
        | BLEND
        | SHAPES["qwen3_small"]
        | {"model.cross_entropy_fusion_impl": "te"},
    ),
    "without the recipe qwen": ({}, {"model.cross_entropy_fusion_impl": "native"}),
    **{
        f"sft {m}": (
            {"stage": "sft", "model": m, "flags": ""},
            KEYS | PACKED | SHAPES[m] | {"train.micro_batch_size": 1, "peft": None},
        )
        for m in ("tiny", "nano3_small", "hybrid4b_small", "qwen3_small")
    },
    "lora": (
        {"stage": "sft", "recipe": {"peft": {"method": "lora"}}},
        {
            "peft": "LoRA",
            "peft.dim": 16,
            "peft.alpha": 32,
            "peft.dropout": 0.0,
            "peft.target_modules": ALL,
        },
    ),
    "dora": (
        {
            "stage": "sft",
            "recipe": {
                "peft": {
                    "method": "dora",
                    "rank": 4,
                    "alpha": 8,
                    "dropout": 0.1,
                    "target_modules": ["linear_qkv"],
                }
            },
        },
        {
            "peft": "DoRA",
            "peft.dim": 4,
            "peft.alpha": 8,
            "peft.dropout": 0.1,
            "peft.target_modules": ["linear_qkv"],
        },
    ),
}
NO_SETTING = "the installed Megatron-Bridge has no such setting"
REFUSED: dict[str, tuple[dict[str, Any], str, str]] = {
    "an unknown field": (
        {"recipe": {"overrides": {"model.no_such": 1}}},
        "overrides model.no_such",
        NO_SETTING,
    ),
    "an unknown section": (
        {"recipe": {"overrides": {"nothing.no_such": 1}}},
        "overrides nothing.no_such",
        NO_SETTING,
    ),
    "a section that is not there": (
        {"recipe": {"overrides": {"peft.dropout_position": "post"}}},
        "overrides peft.dropout_position",
        NO_SETTING,
    ),
    "an unknown recipe": (
        {"recipe": {"recipe": "qwen3_600m_pretrain_confg"}},
        "recipe qwen3_600m_pretrain_confg",
        "no such recipe",
    ),
    "a recipe that fine-tunes": (
        {"recipe": {"recipe": "qwen3_600m_sft_config"}},
        "recipe",
        "is not one that pretrains",
    ),
    "no mapping": ({"model": "gpt2"}, "MODEL/config.json", "cannot map it"),
    "no architecture": ({"model": "none"}, "MODEL/config.json", "cannot map it"),
}


def named(value: Any, **folders: str) -> Any:
    """A value with the folders in it."""
    text = json.dumps(value)
    for name, path in folders.items():
        text = text.replace(name.upper(), path)
    return json.loads(text)


@pytest.fixture(scope="session")
def configs(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What Bridge is told in all cases, and the folder where it was asked."""
    folder = tmp_path_factory.mktemp("configs")
    for name, kind in (("gpt2", "GPT2LMHeadModel"), ("none", "NoSuchModel")):
        (folder / name).mkdir()
        config = {"model_type": name, "architectures": [kind], "vocab_size": 512}
        (folder / name / "config.json").write_text(json.dumps(config))
    asked = {}
    every: dict[str, Any] = {**CASES, **REFUSED}
    for name, (case, *wanted) in every.items():
        stage, model = case.get("stage", "pretrain"), case.get("model", "qwen3_small")
        given = PRETRAIN if stage == "pretrain" else SFT
        there = MODELS / model
        default = "--micro-batch-size 4" if stage == "pretrain" else ""
        flags = case.get("flags", default)
        fields = wanted[0] if isinstance(wanted[0], dict) else {}
        asked[name] = {
            "stage": stage,
            "recipe": given | case.get("recipe", {}),
            "flags": [*flags.split(), "--save-steps", "30"],
            "model": str(there if there.exists() else folder / model),
            "inputs": str(inputs),
            "work": str(folder / "work"),
            "fields": [key for key in fields if key != "default_folders"],
        }
    return {
        "folder": folder,
        "asked": asked,
        "found": answer("configs", asked, folder),
    }


@pytest.mark.parametrize("name", CASES)
def test_bridge_is_told_what_the_node_says(
    configs: dict[str, Any], inputs: Path, name: str
):
    asked, found = configs["asked"][name], configs["found"][name]
    wanted = named(
        CASES[name][1], inputs=str(inputs), work=asked["work"], model=asked["model"]
    )
    assert {key: found.get(key, "missing") for key in wanted} == wanted, found


@pytest.mark.parametrize("name", REFUSED)
def test_what_bridge_has_not_is_refused_by_name(configs: dict[str, Any], name: str):
    _, where, said = REFUSED[name]
    kind, found_where, what, hint = configs["found"][name]["error"]
    assert kind == "RecipeError" and said in what and hint
    assert found_where == named(where, model=configs["asked"][name]["model"])


def test_settings_are_made_without_writing_anything(configs: dict[str, Any]):
    there = sorted(path.name for path in configs["folder"].iterdir())
    assert there == ["asked.json", "found.json", "gpt2", "none"]


# ---- models there and back -------------------------------------------------------

PUBLISHED = [
    ("hybrid4b_small", "full"),
    ("nano3_small", "full"),
    ("qwen3_small", "full"),
    ("hybrid4b_small", "lora"),
    ("hybrid4b_small", "dora"),
    ("qwen3_small", "dora"),
]
LOST = "backbone.layers.0.mixer.in_proj.weight"


@pytest.fixture(scope="session")
def parents(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models at random, as this Transformers writes them."""
    from transformers import AutoConfig, AutoModelForCausalLM

    folder = tmp_path_factory.mktemp("parents")
    for name in {name for name, _ in PUBLISHED}:
        torch.manual_seed(0)
        config = AutoConfig.from_pretrained(MODELS / name)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        model.save_pretrained(folder / name)
    whole = load_file(folder / "hybrid4b_small/model.safetensors")
    spoilt = {
        "missing": {name: whole[name] for name in whole if name != LOST},
        "renamed": {
            name.replace(".embeddings.", ".embedding."): whole[name] for name in whole
        },
    }
    for name, tensors in spoilt.items():
        (folder / name).mkdir()
        shutil.copy(MODELS / "hybrid4b_small/config.json", folder / name)
        save_file(tensors, folder / name / "model.safetensors", {"format": "pt"})
    return folder


@pytest.fixture(scope="session")
def published(
    inputs: Path, parents: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, Any]]:
    """A folder with what Megatron made of the parents, and what was said."""
    folder = tmp_path_factory.mktemp("published")
    asked = {
        "tokenizer": str(inputs / "tokenizer"),
        "published": {
            f"{model}-{method}": {"parent": str(parents / model), "method": method}
            for model, method in PUBLISHED
        },
        "refused": {
            "good": str(parents / "hybrid4b_small"),
            "spoilt": {name: str(parents / name) for name in ("missing", "renamed")},
        },
    }
    return folder, answer("conversions", asked, folder)


@pytest.mark.parametrize(("model", "method"), PUBLISHED)
def test_disk_and_round_trip_are_identical(
    published: tuple[Path, dict[str, Any]], model: str, method: str
):
    folder, found = published
    case = found[f"{model}-{method}"]
    assert (case["start"], case["publish"]) == ("", "")
    out = folder / f"{model}-{method}/out"
    parity = json.loads((out / "parity.json").read_text())
    assert parity["differs_on_disk"] == parity["differs_after_round_trip"] == []
    assert parity["tensors"] == len(load_file(out / "model.safetensors"))
    assert (out / "adapter").exists() == (method != "full")


@pytest.mark.parametrize("model", [m for m, method in PUBLISHED if method == "full"])
def test_a_model_comes_back_bit_for_bit(
    parents: Path, published: tuple[Path, dict[str, Any]], model: str
):
    ours = load_file(published[0] / f"{model}-full/out/model.safetensors")
    theirs = load_file(parents / model / "model.safetensors")
    if model == "qwen3_small":  # Bridge writes tied embeddings under both names
        theirs["lm_head.weight"] = theirs["model.embed_tokens.weight"]
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert tensor.dtype == ours[name].dtype == torch.bfloat16
        assert tensor.shape == ours[name].shape
        bits = [each.view(torch.int16) for each in (tensor, ours[name])]
        assert torch.equal(*bits), name


@pytest.mark.parametrize(
    ("model", "method"), [case for case in PUBLISHED if case[1] != "full"]
)
def test_the_merged_model_is_pefts_adapter_on_the_base(
    parents: Path, published: tuple[Path, dict[str, Any]], model: str, method: str
):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    def load(folder: Path) -> Any:
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    out, words = published[0] / f"{model}-{method}/out", torch.arange(3, 43)[None]
    with torch.no_grad():
        plain = load(parents / model)(words).logits
        merged = load(out)(words).logits
        adapted = PeftModel.from_pretrained(load(parents / model), out / "adapter")
        difference = float((merged - adapted(words).logits).abs().max())
    settings = json.loads((out / "adapter/adapter_config.json").read_text())
    assert settings["use_dora"] == (method == "dora")
    change = float((merged - plain).abs().max())
    assert change > 0.5, "the adapter does something"
    assert difference < 0.02 * change


def test_newer_names_of_layers_are_put_in_the_older_form(
    parents: Path, published: tuple[Path, dict[str, Any]]
):
    folder, found = published
    newer = json.loads((parents / "nano3_small/config.json").read_text())
    assert newer["layers_block_type"][0] == "linear_attention"
    copy = folder / found["nano3_small-full"]["read"]
    assert copy == folder / "nano3_small-full/parent"
    older = json.loads((copy / "config.json").read_text())
    kept = {key: newer[key] for key in newer if "layers_block_type" not in key}
    layers = {"hybrid_override_pattern": "MEM*EM", "num_hidden_layers": 6}
    assert older == kept | layers
    weights = copy / "model.safetensors"
    assert weights.resolve() == parents / "nano3_small/model.safetensors"
    assert found["qwen3_small-full"]["read"] == str(parents / "qwen3_small")


@pytest.mark.parametrize(
    ("name", "named"),
    [("missing", LOST), ("renamed", "backbone.embedding.weight")],
)
def test_a_parent_that_was_not_read_whole_is_refused(
    parents: Path, published: tuple[Path, dict[str, Any]], name: str, named: str
):
    said = published[1]["refusals"][name]
    assert f"{parents / name}: {named}" in said
    assert "not what Megatron has read" in said


def test_one_bit_of_a_weight_of_megatron_is_seen(
    published: tuple[Path, dict[str, Any]],
):
    found = published[1]["refusals"]
    assert found["same"] == []
    assert found["bit"] == ["backbone.embeddings.weight"]


# ---- refused before anything slow ------------------------------------------------


@pytest.fixture(scope="session")
def stages(
    inputs: Path, parents: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, list[str | Path]]]:
    """A folder with a lock of the versions that are here; each stage's flags."""
    folder = tmp_path_factory.mktemp("stages")
    (folder / "envs").mkdir()
    shutil.copy(ROOT / "envs/nvidia.lock", folder / "envs")
    wrote = run("scripts.nvidia.versions", "envs/nvidia.lock", "--write", cwd=folder)
    assert wrote.returncode == 0, wrote.stderr
    recipes = {"pretrain": PRETRAIN, "sft": SFT, "export": {}}
    parent = ["--parent", parents / "qwen3_small"]
    flags: dict[str, list[str | Path]] = {
        "pretrain": [
            *("--model", MODELS / "tiny", "--tokenizer", inputs / "tokenizer"),
            *("--data", inputs / "blend"),
        ],
        "sft": [*parent, "--packed", inputs / "packed"],
        "export": parent,
    }
    for name, recipe in recipes.items():
        file = folder / f"{name}.yaml"
        file.write_text(json.dumps(recipe))
        flags[name] += ["--recipe", file, "--out", folder / name]
    return folder, flags


@pytest.mark.parametrize("stage", ["pretrain", "sft", "export"])
def test_without_a_gpu_a_stage_says_so(stages: tuple[Path, Any], stage: str):
    folder, flags = stages
    ran = run(
        f"scripts.nvidia.{stage}", *flags[stage], cwd=folder, CUDA_VISIBLE_DEVICES=""
    )
    assert ran.returncode == 1
    host = os.uname().nodename
    assert f"error: engine nvidia on {host}: no GPU is seen" in ran.stderr
    assert "Traceback" not in ran.stderr
    assert list((folder / stage).iterdir()) == []


def test_another_version_than_the_locks_is_named(
    stages: tuple[Path, Any], tmp_path: Path
):
    folder, flags = stages
    shutil.copytree(folder / "envs", tmp_path / "envs")
    lock = tmp_path / "envs/nvidia.lock"
    lines = lock.read_text().splitlines(keepends=True)
    (old,) = [line for line in lines if line.startswith("megatron-core==")]
    lock.write_text("".join(lines).replace(old, "megatron-core==0.1\n"))
    ran = run("scripts.nvidia.pretrain", *flags["pretrain"], cwd=tmp_path)
    assert ran.returncode == 1
    assert "error: envs/nvidia.lock: this environment has other versions" in ran.stderr
    here = old.strip().partition("==")[2]
    assert f"megatron-core: {here}; envs/nvidia.lock pins 0.1" in ran.stderr
    assert "no GPU" not in ran.stderr
