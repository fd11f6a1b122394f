"""What Megatron-Bridge can be told, checked where Megatron-Bridge is not installed.

`envs/nvidia-options.json` holds the names and types of its settings; it is written by
`scripts.nvidia.options` in the training environment. What a type's text does not say
plainly passes here, and is checked again when the training starts.
"""

from __future__ import annotations

import ast
import difflib
import json
import re
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path
from typing import Any

from scripts.lib.load import nearest
from scripts.lib.megatron import SHAPE

OPTIONS = Path(__file__).parents[2] / "envs" / "nvidia-options.json"

DECIDED = "the build decides where and when"
PUBLISHED = "what is published is in bfloat16"
OF_PRECISION = "set `precision` of the node"
OF_TOKENIZER = "a node's tokenizer follows from its data"
OF_DATA = "set `data` of the node"

OWNED: tuple[tuple[str, str], ...] = (
    ("train.train_iters", "set `steps` of the node"),
    ("train.train_samples", "set `steps` of the node"),
    ("train.num_epochs", "set `steps` of the node"),
    ("train.skip_train", "remove the node"),
    ("train.global_batch_size", "set `batch_size` of the node"),
    ("train.rampup_batch_size", "set `batch_size` of the node"),
    ("train.step_batch_size_schedule", "set `batch_size` of the node"),
    ("train.micro_batch_size", "set `micro_batch_size` in `placement:`"),
    ("train.exit_*", DECIDED),
    ("validation.skip_train", "remove the node"),
    ("model.seq_length", "set `sequence_length` of the node, or of its pack node"),
    ("dataset.seq_length", "set `sequence_length` of the node, or of its pack node"),
    ("dataset.sequence_length", "set `sequence_length` of the node"),
    ("model.tensor_model_parallel_size", "set `tensor_parallel` in `placement:`"),
    ("model.pipeline_model_parallel_size", "set `pipeline_parallel` in `placement:`"),
    (
        "model.virtual_pipeline_model_parallel_size",
        "set `virtual_pipeline` in `placement:`",
    ),
    ("model.context_parallel_size", "set `context_parallel` in `placement:`"),
    ("model.expert_model_parallel_size", "set `expert_parallel` in `placement:`"),
    (
        "model.expert_tensor_parallel_size",
        "set `expert_tensor_parallel` in `placement:`",
    ),
    ("model.sequence_parallel", "set `sequence_parallel` in `placement:`"),
    ("*.use_distributed_optimizer", "set `distributed_optimizer` in `placement:`"),
    ("optimizer.lr", "set `lr` of the node"),
    ("optimizer.weight_decay", "set `weight_decay` of the node"),
    ("optimizer.clip_grad", "set `max_grad_norm` of the node"),
    ("scheduler.lr_warmup_iters", "set `warmup_steps` of the node"),
    ("scheduler.lr_warmup_samples", "set `warmup_steps` of the node"),
    ("scheduler.lr_warmup_fraction", "set `warmup_steps` of the node"),
    ("scheduler.lr_decay_style", "set `lr_scheduler` of the node"),
    ("rng.seed", "set `seed` of the node"),
    ("dataset.seed", "set `seed` of the node"),
    ("dataset.random_seed", "set `seed` of the node"),
    ("checkpoint.load", DECIDED),
    ("checkpoint.save", DECIDED),
    ("checkpoint.load_*", DECIDED),
    ("checkpoint.save_*", DECIDED),
    ("checkpoint.ckpt_step", DECIDED),
    ("checkpoint.pretrained_checkpoint", "set `from` of the node"),
    ("checkpoint.async_save", DECIDED),
    ("checkpoint.finetune", DECIDED),
    ("checkpoint.non_persistent_*", DECIDED),
    ("checkpoint.most_recent_k", DECIDED),
    ("checkpoint.*hf_*", "add an `export:` node"),
    ("checkpoint.ckpt_format", DECIDED),
    ("checkpoint.ckpt_assume_constant_structure", DECIDED),
    ("checkpoint.custom_manager_class", DECIDED),
    ("dist.use_decentralized_pg", DECIDED),
    ("*.use_megatron_fsdp", DECIDED),
    ("dist.use_torch_fsdp2", DECIDED),
    ("dataset.blend*", OF_DATA),
    ("dataset.data_path", OF_DATA),
    ("dataset.dataset_root", OF_DATA),
    ("dataset.hf_*", OF_DATA),
    ("dataset.dataloader_type", DECIDED),
    ("dataset.path_to_cache", DECIDED),
    ("dataset.object_storage_cache_path", DECIDED),
    ("dataset.per_dataset_sequences_path", OF_DATA),
    ("dataset.dataloader_save", DECIDED),
    ("dataset.dataloader_load", DECIDED),
    ("dataset.enable_offline_packing", "the `pack` node packs"),
    ("dataset.offline_packing_specs", "the `pack` node packs"),
    ("dataset.tokenizer", OF_TOKENIZER),
    ("dataset.context_parallel_size", "set `context_parallel` in `placement:`"),
    ("dataset.data_parallel_size", "it follows from `placement:`"),
    ("dataset.sequence_parallel_size", "it follows from `placement:`"),
    ("tokenizer.*", OF_TOKENIZER),
    ("logger.tensorboard_dir", DECIDED),
    ("logger.wandb_*", DECIDED),
    ("logger.*_dir", DECIDED),
    ("logger.*_path", DECIDED),
    ("logger.save_config_filepath", DECIDED),
    ("logger.log_interval", "set `log_steps` of the node"),
    ("model.vocab_size", "set `vocab_size` in the model's config.json"),
    ("model.*_dtype", OF_PRECISION),
    ("model.bf16", OF_PRECISION),
    ("model.fp16", OF_PRECISION),
    ("model.fp8", OF_PRECISION),
    ("model.fp8_recipe", OF_PRECISION),
    ("model.fp4", OF_PRECISION),
    ("model.fp4_recipe", OF_PRECISION),
    ("optimizer.bf16", OF_PRECISION),
    ("optimizer.fp16", OF_PRECISION),
    ("mixed_precision.params_dtype", OF_PRECISION),
    ("mixed_precision.*_param", PUBLISHED),
    ("mixed_precision.*_param_gather", PUBLISHED),
    ("ddp.*_param_gather", PUBLISHED),
    ("mixed_precision.bf16", OF_PRECISION),
    ("mixed_precision.fp16", OF_PRECISION),
    ("mixed_precision.fp32", OF_PRECISION),
    ("mixed_precision.fp8", OF_PRECISION),
    ("mixed_precision.fp8_recipe", OF_PRECISION),
    ("mixed_precision.fp4", OF_PRECISION),
    ("mixed_precision.fp4_recipe", OF_PRECISION),
    ("peft.dim", "set `peft.rank` of the node"),
    ("peft.alpha", "set `peft.alpha` of the node"),
    ("peft.dropout", "set `peft.dropout` of the node"),
    ("peft.target_modules", "set `peft.target_modules` of the node"),
)
"""Settings that the build makes itself, and where each of them is set instead."""

