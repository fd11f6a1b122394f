"""What NeMo-RL can be told, checked where NeMo-RL is not installed.

NeMo-RL accepts an unknown key and does nothing with it, so here it is refused.
`envs/nemo-rl-options.json` holds the names and types of its settings; it is written
by `scripts.nvidia.rl_options` where NeMo-RL is installed. A config is not trusted:
settings that name code to import are refused, where they are known as such.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path
from typing import Any

from scripts.lib.bridge_options import BAR, DECIDED, PUBLISHED, mistyped
from scripts.lib.load import nearest

OPTIONS = Path(__file__).parents[2] / "envs" / "nemo-rl-options.json"

ITSELF = "NeMo-RL sets it itself"
OF_BACKEND = "set `backend` in `placement:`"
OF_DATA = "it follows from the node's `data`: a prompts or preferences node"
OF_KL = "set `beta` of the node"
OF_LENGTH = (
    "it follows from `max_completion_tokens`, `max_conversation_tokens` and the "
    "prompts' `max_prompt_tokens`; with pairs, from the preferences' `max_tokens`"
)
OF_MEMORY = "set `generation_memory` in `placement:`"
OF_PLACE = "it follows from `placement:`"
OF_ENVIRONMENT = "set `environment` of the container"
OF_SEQUENCE = "set `sequence_parallel` in `placement:`"

OPEN = (
    "data.shuffle",
    "data.num_workers",
    "logger.wandb_enabled",
    "logger.wandb.*",
    "logger.mlflow_enabled",
    "logger.mlflow.experiment_name",
    "logger.mlflow.run_name",
    "logger.mlflow.tracking_uri",
    "logger.tensorboard_enabled",
)
"""What may be set though a pattern of OWNED covers it."""

OWNED: tuple[tuple[str, str], ...] = (
    ("data.*", OF_DATA),
    ("env.*", "set `environment` of the node"),
    ("cluster.*", OF_PLACE),
    ("checkpointing.*", DECIDED),
    ("logger.*", DECIDED),
    ("grpo.num_prompts_per_step", "set `batch_size` and `num_generations` of the node"),
    ("grpo.num_generations_per_prompt", "set `num_generations` of the node"),
    ("*.max_num_steps", "set `steps` of the node"),
    ("*.max_num_epochs", "set `steps` of the node"),
    ("grpo.seed", "set `seed` of the node"),
    ("dpo.seed", "set `seed` of the node"),
    ("rm.seed", "set `seed` of the node"),
    ("grpo.max_rollout_turns", "set `max_turns` of the node"),
    ("grpo.skip_reference_policy_logprobs_calculation", OF_KL),
    ("loss_fn.reference_policy_kl_penalty", OF_KL),
    ("dpo.reference_policy_kl_penalty", OF_KL),
    ("policy.model_name", "set `from` of the node"),
    ("policy.generation.model_name", "set `from` of the node"),
    ("policy.pretrained_checkpoint.*", "set `from` of the node"),
    ("policy.tokenizer.*", "the tokenizer follows from the node's `from`"),
    ("policy.reward_model_cfg.*", "an rm node sets it"),
    ("policy.train_global_batch_size", "set `batch_size` of the node"),
    ("policy.train_micro_batch_size", "set `micro_batch_size` in `placement:`"),
    ("policy.logprob_batch_size", "set `micro_batch_size` in `placement:`"),
    ("policy.max_total_sequence_length", OF_LENGTH),
    ("policy.generation.vllm_cfg.max_model_len", OF_LENGTH),
    ("policy.generation.max_new_tokens", "set `max_completion_tokens` of the node"),
    ("policy.generation.temperature", "set `temperature` of the node"),
    ("policy.generation.colocated.*", "set `generation_gpus` in `placement:`"),
    (
        "policy.generation.vllm_cfg.*_parallel_size",
        "set `generation_tensor_parallel` in `placement:`",
    ),
    ("policy.generation.vllm_cfg.gpu_memory_utilization", OF_MEMORY),
    ("policy.generation.vllm_cfg.load_format", ITSELF),
    ("policy.generation.vllm_cfg.skip_tokenizer_init", ITSELF),
    ("policy.generation.port_range_*", DECIDED),
    ("policy.generation._*", ITSELF),
    ("policy.*.env_vars.*", OF_ENVIRONMENT),
    ("policy.dtensor_cfg.enabled", OF_BACKEND),
    ("policy.megatron_cfg.enabled", OF_BACKEND),
    ("policy.dtensor_cfg._v2", OF_BACKEND),
    ("policy.megatron_cfg.force_reconvert_from_hf", DECIDED),
    ("policy.megatron_cfg.*.use_custom_fsdp", DECIDED),
    (
        "policy.megatron_cfg.*.use_distributed_optimizer",
        "set `distributed_optimizer` in `placement:`",
    ),
    ("policy.make_sequence_length_divisible_by", OF_PLACE),
    ("policy.megatron_cfg.fp8_cfg.fp8_param", PUBLISHED),
    (
        "policy.megatron_cfg.tensor_model_parallel_size",
        "set `tensor_parallel` in `placement:`",
    ),
    (
        "policy.megatron_cfg.pipeline_model_parallel_size",
        "set `pipeline_parallel` in `placement:`",
    ),
    (
        "policy.megatron_cfg.expert_model_parallel_size",
        "set `expert_parallel` in `placement:`",
    ),
    (
        "policy.megatron_cfg.expert_tensor_parallel_size",
        "set `expert_tensor_parallel` in `placement:`",
    ),
    ("policy.*.context_parallel_size", "set `context_parallel` in `placement:`"),
    (
        "policy.dtensor_cfg.tensor_parallel_size",
        "set `tensor_parallel` in `placement:`",
    ),
    (
        "policy.dtensor_cfg.expert_parallel_size",
        "set `expert_parallel` in `placement:`",
    ),
    ("policy.*.sequence_parallel", OF_SEQUENCE),
    ("policy.max_grad_norm", "set `max_grad_norm` of the node"),
    ("policy.megatron_cfg.optimizer.clip_grad", "set `max_grad_norm` of the node"),
    ("policy.optimizer", OF_BACKEND),
    ("policy.*optimizer*.lr", "set `lr` of the node"),
    ("policy.*optimizer*.weight_decay", "set `weight_decay` of the node"),
    ("policy.megatron_cfg.scheduler.*weight_decay*", "set `weight_decay` of the node"),
    ("policy.megatron_cfg.scheduler.lr_warmup_iters", "set `warmup_steps` of the node"),
    ("policy.megatron_cfg.scheduler.lr_decay_*", "set `lr_scheduler` of the node"),
    ("policy.scheduler.*", "set `lr_scheduler` and `warmup_steps` of the node"),
)
"""Settings that the build makes itself, and where each of them is set instead."""

UNSUPPORTED: tuple[tuple[str, str], ...] = (
    ("data_plane.*", "NeMo-RL's data plane"),
    ("on_policy_distillation.*", "distillation from teachers"),
    ("grpo.async_grpo.*", "asynchronous GRPO"),
    ("*.val_*", "validation while training; add an `eval:` node"),
    ("grpo.max_val_samples", "validation while training; add an `eval:` node"),
    ("policy.draft.*", "a draft model"),
    ("policy.dtensor_cfg.lora_cfg.*", "an adapter in a stage that NeMo-RL runs"),
    ("policy.megatron_cfg.peft.*", "an adapter in a stage that NeMo-RL runs"),
    ("policy.dtensor_cfg.custom_parallel_plan", "a parallel plan of one's own"),
    ("policy.quant_*", "quantization-aware training"),
    ("policy.disable_modelopt_layer_spec", "quantization-aware training"),
    ("policy.generation.quant_cfg", "quantization-aware training"),
    ("policy.generation.real_quant*", "quantization-aware training"),
    ("policy.generation.backend", "another generator than vLLM"),
    ("policy.generation.mcore_generation_config.*", "another generator than vLLM"),
    ("policy.generation.vllm_cfg.expose_http_server", "a server beside the training"),
    ("policy.generation.vllm_cfg.http_server_*", "a server beside the training"),
    ("policy.generation.vllm_cfg.*_plugin", "a server beside the training"),
)
"""Settings that would leave the build's ground, and for what they are."""

