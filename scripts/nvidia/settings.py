"""A node's recipe and placement as Megatron-Bridge's ConfigContainer.

The recipe's own keys mean the same as on the other engine. Beyond them `recipe` names
a function of megatron.bridge.recipes to start from, and `overrides` reaches every
field. The order: Bridge's defaults, or its named recipe; the model's definition; the
build's keys; the overrides.
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib.util
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from scripts.lib.errors import RecipeError
from scripts.lib.megatron import SHAPE
from scripts.lib.schema import MegatronRecipe, Peft

if TYPE_CHECKING:
    from megatron.bridge.training.config import ConfigContainer

PRECISIONS = {
    "bf16": "bf16_mixed",
    "fp8_delayed": "bf16_with_fp8_delayed_scaling_mixed",
    "fp8_current": "bf16_with_fp8_current_scaling_mixed",
    "fp8_block": "bf16_with_fp8_subchannel_scaling_mixed",
    "mxfp8": "bf16_with_mxfp8_mixed",
    "nvfp4": "bf16_with_nvfp4_mixed",
}
"""Names in megatron/bridge/training/mixed_precision.py."""

CAPABILITY = {
    "fp8_delayed": (8, 9),
    "fp8_current": (8, 9),
    "fp8_block": (9, 0),
    "mxfp8": (10, 0),
    "nvfp4": (10, 0),
}
"""Compute capability that they need: transformer_engine/pytorch/quantization.py."""

PARALLEL_FIELDS = {
    "tensor_parallel": "tensor_model_parallel_size",
    "pipeline_parallel": "pipeline_model_parallel_size",
    "virtual_pipeline": "virtual_pipeline_model_parallel_size",
    "context_parallel": "context_parallel_size",
    "expert_parallel": "expert_model_parallel_size",
    "expert_tensor_parallel": "expert_tensor_parallel_size",
}
ADAPTED = {"dora": ["linear_qkv", "linear_proj", "linear_fc1", "linear_fc2"]}
ADAPTED |= {"lora": [*ADAPTED["dora"], "in_proj"]}
"""Megatron's names of what adapters adapt: attention, MLP, for LoRA Mamba's in_proj too.

