"""What NeMo-RL would swallow in silence is refused in the plan, by name."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from scripts.lib import rl_options
from scripts.lib.rl_options import check_overrides, covers, options

ROOT = Path(__file__).parents[2]
NEMO_RL = os.environ.get("NEMO_RL_PYTHON", "")


def wrong(key: str, value: Any = 1, algorithm: str = "grpo") -> tuple[str, str]:
    found = check_overrides(algorithm, {key: value})
    assert len(found) == 1 and found[0][0] == key, found
    return found[0][1:]


@pytest.mark.parametrize(
    ("algorithm", "key", "value"),
    [
        ("grpo", "grpo.use_dynamic_sampling", True),
        ("grpo", "grpo.batch_multiplier", 3),
        ("grpo", "grpo.adv_estimator.name", "reinforce_plus_plus"),
        ("grpo", "grpo.overlong_filtering", True),
        ("grpo", "grpo.advantage_clip_low", None),
        ("grpo", "loss_fn.ratio_clip_max", 0.28),
        ("grpo", "loss_fn.ratio_clip_c", 10),
        ("grpo", "policy.generation.top_p", 0.95),
        ("grpo", "policy.generation.stop_strings", ["</answer>"]),
        ("grpo", "policy.generation.vllm_cfg.enable_prefix_caching", False),
        ("grpo", "policy.generation.vllm_cfg.kv_cache_dtype", "fp8"),
        ("grpo", "policy.megatron_cfg.optimizer.min_lr", 1.0e-7),
        ("grpo", "policy.megatron_cfg.recompute_granularity", "selective"),
        ("grpo", "policy.megatron_cfg.recompute_modules", ["moe"]),
        ("grpo", "policy.optimizer.name", "torch.optim.Adam"),
        ("grpo", "policy.optimizer.kwargs.eps", 1.0e-6),
        ("grpo", "policy.sequence_packing.enabled", False),
        ("grpo", "policy.megatron_cfg.fp8_cfg.enabled", True),
        ("grpo", "data.shuffle", False),
        ("grpo", "data.num_workers", 4),
        ("grpo", "logger.wandb_enabled", True),
        ("grpo", "logger.wandb.project", "mine"),
        ("grpo", "logger.mlflow_enabled", True),
        ("grpo", "logger.tensorboard_enabled", True),
        ("dpo", "dpo.sft_loss_weight", 0.1),
        ("dpo", "dpo.preference_average_log_probs", True),
        ("dpo", "policy.precision", "float32"),
        ("rm", "policy.dtensor_cfg.activation_checkpointing", True),
        ("rm", "policy.optimizer.kwargs.betas", [0.9, 0.95]),
    ],
)
def test_a_setting_of_nemo_rl_can_be_overridden(algorithm: str, key: str, value: Any):
    assert check_overrides(algorithm, {key: value}) == []


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("policy.generation.vllm_kwargs.max_num_seqs", 64),
        ("policy.generation.vllm_kwargs.compilation_config.backend", "eager"),
        ("policy.generation.vllm_kwargs", {"compilation_config": {"level": 3}}),
        ("policy.generation.vllm_kwargs", {}),
        ("policy.dtensor_cfg.automodel_kwargs.anything", "new"),
        ("policy.dtensor_cfg.automodel_kwargs.backend.attn", "te"),
        ("policy.hf_config_overrides.rope_scaling.factor", 2.0),
        ("policy.hf_config_overrides", {"rope_scaling": {"rope_type": "yarn"}}),
        ("policy.optimizer.kwargs.amsgrad", True),
    ],
)
def test_what_nemo_rl_passes_on_is_open(key: str, value: Any):
    assert check_overrides("grpo", {key: value}) == []


def test_every_mistake_is_named_in_order():
    given = {"policy.x": 1, "loss_fn.use_cispo": True, "nothing": 2}
    found = check_overrides("grpo", given)
    assert [key for key, _, _ in found] == ["policy.x", "nothing"]


@pytest.mark.parametrize("key", ["recompute", "", ".", "policy.", ".policy", "a b.c"])
def test_a_key_without_a_section_is_refused(key: str):
    what, hint = wrong(key)
    assert what == "not `section.key`" and "policy.precision" in hint


@pytest.mark.parametrize(
    ("algorithm", "key", "what", "hint"),
    [
        ("grpo", "polcy.precision", "has no section polcy", "did you mean `policy`?"),
        ("dpo", "grpo.normalize_rewards", "no section grpo for dpo", "there are:"),
        ("rm", "loss_fn.use_cispo", "no section loss_fn for rm", "there are:"),
        (
            "grpo",
            "policy.megatron_cfg.recompute_granularty",
            "NeMo-RL 0.7.0 has no policy.megatron_cfg.recompute_granularty",
            "did you mean `recompute_granularity`?",
        ),
        (
            "grpo",
            "policy.megatron.recompute_granularity",
            "has no policy.megatron.recompute_granularity",
            "did you mean `megatron_cfg`?",
        ),
        (
            "grpo",
            "policy.top_p",
            "has no policy.top_p",
            "did you mean `policy.generation.top_p`?",
        ),
        (
            "grpo",
            "policy.zzzzzzz",
            "has no policy.zzzzzzz",
            "see policy in envs/nemo-rl-options.json",
        ),
        ("grpo", "policy.precision.x", "has no policy.precision.x", "`precision`"),
        ("dpo", "policy.generation.top_p", "has no policy.generation.top_p", ""),
    ],
)
def test_an_unknown_key_gets_the_nearest_as_a_hint(
    algorithm: str, key: str, what: str, hint: str
):
    found = wrong(key, algorithm=algorithm)
    assert what in found[0] and hint in found[1], found


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("policy.megatron_cfg", {"enabled": True}),
        ("policy.megatron_cfg.optimizer", {"lr": 1.0}),
        ("policy.optimizer.kwargs", {"eps": 1.0e-6}),
        ("policy.dtensor_cfg.automodel_kwargs", {"force_hf": True}),
        ("grpo", 3),
    ],
)
def test_no_section_hides_what_the_build_sets(key: str, value: Any):
    found = wrong(key, value)
    assert found[0] in {"a section", "the build sets it"}


def test_a_key_and_its_part_are_not_given_both():
    kwargs = "policy.generation.vllm_kwargs"
    found = check_overrides("grpo", {kwargs: {}, f"{kwargs}.max_num_seqs": 8})
    assert found == [
        (kwargs, f"holds {kwargs}.max_num_seqs, which is given too", "keep one of them")
    ]


@pytest.mark.parametrize(
    ("key", "value", "what", "hint"),
    [
        ("grpo.use_dynamic_sampling", "yes", "'yes' is not bool", "give bool"),
        ("grpo.use_dynamic_sampling", 1, "1 is not bool", "give bool"),
        ("grpo.dynamic_sampling_max_gen_batches", 1.5, "1.5 is not int", "give int"),
        ("grpo.dynamic_sampling_max_gen_batches", True, "True is not int", "give int"),
        ("loss_fn.ratio_clip_max", None, "None is not float", "give float"),
        ("loss_fn.ratio_clip_c", "high", "'high' is not float", "one of: float, null"),
        ("policy.megatron_cfg.optimizer.min_lr", "1e-7", "'1e-7' is not", "1.0e-7"),
        ("policy.generation.vllm_cfg.kv_cache_dtype", "fp4", "'fp4' is not", "fp8"),
        ("policy.generation.stop_strings", "a", "'a' is not list[str]", "list"),
        ("policy.hf_config_overrides", 3, "3 is not dict", "give dict"),
        ("policy.precision", {"a": 1}, "is not str", "give str"),
    ],
)
def test_a_value_of_the_wrong_kind_is_refused(
    key: str, value: Any, what: str, hint: str
):
    found = wrong(key, value)
    assert what in found[0] and hint in found[1], found


@pytest.mark.parametrize(
    ("algorithm", "key", "hint"),
    [
        ("grpo", "grpo.num_prompts_per_step", "`batch_size` and `num_generations`"),
        ("grpo", "grpo.num_generations_per_prompt", "`num_generations`"),
        ("grpo", "grpo.max_num_steps", "`steps`"),
        ("dpo", "dpo.max_num_steps", "`steps`"),
        ("rm", "rm.max_num_steps", "`steps`"),
        ("grpo", "grpo.max_num_epochs", "`steps`"),
        ("grpo", "grpo.seed", "`seed`"),
        ("dpo", "dpo.seed", "`seed`"),
        ("rm", "rm.seed", "`seed`"),
        ("grpo", "grpo.max_rollout_turns", "`max_turns`"),
        ("grpo", "loss_fn.reference_policy_kl_penalty", "`beta`"),
        ("dpo", "dpo.reference_policy_kl_penalty", "`beta`"),
        ("grpo", "policy.model_name", "`from`"),
        ("grpo", "policy.tokenizer", "`from`"),
        ("grpo", "policy.tokenizer.chat_template", "`from`"),
        ("rm", "policy.reward_model_cfg.enabled", "an rm node"),
        ("grpo", "policy.train_global_batch_size", "`batch_size`"),
        ("grpo", "policy.train_micro_batch_size", "`micro_batch_size` in `placement:`"),
        ("grpo", "policy.logprob_batch_size", "`micro_batch_size` in `placement:`"),
        ("grpo", "policy.max_total_sequence_length", "`max_prompt_tokens`"),
        ("dpo", "policy.max_total_sequence_length", "`max_tokens`"),
        ("grpo", "policy.generation.max_new_tokens", "`max_completion_tokens`"),
        ("grpo", "policy.generation.temperature", "`temperature`"),
        ("grpo", "policy.generation.colocated.enabled", "`generation_gpus`"),
        ("grpo", "policy.generation.colocated.resources.num_nodes", "generation_gpus"),
        (
            "grpo",
            "policy.generation.vllm_cfg.tensor_parallel_size",
            "`generation_tensor_parallel` in `placement:`",
        ),
        ("grpo", "policy.megatron_cfg.enabled", "`backend` in `placement:`"),
        ("grpo", "policy.dtensor_cfg.enabled", "`backend` in `placement:`"),
        ("dpo", "policy.dtensor_cfg._v2", "`backend` in `placement:`"),
        ("grpo", "policy.optimizer", "`backend` in `placement:`"),
        ("grpo", "policy.megatron_cfg.tensor_model_parallel_size", "`tensor_parallel`"),
        (
            "grpo",
            "policy.megatron_cfg.pipeline_model_parallel_size",
            "`pipeline_parallel`",
        ),
        ("grpo", "policy.megatron_cfg.context_parallel_size", "`context_parallel`"),
        ("grpo", "policy.megatron_cfg.expert_model_parallel_size", "`expert_parallel`"),
        (
            "grpo",
            "policy.megatron_cfg.expert_tensor_parallel_size",
            "`expert_tensor_parallel`",
        ),
        ("grpo", "policy.dtensor_cfg.tensor_parallel_size", "`tensor_parallel`"),
        ("grpo", "policy.dtensor_cfg.context_parallel_size", "`context_parallel`"),
        ("grpo", "policy.dtensor_cfg.expert_parallel_size", "`expert_parallel`"),
        ("grpo", "policy.megatron_cfg.sequence_parallel", "`sequence_parallel`"),
        ("rm", "policy.dtensor_cfg.sequence_parallel", "`sequence_parallel`"),
        ("grpo", "policy.megatron_cfg.optimizer.lr", "`lr`"),
        ("grpo", "policy.optimizer.kwargs.lr", "`lr`"),
        ("grpo", "policy.megatron_cfg.optimizer.weight_decay", "`weight_decay`"),
        ("grpo", "policy.optimizer.kwargs.weight_decay", "`weight_decay`"),
        ("grpo", "policy.megatron_cfg.scheduler.end_weight_decay", "`weight_decay`"),
        ("grpo", "policy.megatron_cfg.optimizer.clip_grad", "`max_grad_norm`"),
        ("grpo", "policy.max_grad_norm", "`max_grad_norm`"),
        ("grpo", "policy.megatron_cfg.scheduler.lr_warmup_iters", "`warmup_steps`"),
        ("grpo", "policy.megatron_cfg.scheduler.lr_decay_style", "`lr_scheduler`"),
        ("grpo", "policy.megatron_cfg.scheduler.lr_decay_iters", "`lr_scheduler`"),
        ("grpo", "policy.scheduler", "`lr_scheduler`"),
        ("grpo", "policy.megatron_cfg.fp8_cfg.fp8_param", "bfloat16"),
        (
            "grpo",
            "policy.generation.vllm_cfg.gpu_memory_utilization",
            "`generation_memory`",
        ),
        (
            "grpo",
            "policy.generation.vllm_kwargs.gpu_memory_utilization",
            "`generation_memory`",
        ),
        (
            "grpo",
            "policy.megatron_cfg.optimizer.use_distributed_optimizer",
            "`distributed_optimizer`",
        ),
        ("grpo", "policy.make_sequence_length_divisible_by", "`placement:`"),
        ("grpo", "checkpointing", "the build decides"),
        ("grpo", "checkpointing.save_period", "the build decides"),
        ("grpo", "cluster.gpus_per_node", "`placement:`"),
        ("grpo", "data.train.data_path", "prompts or preferences"),
        ("grpo", "data.custom_dataloader", "prompts or preferences"),
        ("grpo", "env", "`environment` of the node"),
        ("grpo", "env.math.num_workers", "`environment` of the node"),
        ("grpo", "env.code.num_workers", "`environment` of the node"),
        ("grpo", "logger.log_dir", "the build decides"),
        ("grpo", "logger.monitor_gpus", "the build decides"),
        ("grpo", "logger.tensorboard.log_dir", "the build decides"),
        ("grpo", "policy.megatron_cfg.env_vars.LD_PRELOAD", "container"),
        ("grpo", "policy.generation.vllm_kwargs.seed", "itself"),
        ("grpo", "policy.generation.vllm_kwargs.enforce_eager", "vllm_cfg"),
    ],
)
def test_what_the_build_sets_is_refused_with_the_key_that_sets_it(
    algorithm: str, key: str, hint: str
):
    found = wrong(key, algorithm=algorithm)
    assert found[0] == "the build sets it" and hint in found[1], found


def test_what_the_build_sets_is_found_inside_of_a_mapping():
    what, hint = wrong("policy.generation.vllm_kwargs", {"max_model_len": 9})
    assert what == "the build sets it" and "max_completion_tokens" in hint


@pytest.mark.parametrize(
    ("key", "what"),
    [
        ("data_plane", "data plane"),
        ("data_plane.enabled", "data plane"),
        ("grpo.async_grpo.enabled", "asynchronous"),
        ("on_policy_distillation", "distillation"),
        ("on_policy_distillation.enabled", "distillation"),
        ("grpo.val_period", "`eval:` node"),
        ("policy.draft.enabled", "draft"),
        ("policy.megatron_cfg.peft.dim", "adapter"),
        ("policy.quant_cfg", "quantization"),
        ("policy.generation.backend", "vLLM"),
        ("policy.generation.vllm_cfg.tool_parser_plugin", "names"),
    ],
)
def test_what_leaves_the_ground_of_the_build_is_refused_by_name(key: str, what: str):
    found = wrong(key)
    if what == "names":
        assert "would name code to run" in found[0]
    else:
        assert found[0].startswith("not supported by this build: ")
        assert what in found[0] and found[1] == "remove it"


@pytest.mark.parametrize("algorithm", ["dpo", "rm"])
def test_pairs_are_not_packed(algorithm: str):
    what, _ = wrong("policy.sequence_packing.enabled", True, algorithm)
    assert what.endswith(f"neither packs nor sorts the pairs of {algorithm}")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("policy.dtensor_cfg.automodel_kwargs.backend._target_", "os.system"),
        ("policy.generation.vllm_kwargs.x._args_", ["rm"]),
        ("policy.generation.vllm_kwargs", {"a": [{"_target_": "os.system"}]}),
        ("policy.hf_config_overrides.auto_map", {"AutoModel": "bad/repo--m.M"}),
        ("policy.hf_config_overrides", {"text_config": {"auto_map": {}}}),
        ("policy.generation.vllm_kwargs.worker_extension_cls", "bad.Class"),
        ("policy.generation.vllm_kwargs.logits_processors", ["bad:Class"]),
        ("policy.generation.vllm_kwargs.compilation_config.backend", "bad.run"),
        ("policy.generation.vllm_kwargs", {"compilation_config": {"backend": "b.r"}}),
        ("policy.optimizer.name", "subprocess.Popen"),
    ],
)
def test_a_config_cannot_name_code_to_run(key: str, value: Any):
    assert "would name code to run" in wrong(key, value)[0]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("policy.precision", "${oc.env:HF_TOKEN}"),
        ("policy.generation.stop_strings", ["a", "${policy.model_name}"]),
        ("policy.generation.vllm_kwargs", {"a": {"b": ["${oc.env:HF_TOKEN}"]}}),
        ("policy.generation.vllm_kwargs", {"${oc.env:HF_TOKEN}": 1}),
        ("logger.wandb.project", "${oc.env:HF_TOKEN}"),
    ],
)
def test_a_value_does_not_refer_to_others(key: str, value: Any):
    assert "`${`" in wrong(key, value)[0]


def test_each_key_that_is_refused_is_one_of_nemo_rl():
    known = {key for keys in options()["algorithms"].values() for key in keys}
    patterns = [pattern for pattern, _ in rl_options.OWNED + rl_options.UNSUPPORTED]
    patterns += [*rl_options.OPEN, *rl_options.OF_PAIRS]
    for pattern in patterns:
        assert any(covers(pattern, key) for key in known), pattern


def test_each_type_is_one_that_can_be_checked():
    plain = {*rl_options.BAR.split("Any | Callable"), "Literal", "Path", "None"}
    plain |= {"bool", "int", "float", "str", "list", "dict"}
    for keys in options()["algorithms"].values():
        for key, text in keys.items():
            names = {one.partition("[")[0] for one in rl_options.BAR.split(text)}
            assert names <= plain, (key, text)


@pytest.mark.skipif(
    not NEMO_RL,
    reason="NEMO_RL_PYTHON names no Python with NeMo-RL: "
    "envs/nemo-rl-options.json IS NOT COMPARED with NeMo-RL",
)
def test_the_committed_names_are_what_nemo_rl_says(tmp_path: Path):
    made = tmp_path / "options.json"
    done = subprocess.run(
        [NEMO_RL, "-m", "scripts.nvidia.rl_options", str(made)],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert made.read_bytes() == rl_options.OPTIONS.read_bytes()