OF_PAIRS = ("policy.dynamic_batching.*", "policy.sequence_packing.*")
"""What NeMo-RL does only where a sequence stands alone."""

VLLM = "policy.generation.vllm_kwargs."

OF_VLLM = {
    "model": "set `from` of the node",
    "served_model_name": ITSELF,
    "tokenizer": "the tokenizer follows from the node's `from`",
    "load_format": ITSELF,
    "skip_tokenizer_init": ITSELF,
    "tensor_parallel_size": "set `generation_tensor_parallel` in `placement:`",
    "pipeline_parallel_size": OF_PLACE,
    "data_parallel_size": OF_PLACE,
    "enable_expert_parallel": OF_PLACE,
    "gpu_memory_utilization": OF_MEMORY,
    "enable_prefix_caching": "set it in policy.generation.vllm_cfg",
    "enforce_eager": "set it in policy.generation.vllm_cfg",
    "dtype": "set policy.generation.vllm_cfg.precision",
    "seed": ITSELF,
    "max_model_len": OF_LENGTH,
    "enable_sleep_mode": ITSELF,
    "disable_log_stats": ITSELF,
    "logprobs_mode": ITSELF,
    "speculative_config.model": "a model outside of the graph would change results",
}
"""Arguments of vLLM that NeMo-RL gives itself: a second one stops it."""

CODE = re.compile(
    r"_\w+_|auto_map|trust_remote_code|\w+_cls|\w+_plugin|\w+_module_path|"
    r"logits_processors|inductor_passes"
)
"""Names whose values are imported; the first kind are Hydra's own words."""

NAMES: tuple[tuple[str, re.Pattern[str], str], ...] = (
    (
        "policy.optimizer.name",
        re.compile(r"torch\.optim\.\w+"),
        "one of PyTorch's, as torch.optim.AdamW",
    ),
    (f"{VLLM}*backend", re.compile(r"\w+"), "one of vLLM's own, as eager"),
)
"""Names that are imported when written otherwise: keys, what they may be, a hint."""