PLAIN: dict[str, tuple[type, ...]] = {
    "bool": (bool,),
    "int": (int,),
    "float": (float, int),
    "str": (str,),
    "Path": (str,),
    "list": (list,),
    "tuple": (list,),
    "dict": (dict,),
    "None": (type(None),),
}

BAR = re.compile(r" \| (?![^\[]*\])")
"""Between alternatives of a type's text, not between those inside of brackets."""


@cache
def options() -> dict[str, Any]:
    """What envs/nvidia-options.json holds."""
    loaded: dict[str, Any] = json.loads(OPTIONS.read_text(encoding="utf-8"))
    return loaded


def bridge() -> str:
    """Megatron-Bridge with the version that the names are of."""
    return f"Megatron-Bridge {options()['versions']['megatron-bridge']}"


def fits(value: Any, text: str) -> bool:
    """Whether the value can be of the type that the text says; unclear ones can."""
    for one in BAR.split(text):
        name, _, rest = one.partition("[")
        if name == "Literal":
            if any(
                value == choice and type(value) is type(choice)
                for choice in ast.literal_eval(f"[{rest}")
            ):
                return True
        elif name in options()["enums"]:
            if value in options()["enums"][name]:
                return True
        elif name not in PLAIN or _is(value, name):
            return True
    return False