Not its out_proj, which PEFT refuses to load: its fused kernel would pass an adapter by.
Bridge cannot save DoRA's of Mamba (0.6.2: ParallelLinearDoRAAdapter.sharded_state_dict).
"""


def configure(
    recipe: Any,
    *,
    definition: Path,
    tokenizer: Path,
    work: Path,
    placement: Mapping[str, Any],
    save_steps: int,
    parent: Path | None = None,
) -> ConfigContainer:
    """The settings of a training run.

    `definition` is a folder with config.json, `placement` the values of the parallel
    flags, `parent` the Hugging Face folder to start from. The dataset is set by
    `use_blend` or `use_packed`, and then `override` comes last. Raises RecipeError for
    a recipe that is not there and a model that Bridge cannot map.
    """
    from megatron.bridge.recipes import common as recipes
    from megatron.bridge.training.mixed_precision import get_mixed_precision_config

    peft: Peft | None = getattr(recipe, "peft", None)
    model = model_of(definition)
    if recipe.recipe:
        config = named(recipe.recipe, definition)
        take_tuning(model, config.model)
    elif parent is None:
        config = recipes._pretrain_common()
    else:
        config = recipes._peft_common() if peft else recipes._sft_common()
    config.model = model

    place(model, placement)
    config.mixed_precision = get_mixed_precision_config(
        PRECISIONS[recipe.precision or "bf16"]
    )
    # weights that are kept in 8 or 4 bits could not be published as they are
    config.mixed_precision.fp8_param_gather = False
    config.mixed_precision.fp4_param_gather = False
    config.mixed_precision.reuse_grad_buf_for_mxfp8_param_ag = False
    model.pipeline_dtype = config.mixed_precision.params_dtype
    config.train.train_iters = recipe.steps
    config.train.global_batch_size = recipe.batch_size
    config.train.micro_batch_size = placement["micro_batch_size"]
    config.train.exit_signal_handler = True
    config.validation.eval_iters = 0
    config.validation.eval_interval = recipe.steps

    distributed = placement["distributed_optimizer"]
    config.optimizer.use_distributed_optimizer = distributed
    config.ddp.use_distributed_optimizer = distributed
    config.ddp.overlap_param_gather &= distributed
    config.optimizer.lr = recipe.lr
    config.optimizer.min_lr = 0.0
    config.optimizer.clip_grad = recipe.max_grad_norm
    config.optimizer.weight_decay = recipe.weight_decay
    config.optimizer.adam_beta1, config.optimizer.adam_beta2 = 0.9, 0.95
    config.scheduler.start_weight_decay = recipe.weight_decay
    config.scheduler.end_weight_decay = recipe.weight_decay
    style = recipe.lr_scheduler.removesuffix("_with_warmup")
    config.scheduler.lr_decay_style = style
    constant = recipe.lr_scheduler == "constant"  # of Transformers' names, without one
    config.scheduler.lr_warmup_iters = 0 if constant else recipe.warmup_steps
    config.scheduler.lr_decay_iters = recipe.steps
    config.rng.seed = recipe.seed

    config.tokenizer.tokenizer_type = "HuggingFaceTokenizer"
    config.tokenizer.tokenizer_model = str(tokenizer)
    config.tokenizer.use_tokenizer_vocab_size = False  # the model's own decides
    config.logger.log_interval = recipe.log_steps
    config.logger.tensorboard_dir = str(work / "tensorboard")

    saves = str(work / "saves")
    config.checkpoint.save = config.checkpoint.load = saves
    config.checkpoint.save_interval = save_steps
    config.checkpoint.most_recent_k = 2
    config.checkpoint.async_save = False
    # so that a run goes on under other parallel sizes
    config.checkpoint.dist_ckpt_optim_fully_reshardable = distributed
    config.checkpoint.pretrained_checkpoint = str(parent) if parent else None
    config.peft = adapter(peft) if peft else None
    return config


def has_module(name: str) -> bool:
    """Whether a module could be imported; asked without doing so."""
    return importlib.util.find_spec(name) is not None


def has_flash() -> bool:
    """Whether FlashAttention is installed, which alone has fast kernels for packs."""
    return has_module("flash_attn") or has_module("flash_attn_3")


def place(model: Any, placement: Mapping[str, Any]) -> None:
    """Split a model as the parallel flags say, with the kernels that are there."""
    for name, field in PARALLEL_FIELDS.items():
        setattr(model, field, placement[name])
    wished = placement["sequence_parallel"]
    several = placement["tensor_parallel"] > 1
    model.sequence_parallel = several if wished is None else wished
    use_kernels(model)


def use_kernels(model: Any) -> None:
    """Turn off what the installed packages have no kernels for."""
    from megatron.core.transformer.enums import AttnBackend

    if not has_module("fused_weight_gradient_mlp_cuda"):
        model.gradient_accumulation_fusion = False  # it is Apex's
    if not has_flash() and "flash" in str(model.attention_backend):
        model.attention_backend = AttnBackend.auto  # cuDNN's fused kernels


def bridge_of(definition: Path) -> Any:
    """Bridge's two-way mapping of the model that a folder's config.json defines."""
    from megatron.bridge import AutoBridge
    from transformers import AutoConfig

    return AutoBridge.from_hf_config(
        AutoConfig.from_pretrained(definition, trust_remote_code=False)
    )


def model_of(definition: Path) -> Any:
    """The provider of the model that a folder's config.json defines."""
    try:
        return bridge_of(definition).to_megatron_provider(load_weights=False)
    except (ValueError, NotImplementedError) as error:
        first = str(error).strip().splitlines()[0]
        raise RecipeError(
            str(definition / "config.json"),
            f"Megatron-Bridge cannot map it: {first}",
            "choose an architecture that it lists: AutoBridge.list_supported_models()",
        ) from error


def named(name: str, definition: Path) -> ConfigContainer:
    """What a recipe of Megatron-Bridge returns, with this model in place of its own."""
    from megatron.bridge import recipes

    function = getattr(recipes, name, None)
    if not callable(function) or not name.endswith("_config"):
        known = [n for n in dir(recipes) if n.endswith("_config")]
        near = difflib.get_close_matches(name, known, 3)
        raise RecipeError(
            f"recipe {name}",
            "no such recipe",
            f"near to it: {', '.join(near) or 'none'}",
        )
    with models_from(definition):
        return function()


@contextmanager
def models_from(definition: Path) -> Iterator[None]:
    """Have recipes read this definition where they would ask the hub for theirs."""
    from megatron.bridge import AutoBridge

    original = AutoBridge.__dict__["from_hf_pretrained"]

    def local(cls: Any, path: Any, **_: Any) -> Any:
        return bridge_of(definition)

    AutoBridge.from_hf_pretrained = classmethod(local)
    try:
        yield
    finally:
        AutoBridge.from_hf_pretrained = original


def take_tuning(model: Any, source: Any) -> None:
    """Give a model what a recipe changed from Bridge's defaults, but for its shape."""
    left = {*SHAPE, *PARALLEL_FIELDS.values(), "pipeline_model_parallel_layout"}
    ours = {field.name for field in dataclasses.fields(model)}
    for field in dataclasses.fields(source):
        name, value = field.name, getattr(source, field.name, None)
        if name in ours and name not in left and value != default_of(field):
            setattr(model, name, value)


def default_of(field: dataclasses.Field[Any]) -> Any:
    """A dataclass field's default; a new one where a factory makes it."""
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return field.default