@cache
def options() -> dict[str, Any]:
    """What envs/nemo-rl-options.json holds."""
    loaded: dict[str, Any] = json.loads(OPTIONS.read_text(encoding="utf-8"))
    return loaded


def nemo_rl() -> str:
    """NeMo-RL with the version that the names are of."""
    return f"NeMo-RL {options()['versions']['nemo-rl']}"


def check_overrides(
    algorithm: str, overrides: Mapping[str, Any]
) -> list[tuple[str, str, str]]:
    """(key, what is wrong, hint) of each override that NeMo-RL could not be given."""
    known: dict[str, str] = options()["algorithms"][algorithm]
    found = []
    for key, value in overrides.items():
        wrong = _wrong(algorithm, known, key, value)
        inner = next((k for k in overrides if k.startswith(f"{key}.")), None)
        if inner and not wrong:
            wrong = f"holds {inner}, which is given too", "keep one of them"
        if wrong:
            found.append((key, *wrong))
    return found


def covers(pattern: str, key: str) -> bool:
    """Whether a pattern is of the key; `section.*` is of the section as well."""
    return fnmatchcase(key, pattern) or fnmatchcase(f"{key}.", pattern)


def _wrong(
    algorithm: str, known: dict[str, str], key: str, value: Any
) -> tuple[str, str] | None:
    section = key.partition(".")[0]
    sections = sorted({k.partition(".")[0] for k in known})
    if not re.fullmatch(r"[\w-]+(\.[\w-]+)*", key) or (
        key == section and section not in sections
    ):
        return "not `section.key`", "for instance policy.precision: float32"
    if section not in sections:
        what = f"{nemo_rl()} has no section {section} for {algorithm}"
        return what, nearest(section, sections)
    for at, inner in _within(key, value):
        if refused := _refused(at, inner):
            return refused
    if algorithm != "grpo" and any(covers(pattern, key) for pattern in OF_PAIRS):
        what = f"{nemo_rl()} neither packs nor sorts the pairs of {algorithm}"
        return what, "remove it"
    return _unfit(known, key, value)


def _within(key: str, value: Any) -> Iterator[tuple[str, Any]]:
    """The key and all that its value holds, by dotted key."""
    yield key, value
    if isinstance(value, Mapping):
        for name, inner in value.items():
            yield from _within(f"{key}.{name}", inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _within(key, inner)


def _refused(key: str, value: Any) -> tuple[str, str] | None:
    """(what is wrong, hint) of what may not be set, whether NeMo-RL knows it or not."""
    if "${" in key or (isinstance(value, str) and "${" in value):
        return "`${` refers to other settings", "write the value itself"
    for part in key.split("."):
        if CODE.fullmatch(part):
            return f"{part} would name code to run", "remove it"
    if not any(covers(pattern, key) for pattern in OPEN):
        for pattern, hint in OWNED:
            if covers(pattern, key):
                return "the build sets it", hint
        for pattern, what in UNSUPPORTED:
            if covers(pattern, key):
                return f"not supported by this build: {what}", "remove it"
    if key.startswith(VLLM) and (hint := OF_VLLM.get(key.removeprefix(VLLM), "")):
        return "the build sets it", hint
    for pattern, allowed, hint in NAMES:
        named = isinstance(value, str) and covers(pattern, key)
        if named and not allowed.fullmatch(value):
            return f"{value!r} would name code to run", hint
    return None


def _unfit(known: dict[str, str], key: str, value: Any) -> tuple[str, str] | None:
    """(what is wrong, hint) of a key or a value that NeMo-RL does not know."""
    below = _below(known, key)
    if below and (key not in known or isinstance(value, Mapping)):
        inner = next(k for k in known if k.startswith(f"{key}."))
        return "a section", f"give its keys one by one, as {inner}"
    if key in known:
        return mistyped(value, known[key])
    parts = key.split(".")
    for length in range(len(parts) - 1, 0, -1):
        above = ".".join(parts[:length])
        if any(one.startswith("dict") for one in BAR.split(known.get(above, ""))):
            return None
        if names := _below(known, above):
            return f"{nemo_rl()} has no {key}", _hint(known, above, names, parts)
    raise AssertionError(key)  # its section is known


def _below(known: dict[str, str], above: str) -> list[str]:
    """The names that come next below a key."""
    start = f"{above}."
    found = (k.removeprefix(start) for k in known if k.startswith(start))
    return list(dict.fromkeys(name.partition(".")[0] for name in found))


def _hint(known: dict[str, str], above: str, names: list[str], parts: list[str]) -> str:
    """The nearest of a section's names, or the same name in another section."""
    guess, _, rest = nearest(parts[above.count(".") + 1], names).partition("? ")
    if rest:
        return f"{guess}?"
    elsewhere = [k for k in known if k.endswith(f".{parts[-1]}")]
    if elsewhere:
        return f"did you mean `{elsewhere[0]}`?"
    return f"see {above} in envs/nemo-rl-options.json"