def _is(value: Any, name: str) -> bool:
    """Whether it is of a plain type; Python's bool is an int, a setting's is not."""
    if isinstance(value, bool):
        return name == "bool"
    return isinstance(value, PLAIN[name])


def wanted(text: str) -> str:
    """A type's text as a hint at what to write."""
    names = {"Path": "str", "tuple": "list", "None": "null"}
    choices: list[str] = []
    for one in BAR.split(text):
        name, _, rest = one.partition("[")
        if name == "Literal":
            choices += [str(choice) for choice in ast.literal_eval(f"[{rest}")]
        elif name in options()["enums"]:
            choices += options()["enums"][name]
        else:
            choices.append(names.get(name, name))
    listed = ", ".join(dict.fromkeys(choices))
    return f"one of: {listed}" if len(choices) > 1 else f"give {listed}"


def mistyped(value: Any, text: str) -> tuple[str, str] | None:
    """(what is wrong, hint) where the value cannot be of the type the text says."""
    if fits(value, text):
        return None
    hint = wanted(text)
    if isinstance(value, str) and re.fullmatch(r"[+-]?\d+e[+-]?\d+", value, re.I):
        mantissa, _, exponent = value.lower().partition("e")
        hint = f"without a point it is text to YAML: {mantissa}.0e{exponent}"
    return f"{value!r} is not {text}", hint


def check_overrides(overrides: dict[str, Any]) -> list[tuple[str, str, str]]:
    """(key, what is wrong, hint) of each override that Bridge could not be given."""
    found = ((key, _wrong(key, value)) for key, value in overrides.items())
    return [(key, *wrong) for key, wrong in found if wrong]


def _wrong(key: str, value: Any) -> tuple[str, str] | None:
    sections: dict[str, dict[str, str]] = options()["sections"]
    section, _, field = key.partition(".")
    if key == "mixed_precision":
        return "the build sets it", OF_PRECISION
    if not section or not field:
        return "not `section.key`", "for instance model.recompute_granularity: full"
    if section not in sections:
        return f"{bridge()} has no section {section}", nearest(section, [*sections])
    for pattern, hint in OWNED:
        if fnmatchcase(key, pattern):
            return "the build sets it", hint
    if section == "model" and field in SHAPE:
        return (
            "it is the model's shape",
            "set it in the model's config.json, which is exported with the weights",
        )
    fields = sections[section]
    if field not in fields:
        hint = nearest(field, [*fields])
        guess, _, rest = hint.partition("? ")
        short = f"{guess}?" if rest else f"see {section} in envs/nvidia-options.json"
        return f"{bridge()} has no {key}", short
    return mistyped(value, fields[field])


def check_recipe(name: str) -> tuple[str, str] | None:
    """(what is wrong, hint) where Bridge has no recipe of that name."""
    recipes: list[str] = options()["recipes"]
    if name in recipes:
        return None
    return f"{bridge()} has no recipe {name}", _near(name, recipes)


def check_architecture(config: dict[str, Any]) -> tuple[str, str] | None:
    """(what is wrong, hint) where Bridge cannot convert the model of a config.json."""
    named = config.get("architectures") or []
    known: list[str] = options()["architectures"]
    if not isinstance(named, list) or not named:
        return "names no architecture", "architectures: [NemotronHForCausalLM]"
    if named[0] in known:
        return None
    return f"{bridge()} has no mapping for {named[0]}", _near(str(named[0]), known)


def _near(word: str, words: list[str]) -> str:
    """The nearest of many words: a list of hundreds would hide the message."""
    close = difflib.get_close_matches(word, words, 5, 0.5)
    if not close:
        close = [w for w in words if w[:4].lower() == word[:4].lower()][:5]
    listed = "envs/nvidia-options.json lists all"
    return f"near ones: {', '.join(close)}; {listed}" if close else listed