def adapter(peft: Peft) -> Any:
    """LoRA or DoRA as Megatron-Bridge knows it."""
    from megatron.bridge.peft.dora import DoRA
    from megatron.bridge.peft.lora import LoRA

    kind = {"lora": LoRA, "dora": DoRA}[peft.method]
    return kind(
        target_modules=peft.target_modules or ADAPTED[peft.method],
        dim=peft.rank,
        alpha=peft.alpha,
        dropout=peft.dropout,
    )


def use_blend(
    config: ConfigContainer, blend: dict[str, Any], data: Path, length: int, work: Path
) -> None:
    """Train on the shards that a blend.json lists, by their weights, all of them.

    Overrides of dataset.split, validation.eval_iters and validation.eval_interval keep
    some for validation.
    """
    from megatron.bridge.training.config import GPTDatasetConfig

    sources = blend["sources"]
    prefixes = [str(data / source["prefix"]) for source in sources]
    weights = [float(source["weight"]) for source in sources]
    seed = config.rng.seed
    if not isinstance(config.dataset, GPTDatasetConfig):
        raise RecipeError("recipe", "is not one that pretrains", "name a pretrain one")
    config.model.seq_length = config.dataset.seq_length = length
    config.dataset.random_seed = seed
    config.dataset.blend = (prefixes, weights)
    config.dataset.blend_per_split = None
    config.dataset.split = "100,0,0"
    config.dataset.path_to_cache = str(work / "index")  # not beside what is published
    config.dataset.num_workers = min(config.dataset.num_workers, 2)


def use_packed(config: ConfigContainer, packed: Path, length: int) -> None:
    """Fine-tune on packed rows; each chat sees itself alone.

    Every token that counts has the same weight, in whichever row it is.
    """
    from megatron.bridge.data.builders.gpt_sft import GPTSFTDatasetConfig
    from megatron.bridge.data.packing.config import PackedSequenceSpecs

    config.model.seq_length = length
    config.model.calculate_per_token_loss = True
    config.ddp.average_in_collective = False
    config.dataset = GPTSFTDatasetConfig(
        seq_length=length,
        seed=config.rng.seed,
        dataset_root=str(packed.parent),
        enable_offline_packing=True,
        offline_packing_specs=PackedSequenceSpecs(
            packed_sequence_size=length,
            packed_train_data_path=str(packed),
            tokenizer_model_name=str(config.tokenizer.tokenizer_model),
        ),
        do_validation=False,
        do_test=False,
        num_workers=2,
        dataset_kwargs={"pad_to_max_length": True},
    )
    if not has_flash():
        from megatron.core.transformer.enums import AttnBackend

        config.model.attention_backend = AttnBackend.unfused  # packed rows need it


def override(config: ConfigContainer, recipe: MegatronRecipe) -> None:
    """Lay the recipe's `overrides` over all else.

    Raises RecipeError for a key that the installed Bridge has not.
    """
    from megatron.bridge.training.comm_overlap import CommOverlapConfig
    from megatron.bridge.training.utils.omegaconf_utils import apply_overrides

    sections = {field.name for field in dataclasses.fields(config)}
    changes: dict[str, dict[str, Any]] = {}
    for key, value in (recipe.overrides or {}).items():
        section, _, name = key.partition(".")
        changes.setdefault(section, {})[name] = value
    for section, values in changes.items():
        if section == "comm_overlap" and config.comm_overlap is None:
            overlap = values.pop("tp_comm_overlap", False)
            config.comm_overlap = CommOverlapConfig(tp_comm_overlap=overlap)
        there = getattr(config, section, None) if section in sections else None
        known = {f.name for f in dataclasses.fields(there)} if there is not None else ()
        for name, value in values.items():
            if name not in known or is_target(value):
                raise RecipeError(
                    f"overrides {section}.{name}",
                    "the installed Megatron-Bridge has no such setting",
                    "envs/nvidia-options.json lists what it has",
                )
    apply_overrides(config, changes, {})
    for section, values in changes.items():
        fields = dataclasses.fields(getattr(config, section))
        kinds = {field.name: type(default_of(field)) for field in fields}
        for name, value in values.items():
            members = getattr(kinds[name], "__members__", {})
            if not isinstance(value, str) or not members:
                continue
            if value not in members:
                raise RecipeError(
                    f"overrides {section}.{name}",
                    f"{value!r} is none of its values",
                    ", ".join(members),
                )
            setattr(getattr(config, section), name, members[value])


def is_target(value: Any) -> bool:
    """Whether a value would have Bridge call something by its name."""
    if isinstance(value, dict):
        named = any(str(key).startswith("_") for key in value)
        return named or any(map(is_target, value.values()))
    return isinstance(value, list) and any(map(is_target, value))
