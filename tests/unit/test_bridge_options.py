"""What Megatron-Bridge would refuse on the GPUs is refused in the plan, by name."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from scripts.lib import bridge_options
from scripts.lib.bridge_options import (
    check_architecture,
    check_overrides,
    check_recipe,
    options,
)

ROOT = Path(__file__).parents[2]
NVIDIA = os.environ.get("NVIDIA_PYTHON", str(ROOT / ".venv-nvidia/bin/python"))


def wrong(key: str, value: Any = 1) -> tuple[str, str]:
    found = check_overrides({key: value})
    assert len(found) == 1 and found[0][0] == key, found
    return found[0][1:]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("model.recompute_granularity", "selective"),
        ("model.recompute_granularity", None),
        ("model.recompute_modules", ["moe", "layernorm"]),
        ("model.attention_backend", "unfused"),
        ("model.moe_aux_loss_coeff", 0.001),
        ("optimizer.min_lr", 1.0e-5),
        ("optimizer.min_lr", 0),
        ("ddp.overlap_grad_reduce", True),
        ("mixed_precision.grad_reduce_in_fp32", False),
        ("comm_overlap.tp_comm_overlap", True),
        ("profiling.profile_ranks", [0]),
        ("model.pipeline_model_parallel_layout", "Et*3|t*3L"),
        ("model.init_method", "unclear types pass"),
    ],
)
def test_a_setting_of_bridge_can_be_overridden(key: str, value: Any):
    assert check_overrides({key: value}) == []


def test_every_mistake_is_named_in_order():
    found = check_overrides({"ddp.x": 1, "rng.te_rng_tracker": True, "nothing": 2})
    assert [key for key, _, _ in found] == ["ddp.x", "nothing"]


@pytest.mark.parametrize("key", ["model", "recompute", "", ".", "model.", ".model"])
def test_a_key_without_a_section_is_refused(key: str):
    what, hint = wrong(key)
    assert what == "not `section.key`" and "model.recompute_granularity" in hint


def test_an_unknown_section_gets_the_nearest_as_a_hint():
    what, hint = wrong("modle.recompute_granularity", "full")
    assert "has no section modle" in what and "did you mean `model`?" in hint


def test_an_unknown_field_gets_the_nearest_as_a_hint():
    what, hint = wrong("model.recompute_granularty", "full")
    assert what.endswith("has no model.recompute_granularty")
    assert what.startswith("Megatron-Bridge 0.")
    assert hint == "did you mean `recompute_granularity`?"


def test_a_field_near_to_none_gets_the_list_and_not_four_hundred_names():
    _, hint = wrong("model.zzzzzzzzz")
    assert hint == "see model in envs/nvidia-options.json"


@pytest.mark.parametrize(
    ("key", "value", "what", "hint"),
    [
        ("ddp.overlap_grad_reduce", "yes", "'yes' is not bool", "give bool"),
        ("ddp.overlap_grad_reduce", 1, "1 is not bool", "give bool"),
        ("train.manual_gc_interval", 1.5, "1.5 is not int", "give int"),
        ("train.manual_gc_interval", True, "True is not int", "give int"),
        ("optimizer.adam_beta2", "high", "'high' is not float", "give float"),
        ("optimizer.min_lr", "1e-5", "'1e-5' is not", "1.0e-5"),
        ("model.attention_backend", "flsh", "'flsh' is not", "flash"),
        ("checkpoint.dist_ckpt_strictness", "zarr", "'zarr' is not", "raise_all"),
        ("profiling.profile_ranks", 0, "0 is not list[int]", "give list"),
        ("ddp.overlap_grad_reduce", None, "None is not bool", "give bool"),
    ],
)
def test_a_value_of_the_wrong_kind_is_refused(
    key: str, value: Any, what: str, hint: str
):
    found = wrong(key, value)
    assert what in found[0] and hint in found[1]


@pytest.mark.parametrize(
    ("key", "hint"),
    [
        ("train.train_iters", "`steps`"),
        ("train.global_batch_size", "`batch_size`"),
        ("train.micro_batch_size", "`micro_batch_size` in `placement:`"),
        ("train.exit_signal_handler", "the build decides"),
        ("model.seq_length", "`sequence_length`"),
        ("dataset.seq_length", "`sequence_length`"),
        ("model.tensor_model_parallel_size", "`tensor_parallel`"),
        ("model.pipeline_model_parallel_size", "`pipeline_parallel`"),
        ("model.virtual_pipeline_model_parallel_size", "`virtual_pipeline`"),
        ("model.context_parallel_size", "`context_parallel`"),
        ("model.expert_model_parallel_size", "`expert_parallel`"),
        ("model.expert_tensor_parallel_size", "`expert_tensor_parallel`"),
        ("model.sequence_parallel", "`sequence_parallel`"),
        ("ddp.use_distributed_optimizer", "`distributed_optimizer`"),
        ("optimizer.use_distributed_optimizer", "`distributed_optimizer`"),
        ("optimizer.lr", "`lr`"),
        ("optimizer.weight_decay", "`weight_decay`"),
        ("optimizer.clip_grad", "`max_grad_norm`"),
        ("scheduler.lr_warmup_iters", "`warmup_steps`"),
        ("scheduler.lr_decay_style", "`lr_scheduler`"),
        ("rng.seed", "`seed`"),
        ("dataset.random_seed", "`seed`"),
        ("dataset.seed", "`seed`"),
        ("checkpoint.load", "the build decides"),
        ("checkpoint.save", "the build decides"),
        ("checkpoint.save_interval", "the build decides"),
        ("checkpoint.async_save", "the build decides"),
        ("checkpoint.finetune", "the build decides"),
        ("checkpoint.ckpt_step", "the build decides"),
        ("checkpoint.pretrained_checkpoint", "`from`"),
        ("checkpoint.non_persistent_ckpt_type", "the build decides"),
        ("dataset.blend", "`data`"),
        ("dataset.blend_per_split", "`data`"),
        ("dataset.dataset_root", "`data`"),
        ("dataset.hf_dataset", "`data`"),
        ("dataset.path_to_cache", "the build decides"),
        ("dataset.offline_packing_specs", "packs"),
        ("tokenizer.tokenizer_model", "tokenizer"),
        ("logger.tensorboard_dir", "the build decides"),
        ("model.vocab_size", "config.json"),
        ("model.num_layers", "config.json"),
        ("model.fp8", "`precision`"),
        ("mixed_precision", "`precision`"),
        ("mixed_precision.fp8_recipe", "`precision`"),
        ("peft.dim", "`peft.rank`"),
    ],
)
def test_what_the_build_sets_is_refused_with_the_key_that_sets_it(key: str, hint: str):
    assert hint in wrong(key)[1]


def test_each_key_that_the_build_sets_is_one_of_bridge():
    known = {f"{s}.{f}" for s, fields in options()["sections"].items() for f in fields}
    for pattern, _ in bridge_options.OWNED:
        assert any(bridge_options.fnmatchcase(key, pattern) for key in known), pattern
    assert {f"model.{f}" for f in bridge_options.SHAPE} <= known


def test_a_recipe_is_known_by_its_full_name_and_by_its_alias():
    assert check_recipe("nemotron_3_nano_pretrain_config") is None
    assert check_recipe("nemotron_3_nano_pretrain_8gpu_h100_bf16_config") is None
    found = check_recipe("nemotron_3_nano_pretrain")
    assert found is not None
    assert "has no recipe nemotron_3_nano_pretrain" in found[0]
    assert "nemotron_3_nano_pretrain_config" in found[1]


def test_recipes_for_images_or_sound_are_not_offered():
    assert not [n for n in options()["recipes"] if "_vl_" in n or "audio" in n]


def test_an_architecture_without_a_mapping_is_refused_with_near_ones():
    assert check_architecture({"architectures": ["NemotronHForCausalLM"]}) is None
    found = check_architecture({"architectures": ["Qwen3ForCausal"]})
    assert found is not None
    assert "has no mapping for Qwen3ForCausal" in found[0]
    assert "Qwen3ForCausalLM" in found[1]
    for config in ({}, {"architectures": []}, {"architectures": None}):
        found = check_architecture(config)
        assert found is not None and "names no architecture" in found[0]


def test_the_names_are_those_of_the_bridge_that_the_lock_pins():
    text = (ROOT / "envs/nvidia.lock").read_text()
    for name, version in options()["versions"].items():
        assert f"\n{name}=={version}\n" in text


@pytest.mark.skipif(
    not Path(NVIDIA).exists(), reason=f"no {NVIDIA}: no Megatron-Bridge"
)
def test_the_committed_names_are_what_bridge_says(tmp_path: Path):
    made = tmp_path / "options.json"
    subprocess.run(
        [NVIDIA, "-m", "scripts.nvidia.options", str(made)],
        cwd=ROOT,
        check=True,
        capture_output=True,
    )
    assert made.read_bytes() == bridge_options.OPTIONS.read_bytes()
